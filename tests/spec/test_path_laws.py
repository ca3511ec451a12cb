"""What a user can type wrongly about the path: field, value and cure; and every preset holds."""

import pytest

from launcher.choices import options
from launcher.compose import compose
from selfguide.spec.validate import validate
from shards.errors import UserError

LATENTS = ["experiment=in1k_dit", "cluster=slurm", "nodes=4"]

BAD = [
    # settings, field and value, a word of the cure
    ("path=vp path.prediction=edm", "path.prediction=edm", "eps or x0 or v"),
    ("path.prediction=edm", "path.prediction=edm", "v or eps or x0"),
    ("path=edm path.prediction=v", "path.prediction=v", "edm or x0 or eps"),
    ("path=ve path.prediction=v", "path.prediction=v", "eps or x0 or edm"),
    ("path=edm path.time_density=uniform", "path.time_density=uniform", "log_normal"),
    ("path=edm path.time_density=logit_normal", "path.time_density=logit_normal", "log_normal"),
    ("path.time_density=log_uniform", "path.time_density=log_uniform", "logit_normal"),
    ("path=ddpm path.time_density=log_normal", "path.time_density=log_normal", "uniform"),
    ("path.sigma_min=1", "path.sigma_min=1.0", "1.0)"),
    ("path.sigma_min=-0.1", "path.sigma_min=-0.1", "[0.0"),
    ("path=vp path.sigma_min=1e-4", "path.sigma_min=0.0001", "path.name=rectified_flow"),
    ("path=vp path.betas=scaled_linear", "path.betas=scaled_linear", "path.name=ddpm"),
    ("path=ddpm path.betas=cosin", "path.betas='cosin'", "did you mean 'cosine'"),
    ("path=vp path.least=0.2", "path.least=0.2", "[0.0, 0.1]"),
    ("path=vp path.least=nan", "path.least=nan", "number"),
    ("path=ddpm path.least=0", "path.least=0.0", "path.name=vp"),
    ("path=ddpm path.snr_gamma=3", "path.snr_gamma=3.0", "path.weighting=min_snr"),
    ("path=ddpm_min_snr path.snr_gamma=0", "path.snr_gamma=0.0", "positive"),
    ("path=ddpm_min_snr path.weighting=edm", "path.weighting=edm", "path.weighting=plain"),
    ("path.sigma_data=1", "path.sigma_data=1.0", "path.prediction=edm"),
    ("path=edm path.sigma_data=0", "path.sigma_data=0.0", "positive"),
    ("path=edm path.sigma_data=nan", "path.sigma_data=nan", "positive"),
    ("path=rectified_flow path.time_mean=0.5", "path.time_mean=0.5", "logit_normal"),
    ("path=ve path.time_std=2", "path.time_std=2.0", "log_normal"),
    ("path.time_std=0", "path.time_std=0.0", "positive"),
    ("path.time_mean=inf", "path.time_mean=inf", "number"),
    ("path=lightning path.uniform_after=0", "path.uniform_after=0.0", "between 0 and 1"),
    ("path=lightning path.uniform_after=1", "path.uniform_after=1.0", "between 0 and 1"),
    ("path=sgfm path.uniform_after=0.5", "path.uniform_after=0.5", "logit_normal"),
    ("path=edm path.uniform_after=0.5", "path.uniform_after=0.5", "logit_normal"),
    ("path.cosine=-1", "path.cosine=-1.0", "[0.0"),
    ("path.prediction=eps path.cosine=1", "path.cosine=1.0", "path.prediction=v"),
    ("path=edm path.cosine=1", "path.cosine=1.0", "path.cosine=0"),
    ("path.prediction=x0 path.weighting=edm", "path.weighting=edm", "path.prediction=v"),
    ("path=ve path.weighting=uncertainty", "path.weighting=uncertainty", "path.prediction=edm"),
    (
        "path=edm path.uncertainty=normalised",
        "path.uncertainty=normalised",
        "path.weighting=uncertainty",
    ),
    ("path=edm guidance.noise_time=1", "guidance.noise_time=1.0", "below 1"),
]


@pytest.mark.parametrize(("settings", "names", "cure"), BAD, ids=[row[0] for row in BAD])
def test_a_broken_law_names_field_value_and_cure(settings: str, names: str, cure: str) -> None:
    with pytest.raises(UserError) as raised:
        validate(compose([*LATENTS, *settings.split(" ")]))
    message = str(raised.value)
    assert names in message and cure in message
    assert "\n" not in message


@pytest.mark.parametrize("path", options("path"))
def test_every_preset_holds_on_latents(path: str) -> None:
    validate(compose([*LATENTS, f"path={path}"]))


def test_a_direction_over_one_channel_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"path\.cosine=1\.0 .* the data has one; take path\.cosine=0"
    ):
        validate(compose(["experiment=digits_dit", "cluster=local", "path=lightning"]))


def test_presets_differ_by_what_their_papers_say() -> None:
    def path(name: str):  # type: ignore[no-untyped-def]
        return compose([*LATENTS, f"path={name}"]).path

    assert path("sgfm").sigma_min == 1e-4 and path("lightning").cosine == 1.0
    assert (path("edm").time_mean, path("edm").time_std, path("edm").sigma_data) == (-1.2, 1.2, 0.5)
    assert (path("edm2").time_mean, path("edm2").time_std) == (-0.4, 1.0)
    assert path("edm2").weighting == "uncertainty" and path("edm").weighting == "edm"
    assert path("ddpm_scaled").betas == "scaled_linear" and path("ddpm").betas == "linear"
    assert path("ddpm_quad").betas == "quad"
    assert path("ve").time_density == "log_uniform"
    for name in ("ddpm", "ddpm_quad", "ddpm_scaled", "vp", "ve"):
        assert path(name).prediction == "eps" and path(name).weighting == "plain"
