"""TEMI: its loss against a loop and closed forms, heads against torch's layers, fits over ranks and after a kill."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import make_blobs
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

from selfguide.discovery import temi_fit
from selfguide.discovery.neighbours import neighbours
from selfguide.discovery.temi import Heads, TemiConfig, pair_losses, update_marginal
from selfguide.discovery.temi_fit import fit
from selfguide.distributed import RankInfo
from shards.errors import UserError

SMALL = TemiConfig(
    groups=5, heads=3, epochs=4, batch=32, learning_rate=8e-3, neighbours=10, hidden=32, width=16
)


def logits(*shape: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made * spread


def drawn(heads: int = 3, count: int = 6, groups: int = 5) -> tuple[Any, Any, torch.Tensor]:
    shape = (heads, count, groups)
    student = (logits(*shape, seed=0), logits(*shape, seed=1))
    teacher = (logits(*shape, seed=2), logits(*shape, seed=3))
    return student, teacher, logits(heads, groups, seed=4).softmax(1)


def loop(student: Any, teacher: Any, marginal: torch.Tensor, beta: float) -> list[float]:
    """The loss of each head as the paper writes it, one number at a time."""
    s, s_near = ([[p.tolist() for p in h] for h in x.softmax(2)] for x in student)
    t, t_near = ([[p.tolist() for p in h] for h in x.softmax(2)] for x in teacher)
    heads, count, groups = student[0].shape
    per_head = []
    for i in range(heads):
        total = 0.0
        for b in range(count):
            w = 0.0
            for j in range(heads):
                for k in range(groups):
                    w += t[j][b][k] * t_near[j][b][k] / heads
            forth = back = 0.0
            for k in range(groups):
                forth += (s[i][b][k] * t_near[i][b][k]) ** beta / marginal[i, k].item()
                back += (s_near[i][b][k] * t[i][b][k]) ** beta / marginal[i, k].item()
            total += -w * math.log(forth) / 2 - w * math.log(back) / 2
        per_head.append(total / count)
    return per_head


def temi_loss(
    student: Any, teacher: Any, marginal: torch.Tensor, beta: float = 0.6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over images and heads, and that of each head."""
    per_head = pair_losses(student, teacher, marginal, beta=beta).mean(1)
    return per_head.mean(), per_head


@pytest.mark.parametrize("beta", [0.6, 1.0])
def test_the_loss_is_the_papers_loop(beta: float) -> None:
    student, teacher, marginal = drawn()
    loss, per_head = temi_loss(student, teacher, marginal, beta=beta)
    expected = loop(student, teacher, marginal, beta)
    assert per_head.tolist() == pytest.approx(expected, abs=1e-12)
    assert loss.item() == pytest.approx(sum(expected) / 3, abs=1e-12)
    narrow = [tuple(x.float() for x in pair) for pair in (student, teacher)]
    loss, _ = temi_loss(narrow[0], narrow[1], marginal.float(), beta=beta)
    assert loss.item() == pytest.approx(sum(expected) / 3, abs=1e-6)


@pytest.mark.parametrize("beta", [0.6, 1.0])
def test_certain_and_agreeing_images_cost_minus_log_k(beta: float) -> None:
    """One-hot p_s = p_t and uniform p~: w = 1 and the sum is K, so the loss is -ln K."""
    groups = 7
    sure = torch.zeros(2, 4, groups)
    sure[:, torch.arange(4), torch.arange(4)] = 200.0
    uniform = torch.full((2, groups), 1 / groups)
    _, per_head = temi_loss((sure, sure), (sure, sure), uniform, beta=beta)
    assert per_head.tolist() == pytest.approx([-math.log(groups)] * 2, abs=1e-6)
    # half of the heads sure of the same group, half of different ones: w = 1/2 for both
    apart = sure.clone()
    apart[1] = sure[1].roll(1, dims=1)
    _, split = temi_loss((sure, apart), (sure, apart), uniform, beta=beta)
    assert split[0].item() == pytest.approx(-math.log(groups) / 2, abs=1e-6)
    assert torch.isfinite(split).all()


def test_uncertain_images_cost_what_uniform_distributions_do() -> None:
    """All uniform: w = 1/K and the sum is K * K^(-2 beta) * K, so l = -(2 - 2 beta) ln K / K."""
    flat, marginal = torch.zeros(2, 3, 8), torch.full((2, 8), 1 / 8)
    loss, _ = temi_loss((flat, flat), (flat, flat), marginal, beta=0.6)
    assert loss.item() == pytest.approx(-(2 - 1.2) * math.log(8) / 8, abs=1e-6)


