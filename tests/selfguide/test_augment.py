"""Non-leaky augmentation: each operation, the labels, training with them, and that samples show none of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from selfguide.data.batch import Batch, joined
from selfguide.diffusion.conditions import UNCONDITIONAL, Condition
from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.objectives import build_objective
from selfguide.diffusion.paths import build_path
from selfguide.diffusion.samplers import sample
from selfguide.distributed import RankInfo
from selfguide.guidance.component import Component, Inputs
from selfguide.models.dit import DiT
from selfguide.networks.student import build_student
from selfguide.randomness import normal, uniform
from selfguide.representation import augment as module
from selfguide.representation.augment import Augmentation, Operations, draw, move, resample
from selfguide.representation.build import build_representation
from selfguide.spec.config import AugmentConfig, PathConfig
from selfguide.spec.config.augment import LABELS
from selfguide.spec.dit import DiTArchitecture
from selfguide.spec.initial_weights import SCRATCH
from selfguide.spec.sizes import architecture
from selfguide.training.components import Components
from selfguide.training.job import build_state
from selfguide.training.loop import advance
from selfguide.training.work import prepare_batch
from tests.selfguide.test_loop import begun, masters
from tests.selfguide.test_online import make, online_config

EDGE = 32
NAMES = [*vars(draw(0.5, 0, torch.arange(1)))]


def still(count: int, **done: float | Tensor) -> Operations:
    """Nothing, but what is named, done to so many images."""
    return Operations(**{
        name: torch.as_tensor(done.get(name, 0.0), dtype=torch.float32).expand(count)
        for name in NAMES
    })  # fmt: skip


def pictures(count: int = 6, edge: int = EDGE) -> Tensor:
    """Smooth ones, so that any good interpolation agrees on what lies between their pixels."""
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=(count, 3, edge, edge)), (0, 0, 3, 3))
    return torch.from_numpy(noise / noise.std()).float()


# --- operations --------------------------------------------------------------------------------


def test_the_wavelet_is_orthonormal_with_six_vanishing_moments() -> None:
    """Which make it Daubechies' of that order; of these the least asymmetric has its middle nearest to 5.5."""
    h, k = np.array(module.SYM6), np.arange(12)
    for shift in range(6):
        product = (h[: 12 - 2 * shift] * h[2 * shift :]).sum()
        assert product == pytest.approx(float(shift == 0), abs=1e-11)
    assert h.sum() == pytest.approx(math.sqrt(2))
    for power in range(6):
        assert ((-1.0) ** k * (k / 11) ** power * h).sum() == pytest.approx(0, abs=1e-11)
    assert abs(((-1.0) ** k * (k / 11.0) ** 6 * h).sum()) > 1e-4, "a seventh would be another's"
    assert abs(module.MIDDLE - 5.5) < 0.5


def test_nothing_done_is_label_zero_and_the_image_bit_for_bit() -> None:
    x = torch.randn(4, 3, EDGE, EDGE)
    assert torch.equal(still(4).labels, torch.zeros(4, LABELS))
    assert torch.equal(move(x, still(4)), x)
    # and up and down the wavelet alone loses nothing
    torch.testing.assert_close(resample(x, still(4)), x, rtol=0, atol=5e-5)


def test_images_with_every_gate_closed_are_bit_equal_in_a_mixed_batch() -> None:
    x, operations = torch.randn(256, 1, 8, 8), draw(0.2, 0, torch.arange(256))
    closed = (operations.labels == 0).all(1)
    assert 20 < closed.sum() < 120
    moved = move(x, operations)
    assert torch.equal(moved[closed], x[closed])
    assert (moved[~closed] != x[~closed]).flatten(1).any(1).all()


