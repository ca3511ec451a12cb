"""STEGO against plain loops, its identities, and planted segments (Hamilton et al. 2022, arXiv 2203.08414)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from selfguide.discovery.neighbours import neighbours
from selfguide.discovery.stego import (
    PRESETS,
    Fit,
    Pairs,
    StegoConfig,
    Watched,
    centred,
    correspondence,
    correspondence_loss,
    others,
    sample,
    segment,
)
from shards.errors import UserError


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_loss(f1: Tensor, f2: Tensor, s1: Tensor, s2: Tensor, shift: float) -> float:
    """Equation 4 point by point: F' = F - mean over the second map + mean of all, times max(S, 0)."""
    batch, _, height, width = f1.shape
    places = list(product(range(height), range(width)))

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b) / math.sqrt(float(a @ a)) / math.sqrt(float(b @ b))

    near = {
        (b, p, q): cosine(f1[b, :, p[0], p[1]], f2[b, :, q[0], q[1]])
        for b, p, q in product(range(batch), places, places)
    }
    mean = sum(near.values()) / len(near)
    total = 0.0
    for (b, p, q), value in near.items():
        row = sum(near[b, p, r] for r in places) / len(places)
        code = cosine(s1[b, :, p[0], p[1]], s2[b, :, q[0], q[1]])
        total += max(code, 0.0) * (value - row + mean - shift)
    return -total / len(near)


def test_the_loss_is_the_plain_loop() -> None:
    f1, f2 = random_maps(2, 5, 3, 3, seed=1), random_maps(2, 5, 3, 3, seed=2)
    s1, s2 = random_maps(2, 4, 3, 3, seed=3), random_maps(2, 4, 3, 3, seed=4)
    for shift in (0.0, 0.3, -0.7):
        found = correspondence_loss(correspondence(f1, f2), correspondence(s1, s2), shift)
        assert float(found) == pytest.approx(plain_loss(f1, f2, s1, s2, shift), abs=1e-12)


def test_centring_keeps_the_mean_and_levels_every_point() -> None:
    cosines = correspondence(random_maps(2, 5, 3, 4), random_maps(2, 5, 2, 3, seed=1))
    found = centred(cosines)
    assert found.shape == (2, 3, 4, 2, 3)
    torch.testing.assert_close(found.mean((3, 4)), cosines.mean().expand(2, 3, 4))
    # a point that is nearer to everything gains nothing
    raised = cosines.clone()
    raised[0, 1, 2] += 0.5
    torch.testing.assert_close(centred(raised) - raised.mean(), found - cosines.mean())


def test_a_shift_adds_its_share_of_agreeing_codes() -> None:
    """L(b) = L(0) + b mean(max(S, 0)), exactly linear in b."""
    features = correspondence(random_maps(2, 5, 3, 3), random_maps(2, 5, 3, 3, seed=1))
    codes = correspondence(random_maps(2, 4, 3, 3, seed=2), random_maps(2, 4, 3, 3, seed=3))
    at = {b: correspondence_loss(features, codes, b) for b in (0.0, 0.25, 1.0)}
    share = codes.clamp_min(0).mean()
    torch.testing.assert_close(at[0.25] - at[0.0], 0.25 * share)
    torch.testing.assert_close(at[1.0] - at[0.0], share)


def test_opposite_codes_are_pushed_no_further() -> None:
    codes = (random_maps(1, 2, 2, 2, 2).abs() * -1).requires_grad_()
    correspondence_loss(random_maps(1, 2, 2, 2, 2), codes, 0.1).backward()
    assert codes.grad is not None and not codes.grad.any()


def test_points_are_sampled_where_they_lie() -> None:
    """Corners are the map's own corners; between two, their mean. x comes before y."""
    maps = random_maps(1, 3, 2, 2)
    points = torch.tensor([[-1, -1], [1, -1], [-1, 1], [1, 1], [0, -1]], dtype=torch.float64)
    found = sample(maps, points.view(1, 1, 5, 2))[0, :, 0]
    expected = [maps[0, :, 0, 0], maps[0, :, 0, 1], maps[0, :, 1, 0], maps[0, :, 1, 1]]
    torch.testing.assert_close(
        found, torch.stack([*expected, (expected[0] + expected[1]) / 2], dim=1)
    )