def test_the_order_of_image_and_neighbour_does_not_matter() -> None:
    student, teacher, marginal = drawn()
    there = temi_loss(student, teacher, marginal)[1]
    back = temi_loss(student[::-1], teacher[::-1], marginal)[1]
    torch.testing.assert_close(there, back)


def test_only_the_student_learns_and_by_the_right_gradient() -> None:
    student, teacher, marginal = drawn(heads=2, count=3, groups=4)
    for tensor in (*student, *teacher, marginal):
        tensor.requires_grad_()
    temi_loss(student, teacher, marginal)[0].backward()
    assert all(t.grad is None for t in teacher)
    assert torch.autograd.gradcheck(
        lambda a, b: temi_loss((a, b), teacher, marginal.detach())[0], student
    )


def test_extreme_logits_and_dead_groups_stay_finite() -> None:
    student, teacher, marginal = drawn()
    student = tuple((s.float() * 1000).requires_grad_() for s in student)
    teacher = tuple(t.float() * 1000 for t in teacher)
    dead = marginal.float()
    dead[:, 2] = 0
    loss, _ = temi_loss(student, teacher, dead)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(s.grad).all() for s in student)


def test_parts_of_a_batch_add_up_and_one_may_be_empty() -> None:
    student, teacher, marginal = drawn(count=9)
    whole = pair_losses(student, teacher, marginal, beta=0.6)
    parts = [
        pair_losses(
            tuple(s[:, a:b] for s in student),  # type: ignore[arg-type]
            tuple(t[:, a:b] for t in teacher),  # type: ignore[arg-type]
            marginal,
            beta=0.6,
        )
        for a, b in ((0, 4), (4, 4), (4, 9))
    ]
    assert [p.shape[1] for p in parts] == [4, 0, 5]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_every_head_is_torchs_layers_with_weight_norm() -> None:
    heads = Heads(9, SMALL)
    with torch.no_grad():
        for bias in (heads.inner_bias, heads.outer_bias, heads.gain):
            bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)))
    mean, spread = np.linspace(-1, 1, 9), np.linspace(0.5, 2, 9)
    heads.standardise(mean, spread)
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    found = heads(x)
    assert found.shape == (3, 6, 5)
    for i in range(SMALL.heads):
        inner, outer = nn.Linear(9, 32), nn.Linear(32, 16)
        last = nn.utils.parametrizations.weight_norm(nn.Linear(16, 5, bias=False))
        with torch.no_grad():
            for layer, w, b in (
                (inner, heads.inner, heads.inner_bias),
                (outer, heads.outer, heads.outer_bias),
            ):
                layer.weight.copy_(w[i].T)
                layer.bias.copy_(b[i, 0])
            last.parametrizations.weight.original0.copy_(heads.gain[i])
            last.parametrizations.weight.original1.copy_(heads.directions[i])
        scaled = ((x.double() - torch.from_numpy(mean)) / torch.from_numpy(spread)).float()
        z = nn.functional.normalize(outer(nn.functional.gelu(inner(scaled))), dim=1)
        torch.testing.assert_close(found[i], last(z) / 0.1)
        torch.testing.assert_close(heads(x, i), found[i])


def test_heads_begin_apart_with_a_gain_of_one_and_the_same_for_a_seed() -> None:
    first, again, other = Heads(4, SMALL), Heads(4, SMALL), Heads(4, TemiConfig(groups=5, seed=1))
    assert torch.equal(first.inner, again.inner) and torch.equal(first.directions, again.directions)
    assert not torch.equal(first.inner[0], first.inner[1])
    assert not torch.equal(first.inner[0, :, :32], other.inner[0, :, :32])
    assert (first.gain == 1).all()


def blobs(
    count: int = 300, groups: int = 5, width: int = 8, seed: int = 0
) -> tuple[NDArray, NDArray]:
    x, y = make_blobs(count, width, centers=groups, cluster_std=1.0, random_state=seed)
    return x.astype(np.float32), y


