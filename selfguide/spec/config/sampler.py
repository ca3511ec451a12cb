"""`sampler=`: how samples are drawn, which settings each sampler reads, and which of them a score's protocol names."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from selfguide.spec.config.laws import (
    AtLeast,
    Positive,
    ReadWith,
    Span,
    Within,
    check,
    check_read,
    fields_of,
)
from selfguide.spec.config.path import PathConfig
from selfguide.spec.conventions import DDPM_STEPS
from selfguide.spec.weak import CONDITION, weak_models
from shards.errors import UserError

_HEUN, _DOPRI5, _DDIM = ReadWith("name=heun"), ReadWith("name=dopri5"), ReadWith("name=ddim")

# which of a discrete table's noise levels N steps visit, see `table_entries`; or even steps in the logarithm of sigma
Spacing = Literal["trailing", "leading", "leading_offset", "linspace", "log_snr"]
# paths whose noise level is finite and above 0 at both ends
_LOG_SNR = ("vp", "ve", "edm")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """`g` is the total guidance weight: 1 is no guidance, 0 is unconditional."""

    name: Literal[
        "euler", "heun", "ddim", "dpm1", "dpm2", "dpm_fast", "dpmpp", "euler_maruyama", "dopri5"
    ] = "euler"
    steps: Annotated[int, AtLeast(1)] = 50
    g: Annotated[float, Within(0.0)] = 1.0
    # noise-times in which `g` applies
    interval: Annotated[tuple[float, float], Span()] = (0.0, 1.0)
    # what guidance leads away from, one model or several, as `selfguide.spec.weak` words it; condition is
    # classifier-free guidance
    weak: str = CONDITION
    # only the first so many; 3 is DiT's, SiT's and LightningDiT's
    guided_channels: Annotated[
        int | None, AtLeast(1, "must be {low} or more; null guides all channels")
    ] = None
    # above 1 spends more steps at high noise; LightningDiT's 0.3 is 1 / 0.3 here
    shift: Annotated[float, Positive()] = 1.0
    # path.name=ddpm: trailing begins at the last noise level. leading is guided-diffusion's, linspace DiT's and
    # leading_offset SGDM's and latent diffusion's, which ends one level before data. log_snr is DPM-Solver's on vp, and
    # VE's own
    spacing: Spacing = "trailing"
    # SGFM's tolerances
    rtol: Annotated[float, Positive(), _DOPRI5] = 1e-5
    atol: Annotated[float, Positive(), _DOPRI5] = 1e-5
    # 0 is deterministic, 1 ancestral
    eta: Annotated[float, Within(0.0, 1.0), _DDIM] = 0.0
    # data stays within +-clip; 1 for pixels, never for latents
    clip: Annotated[
        float | None, Positive("must be a positive number, or null for none"), _DDIM
    ] = None
    # noise beside a clipped estimate: reread off it (guided-diffusion, DDAE), or kept as the network said it (SGDM)
    clipped_noise: Annotated[Literal["reread", "kept"], _DDIM] = "reread"
    # EDM's S_churn, with its span of sigmas and its noise scale
    churn: Annotated[float, Within(0.0), _HEUN] = 0.0
    churn_sigma: Annotated[tuple[float, float], Span("noise levels", math.inf), _HEUN] = (0.0, 1e9)
    churn_noise: Annotated[float, Positive(), _HEUN] = 1.0
    # whose diffusion coefficient the SDE has
    diffusion: Annotated[Literal["sit", "repa", "sbdm"], ReadWith("name=euler_maruyama")] = "sit"


def settings_read(config: SamplerConfig) -> dict[str, Any]:
    """The settings that this sampler alone reads, by name."""
    readers = ((each.name, each.law(ReadWith)) for each in fields_of(SamplerConfig))
    return {name: getattr(config, name) for name, law in readers if law and law.holds(config)}


def protocol_settings(config: SamplerConfig) -> dict[str, Any]:
    """What changes a sample beyond name, steps, tolerance, g and interval; empty where nothing does.

    Nothing is guided at g = 1, and so neither the weak model nor guided_channels change anything there.
    """
    # fields that came later leave no trace at what they were before, so that a protocol keeps its key
    settings = {
        k: v
        for k, v in settings_read(config).items()
        if k not in ("rtol", "atol") and (k, v) != ("clipped_noise", "reread")
    }
    if config.spacing != "trailing":
        settings["spacing"] = config.spacing
    if config.shift != 1:
        settings["shift"] = config.shift
    if config.guided_channels is not None and config.g != 1:
        settings["guided_channels"] = config.guided_channels
    if config.weak != CONDITION and config.g != 1:
        settings["weak"] = config.weak
    return settings


def plain_sampler(config: SamplerConfig) -> dict[str, Any]:
    """All settings by name, as hashes hold them: a field that came later leaves no trace at what it was before."""
    values = asdict(config)
    if config.weak == CONDITION:
        del values["weak"]
    return values


def most_steps(shift: float) -> int:
    """The most steps that `shift` keeps apart on a table of DDPM_STEPS: its least slope is k or 1 / k."""
    return max(1, math.floor(DDPM_STEPS * min(shift, 1 / shift)))


def table_entries(steps: int, spacing: Spacing) -> list[int]:
    """Returns the entries of a table of noise levels 1 to DDPM_STEPS that N steps visit, falling, and where they end.

    Trailing is the path's own grid, and not here. For N = 250:
    leading          1 + k stride: 997, 993, ... 1, 0 (Dhariwal & Nichol 2021, their code's `ddimN`)
    leading_offset   2 + k stride: 998, 994, ... 2, and an end at entry 1 (Rombach et al. 2022; Hu et al. 2023, SGDM)
    linspace         both ends: 1000, 996, ... 5, 1, 0 (Nichol & Dhariwal 2021; Peebles & Xie 2023, DiT)

    Raises:
        UserError: no whole stride makes so many steps; names numbers of steps near it that do.
    """
    if spacing == "linspace" and steps > 1:
        last = DDPM_STEPS - 1
        return [1 + round(i * last / (steps - 1)) for i in reversed(range(steps))] + [0]
    first = 2 if spacing == "leading_offset" else 1
    made: dict[int, list[int]] = {}
    for stride in range(1, DDPM_STEPS + 1):
        entries = list(range(first, DDPM_STEPS + first, stride))
        if spacing != "linspace" and entries[-1] <= DDPM_STEPS:
            made.setdefault(len(entries), [*reversed(entries), first - 1])
    if steps not in made:
        near = sorted(sorted(made or [2], key=lambda count: abs(count - steps))[:2])
        raise UserError(
            f"sampler.steps={steps} with sampler.spacing={spacing} is no even stride through {DDPM_STEPS} noise "
            f"levels; take sampler.steps={' or '.join(map(str, near))}"
        )
    return made[steps]


def check_sampler(config: SamplerConfig, path: PathConfig) -> None:
    """The laws of a sampler's settings, and those between it and the path.

    Raises:
        UserError: names the field, its value and the cure.
    """
    check(config, "sampler")
    check_read(config, "sampler")
    routed = any(weak.kind == "routed" for weak in weak_models(config.weak))
    if config.name == "dopri5" and routed and config.g != 1:
        raise UserError(
            f"sampler.weak={config.weak} leaves out other tokens at each noise-time, so that dopri5, which steps until "
            "it sees no change, takes ever smaller steps; take sampler=heun, or another weak model"
        )
    sigmas = path.name in ("ve", "edm")
    if config.clip is None and config.clipped_noise != "reread":
        raise UserError(
            f"sampler.clipped_noise={config.clipped_noise} needs a sampler.clip; set one or drop it"
        )
    if config.name == "dopri5" and config.shift != 1:
        raise UserError(
            f"sampler.shift={config.shift} moves a grid of steps, and dopri5 chooses its own; drop it"
        )
    if path.name == "ddpm" and config.steps > DDPM_STEPS:
        raise UserError(
            f"sampler.steps={config.steps} is more than the {DDPM_STEPS} noise levels of path.name=ddpm; "
            f"take {DDPM_STEPS} or fewer"
        )
    if path.name == "ddpm" and config.shift != 1 and config.steps > most_steps(config.shift):
        raise UserError(
            f"sampler.steps={config.steps} with sampler.shift={config.shift} would stand still on the {DDPM_STEPS} "
            f"noise levels of path.name=ddpm; take sampler.steps={most_steps(config.shift)} or fewer, or a shift "
            "nearer 1"
        )
    if config.spacing != "trailing":
        _check_spacing(config, path)
    if sigmas and config.shift != 1:
        raise UserError(
            f"sampler.shift={config.shift} moves noise-times, and path.name={path.name} has a grid of "
            "noise levels of its own; drop it"
        )
    if config.churn and not sigmas:
        raise UserError(
            f"sampler.churn={config.churn} adds noise at a noise level, which path.name={path.name} does not step "
            "in; take path=edm, or sampler.name=ddim with sampler.eta=1"
        )
    if config.name == "euler_maruyama" and path.name not in ("rectified_flow", "vp"):
        # of a preset more than the name stays
        other = "sampler.name=ddim" if config.diffusion == "sit" else "sampler=ddim"
        raise UserError(
            f"sampler.name=euler_maruyama steps in noise-time, which path.name={path.name} does not take evenly; "
            f"take {other} with sampler.eta=1"
        )


def _check_spacing(config: SamplerConfig, path: PathConfig) -> None:
    """Raises UserError where the path or the sampler has no such grid."""
    if config.spacing == "log_snr":
        if path.name not in _LOG_SNR:
            raise UserError(
                f"sampler.spacing=log_snr steps evenly between finite noise levels, and path.name={path.name} has none "
                "at an end, or a table of its own; take sampler.spacing=trailing, or path=vp"
            )
    elif path.name != "ddpm":
        raise UserError(
            f"sampler.spacing={config.spacing} chooses among discrete noise levels, which path.name={path.name} does "
            "not have; take sampler.spacing=trailing, or path=ddpm"
        )
    if config.name in ("dopri5", "euler_maruyama") or config.shift != 1:
        what = f"shift={config.shift}" if config.shift != 1 else f"name={config.name}"
        raise UserError(f"sampler.spacing={config.spacing} is no grid for sampler.{what}; drop one")
    if config.spacing != "log_snr":
        table_entries(config.steps, config.spacing)
