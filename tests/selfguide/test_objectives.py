"""Objectives: weightings against what they weigh, densities against scipy, and a run with them."""

import math
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path as Folder
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from launcher.compose import compose
from selfguide import snapshot
from selfguide.data.normaliser import Normaliser
from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.objectives import Uncertainty, build_objective, sample_times
from selfguide.diffusion.paths import VarianceExploding, build_path
from selfguide.diffusion.preconditioning import build_preconditioning
from selfguide.distributed import RankInfo
from selfguide.guidance.prototypes import extract
from selfguide.networks.student import Student, build_student
from selfguide.spec.config import Config, NoGuidance, PathConfig, Prediction
from selfguide.spec.sizes import footprint
from selfguide.spec.validate import validate
from selfguide.training.components import Components
from selfguide.training.work import Training, prepare_batch
from shards.errors import UserError
from shards.format.header import Header
from tests.selfguide.test_online import online_config
from tests.selfguide.test_preconditioning import (
    FORMS,
    NAMES,
    deviations,
    edm,
    every_form,
    images,
    inner,
    made,
)
from tests.selfguide.test_training import IMAGES, attempt
from tests.selfguide.test_training import config as training_config

EDM2 = PathConfig(
    name="edm", prediction="edm", weighting="uncertainty", time_density="log_normal",
    time_mean=-0.4, time_std=1.0,
)  # fmt: skip


# weightings


@pytest.mark.parametrize(("name", "prediction"), [f for f in FORMS if f[1] != "edm"])
def test_plain_is_the_mean_over_elements(name: str, prediction: str) -> None:
    config, (x0, eps) = made(name, prediction), images(5)
    tau = inner(name, torch.linspace(0, 1, 5))
    output = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    found = build_objective(config).losses(output, x0, eps, tau)
    _, _, da, db = build_path(config).coefficients(tau)
    for i in range(5):
        target = {"x0": x0[i], "eps": eps[i], "v": da[i] * x0[i] + db[i] * eps[i]}[prediction]
        assert found[i].item() == pytest.approx((output[i] - target).square().mean().item(), 1e-4)
    assert found.shape == (5,) and found.dtype == torch.float32


@every_form
@given(share=st.floats(0, 1), sd=deviations, seed=st.integers(0, 100))
def test_edm_weighting_weighs_the_error_of_the_data(
    name: str, prediction: str, share: float, sd: float, seed: int
) -> None:
    objective = build_objective(made(name, prediction, sigma_data=sd, weighting="edm"))
    form, (x0, eps) = objective.preconditioning, images(1, seed=seed)
    tau = inner(name, torch.tensor([share], dtype=torch.float64))
    output = form.target(x0, eps, tau) + torch.randn_like(x0)
    x, sigma = form.path.interpolate(x0, eps, tau), form.path.sigma(tau)
    guess = form.estimate(output, x, tau).x0
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    expected = (weight * (guess - x0).square().mean()).float()
    # fp32 rounds targets of v on VE and EDM, which are in the thousands
    torch.testing.assert_close(objective.losses(output, x0, eps, tau), expected, rtol=5e-3, atol=0)


def test_bf16_predictions_are_compared_in_fp32() -> None:
    x0, eps = images(2)
    tau = torch.tensor([0.2, 0.8])
    target = build_preconditioning(PathConfig()).target(x0, eps, tau)
    output = target.bfloat16()
    found = build_objective(PathConfig()).losses(output, x0, eps, tau)
    assert found.dtype == torch.float32 and (found > 0).all() and (found < 1e-4).all()


@given(u=st.floats(-3, 3), seed=st.integers(0, 100))
def test_uncertainty_is_least_where_it_equals_the_weighted_error(u: float, seed: int) -> None:
    x0, eps = images(4, seed=seed)
    tau = inner("edm", torch.linspace(0, 1, 4))
    output = torch.randn_like(x0)
    weighted = build_objective(replace(EDM2, weighting="edm")).losses(output, x0, eps, tau)
    objective = build_objective(EDM2)
    log_variance = torch.full((4,), u, requires_grad=True)
    found = objective.losses(output, x0, eps, tau, log_variance)
    torch.testing.assert_close(found, weighted / math.exp(u) + u)
    best = weighted.log().requires_grad_()
    (slope,) = torch.autograd.grad(objective.losses(output, x0, eps, tau, best).sum(), best)
    torch.testing.assert_close(slope, torch.zeros(4), atol=1e-5, rtol=0)