def test_planted_groups_are_found() -> None:
    x, y = blobs(2000, 10, 32, seed=3)
    config = TemiConfig(
        groups=10, heads=4, epochs=15, batch=64, learning_rate=4e-3, neighbours=50, hidden=128,
        width=64,
    )  # fmt: skip
    found = fit(x, neighbours(x, 50), config)
    assert normalized_mutual_info_score(y, found.ids) >= 0.95
    assert found.used == 10 and found.counts.sum() == 2000
    assert found.head == int(np.argmin(found.losses)) and len(found.losses) == 4
    assert found.confidence.min() > 0.1 and found.confidence.mean() > 0.9


def test_ids_and_confidence_are_of_the_best_head() -> None:
    x, _ = blobs()
    found = fit(x, neighbours(x, 10), SMALL)
    p = found.heads(torch.from_numpy(x))[found.head].softmax(1)
    np.testing.assert_array_equal(found.ids, p.argmax(1))
    np.testing.assert_allclose(found.confidence, p.max(1).values.detach(), atol=1e-5)


def test_standardised_features_know_no_unit() -> None:
    x, _ = blobs()
    near = neighbours(x, 10)
    moved = x * np.linspace(0.5, 40, 8, dtype=np.float32) - 3
    a, b = fit(x, near, SMALL), fit(moved, near, SMALL)
    assert (a.ids == b.ids).mean() > 0.99
    np.testing.assert_allclose(a.losses, b.losses, atol=1e-3)


def part(rank_info: RankInfo, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """A rank's marginal after its share of a batch, and its end of a fit."""
    _, teacher, marginal = drawn(count=sum(sizes))
    first, second = (t.split(sizes, dim=1)[rank_info.rank] for t in teacher)
    after = update_marginal(marginal, (first, second), 0.9)
    x, _ = blobs()
    found = fit(x, neighbours(x, 10), SMALL, rank_info=rank_info)
    return after.tolist(), found.ids.tolist(), found.losses, found.heads.outer.tolist()


def test_the_number_of_ranks_and_their_shares_change_rounding_only(ranks: Any) -> None:
    sizes = (3, 0, 8)
    _, teacher, marginal = drawn(count=sum(sizes))
    said = torch.cat([t.softmax(2) for t in teacher], dim=1)
    expected = (0.9 * marginal + 0.1 * said.mean(1)).tolist()
    _, ids, losses, weights = part(RankInfo(0, 0, 1), (sum(sizes),))
    for its_marginal, its_ids, its_losses, its_weights in ranks(3, part, sizes):
        np.testing.assert_allclose(its_marginal, expected, atol=1e-12, rtol=0)
        assert np.mean(np.array(its_ids) == ids) > 0.99
        np.testing.assert_allclose(its_losses, losses, atol=1e-4)
        np.testing.assert_allclose(its_weights, weights, atol=1e-3)


class Killed(Exception):
    pass


def test_a_killed_fit_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, _ = blobs()
    near = neighbours(x, 10)
    config = TemiConfig(**{**vars(SMALL), "epochs": 8})
    whole = fit(x, near, config)
    epochs: list[int] = []
    kill_after = [*range(7)]
    true_epoch = temi_fit._epoch

    def counted(*arguments: Any) -> None:
        epochs.append(arguments[-1])
        if epochs == kill_after:
            raise Killed
        true_epoch(*arguments)

    monkeypatch.setattr(temi_fit, "_epoch", counted)
    with pytest.raises(Killed):
        fit(x, near, config, partial=tmp_path)
    kill_after.clear()
    continued = fit(x, near, config, partial=tmp_path)
    assert epochs == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7]  # from the fifth, where it was saved
    np.testing.assert_array_equal(continued.ids, whole.ids)
    assert continued.losses == whole.losses
    for mine, its in zip(continued.heads.parameters(), whole.heads.parameters(), strict=True):
        assert torch.equal(mine, its)
    # finished: nothing is left to do; of other settings or features: nothing is taken over
    for changed, rows, expected in (
        (config, x, 0),
        (TemiConfig(**{**vars(config), "beta": 0.7}), x, 8),
        (config, x + 1, 8),
    ):
        epochs.clear()
        fit(rows, near, changed, partial=tmp_path)
        assert len(epochs) == expected


