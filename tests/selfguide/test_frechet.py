"""Frechet distance: closed forms, independent oracles, references, and what a jackknife is worth."""

from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as clean_fid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torchmetrics.image.fid import _compute_fid

from selfguide.evaluation.metrics.cluster_frechet import between_few, cluster_frechet
from selfguide.evaluation.metrics.copies import copy_rate
from selfguide.evaluation.metrics.fdr import fdr
from selfguide.evaluation.metrics.frechet import Reference, between, distance, frechet
from selfguide.evaluation.metrics.moments import Moments
from selfguide.evaluation.metrics.ufid import ufid
from shards.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")


def features(seed: int, count: int = 500, width: int = 6) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, width)) @ generator.normal(
        size=(width, width)
    ) + generator.normal(size=width)


# ---- closed forms ----------------------------------------------------------------------------------


def test_distance_of_simple_gaussians_is_its_closed_form() -> None:
    eye, zero = np.eye(3), np.zeros(3)
    assert distance(zero, eye, zero, eye) == pytest.approx(0, abs=1e-10)
    assert distance(zero, eye, np.array([3.0, 4, 0]), eye) == pytest.approx(25)
    a, b = np.diag([1.0, 4, 9]), np.diag([4.0, 1, 16])
    assert distance(zero, a, zero, b) == pytest.approx(1 + 1 + 1)  # sum of (sqrt a - sqrt b)^2
    assert distance(zero, eye, zero, np.zeros((3, 3))) == pytest.approx(3)
    one = np.ones((3, 3))  # of rank 1
    assert distance(zero, one, zero, 4 * one) == pytest.approx(3)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    assert distance(zero, turn @ a @ turn.T, zero, turn @ b @ turn.T) == pytest.approx(3)
    assert distance(zero, 4 * a, zero, 4 * b) == pytest.approx(4 * 3)


def test_distance_agrees_with_fifty_digits() -> None:
    a, b = (Moments.of(features(seed, 300, 8)) for seed in (1, 2))
    with mpmath.workdps(50):
        s1, s2 = mpmath.matrix(a.covariance), mpmath.matrix(b.covariance)
        shift = mpmath.matrix(a.mean) - mpmath.matrix(b.mean)
        values, vectors = mpmath.eigsy(s1)
        root = vectors * mpmath.diag([mpmath.sqrt(v) for v in values]) * vectors.T
        cross = sum(mpmath.sqrt(v) for v in mpmath.eigsy(root * s2 * root, eigvals_only=True))
        traces = sum(s1[i, i] + s2[i, i] for i in range(8))
        wanted = float((shift.T * shift)[0] + traces - 2 * cross)
    assert between(a, b) == pytest.approx(wanted, rel=1e-12)


# ---- oracles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "tolerance"), [(400, 1e-9), (40, 1e-6)])
def test_distance_equals_three_packages_on_the_same_statistics(
    count: int, tolerance: float
) -> None:
    sets = [features(seed, count, 64) for seed in (3, 4)]
    (m1, s1), (m2, s2) = ((each.mean(0), np.cov(each, rowvar=False)) for each in sets)
    ours = between(*map(Moments.of, sets))
    theirs = fid_statistics_to_metric({"mu": m1, "sigma": s1}, {"mu": m2, "sigma": s2}, False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=tolerance)
    assert ours == pytest.approx(clean_fid(m1, s1, m2, s2), rel=tolerance)
    metric = _compute_fid(*(torch.from_numpy(each) for each in (m1, s1, m2, s2)))
    assert ours == pytest.approx(metric.item(), rel=tolerance)
    # a reference that keeps its root gives the same
    reference = Reference.of(Moments.of(sets[0]))
    assert frechet(reference, Moments.of(sets[1], blocks=10)).value == pytest.approx(
        ours, rel=tolerance
    )


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_distance_of_any_features_is_symmetric_and_rotation_invariant(seed: int) -> None:
    a, b = features(seed), features(seed + 1)
    ours = between(Moments.of(a), Moments.of(b))
    oracle = clean_fid(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert ours == pytest.approx(oracle, rel=1e-8)
    assert between(Moments.of(b), Moments.of(a)) == pytest.approx(ours, rel=1e-9)
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))
    assert between(Moments.of(a @ turn), Moments.of(b @ turn)) == pytest.approx(ours, rel=1e-9)


def test_sets_that_do_not_fit_the_reference_or_its_blocks_are_refused() -> None:
    reference = Reference.of(Moments.of(features(0)))
    with pytest.raises(ValueError, match="fill"):
        frechet(reference, Moments.of(features(1, 9), blocks=10))
    with pytest.raises(ValueError, match="reference of 6"):
        frechet(reference, Moments.of(features(1, 50, 5), blocks=10))


