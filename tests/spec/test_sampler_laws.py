"""What a sampler's settings may be, which of them it reads, and what of them a score's protocol names."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

import configs
from launcher.compose import compose
from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.paths import build_path
from selfguide.diffusion.samplers import COMMON, SAMPLERS, sample, settings
from selfguide.spec.config import PathConfig, SamplerConfig, build
from selfguide.spec.config.laws import identity_of
from selfguide.spec.config.path import read_by_sampling
from selfguide.spec.config.sampler import check_sampler, protocol_settings, settings_read
from selfguide.spec.conventions import guidance_interval, noise_shift, total_weight
from selfguide.spec.records import Protocol
from selfguide.spec.validate import validate
from shards.errors import UserError
from tests.board.fakes import PROTOCOL
from tests.selfguide.exact import ExactGaussian, exact, gaussian

SEEDS = torch.arange(2)
PRESETS = sorted(path.stem for path in (Path(configs.__file__).parent / "sampler").glob("*.yaml"))
READS = {name: tuple(settings_read(SamplerConfig(name=name))) for name in SAMPLERS}  # type: ignore[arg-type]
BAD = [
    # settings, field and value, a word of the cure
    ("sampler.steps=0", "sampler.steps=0", "1 or more"),
    ("sampler=dopri5 sampler.rtol=0", "sampler.rtol=0.0", "positive"),
    ("sampler=dopri5 sampler.atol=nan", "sampler.atol=nan", "positive"),
    ("sampler.shift=0", "sampler.shift=0.0", "positive"),
    ("sampler.shift=inf", "sampler.shift=inf", "positive"),
    ("sampler.g=inf", "sampler.g=inf", "[0.0"),
    ("sampler.interval=[0.5,0.1]", "sampler.interval=[0.5, 0.1]", "swap the two"),
    ("sampler.interval=[0.5,1.1]", "sampler.interval=[0.5, 1.1]", "low <= high <= 1"),
    ("sampler.guided_channels=0", "sampler.guided_channels=0", "null guides all"),
    ("sampler.guided_channels=3", "sampler.guided_channels=3", "1 channels"),
    ("sampler=ddim sampler.eta=1.2", "sampler.eta=1.2", "[0.0, 1.0]"),
    ("sampler=ddim sampler.clip=0", "sampler.clip=0.0", "null for none"),
    ("sampler=heun_edm path=edm sampler.churn=-1", "sampler.churn=-1.0", "[0.0, inf)"),
    ("sampler=heun_edm path=edm sampler.churn_noise=0", "sampler.churn_noise=0.0", "positive"),
    (
        "sampler=heun_edm path=edm sampler.churn_sigma=[2,1]",
        "churn_sigma=[2.0, 1.0]",
        "low <= high",
    ),
    # read by another
    ("sampler.eta=0.5", "sampler.eta=0.5 is read with sampler.name=ddim only", "drop it"),
    ("sampler.rtol=1e-3", "sampler.rtol=0.001 is read with sampler.name=dopri5 only", "drop it"),
    (
        "sampler=dopri5 sampler.churn=1",
        "sampler.churn=1.0 is read with sampler.name=heun only",
        "drop it",
    ),
    (
        "sampler.diffusion=repa",
        "is read with sampler.name=euler_maruyama only",
        "drop it, take that, or set sampler.diffusion=sit",
    ),
    ("sampler=dopri5 sampler.shift=2", "sampler.shift=2.0", "drop it"),
    ("sampler=dopri5 sampler.steps=20", "sampler.steps=20", "sampler.rtol"),
    ("guidance=none sampler.g=1.5", "sampler.g=1.5", "take sampler.g=1"),
    ("guidance=none sampler.g=0", "sampler.g=0.0", "guidance=online, labels or sidecar"),
    # not on this path
    ("path=ddpm sampler.steps=1001", "sampler.steps=1001", "1000 or fewer"),
    ("path=ddpm sampler.steps=501 sampler.shift=2", "sampler.steps=501", "sampler.steps=500 or"),
    ("path=edm sampler.shift=2", "sampler.shift=2.0", "drop it"),
    ("sampler.spacing=leading", "path.name=rectified_flow", "path=ddpm"),
    ("path=edm sampler.spacing=linspace", "sampler.spacing=linspace", "path=ddpm"),
    ("path=vp sampler.spacing=leading", "sampler.spacing=leading", "sampler.spacing=trailing"),
    ("sampler.spacing=log_snr", "sampler.spacing=log_snr", "path=vp"),
    ("path=ddpm sampler.spacing=log_snr", "path.name=ddpm", "sampler.spacing=trailing"),
    ("path=vp sampler.spacing=log_snr sampler.shift=2", "sampler.shift=2.0", "drop one"),
    ("path=vp sampler=dopri5 sampler.spacing=log_snr", "sampler.name=dopri5", "drop one"),
    (
        "path=ddpm sampler=ddim sampler.spacing=leading sampler.steps=300",
        "sampler.steps=300",
        "take sampler.steps=250 or 334",
    ),
    (
        "path=ddpm sampler=ddim sampler.spacing=leading_offset sampler.steps=1000",
        "sampler.steps=1000",
        "sampler.steps=250 or 500",
    ),
    (
        "path=ddpm sampler=ddim sampler.spacing=linspace sampler.steps=1",
        "sampler.steps=1",
        "sampler.steps=2",
    ),
    ("path=ddpm sampler.spacing=leading sampler.shift=2", "sampler.shift=2.0", "drop one"),
    ("path=ddpm sampler=dopri5 sampler.spacing=leading", "sampler.name=dopri5", "drop one"),
    ("path=ddpm sampler=ddim sampler.clipped_noise=kept", "clipped_noise=kept", "sampler.clip"),
    ("sampler=heun_edm sampler.churn=1", "sampler.churn=1.0", "path=edm"),
    ("path=edm sampler=euler_maruyama_repa", "name=euler_maruyama", "sampler.eta=1"),
    ("path=ddpm sampler=euler_maruyama_repa", "name=euler_maruyama", "sampler.eta=1"),
]


@pytest.mark.parametrize(("text", "wrong", "cure"), BAD)
def test_a_law_that_does_not_hold_names_field_value_and_cure(
    text: str, wrong: str, cure: str
) -> None:
    config = compose(["experiment=digits_dit", "cluster=local", *text.split()])
    with pytest.raises(UserError, match=re.escape(wrong)) as caught:
        validate(config)
    assert cure in str(caught.value)


@pytest.mark.parametrize(
    ("text", "cures"),
    [
        ("sampler.spacing=leading", ["sampler.spacing=trailing", "path=ddpm"]),
        ("path=vp sampler=dpm_uvit sampler.spacing=linspace", ["sampler.spacing=trailing"]),
        ("path=edm sampler=heun_edm sampler.spacing=leading_offset", ["sampler.spacing=trailing"]),
        ("sampler=dpm_uvit", ["sampler.spacing=trailing", "path=vp"]),
        ("path=ddpm sampler=dpm_uvit", ["sampler.spacing=trailing", "path=vp"]),
        (
            "path=ddpm sampler=ddim_adm sampler.steps=300",
            ["sampler.steps=250", "sampler.steps=334"],
        ),
    ],
)
def test_what_a_refused_spacing_is_told_to_take_works_as_printed(
    text: str, cures: list[str]
) -> None:
    words = ["experiment=in1k_dit", "cluster=slurm", "nodes=4", *text.split()]
    with pytest.raises(UserError) as caught:
        validate(compose(words))
    for cure in cures:
        key, _, value = cure.partition("=")
        assert key in str(caught.value) and value in str(caught.value)
        others = [word for word in words if not word.startswith(f"{key}=")]
        validate(compose([*others, cure]))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_on_the_path_it_is_for(preset: str) -> None:
    path = "edm" if "edm" in preset else "ddpm" if "ddim_" in preset else "rectified_flow"
    path = "vp" if preset == "dpm_uvit" else path
    config = compose(["experiment=in1k_dit", "cluster=slurm", f"path={path}", f"sampler={preset}"])
    validate(config)


def preset(name: str, path: str) -> SamplerConfig:
    return compose(
        ["experiment=in1k_dit", "cluster=slurm", f"path={path}", f"sampler={name}"]
    ).sampler


LATE, NEARLY = guidance_interval("repa", 0.7), guidance_interval("lightningdit", 0.11)
SHIFT = noise_shift("lightningdit", 0.3)
# preset -> path, network evaluations, and what its paper changes of a plain run; nothing else may differ
PAPERS: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "euler": ("rectified_flow", 50, {}),
    "ddim": ("ddpm", 250, {"name": "ddim", "steps": 250}),
    "ddim_adm": ("ddpm", 250, {"name": "ddim", "steps": 250, "spacing": "leading", "clip": 1.0}),
    "ddim_sgdm": ("ddpm_quad", 250, {
        "name": "ddim", "steps": 250, "spacing": "leading_offset", "clip": 1.0, "clipped_noise": "kept",
        "g": total_weight("sgdm", 2.0),
    }),
    "ddim_dit": ("ddpm", 250, {
        "name": "ddim", "steps": 250, "spacing": "linspace", "g": total_weight("dit", 1.5), "guided_channels": 3,
    }),
    "dpm2": ("vp", 50, {"name": "dpm2", "steps": 25}),
    "dpmpp": ("vp", 20, {"name": "dpmpp", "steps": 20}),
    "dpm_uvit": ("vp", 50, {
        "name": "dpm_fast", "steps": 17, "spacing": "log_snr", "g": total_weight("uvit", 0.4),
    }),
    "dopri5": ("sgfm", None, {"name": "dopri5", "rtol": 1e-5, "atol": 1e-5}),
    "dopri5_sit": ("rectified_flow", None, {
        "name": "dopri5", "rtol": 1e-3, "atol": 1e-6, "guided_channels": 3,
    }),
    "euler_maruyama_sit": ("rectified_flow", 250, {
        "name": "euler_maruyama", "steps": 250, "diffusion": "sit",
        "g": total_weight("sit", 1.5), "guided_channels": 3,
    }),
    "euler_maruyama_repa": ("rectified_flow", 250, {
        "name": "euler_maruyama", "steps": 250, "diffusion": "repa",
        "g": total_weight("repa", 1.8), "interval": LATE,
    }),
    # between linspace(0, 1, 250) lie 249 steps
    "lightning": ("lightning", 249, {
        "steps": 249, "shift": SHIFT, "g": total_weight("lightningdit", 10.0),
        "interval": NEARLY, "guided_channels": 3,
    }),
    "ddae": ("rectified_flow_logit_normal", 250, {
        "steps": 250, "shift": noise_shift("ddae++", 1 / 0.3), "g": total_weight("ddae++", 1.5),
        "interval": guidance_interval("ddae++", 0.89),
    }),
    "heun_edm": ("edm", 35, {"name": "heun", "steps": 18}),
    "heun_edm_64": ("edm", 79, {"name": "heun", "steps": 40}),
    "heun_edm_churn": ("edm", 511, {
        "name": "heun", "steps": 256, "churn": 40.0, "churn_sigma": (0.05, 50.0), "churn_noise": 1.003,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_paper_says(name: str) -> None:
    path, evaluations, said = PAPERS[name]
    found, wanted = asdict(preset(name, path)), asdict(SamplerConfig(**said))
    for field, value in wanted.items():
        if isinstance(value, str) or value is None:
            assert found[field] == value, field
        else:
            assert found[field] == pytest.approx(value, rel=1e-12), field
    if evaluations is not None:
        config = compose(["experiment=in1k_dit", "cluster=slurm", f"path={path}"]).path
        net = ExactGaussian(build_path(config), config.prediction)
        denoiser = Denoiser(net, net.path, Condition.unconditional(2), prediction=config.prediction)
        sample(denoiser=denoiser, noise=gaussian(2), seeds=SEEDS, **settings(preset(name, path)))
        assert denoiser.evaluations == evaluations


def test_the_table_of_settings_is_what_the_samplers_take() -> None:
    assert set(SAMPLERS) == set(get_args(get_type_hints(SamplerConfig)["name"]))
    for name, sampler in SAMPLERS.items():
        taken = inspect.signature(sampler).parameters
        assert tuple(option for option in taken if option not in COMMON) == READS[name], name
    known = {f.name for f in fields(SamplerConfig)}
    assert {setting for reads in READS.values() for setting in reads} <= known


VALUES: dict[str, Any] = {
    "eta": 0.5,
    "clip": 0.4,
    "clipped_noise": "kept",
    "churn": 2.0,
    "churn_sigma": (0.1, 10.0),
    "churn_noise": 1.01,
    "diffusion": "sbdm",  # on rectified flow REPA's is SiT's
    "rtol": 1e-4,
    "atol": 1e-4,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_config_reaches_its_sampler_with_every_setting(name: str) -> None:
    shift = {} if name in ("dopri5", "heun") else {"shift": 2.0}
    config = SamplerConfig(name=name, steps=4, **{s: VALUES[s] for s in READS[name]}, **shift)  # type: ignore[arg-type]
    path = PathConfig(name="edm", prediction="edm") if name == "heun" else PathConfig()
    check_sampler(config, path)

    def made(**call: Any) -> Tensor:
        denoiser = exact("edm" if name == "heun" else "rf", 4)
        return sample(denoiser=denoiser, noise=3 * gaussian(4), seeds=torch.arange(4), **call)

    assert torch.equal(
        made(**settings(config)), made(name=name, steps=4, **settings_read(config), **shift)
    )
    for setting in READS[name]:  # each of them changes the sample
        plain = replace(config, **{setting: getattr(SamplerConfig(), setting)})
        assert not torch.equal(made(**settings(config)), made(**settings(plain))), setting


NAMES = ["rectified_flow", "ddpm", "vp", "ve", "edm"]


@pytest.mark.parametrize("path", NAMES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_validation_allows_exactly_what_the_sampler_can_walk(name: str, path: str) -> None:
    prediction = {"rectified_flow": "v", "edm": "edm"}.get(path, "eps")
    chosen = PathConfig(name=path, prediction=prediction)  # type: ignore[arg-type]
    walked, condition = build_path(chosen), Condition.unconditional(2)
    crowded, spaced = {"steps": 600, "shift": 2.0}, [{"spacing": s} for s in ("leading", "log_snr")]
    for changes in ({}, {"shift": 2.0}, {"churn": 1.0}, {"steps": 1001}, crowded, *spaced):
        if ("churn" in changes and name != "heun") or ("steps" in changes and path != "ddpm"):
            continue
        config = build(SamplerConfig, {"name": name, "steps": 2} | changes)
        net = ExactGaussian(walked, prediction)
        denoiser = Denoiser(net, walked, condition, prediction=prediction)  # type: ignore[arg-type]
        call = settings(config) | {"denoiser": denoiser, "seeds": torch.arange(2)}
        try:
            check_sampler(config, chosen)
        except UserError:
            with pytest.raises(UserError):
                sample(noise=gaussian(2), **call)
        else:
            assert sample(noise=gaussian(2), **call).isfinite().all()


def test_a_protocol_names_what_changes_a_sample_and_only_that() -> None:
    assert (
        protocol_settings(SamplerConfig()) == {} == protocol_settings(SamplerConfig(name="dopri5"))
    )
    assert protocol_settings(SamplerConfig(name="ddim", clip=1.0)) == {"eta": 0.0, "clip": 1.0}
    sgdm = SamplerConfig(name="ddim", clip=1.0, clipped_noise="kept", spacing="leading_offset")
    named = {"eta": 0.0, "clip": 1.0, "clipped_noise": "kept", "spacing": "leading_offset"}
    assert protocol_settings(sgdm) == named
    shifted = SamplerConfig(shift=2.0, guided_channels=3)
    assert protocol_settings(shifted) == {"shift": 2.0}  # g is 1
    assert protocol_settings(replace(shifted, g=2.0)) == {"shift": 2.0, "guided_channels": 3}
    assert protocol_settings(replace(shifted, g=0.0)) == {"shift": 2.0, "guided_channels": 3}


def key(**settings: Any) -> str:
    protocol: Protocol = replace(PROTOCOL, settings=settings)
    return protocol.key


def test_where_vp_sampling_ends_is_part_of_a_protocol_and_of_an_identity_unless_it_is_as_before() -> (
    None
):
    assert read_by_sampling(PathConfig()) == {} == read_by_sampling(PathConfig(name="vp"))
    assert read_by_sampling(PathConfig(name="vp", last=1e-4)) == {"last": 1e-4}
    assert "last" not in identity_of(PathConfig(name="vp"))
    assert identity_of(PathConfig(name="vp", last=1e-4))["last"] == 1e-4


def test_an_interval_parts_columns_where_something_is_guided_in_it() -> None:
    half: Protocol = replace(PROTOCOL, interval=(0.0, 0.5))
    assert PROTOCOL.g == 1 and half.key == PROTOCOL.key
    assert replace(half, g=2.0).key != replace(PROTOCOL, g=2.0).key


def test_settings_part_columns_and_scores_without_any_keep_theirs() -> None:
    assert key() == PROTOCOL.key == "dd50bceed276"  # as before there were settings
    assert len({key(), key(eta=0.0), key(eta=1.0), key(shift=2.0)}) == 4