def test_every_image_once_an_epoch_beside_a_neighbour_drawn_evenly() -> None:
    near = np.stack([np.roll(np.arange(40), -i - 1)[:4] for i in range(40)])  # i + 1 .. i + 4
    config = TemiConfig(groups=2, neighbours=4)
    drawn = [temi_fit._pairs(near, config, epoch) for epoch in range(100)]
    for pairs in drawn:
        np.testing.assert_array_equal(np.sort(pairs[:, 0]), np.arange(40))
    steps = np.concatenate([(p[:, 1] - p[:, 0]) % 40 for p in drawn])
    counts = np.bincount(steps, minlength=5)
    assert counts[0] == 0 and len(counts) == 5
    assert np.abs(counts[1:] - 1000).max() < 4 * math.sqrt(4000 * 0.25 * 0.75)
    assert not np.array_equal(drawn[0][:, 0], drawn[1][:, 0])


def test_the_last_layer_waits_for_an_epoch_and_the_teacher_follows() -> None:
    x, _ = blobs(64)
    near = neighbours(x, 10)
    begin = Heads(8, SMALL)
    one = fit(x, near, TemiConfig(**{**vars(SMALL), "epochs": 1})).heads
    two = fit(x, near, TemiConfig(**{**vars(SMALL), "epochs": 2})).heads
    assert torch.equal(one.directions, begin.directions) and torch.equal(one.gain, begin.gain)
    assert not torch.equal(one.inner, begin.inner)
    assert not torch.equal(two.directions, begin.directions) and not (two.gain == 1).all()


def test_one_step_is_adamws_and_the_teacher_takes_its_share() -> None:
    x, _ = blobs(32)
    config = TemiConfig(**{**vars(SMALL), "epochs": 1, "batch": 32, "memory": 4.0})
    assert config.teacher_momentum(32) == 0.75  # one step, of which 1 / 4 is taken
    begin = Heads(8, config)
    begin.standardise(x.mean(0).astype(np.float64), x.std(0).astype(np.float64))
    near = neighbours(x, 10)
    pairs = temi_fit._pairs(near, config, 0)
    optimiser = torch.optim.AdamW(begin.parameters(), lr=8e-3 * 32 / 256, weight_decay=1e-4)
    start = begin.outer.detach().clone()
    a, b = (begin(torch.from_numpy(x[pairs[:, i]])) for i in (0, 1))
    teacher = (a.detach(), b.detach())
    said = torch.cat(teacher, 1).softmax(2).mean(1)
    temi_loss((a, b), teacher, 0.9 / 5 + 0.1 * said)[0].backward()
    optimiser.step()
    found = fit(x, near, config).heads.outer
    torch.testing.assert_close(found, start.lerp(begin.outer.detach(), 0.25), atol=1e-6, rtol=1e-3)


def test_the_teacher_is_the_papers_where_fits_are_as_long_and_shorter_where_not() -> None:
    assert TemiConfig(groups=100).teacher_momentum(50_000) == 0.996
    digits = TemiConfig(groups=10, epochs=30, batch=64).teacher_momentum(1797)
    assert digits == pytest.approx(1 - 1 / (0.02 * 30 * 29))
    assert TemiConfig(groups=2, epochs=1).teacher_momentum(100) == 0.0


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_no_number_ends_the_fit_with_a_cure(tmp_path: Path) -> None:
    x, _ = blobs()
    config = TemiConfig(**{**vars(SMALL), "learning_rate": 1e30, "epochs": 6})
    with pytest.raises(UserError, match=r"not finite .* learning_rate=1e\+30: give a lower one"):
        fit(x, neighbours(x, 10), config, partial=tmp_path)
    assert not list(tmp_path.iterdir())  # nothing broken was kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 301}, "groups=301 of 300 images"),
        ({"groups": 1}, "groups=1"),
        ({"neighbours": 300}, "neighbours=300 of 300 images"),
        ({"heads": 0}, "heads=0"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict, message: str) -> None:
    x, _ = blobs()
    with pytest.raises(UserError, match=message):
        fit(x, neighbours(x, 10), TemiConfig(**{**vars(SMALL), **change}))


def test_features_in_which_nothing_can_be_found_are_refused() -> None:
    near = neighbours(blobs()[0], 10)
    same = np.ones((300, 8), dtype=np.float32)
    with pytest.raises(UserError, match="the same"):
        fit(same, near, SMALL)
    same[5, 3] = np.inf
    with pytest.raises(UserError, match="sample 5"):
        fit(same, near, SMALL)