# ---- jackknife -------------------------------------------------------------------------------------


def test_the_jackknife_on_gaussians_covers_and_removes_the_bias() -> None:
    width, count, repeats = 32, 500, 150
    generator = np.random.default_rng(0)
    truth = width * 0.1**2  # of covariances 1 and 1.1^2
    reference = Reference(np.zeros(width), np.eye(width), np.eye(width))
    found = []
    for _ in range(repeats):
        made = Moments(reference.mean)
        made.update(generator.normal(size=(count, width)) * 1.1, 0)
        found.append(frechet(reference, made))
    spread = np.std([score.value for score in found])
    # on the safe side, as Efron and Stein show
    assert 0.9 * spread < np.mean([score.se for score in found]) < 1.5 * spread
    plain, corrected = (np.mean([getattr(f, n) for f in found]) for n in ("value", "corrected"))
    assert plain - truth > 0.5 * truth  # the bias is larger than half of what is measured
    assert abs(corrected - truth) < 0.1 * (plain - truth)
    assert np.std([score.corrected for score in found]) < 1.5 * spread  # at no cost in variance
    covered = [abs(score.corrected - truth) <= 2.26 * score.se for score in found]  # t, 9 degrees
    assert np.mean(covered) >= 0.88


def test_the_jackknife_is_the_textbook_formula() -> None:
    reference, whole = Reference.of(Moments.of(features(0))), features(1, 200)
    parts = np.array_split(np.arange(200), 10)
    left = [between(Moments.of(features(0)), Moments.of(np.delete(whole, p, 0))) for p in parts]
    found = frechet(reference, Moments.of(whole, reference.mean, 10))
    assert found.se == pytest.approx(np.std(left) * np.sqrt(9), rel=1e-6)
    assert found.corrected == pytest.approx(10 * found.value - 9 * np.mean(left), rel=1e-6)


# ---- references ------------------------------------------------------------------------------------


def test_a_reference_that_was_saved_is_read_again_with_its_root(tmp_path: Path) -> None:
    made = Reference.of(Moments.of(features(0)), {"net": "a", "resize": "none"})
    made.save(tmp_path / "a.npz")
    found = Reference.load(tmp_path / "a.npz")
    for name in ("mean", "covariance", "root"):
        assert np.array_equal(getattr(found, name), getattr(made, name))
    assert (found.count, found.about) == (500, {"net": "a", "resize": "none"})


def test_references_of_adm_and_clean_fid_are_read_without_their_images(tmp_path: Path) -> None:
    made, spatial = (Moments.of(features(0, 500, width)).gaussian() for width in (6, 4))
    of_adm = {"mu": made[0], "sigma": made[1], "mu_s": spatial[0], "sigma_s": spatial[1]}
    # ADM's own images would be pickled objects here, and nobody looks at them
    np.savez(tmp_path / "adm.npz", arr_0=np.array([{}]), **of_adm)
    np.savez_compressed(tmp_path / "clean.npz", mu=made[0], sigma=made[1])
    for name in ("adm", "clean"):
        found = Reference.load(tmp_path / f"{name}.npz")
        np.testing.assert_allclose(found.root @ found.root, made[1], rtol=1e-9, atol=1e-12)
        assert np.array_equal(found.mean, made[0]) and found.count is None
    found = Reference.load(tmp_path / "adm.npz", spatial=True)
    assert found.mean.shape == (4,)
    np.testing.assert_allclose(found.root @ found.root, spatial[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [4, 500])
def test_the_factor_of_a_reference_is_a_root_also_where_the_covariance_is_singular(
    count: int,
) -> None:
    reference = Reference.of(Moments.of(features(0, count)))
    factor, root = reference.factor, reference.root
    assert np.array_equal(factor, np.tril(factor))
    np.testing.assert_allclose(factor @ factor.T, reference.covariance, rtol=1e-9, atol=1e-12)
    mean, covariance = Moments.of(features(1, 500)).gaussian()
    values = np.linalg.eigvalsh(root @ covariance @ root).clip(min=0)
    cross = np.sqrt(values).sum()
    wanted = ((reference.mean - mean) ** 2).sum() + np.trace(reference.covariance + covariance)
    assert reference.distance(mean, covariance) == pytest.approx(wanted - 2 * cross, rel=1e-6)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.eye(4)},
        {"mu": np.zeros((3, 1)), "sigma": np.eye(3)},
        {"mu": np.zeros(3), "sigma": np.eye(3) * np.nan},
        {"mu": np.full(3, np.inf), "sigma": np.eye(3)},
        {"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))},
        {"mu": np.zeros(3), "sigma": np.zeros((3, 3))},
        {"mu": np.zeros(3), "sigma": -np.eye(3)},
        {"mu": np.array([{}, 1, 2]), "sigma": np.eye(3)},
        {"mu": np.zeros(3), "sigma": np.eye(3), "sqrt": 2 * np.eye(3)},
        {"mu": np.zeros(3), "sigma": np.eye(3), "about": "half"},
    ],
)
def test_a_file_that_is_no_reference_is_refused(tmp_path: Path, arrays: dict) -> None:
    path = tmp_path / "r.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=r"r\.npz"):
        Reference.load(path)