def test_uncertainty_without_its_u_is_an_error() -> None:
    x0, eps = images(1)
    with pytest.raises(ValueError, match="log_variance"):
        build_objective(EDM2).losses(x0, x0, eps, torch.tensor([0.5]))


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_cosine_term_compares_directions_over_channels(weight: float) -> None:
    x0, eps = (each.float() for each in images(3, channels=4))
    tau, output = torch.tensor([0.1, 0.5, 0.9]), torch.randn(3, 4, 4, 4)
    plain = build_objective(PathConfig()).losses(output, x0, eps, tau)
    found = build_objective(PathConfig(cosine=weight)).losses(output, x0, eps, tau)
    for i in range(3):
        term, target = 0.0, eps[i] - x0[i]
        for row, column in product(range(4), range(4)):
            p, t = output[i, :, row, column], target[:, row, column]
            term += (1 - (p @ t / (p.norm() * t.norm())).item()) / 16
        assert found[i].item() == pytest.approx(plain[i].item() + weight * term, rel=1e-4)


# the uncertainty of a noise level


def test_uncertainty_reads_fourier_features_of_the_noise_level() -> None:
    module = Uncertainty(VarianceExploding())
    nn.init.normal_(module.linear.weight)
    nn.init.constant_(module.linear.bias, 0.3)
    sigma = torch.tensor([0.01, 0.5, 20.0])
    found = module(sigma / (1 + sigma))
    for i in range(3):
        angles = module.frequencies * (math.log(sigma[i].item()) / 4) + module.phases
        waves = math.sqrt(2) * torch.cos(angles)
        assert found[i].item() == pytest.approx(
            (module.linear.weight[0] @ waves).item() + 0.3, 1e-3
        )
    assert module.frequencies.std().item() == pytest.approx(2 * math.pi, rel=0.3)
    assert {n for n, _ in module.named_parameters()} == {"linear.weight", "linear.bias"}
    assert {"frequencies", "phases"} <= module.state_dict().keys()


def test_a_normalised_uncertainty_is_edm2s() -> None:
    """Their MPFourier and MPConv: features of unit mean square, a row of unit length, no bias."""
    torch.manual_seed(0)
    module = Uncertainty(VarianceExploding(), normalised=True)
    assert {n for n, _ in module.named_parameters()} == {"linear.weight"}
    assert module.linear.weight.std().item() == pytest.approx(1, rel=0.3)
    sigma = torch.tensor([0.01, 0.5, 20.0])
    for scale in (1.0, 40.0):  # of the row; only its direction counts
        nn.init.normal_(module.linear.weight, std=scale)
        row = module.linear.weight[0].double()
        unit = row / (1e-4 + row.norm() / math.sqrt(128)) / math.sqrt(128)
        found = module(sigma / (1 + sigma))
        for i in range(3):
            angles = module.frequencies * (math.log(sigma[i].item()) / 4) + module.phases
            waves = math.sqrt(2) * torch.cos(angles.double())
            assert found[i].item() == pytest.approx((unit @ waves).item(), abs=1e-3)


def test_uncertainty_is_finite_on_the_whole_path_and_fp32_in_bf16() -> None:
    for name in NAMES:
        module = Uncertainty(build_path(made(name, "eps"))).bfloat16()
        nn.init.normal_(module.linear.weight)
        tau = torch.tensor(
            [0.0, 1e-7, 0.5, 1 - 2.0**-24, 1.0 if name not in ("ve", "edm") else 0.99]
        )
        found = module(tau)
        assert found.dtype == torch.float32 and torch.isfinite(found).all()


def student_of(path: PathConfig, online: bool = True) -> tuple[Config, Student]:
    config = replace(online_config(), path=path)
    if not online:
        config = replace(config, guidance=NoGuidance())
    student = build_student(config, 0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    return config, student


@pytest.mark.parametrize("uncertainty", ["affine", "normalised"])
@pytest.mark.parametrize("online", [True, False])
def test_the_uncertainty_trains_in_the_student_and_never_samples(
    online: bool, uncertainty: str
) -> None:
    config, student = student_of(replace(EDM2, uncertainty=uncertainty), online)
    x0, eps = (each.float() for each in torch.randn(2, 4, 1, 8, 8))
    tau, condition = torch.tensor([0.1, 0.4, 0.6, 0.9]), Condition.unconditional(4)
    features = torch.randn(4, 1024) if online else None
    objective = build_objective(config.path)
    x = objective.preconditioning.noised(x0, eps, tau)
    outputs = student(x, tau, condition, features)
    objective.losses(outputs.prediction, x0, eps, tau, outputs.log_variance).mean().backward()
    assert student.uncertainty is not None
    assert all(p.grad is not None and p.grad.any() for p in student.uncertainty.parameters())
    before = student.predict(x, tau, condition)
    nn.init.normal_(student.uncertainty.linear.weight)
    assert torch.equal(student.predict(x, tau, condition), before)
    assert footprint(config).parameters == sum(p.numel() for p in student.parameters())


def test_the_uncertainty_changes_no_other_weight_at_initialisation() -> None:
    with_u = build_student(replace(online_config(), path=EDM2), 3).state_dict()
    without = build_student(online_config(), 3).state_dict()
    assert {n for n in with_u.keys() - without.keys() if not n.startswith("uncertainty.")} == set()
    assert all(torch.equal(with_u[name], tensor) for name, tensor in without.items())
    again = build_student(replace(online_config(), path=EDM2), 3).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in with_u.items())