def test_nobody_is_its_own_random_other() -> None:
    torch.manual_seed(0)
    seen = torch.zeros(6, 6)
    for _ in range(600):
        found = others(6)
        assert sorted(found.tolist()) == list(range(6)) and not (found == torch.arange(6)).any()
        seen[torch.arange(6), found] += 1
    assert (seen + 120 * torch.eye(6) - 120).abs().max() < 60  # each other about as often


def test_the_probe_teaches_the_head_nothing_and_the_pairs_no_centroid() -> None:
    maps = torch.randn(8, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    fit = Fit(lambda i: maps[i], torch.arange(8).roll(1)[:, None], 6, StegoConfig(), seed=0)
    codes = fit.net.codes(maps)
    fit.net.cosines(codes).amax(1).mean().backward()
    touched = {name for name, p in fit.net.named_parameters() if p.grad is not None}
    assert touched == {"centroids"}
    fit.net.zero_grad(set_to_none=True)
    fit.pair_loss(maps, maps.roll(1, 0), codes, codes.roll(1, 0)).backward()
    touched = {name for name, p in fit.net.named_parameters() if p.grad is not None}
    assert "centroids" not in touched and len(touched) == 6
    # a code that is a centroid, of any length, has the cosine 1 with it
    exact = fit.net.centroids.detach()[:16].T.reshape(1, -1, 4, 4)
    own = fit.net.cosines(3 * exact).detach()[0].flatten(1)[torch.arange(16), torch.arange(16)]
    torch.testing.assert_close(own, torch.ones(16))


def test_a_centroid_without_patches_begins_again_where_codes_are_far() -> None:
    config = StegoConfig(groups=3, width=2, revive=4)
    net = Fit(lambda i: i, torch.zeros(2, 1).long(), 5, config, seed=0).net
    net.centroids.data = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [-1.0, -1.0]])
    # three of four codes lie at the first centroid, the others at right angles, nearest to the first as well
    codes = torch.tensor([[1.0, 0.0]] * 12 + [[0.1, 1.0]] * 4).T.reshape(1, 2, 4, 4)
    for step in range(4):
        revived = net.revive(codes, net.cosines(codes).detach(), config.revive)
        assert revived.any() == (step == 3)
    assert revived.tolist() == [False, True, True]
    torch.testing.assert_close(net.centroids[0].detach(), torch.tensor([2.0, 0.0]))
    for k, length in ((1, 2.0), (2, 2**0.5)):  # there, and as long as it was
        expected = length * F.normalize(torch.tensor([0.1, 1.0]), dim=0)
        torch.testing.assert_close(net.centroids[k].detach(), expected)
    assert net.idle.tolist() == [0, 0, 0]
    net.centroids.data[2] = torch.tensor([-1.0, -1.0])
    for _ in range(9):  # as published: never
        assert not net.revive(codes, net.cosines(codes).detach(), 0).any()


def test_pairs_are_weighed_by_kind() -> None:
    """With one kind's weight alone, each shift enters its own loss only."""
    maps = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    codes = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(2))

    def value(weights: Pairs, shifts: Pairs) -> float:
        config = StegoConfig(weights=weights, shifts=shifts)
        fit = Fit(lambda i: maps[i], torch.zeros(6, 1).long(), 5, config, seed=0)
        torch.manual_seed(0)
        return float(fit.pair_loss(maps, maps.roll(1, 0), codes, codes.roll(1, 0)))

    kinds = ("own", "knn", "random")
    none = Pairs(own=0.0, knn=0.0, random=0.0)
    alone = {kind: value(replace(none, **{kind: 1.0}), none) for kind in kinds}
    for weighed, shifted in product(kinds, kinds):
        changed = value(replace(none, **{weighed: 1.0}), replace(none, **{shifted: 0.5}))
        assert (changed == alone[weighed]) == (weighed != shifted)
    together = value(Pairs(own=2.0, knn=3.0, random=5.0), none)
    expected = 2 * alone["own"] + 3 * alone["knn"] + 5 * alone["random"]
    assert together == pytest.approx(expected, abs=1e-6)