@pytest.mark.parametrize("count", ["a", np.nan, np.inf, [500, 3]])
def test_a_reference_whose_count_is_none_is_refused(tmp_path: Path, count: Any) -> None:
    file = tmp_path / "odd.npz"
    np.savez(file, mu=np.zeros(2), sigma=np.eye(2), count=np.array(count))
    with pytest.raises(UserError, match=r"odd\.npz is no reference"):
        Reference.load(file)
    np.savez(file, mu=np.zeros(2), sigma=np.eye(2), count=np.array([500]))
    assert Reference.load(file).count == 500


def test_a_reference_that_would_execute_code_is_refused_and_executes_none(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    np.savez(tmp_path / "r.npz", mu=np.array([Planted()]), sigma=np.eye(1))
    np.array([Planted()]).dump(tmp_path / "r.pkl")
    for name in ("r.npz", "r.pkl", "none.npz"):
        with pytest.raises(UserError, match=name):
            Reference.load(tmp_path / name)
    whole = (tmp_path / "r.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut"):
        Reference.load(tmp_path / "cut.npz")
    assert not (tmp_path / "executed").exists()


# ---- what is made of distances ---------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(5, 9), (40, 3), (30, 200), (200, 300)])
def test_distance_of_few_features_equals_that_of_their_moments(n: int, m: int) -> None:
    a, b = features(0, n, 20), features(1, m, 20)
    assert between_few(a, b) == pytest.approx(between(Moments.of(a), Moments.of(b)), rel=1e-6)


def test_cluster_frechet_of_swapped_clusters_is_large_where_the_whole_agrees() -> None:
    generator = np.random.default_rng(0)
    ids = np.arange(400) % 4
    real = generator.normal(size=(400, 5)) + 10 * ids[:, None]
    same_sets = cluster_frechet(real, ids, real, ids)
    assert same_sets.value == pytest.approx(0, abs=1e-6) and set(same_sets.each) == {0, 1, 2, 3}
    swapped = cluster_frechet(real, ids, real, (ids + 1) % 4)
    # three clusters are 10 away in each of five features, one 30
    assert swapped.value == pytest.approx((3 * 500 + 4500) / 4, rel=0.05)
    assert between(Moments.of(real), Moments.of(real)) == pytest.approx(0, abs=1e-6)


def test_cluster_frechet_leaves_out_clusters_that_have_too_few_and_weighs_the_others() -> None:
    real = features(0, 100)
    ids = np.repeat([0, 1, 7], [60, 39, 1])
    made = features(1, 30)
    found = cluster_frechet(real, ids, made, np.repeat([0, 1], 15))
    assert found.left_out == (7,)
    assert found.value == pytest.approx((60 * found.each[0] + 39 * found.each[1]) / 99)
    with pytest.raises(ValueError, match="no cluster"):
        cluster_frechet(real, ids, made, np.full(30, 9))
    with pytest.raises(ValueError, match="as many"):
        cluster_frechet(real, ids[1:], made, np.zeros(30, dtype=int))


def test_fdr_is_the_mean_ratio_and_refuses_other_nets() -> None:
    assert fdr({"a": 6, "b": 30}, {"b": 10, "a": 3}) == 2.5
    for floors in ({"a": 3}, {"a": 3, "b": 0}, {"a": 3, "b": float("nan")}):
        with pytest.raises(ValueError, match=r"net|above"):
            fdr({"a": 6, "b": 30}, floors)
    with pytest.raises(ValueError, match="net"):
        fdr({}, {})


def test_ufid_is_the_distance_to_a_named_run() -> None:
    base = Moments.of(features(0))
    made = Moments.of(features(1), blocks=10)
    assert ufid(Reference.of(base, {"run": "r1"}), made).value == pytest.approx(between(base, made))
    with pytest.raises(ValueError, match="run"):
        ufid(Reference.of(base), made)


def test_copies_are_found_and_fresh_images_are_not() -> None:
    generator = np.random.default_rng(0)
    real, fresh = generator.normal(size=(500, 64)), generator.normal(size=(500, 64))
    mixed = np.concatenate((real[:100] + 1e-3, fresh[:300]))
    rate, own = copy_rate(real, mixed)
    assert rate == pytest.approx(0.25, abs=0.03) and own == pytest.approx(0.01, abs=0.005)