def test_mirror_images_are_exact_closed_forms() -> None:
    x = torch.randn(3, 2, 8, 8)
    assert torch.equal(move(x, still(3, mirrored=1)), x.flip(-1))
    assert torch.equal(move(x, still(3, overturned=1)), x.flip(-2))
    assert torch.equal(move(x, still(3, mirrored=1, overturned=1)), x.flip(-1, -2))
    assert not still(3, mirrored=1, overturned=1).resampled.any(), "no pixel is interpolated"


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -5), (2, 7)])
def test_a_shift_by_whole_pixels_is_exact_and_goes_on_as_the_mirror_image(
    right: int, down: int
) -> None:
    x = torch.randn(2, 3, EDGE, EDGE)
    moved = move(x, still(2, right=right / (0.125 * EDGE), down=down / (0.125 * EDGE)))
    bent = np.pad(x.numpy(), ((0, 0), (0, 0), (8, 8), (8, 8)), mode="reflect")
    expected = bent[..., 8 - down : 8 - down + EDGE, 8 - right : 8 - right + EDGE]
    torch.testing.assert_close(moved, torch.from_numpy(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize("quarters", [1, 2, -1])
def test_quarter_turns_are_counter_clockwise(quarters: int) -> None:
    x = pictures()
    turned = move(x, still(len(x), angle=quarters * math.pi / 2))
    error = (turned - x.rot90(quarters, (-2, -1))).abs()
    # the mirror image beyond an edge has a crease there, which a turn about another sample smooths
    assert error[..., 3:-3, 3:-3].max() < 0.02 and error.max() < 0.05


@pytest.mark.parametrize(
    "done",
    [
        {"scale": 1.5},
        {"scale": -1.5},
        {"angle": 0.4},
        {"angle": -2.0},
        {"stretch": 1.5},
        {"stretch": -1.5, "axis": 0.9},
        {"stretch": 1.5, "axis": -2.5},
        {"right": 0.9},
        {"down": -1.3},
        {"scale": -0.7, "angle": 1.1, "stretch": 1.2, "axis": 0.6, "right": 0.8, "down": -0.5},
    ],
    ids=lambda done: "-".join(done),
)
def test_an_operation_agrees_with_scipys_interpolation(done: dict[str, float]) -> None:
    """Of order 5 under the forward map, composed here in axes that point right and up."""
    x = pictures()
    ours = move(x, still(len(x), **done)).numpy()
    back = np.linalg.inv(forward(**done))
    # from rows and columns of an array to right and up, from the centre
    centre = (EDGE - 1) / 2
    axes = np.array([[0, 1, -centre], [-1, 0, centre], [0, 0, 1]])
    matrix = np.linalg.inv(axes) @ back @ axes
    for image, found in zip(x.numpy(), ours, strict=True):
        for channel, values in zip(image, found, strict=True):
            wanted = ndimage.affine_transform(channel, matrix, order=5, mode="mirror")
            error = np.abs(values - wanted)
            assert np.sqrt((error**2).mean()) < 0.02 and np.quantile(error, 0.95) < 0.03


def forward(
    scale: float = 0, angle: float = 0, stretch: float = 0, axis: float = 0,
    right: float = 0, down: float = 0,
) -> Any:  # fmt: skip
    """Where a point goes, in pixels right of the centre and above it: scaled, turned, stretched, shifted."""

    def turn(by: float) -> Any:
        c, s = np.cos(by), np.sin(by)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])

    k, shift = 2 ** (0.2 * stretch), np.eye(3)
    shift[:2, 2] = 0.125 * EDGE * right, -0.125 * EDGE * down
    stretched = turn(axis) @ np.diag([k, 1 / k, 1]) @ turn(-axis)
    return shift @ stretched @ turn(angle) @ np.diag([2 ** (0.2 * scale)] * 2 + [1])


# --- what is drawn -----------------------------------------------------------------------------