def test_features_are_extracted_from_what_the_network_reads() -> None:
    config, student = student_of(EDM2)
    x0, eps = torch.randn(2, 4, 1, 8, 8)
    assert config.guidance.source == "online"
    found = extract(student, edm(), config.guidance.noise_time, x0, eps)
    sigma, tau = 0.25, torch.full((4,), 0.2)
    read = (x0 + sigma * eps) / math.sqrt(sigma**2 + 0.5**2)
    condition = Condition.unconditional(4)
    torch.testing.assert_close(found, student.features(read, tau, condition), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, student.features(x0 + sigma * eps, tau, condition), atol=1e-2)


# time densities

MANY = torch.arange(20_000)


def drawn(share: float = 0.0, positions: Tensor = MANY, seed: int = 0, **settings: Any) -> Tensor:
    config = PathConfig(**settings)
    return sample_times(config, build_path(config), seed, positions, share)


def sigma_of(tau: Tensor) -> Any:
    tau = tau.double()
    return (tau / (1 - tau)).numpy()


def fits(values: Any, distribution: Any) -> None:
    """Kolmogorov-Smirnov, at a level that a fixed seed either passes or not."""
    assert stats.kstest(values, distribution.cdf).pvalue > 1e-3


def test_times_have_their_densities() -> None:
    fits(drawn().numpy(), stats.uniform())
    fits(drawn(name="vp", prediction="eps").numpy(), stats.uniform(1e-5, 1 - 1e-5))
    ends = build_path(PathConfig(name="vp")).training_time(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([1e-5, 1.0]), rtol=1e-6, atol=0)
    logits = torch.logit(drawn(time_density="logit_normal", time_mean=0.5, time_std=0.8).double())
    fits(logits.numpy(), stats.norm(0.5, 0.8))
    normal = {"name": "edm", "prediction": "edm", "time_density": "log_normal"}
    fits(
        sigma_of(drawn(**normal, time_mean=-1.2, time_std=1.2)),
        stats.lognorm(1.2, scale=math.exp(-1.2)),
    )
    flat = {"name": "ve", "prediction": "eps", "time_density": "log_uniform"}
    fits(sigma_of(drawn(**flat)), stats.loguniform(0.02, 100))


def test_ddpm_draws_every_entry_of_its_table_alike() -> None:
    entries = drawn(name="ddpm", prediction="eps", positions=torch.arange(200_000)).double() * 1000
    torch.testing.assert_close(entries, entries.round(), atol=1e-4, rtol=0)
    counts = torch.bincount(entries.round().long(), minlength=1001)
    assert counts[0] == 0 and len(counts) == 1001
    assert stats.chisquare(counts[1:].numpy()).pvalue > 1e-3
    late = drawn(name="ddpm", prediction="eps", time_density="logit_normal").double() * 1000
    torch.testing.assert_close(late, late.round(), atol=1e-4, rtol=0)


def test_times_of_runs_that_were_begun_stay_what_they_were() -> None:
    """Frozen: a change here would change every run that resumes."""
    positions = torch.tensor([0, 1, 128, 5_000_000_000])
    plain = drawn(seed=7, positions=positions)
    torch.testing.assert_close(plain, torch.tensor([0.0576722, 0.8886078, 0.1162241, 0.6974539]))
    normal = drawn(
        seed=7, positions=positions, time_density="logit_normal", time_mean=0.5, time_std=0.8
    )
    torch.testing.assert_close(normal, torch.tensor([0.8339459, 0.5594088, 0.5886325, 0.7456456]))


@pytest.mark.parametrize("name", ["rectified_flow", "vp", "ddpm"])
def test_times_turn_uniform_at_their_share_of_training(name: str) -> None:
    base = {"name": name, "prediction": "eps"}
    turning = base | {"time_density": "logit_normal", "uniform_after": 0.6}
    before, after = drawn(share=0.599, **turning), drawn(share=0.6, **turning)
    assert torch.equal(before, drawn(**base, time_density="logit_normal"))
    assert torch.equal(after, drawn(**base))
    assert torch.equal(after, drawn(share=1.0, **turning))