def test_features_and_codes_are_looked_at_in_the_same_places() -> None:
    """Codes that are the features agree with them point by point: in an image with itself, and with its neighbour."""
    maps = torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(3))
    near, none = maps.roll(1, 0), Pairs(own=0.0, knn=0.0, random=0.0)
    torch.manual_seed(7)
    here, there = (2 * torch.rand(4, 11, 11, 2) - 1 for _ in range(2))  # as a step draws them
    first = sample(maps, here)
    for kind, second in (("own", first), ("knn", sample(near, there))):
        config = StegoConfig(weights=replace(none, **{kind: 1.0}), shifts=none)
        fit = Fit(lambda i: maps[i], torch.zeros(4, 1).long(), 5, config, seed=0)
        torch.manual_seed(7)
        found = float(fit.pair_loss(maps, near, 2 * maps, 3 * near))  # a length says nothing
        cosines = correspondence(first, second)
        assert found == pytest.approx(float(correspondence_loss(cosines, cosines, 0.0)), abs=1e-6)


def planted(count: int, groups: int, edge: int, seed: int) -> tuple[Tensor, Tensor]:
    """Feature maps (N, 32, edge, edge) of a direction for each group and noise, and their masks (N, edge, edge).

    Each image shows two or three of the groups, divided by straight lines.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    directions = F.normalize(normal(groups, 32), dim=1)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, edge)] * 2, indexing="ij")
    masks = torch.empty(count, edge, edge, dtype=torch.int64)
    for i in range(count):
        shown = torch.randperm(groups, generator=generator)[:3]
        (a, b), offset = normal(2), 0.3 * normal(1)
        masks[i] = torch.where(a * x + b * y > offset, shown[0], shown[1])
        masks[i][(-b * x + a * y > 0.5) & (masks[i] == shown[1])] = shown[2]
    features = directions[masks] + 0.08 * normal(count, edge, edge, 32)
    return features.permute(0, 3, 1, 2).contiguous(), masks


def mean_iou(found: Tensor, true: Tensor, groups: int) -> float:
    """Mean intersection over union after the best one-to-one naming of groups."""
    pairs = found.flatten() * groups + true.flatten()
    both = torch.bincount(pairs, minlength=groups**2).view(groups, groups).double()
    iou = (both / (both.sum(1, keepdim=True) + both.sum(0, keepdim=True) - both)).numpy()
    return float(iou[linear_sum_assignment(iou, maximize=True)].mean())


PLANTED = StegoConfig(
    groups=6, width=16, batch=32, steps=None, epochs=40, points=7, randoms=3, learning_rate=2e-3,
    probe_rate=2e-2, revive=10,
)  # fmt: skip


def fit_planted(config: StegoConfig, maps: Tensor, seed: int = 0) -> Fit:
    pooled = F.normalize(maps.mean((2, 3)), dim=1).numpy()
    near = torch.from_numpy(neighbours(pooled, config.neighbours)).long()
    return Fit(lambda i: maps[i], near, maps.shape[1], config, seed=seed)


@pytest.mark.parametrize("seed", [4, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 1))])
def test_planted_segments_are_recovered(seed: int) -> None:
    """Of seeds 1 and 4, a probe whose dead centroids stay so finds five groups only."""
    maps, masks = planted(128, 6, 12, seed=seed)
    fit = fit_planted(PLANTED, maps, seed)
    before = mean_iou(fit.net.eval().masks(maps, (12, 12)), masks, 6)
    list(fit.run())
    found = fit.net.eval().masks(maps, (12, 12))
    assert before < 0.6 and mean_iou(found, masks, 6) >= 0.9
    assert fit.watched.knn > fit.watched.random  # neighbours show the same groups more often


def test_features_themselves_are_codes_of_the_stand_in() -> None:
    maps, masks = planted(16, 6, 12, seed=0)
    centroids = torch.stack([maps.permute(0, 2, 3, 1)[masks == g].mean(0) for g in range(6)])
    assert mean_iou(segment(maps, centroids, (12, 12)), masks, 6) >= 0.99


def test_a_resumed_fit_ends_with_the_same_bits(tmp_path: Path) -> None:
    maps, _ = planted(40, 4, 8, seed=1)
    config = replace(PLANTED, groups=4, batch=16, epochs=3, points=4)
    whole, first = fit_planted(config, maps), fit_planted(config, maps)
    losses = list(whole.run())
    assert len(losses) == whole.steps == 6  # two batches of 16 in 40 crops, three times
    run = first.run()
    begun = [next(run) for _ in range(2)]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    torch.randn(7)  # whatever else draws in between
    resumed = fit_planted(config, maps)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert begun + list(resumed.run()) == losses
    for name, value in whole.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], value)
    assert resumed.watched == whole.watched
    assert list(fit_planted(config, maps, seed=1).run()) != losses


def test_every_crop_comes_once_an_epoch() -> None:
    maps, _ = planted(32, 4, 4, seed=1)
    fit = fit_planted(replace(PLANTED, groups=4, batch=8, epochs=2), maps)
    epochs = []
    for epoch in range(2):
        fit.step = 4 * epoch
        crops = []
        for _ in range(4):
            crops += fit._crops().tolist()
            fit.step += 1
        assert sorted(crops) == list(range(32))
        epochs.append(crops)
    assert epochs[0] != epochs[1]


def test_features_that_are_not_finite_end_the_fit() -> None:
    maps, _ = planted(16, 4, 4, seed=1)
    fit = fit_planted(replace(PLANTED, groups=4, batch=16, epochs=1), maps)
    maps[3, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="loss is nan at step 0"):
        list(fit.run())


def test_shifts_that_do_not_fit_are_named_with_their_cure() -> None:
    shifts = Pairs(own=0.1, knn=0.02, random=0.66)
    watched = Watched()
    for _ in range(50):
        watched.see(-0.2, 0.4)
    low, high = watched.warnings(shifts)
    assert "lower the shift of neighbours, now 0.02" in low and "-0.20" in low
    assert "raise the shift of random pairs, now 0.66" in high and "0.40" in high
    for _ in range(600):  # what counts is how it ends
        watched.see(0.3, -0.1)
    assert watched.warnings(shifts) == []
    assert watched.knn == pytest.approx(0.3, abs=0.01)


def test_presets_are_those_published() -> None:
    coco, voc = PRESETS["cocostuff27"], PRESETS["voc"]
    assert (coco.groups, voc.groups, coco.width, coco.points, coco.neighbours) == (
        27,
        21,
        70,
        11,
        7,
    )
    assert coco.weights == voc.weights == Pairs(own=0.67, knn=0.25, random=0.63)
    assert coco.shifts == Pairs(own=0.08, knn=0.02, random=0.66)
    assert voc.shifts == Pairs(own=0.18, knn=0.12, random=0.46)


def test_a_pixel_belongs_to_the_centroid_of_the_largest_cosine() -> None:
    codes = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    centroids = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    centroids *= torch.tensor([0.01, 1, 9, 0.3, 2, 5])[:, None]  # their lengths say nothing
    found = segment(codes, centroids, (3, 4))
    for b, y, x in product(range(2), range(3), range(4)):
        cosines = [float(F.cosine_similarity(codes[b, :, y, x], c, dim=0)) for c in centroids]
        assert found[b, y, x] == int(np.argmax(cosines))
    assert segment(codes, centroids, (9, 8)).shape == (2, 9, 8)
    # a border between two patches runs half way between their centres
    two = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert segment(two.T.view(1, 2, 1, 2), two, (1, 8)).tolist() == [[[0] * 4 + [1] * 4]]