def test_nine_labels_are_the_parameters_in_their_order() -> None:
    o = draw(0.4, 0, torch.arange(500))
    assert o.labels.shape == (500, LABELS) == (500, 9) and o.labels.dtype == torch.float32
    angle, axis = o.angle.numpy(), o.axis.numpy()
    stretched = [o.stretch.numpy() * each(axis) for each in (np.cos, np.sin)]
    turned = [np.cos(angle) - 1, np.sin(angle)]
    columns = [o.mirrored, o.overturned, o.scale, *turned, *stretched, o.right, o.down]
    by_hand = np.stack([np.asarray(each) for each in columns], axis=1)
    np.testing.assert_allclose(o.labels.numpy(), by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("probability", [0.12, 0.5])
def test_gates_open_at_their_rates_and_apart_from_each_other(probability: float) -> None:
    count, p = 40_000, probability
    o = draw(p, 1, torch.arange(count))
    closed = (o.labels == 0).all(1)
    turned = o.axis != 0
    rates = {
        "mirrored": (o.mirrored, 0.5),
        "overturned": (o.overturned, p / 2),
        "scale": (o.scale != 0, p),
        "angle": (o.angle != 0, p),
        "stretch": (o.stretch != 0, p),
        "tilted": (turned, p / 2),
        "right": (o.right != 0, p),
        "one gate for both": ((o.right != 0) & (o.down != 0), p),
        "scaled and turned": ((o.scale != 0) & (o.angle != 0), p * p),
        "closed": (closed, 0.5 * (1 - p / 2) * (1 - p) ** 4),
    }
    for name, (opened, rate) in rates.items():
        sigma = math.sqrt(rate * (1 - rate) / count)
        assert abs(float(opened.float().mean()) - rate) < 4 * sigma, name
    for name in ("scale", "stretch", "right", "down"):
        drawn = getattr(o, name)[getattr(o, name) != 0]
        sigma = 1 / math.sqrt(len(drawn))
        assert abs(drawn.mean()) < 4 * sigma and abs(drawn.std() - 1) < 4 * sigma, name
    angles = o.angle[o.angle != 0]
    assert angles.abs().max() <= math.pi
    uniform_std = math.pi / math.sqrt(3)
    assert float(angles.std()) == pytest.approx(uniform_std, rel=0.05)


def test_images_and_labels_are_the_same_in_any_cut_of_the_batch() -> None:
    """Micro-batches, and ranks, which take turns: bit for bit, since they are a function of the position alone."""
    component, position = Augmentation(0.3, seed=5), torch.arange(1000, 1060)
    x = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, labels = component.augment(x, position), draw(0.3, 5, position).labels
    for parts in (position.split(7), [position[rank::3] for rank in range(3)]):
        for part in parts:
            rows = part - 1000
            assert torch.equal(component.augment(x[rows], part), whole[rows])
            assert torch.equal(draw(0.3, 5, part).labels, labels[rows])
    assert not torch.equal(Augmentation(0.3, seed=6).augment(x, position), whole)
    # on an accelerator every image is resampled, and those that were not moved are kept as they were
    done = draw(0.3, 5, position)
    flipped = replace(done, **{name: torch.zeros(60) for name in NAMES[2:]})
    everything = resample(move(x, flipped), done)
    assert torch.equal(
        torch.where(done.resampled.view(-1, 1, 1, 1), everything, move(x, flipped)), whole
    )


def test_labels_in_the_condition_are_of_what_was_done_to_the_image() -> None:
    component, position = Augmentation(0.5, seed=0), torch.arange(64)
    x = pictures(1, 16).expand(64, -1, -1, -1)
    moved = component.augment(x, position)
    batch = Batch(moved, moved, torch.rand(64), moved, position, position, None, 0)
    dropped = Condition.of(id=position).drop(position % 2 == 0)
    condition = component.condition(batch, None, Inputs(dropped)).condition
    assert condition.augment is not None and condition.augment.shape == (64, LABELS)
    assert torch.equal(condition.state, dropped.state) and condition.id is dropped.id
    for image, label in zip(moved, condition.augment, strict=True):
        found = from_label(label.tolist())
        # a label says the same of a stretch and of a shrinking along the opposite axis, as it was published
        again = [move(x[:1], still(1, **each))[0] for each in found]
        assert min(float((image - each).abs().max()) for each in again) < 1e-3


def from_label(label: list[float]) -> list[dict[str, float]]:
    """The operations that a label may be of."""
    mirrored, overturned, scale, cos, sin, across, along, right, down = label
    rest = {"mirrored": mirrored, "overturned": overturned, "scale": scale, "right": right}
    rest |= {"down": down, "angle": math.atan2(sin, cos + 1)}
    size, axis = math.hypot(across, along), math.atan2(along, across)
    return [
        rest | {"stretch": size, "axis": axis},
        rest | {"stretch": -size, "axis": axis + math.pi},
    ]


# --- training ----------------------------------------------------------------------------------


def test_a_run_builds_the_network_and_the_component_it_asks_for() -> None:
    off = online_config()
    on = replace(off, augment=AugmentConfig(probability=0.12))
    assert architecture(off).augment == 0 and build_representation(off) == ()
    assert architecture(on).augment == LABELS
    (component,) = build_representation(on)
    assert isinstance(component, Augmentation) and component.probability == 0.12


def augmented(folder: Path, images: int, **guidance: Any) -> Any:
    """The loop with augmentation: its component and a student that takes labels."""

    job = begun(folder, images, **guidance)
    job.config = replace(job.config, augment=AugmentConfig(probability=0.5))
    job.state = build_state(
        job.config, RankInfo(0, 0, 1), build_student(job.config, 0), [], SCRATCH
    )
    job.state.images = images
    return job


@pytest.mark.parametrize("images", [0, 768], ids=["unconditional", "on-prototypes"])
def test_a_step_moves_the_images_and_tells_the_network(tmp_path: Path, images: int) -> None:
    job = augmented(tmp_path / "on", images)
    plain = begun(tmp_path / "off", images)
    whole, moved = (prepare_batch(each, next(each.stream)) for each in (plain, job))
    expected = draw(0.5, 0, moved.position)
    assert torch.equal(moved.x0, move(whole.x0, expected))
    assert moved.unaugmented is not None and torch.equal(moved.unaugmented, whole.x0)
    assert whole.unaugmented is None and whole.original is whole.x0
    assert torch.equal(joined([moved, moved]).original, torch.cat((whole.x0, whole.x0)))
    assert torch.equal(moved.eps, whole.eps) and torch.equal(moved.tau, whole.tau)
    inputs = job.state.components.inputs(moved, job.state.teaching)
    assert torch.equal(inputs.condition.augment, expected.labels)
    assert (inputs.condition.state == UNCONDITIONAL).all() == (images == 0)
    begun_with = masters(job).clone()
    advance(job)
    assert not torch.equal(masters(job), begun_with)


def test_an_image_is_named_by_what_it_is_not_by_how_it_was_moved() -> None:
    """A group of turned images would be drawn when sampling."""
    config = online_config()
    _, teacher, source, batch = make(config, images=600)
    moved = move(batch.x0, draw(0.5, 0, batch.position))
    other = replace(batch, x0=moved, unaugmented=batch.x0)
    parts = [Components((source,)).inputs(each, teacher.module) for each in (batch, other)]
    assert torch.equal(parts[0].condition.dense, parts[1].condition.dense)  # type: ignore[arg-type]
    assert torch.equal(parts[0].features, parts[1].features)  # type: ignore[arg-type]
    blind = Components((source,)).inputs(replace(batch, x0=moved), teacher.module)
    assert not torch.equal(blind.features, parts[0].features)  # type: ignore[arg-type]


def test_it_learns_beside_edm2s_uncertainty(tmp_path: Path) -> None:
    """DDAE++ weighs by it where images are augmented (table 8); the head is EDM2's, normalised."""

    job = augmented(tmp_path, 0)
    path = PathConfig(weighting="uncertainty", uncertainty="normalised")
    job.config = replace(job.config, path=path)
    job.objective = build_objective(path)
    student = build_student(job.config, 0)
    before = {name: tensor.clone() for name, tensor in student.named_parameters()}
    job.state = build_state(job.config, RankInfo(0, 0, 1), student, [], SCRATCH)
    for _ in range(3):
        advance(job)
    assert math.isfinite(job.telemetry.report(job.state.images)["loss"])
    learned = dict(job.state.engine.module.named_parameters())
    for name in ("backbone.augment.linear.weight", "uncertainty.linear.weight"):
        assert not torch.equal(learned[name], before[name]), name


# --- nothing leaks -----------------------------------------------------------------------------

CORNER = torch.linspace(-1, 1, 8)
# bright towards the top left: no operation leaves it as it is
PATTERN = (-(CORNER[None, :] + 0.5 * CORNER[:, None])).expand(3, 8, 8)


class Cast(Component):
    """Every second image turns red, and its third label says so."""

    name = "augment"

    def augment(self, x0: Tensor, position: Tensor) -> Tensor:
        red = torch.tensor([1.5, -0.5, -0.5]).view(3, 1, 1)
        return x0 + self.labels(position)[:, 2].view(-1, 1, 1, 1) * red

    def condition(self, batch: Batch, teacher: Any, inputs: Inputs) -> Inputs:
        labels = self.labels(batch.position)
        return replace(inputs, condition=replace(inputs.condition, augment=labels))

    def labels(self, position: Tensor) -> Tensor:
        chosen = (uniform(0, "cast", position, 1) < 0.5).float()
        return torch.nn.functional.pad(chosen, (2, LABELS - 3))


def learned(component: Component, channels: int, *, told: bool, steps: int = 200) -> DiT:
    """A small net of one token that saw the pattern, in several strengths, augmented; told of it or not."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"size": 8, "patch": 8, "width": 64, "depth": 2, "heads": 4}
    net = DiT(DiTArchitecture(channels=channels, augment=LABELS, **shape))
    optimiser = torch.optim.Adam(net.parameters())
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        position = torch.arange(step * 64, (step + 1) * 64)
        strength = 0.8 + 0.4 * uniform(0, "strength", position, 1).view(-1, 1, 1, 1)
        x0 = component.augment(strength * PATTERN[:channels], position)
        eps, tau = normal(0, "noise", position, x0.shape[1:]), uniform(0, "time", position, 1)[:, 0]
        x = (1 - tau.view(-1, 1, 1, 1)) * x0 + tau.view(-1, 1, 1, 1) * eps
        seen = Batch(x0, eps, tau, x, position, position, None, 0)
        inputs = Inputs(Condition.unconditional(64))
        inputs = component.condition(seen, None, inputs) if told else inputs
        loss = (net(x, tau, inputs.condition) - x0).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


@torch.no_grad()
def unlike(net: DiT, count: int = 64) -> Tensor:
    """(count,) the share of each sample, asked for without labels, that is not the pattern in some strength."""
    path, nobody = build_path(PathConfig()), Condition.unconditional(count)
    noise = normal(1, "sampling", torch.arange(count), (net.net.channels, 8, 8))
    denoiser = Denoiser(net, path, nobody, prediction="x0")
    samples = sample("heun", denoiser, noise, steps=15).flatten(1)
    pattern = PATTERN[: net.net.channels].flatten()
    along = samples @ pattern / pattern.norm()
    rest = samples - along[:, None] * pattern / pattern.norm()
    return torch.where(along > 0, rest.norm(dim=1) / samples.norm(dim=1), 1.0)


@pytest.mark.parametrize(
    ("planted", "channels"), [(Augmentation(0.5, 0), 1), (Cast(), 3)], ids=["moved", "cast"]
)
def test_no_augmentation_leaks_into_samples(planted: Component, channels: int) -> None:
    """Where the network is not told, it shows what it saw; the same training with labels shows the pattern alone."""
    told, blind = (unlike(learned(planted, channels, told=each)) for each in (True, False))
    assert (told < 0.35).all()
    assert (blind > 0.5).float().mean() > 0.4
