"""Which of its settings a sampler reads, torch-free: what validation refuses and what a score's protocol names."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import Any

from selfguide.spec.config import PathConfig, SamplerConfig
from selfguide.spec.conventions import DDPM_STEPS
from shards.errors import UserError

READS: dict[str, tuple[str, ...]] = {
    "euler": (),
    "heun": ("churn", "churn_sigma", "churn_noise"),
    "ddim": ("eta", "clip"),
    "dpm1": (),
    "dpm2": (),
    "dpmpp": (),
    "euler_maruyama": ("diffusion",),
    "dopri5": ("rtol", "atol"),
}


def read(config: SamplerConfig) -> dict[str, Any]:
    """The settings that this sampler alone reads, by name."""
    return {name: getattr(config, name) for name in READS[config.name]}


def told_apart(config: SamplerConfig) -> dict[str, Any]:
    """What changes a sample beyond name, steps, tolerance, g and interval; empty where nothing does.

    Nothing is guided at g = 1, and so guided_channels change nothing there.
    """
    settings = {k: v for k, v in read(config).items() if k not in ("rtol", "atol")}
    if config.shift != 1:
        settings["shift"] = config.shift
    if config.guided_channels is not None and config.g != 1:
        settings["guided_channels"] = config.guided_channels
    return settings


def most_steps(shift: float) -> int:
    """The most steps that `shift` keeps apart on a table of DDPM_STEPS: its least slope is k or 1 / k."""
    return max(1, math.floor(DDPM_STEPS * min(shift, 1 / shift)))


def validate_sampler(config: SamplerConfig, path: PathConfig) -> None:
    """The laws of a sampler's settings, and those between it and the path.

    Raises:
        UserError: names the field, its value and the cure.
    """
    _values(config)
    _on_path(config, path)


def _values(config: SamplerConfig) -> None:
    _law(config.steps >= 1, "steps", config.steps, "is too small; take 1 or more")
    for field in ("rtol", "atol", "shift", "churn_noise"):
        value = getattr(config, field)
        _law(math.isfinite(value) and value > 0, field, value, "must be a positive number")
    _law(0 <= config.g < math.inf, "g", config.g, "must be a number in [0.0, inf)")
    low, high = config.interval
    law = "is a span of noise-times: take two numbers with 0 <= low <= high <= 1"
    _law(0 <= low <= high <= 1, "interval", list(config.interval), law)
    guided = config.guided_channels
    law = "must be 1 or more; null guides all channels"
    _law(guided is None or guided >= 1, "guided_channels", guided, law)
    _law(0 <= config.eta <= 1, "eta", config.eta, "must be a number in [0.0, 1.0]")
    law = "must be a positive number, or null for none"
    _law(config.clip is None or 0 < config.clip < math.inf, "clip", config.clip, law)
    _law(0 <= config.churn < math.inf, "churn", config.churn, "must be a number in [0.0, inf)")
    low, high = config.churn_sigma
    law = "is a span of noise levels: take two numbers with 0 <= low <= high"
    _law(0 <= low <= high, "churn_sigma", list(config.churn_sigma), law)


def refuse_unread(config: SamplerConfig) -> None:
    """A setting that the sampler would ignore was surely meant for another: a UserError that names both."""
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    owners = {name: owner for owner, names in READS.items() for name in names}
    for name, owner in owners.items():
        value = getattr(config, name)
        if owner != config.name and value != defaults[name]:
            raise UserError(
                f"sampler.{name}={value} is read by sampler.name={owner} and not by {config.name}; "
                "drop it or change the sampler"
            )


def _on_path(config: SamplerConfig, path: PathConfig) -> None:
    sigmas = path.name in ("ve", "edm")
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
        raise UserError(
            f"sampler.name=euler_maruyama steps in noise-time, which path.name={path.name} does not take evenly; "
            "take sampler.name=ddim with sampler.eta=1"
        )


def _law(holds: bool, field: str, value: Any, law: str) -> None:
    if not holds:
        raise UserError(f"sampler.{field}={value} {law}")