@given(first=st.integers(0, 10_000), count=st.integers(1, 50))
def test_a_time_belongs_to_its_image(first: int, count: int) -> None:
    for density in ("uniform", "logit_normal"):
        part = drawn(positions=torch.arange(first, first + count), time_density=density)
        whole = drawn(positions=torch.arange(10_050), time_density=density)
        # vectorised logarithms round the last bit by where in the batch an image stands
        torch.testing.assert_close(part, whole[first : first + count], atol=2e-7, rtol=2e-6)


def test_no_time_is_all_noise_where_that_has_no_level() -> None:
    assert drawn(time_density="logit_normal", time_mean=40.0).max().item() < 1
    far = drawn(name="edm", prediction="edm", time_density="log_normal", time_mean=40.0)
    assert torch.isfinite(build_path(PathConfig(name="edm")).sigma(far)).all()


# what validation lets through can be trained


def combinations() -> list[PathConfig]:
    """Every path, prediction, weighting and density that validation accepts, on four-channel latents."""
    base = compose(["experiment=in1k_dit", "cluster=slurm", "nodes=4"])
    weightings = ("plain", "edm", "uncertainty", "min_snr")
    densities = ("uniform", "logit_normal", "log_normal", "log_uniform")
    accepted = []
    for name, prediction, weighting, density, after in product(
        NAMES, get_args(Prediction), weightings, densities, (None, 0.5)
    ):
        path = made(
            name, prediction, weighting=weighting, time_density=density, uniform_after=after
        )
        try:
            validate(replace(base, path=path))
        except UserError:
            continue
        accepted.append(path)
    return accepted


def test_whatever_is_accepted_has_finite_inputs_and_a_loss_of_sane_size() -> None:
    accepted = combinations()
    assert {(p.name, p.prediction) for p in accepted} >= {
        ("rectified_flow", "v"), ("ddpm", "eps"), ("vp", "eps"), ("ve", "eps"), ("edm", "edm"),
    }  # fmt: skip
    count = len(MANY)
    x0, eps = torch.randn(2, count, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    for config in accepted:
        objective = build_objective(config)
        for share in (0.0, 1.0):
            tau = sample_times(config, objective.preconditioning.path, 0, MANY, share)
            assert torch.isfinite(objective.preconditioning.noised(x0, eps, tau)).all(), config
            losses = objective.losses(torch.zeros_like(x0), x0, eps, tau, torch.zeros(count))
            assert torch.isfinite(losses).all(), config
            assert losses.mean() < 5 and losses.max() < 2000, config


def test_a_batch_holds_what_the_network_reads_at_the_times_of_its_clock() -> None:
    turning = PathConfig(time_density="logit_normal", uniform_after=0.5)
    for path, seen in ((EDM2, 0), (turning, 0), (turning, 512)):
        config = replace(online_config(), path=path)
        job = Training(
            config=config, rank_info=RankInfo(0, 0, 1), state=SimpleNamespace(images=seen, components=Components()),  # type: ignore[arg-type]
            stream=iter(()), objective=build_objective(path), normaliser=Normaliser.of(Header(kind="image")),
            data={}, telemetry=None, lease=None,  # type: ignore[arg-type]
        )  # fmt: skip
        arrays = {
            "position": np.arange(64),
            "ordinal": np.arange(64)[::-1].copy(),
            "x": np.random.default_rng(0).normal(size=(64, 1, 8, 8)),
        }
        batch = prepare_batch(job, arrays)
        assert torch.equal(
            batch.tau, drawn(seen / 1024, torch.arange(64), config.seed, **asdict(path))
        )
        t = batch.tau.view(-1, 1, 1, 1)
        if path is EDM2:
            sigma = t / (1 - t)
            read = (batch.x0 + sigma * batch.eps) / (sigma**2 + 0.5**2).sqrt()
        else:
            read = (1 - t) * batch.x0 + t * batch.eps
        torch.testing.assert_close(batch.x, read, rtol=1e-4, atol=1e-5)
        assert batch.ordinal.tolist() == list(range(63, -1, -1))


def test_a_run_with_edm2s_objective_trains_and_its_snapshot_loads(
    ranks: Any, digits: Folder, tmp_path: Folder
) -> None:
    config = replace(training_config(digits, "deepspeed"), path=EDM2)
    ranks(1, attempt, config, str(tmp_path / "run"))
    loaded = snapshot.load(tmp_path / "run" / "snapshots" / f"img-{IMAGES:09d}")
    module = loaded.student.uncertainty
    assert module is not None and module.linear.weight.any()
    fresh = build_student(config, config.seed).uncertainty
    assert fresh is not None and torch.equal(module.frequencies, fresh.frequencies)
