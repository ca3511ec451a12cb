"""Inception Score, KID, precision and recall and their like: independent oracles, closed forms, and chunks."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.inception import InceptionScore

from selfguide.evaluation.metrics.density_coverage import density_coverage
from selfguide.evaluation.metrics.inception_score import inception_score
from selfguide.evaluation.metrics.kid import kid
from selfguide.evaluation.metrics.nearest import nearest_reference
from selfguide.evaluation.metrics.neighbours import radii, smallest
from selfguide.evaluation.metrics.ood import ood_auroc
from selfguide.evaluation.metrics.precision_recall import ADM, ICGAN, precision_recall


def normal(seed: int, count: int, width: int = 8, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# ---- Inception Score -------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "splits"), [(1203, 10), (97, 4), (50, 1)])
def test_inception_score_of_shared_logits_equals_torch_fidelity(count: int, splits: int) -> None:
    logits = normal(0, count, 30, 4)
    for shuffle, seed in ((True, 2020), (True, 7), (False, None)):
        theirs = isc_features_to_metric(logits, splits, shuffle, seed or 0)
        ours = inception_score(logits, splits=splits, seed=seed)
        assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
        assert ours.sd == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)


def test_inception_score_with_ddof_1_is_that_of_torchmetrics() -> None:
    logits = normal(1, 400, 12, 3).double()
    metric = InceptionScore(feature=torch.nn.Identity(), splits=5)
    metric.features = [logits]
    torch.manual_seed(3)
    mean, sd = metric.compute()
    torch.manual_seed(3)
    ours = inception_score(logits[torch.randperm(400)], splits=5, seed=None, ddof=1)
    assert (ours.value, ours.sd) == pytest.approx((mean.item(), sd.item()), rel=1e-9)
    assert ours.ddof == 1


def test_inception_score_of_known_predictions_is_its_closed_form() -> None:
    assert inception_score(np.zeros((100, 7))).value == pytest.approx(1)
    sure = 1e4 * np.eye(8)[np.arange(800) % 8]  # every class but one underflows to 0
    assert inception_score(sure, splits=1).value == pytest.approx(8)


def test_inception_score_of_images_in_order_of_labels_is_shuffled_first() -> None:
    labels = np.sort(np.arange(2000) % 50)
    sure = 20 * np.eye(50)[labels]
    assert inception_score(sure, seed=None).value == pytest.approx(5, rel=0.01)  # 5 classes a split
    assert inception_score(sure).value > 44


def test_inception_score_of_too_few_images_or_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="splits"):
        inception_score(np.zeros((9, 3)))
    with pytest.raises(ValueError, match="finite"):
        inception_score(np.full((10, 3), np.nan))


# ---- KID -------------------------------------------------------------------------------------------


def test_kid_of_shared_features_equals_torch_fidelity() -> None:
    real, made = normal(0, 700, 32).double(), normal(1, 600, 32, 1.2).double()
    keywords = {"kid_subsets": 10, "kid_subset_size": 300, "verbose": False}
    theirs = kid_features_to_metric(made, real, **keywords)
    ours = kid(real, made, subsets=10, size=300)
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert ours.sd == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-8)


@pytest.mark.parametrize("size", [20, 200])
def test_kid_of_equal_distributions_has_mean_0_at_every_size(size: int) -> None:
    found = [
        kid(normal(2 * i, 200), normal(2 * i + 1, 200), subsets=1, size=size).value
        for i in range(300 if size == 20 else 80)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_kid_is_seeded_and_refuses_small_sets() -> None:
    real, made = normal(0, 100), normal(1, 90)
    a, b, c = (kid(real, made, subsets=3, size=50, seed=seed) for seed in (1, 1, 2))
    assert a == b != c
    with pytest.raises(ValueError, match="subsets"):
        kid(real, made)
    with pytest.raises(ValueError, match="width"):
        kid(real, made[:, 1:], size=50)


# ---- neighbours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk", [10_000, 64, 7])
def test_precision_and_recall_of_shared_features_equal_torch_fidelity(k: int, chunk: int) -> None:
    real, made = normal(0, 301, 16).double(), normal(1, 203, 16, 0.8).double()
    theirs = prc_features_to_metric(made, real, prc_neighborhood=k, verbose=False)
    ours = precision_recall(real, made, k=k, chunk=chunk)
    assert ours.precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours.recall == pytest.approx(theirs["recall"], abs=1e-6)
    assert (ours.real, ours.made) == (301, 203)


def by_hand(real: np.ndarray, made: np.ndarray, k: int, inside: Callable) -> list[float]:
    """Precision, recall, density, coverage, from whole matrices."""
    among, across = (np.linalg.norm(real[:, None] - b[None], axis=-1) for b in (real, made))
    of_made = np.linalg.norm(made[:, None] - made[None], axis=-1)
    ball, their_ball = np.sort(among, 1)[:, k], np.sort(of_made, 1)[:, k]
    held = across < ball[:, None]
    return [
        inside(across, ball[:, None]).any(0).mean(),
        inside(across, their_ball[None]).any(1).mean(),
        held.sum() / (k * len(made)),
        held.any(1).mean(),
    ]


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=40)
def test_every_chunk_gives_what_whole_matrices_give(
    seed: int, k: int, chunk: int, strict: bool
) -> None:
    generator = np.random.default_rng(seed)
    # whole numbers, so that points lie on surfaces and sets share points
    real, made = (generator.integers(-2, 3, size=(n, 3)).astype(float) for n in (31, 23))
    wanted = by_hand(real, made, k, np.less if strict else np.less_equal)
    pr = precision_recall(real, made, k=k, strict=strict, chunk=chunk)
    dc = density_coverage(real, made, k=k, chunk=chunk)
    assert [pr.precision, pr.recall, dc.density, dc.coverage] == pytest.approx(wanted)


def test_precision_and_recall_of_known_sets_are_what_they_must_be() -> None:
    real = normal(0, 400)
    same = precision_recall(real, real)
    assert (same.precision, same.recall) == (1, 1)
    apart = precision_recall(real, real + 100)
    assert (apart.precision, apart.recall) == (0, 0)
    # one mode of what is real: precise, with little recall; and the other way round
    collapsed = 0.1 * normal(1, 400)
    found = precision_recall(real, collapsed)
    assert found.precision > 0.95 and found.recall < 0.05
    found = precision_recall(collapsed, real)
    assert found.precision < 0.05 and found.recall > 0.95


def test_density_and_coverage_of_equal_distributions_are_their_expectations() -> None:
    found = density_coverage(normal(0, 2000, 3), normal(1, 2000, 3))
    assert found.density == pytest.approx(1, abs=0.05)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.02)  # Naeem et al., lemma 2
    # an outlier among real images makes a ball that holds everything, and density hardly sees it
    real = torch.cat((normal(0, 500), torch.full((1, 8), 30.0)))
    between = 15 + normal(2, 300)
    assert precision_recall(real, between, k=5).precision == 1
    assert density_coverage(real, between).density == pytest.approx(1 / 5)


def test_the_named_definitions_draw_their_sizes_by_seed() -> None:
    assert (ADM["k"], ICGAN["k"]) == (3, 5)
    real, made = normal(0, 5300, 4), normal(1, 5100, 4)
    a, b, c = (precision_recall(real, made, **ICGAN, seed=seed) for seed in (0, 0, 1))
    assert a == b != c and (a.real, a.made) == (5000, 5000)
    few = precision_recall(real[:300], made[:200], **ADM)
    assert few == precision_recall(real[:300], made[:200], k=3) and few.made == 200


def test_features_beyond_the_sizes_are_left_out() -> None:
    found = precision_recall(normal(0, 60), normal(1, 50), sizes=(30, 20))
    assert (found.real, found.made) == (30, 20)
    assert found == precision_recall(normal(0, 60), normal(1, 50), sizes=(30, 20))


def test_radii_are_those_of_the_others_and_need_enough_of_them() -> None:
    line = torch.tensor([[0.0], [1], [3], [7]])
    assert radii(line, 1, chunk=2)[:, None].tolist() == [[1], [1], [2], [4]]
    assert smallest(line, line, 2, chunk=3).tolist() == [[0, 1], [0, 1], [0, 2], [0, 4]]
    with pytest.raises(ValueError, match="nearest"):
        radii(line, 4)
    with pytest.raises(ValueError, match="width"):
        precision_recall(line, normal(0, 9))
    with pytest.raises(ValueError, match="finite"):
        precision_recall(line, torch.full((9, 1), torch.nan))


def test_half_precision_features_are_compared_in_float32() -> None:
    real, made = normal(0, 200).half(), normal(1, 150).half()
    assert precision_recall(real, made) == precision_recall(real.float(), made.float())


# ---- nearest reference, out of distribution --------------------------------------------------------


@pytest.mark.parametrize("chunk", [10_000, 13])
def test_nearest_reference_finds_copies_and_names_their_originals(chunk: int) -> None:
    real, fresh = normal(0, 500, 32), normal(1, 300, 32)
    made = torch.cat((real[40:140] + 1e-3, fresh))
    found = nearest_reference(real, made, chunk=chunk)
    assert found.index[:100].tolist() == list(range(40, 140))
    assert found.rate == pytest.approx(0.25, abs=0.03)
    assert found.rate_real == pytest.approx(0.01, abs=0.005)
    across = torch.cdist(made, real)
    assert torch.equal(found.index, across.argmin(1))
    torch.testing.assert_close(found.distance, across.amin(1), atol=1e-2, rtol=1e-4)
    alike = nearest_reference(torch.tensor([[0.0], [2], [2]]), torch.tensor([[2.0], [1]]), chunk=1)
    assert alike.index.tolist() == [1, 0]  # of equally near ones the first


@given(st.integers(0, 1000), st.integers(1, 50))
@settings(deadline=None, max_examples=20)
def test_ood_auroc_equals_that_of_scikit_learn(seed: int, chunk: int) -> None:
    generator = np.random.default_rng(seed)
    train, made, test = (generator.normal(size=(n, 3)) for n in (9, 21, 17))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, made, test)]
    scores = np.concatenate([(u @ unit[0].T).max(1) for u in unit[1:]])
    wanted = roc_auc_score([0] * 21 + [1] * 17, scores)
    assert ood_auroc(train, made, test, chunk=chunk) == pytest.approx(wanted, abs=1e-12)


def test_ood_auroc_counts_ties_half() -> None:
    axes = np.eye(3)
    # cosines to the first axis: of samples 1, 0, 0, of test images 1, 0
    assert ood_auroc(axes[:1], axes, axes[:2]) == pytest.approx((2.5 + 1) / 6)


def test_ood_auroc_is_half_for_unseen_images_and_extreme_for_copies_and_noise() -> None:
    # on a cone around one direction, as features of images are
    train, made, test = (normal(i, 800, 16, 0.3) + 1 for i in range(3))
    assert ood_auroc(train, made, test, chunk=100) == pytest.approx(0.5, abs=0.04)
    assert ood_auroc(train, train[:100], test) == pytest.approx(0, abs=1e-6)
    assert ood_auroc(train, normal(3, 100, 16), test) > 0.99
    for scale, chunk in itertools.product((1.0, 7.0), (50, 1000)):
        again = ood_auroc(train, made * scale, test, chunk=chunk)
        assert again == pytest.approx(ood_auroc(train, made, test), abs=1e-3)
