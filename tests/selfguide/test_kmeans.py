"""k-means: faiss's, Lloyd's over ranks and scikit-learn's agree; planted groups are found; nothing is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from selfguide.discovery import kmeans as module
from selfguide.discovery.extraction import checked
from selfguide.discovery.kmeans import Groups, beginning, kmeans, lloyd, prepared, report
from shards.errors import UserError

Rows = NDArray[Any]


def blobs(count: int = 600, groups: int = 6, width: int = 8, seed: int = 0) -> tuple[Rows, Rows]:
    """Well separated, on a sphere or off it."""
    random = np.random.default_rng(seed)
    centres = np.linalg.qr(random.standard_normal((width, width)))[0][:groups] * 4
    ids = np.arange(count) % groups
    return centres[ids] + 0.2 * random.standard_normal((count, width)), ids


def noise(count: int, width: int = 5, seed: int = 1) -> Rows:
    return np.random.default_rng(seed).standard_normal((count, width))


@pytest.mark.parametrize("setting", [{}, {"spherical": True}, {"normalise": False}])
def test_planted_groups_are_found(setting: dict[str, bool]) -> None:
    features, ids = blobs()
    found = kmeans(features.astype(np.float32), 6, restarts=10, **setting)
    assert normalized_mutual_info_score(ids, found.ids) > 0.99
    by_ranks = lloyd(features.astype(np.float32), prepared(features[:6], True), normalise=True)
    assert normalized_mutual_info_score(ids, by_ranks.ids) > 0.99


def test_lloyd_equals_scikit_learns() -> None:
    features = noise(700)
    for seed in range(4):
        initial = features[beginning(700, 9, seed, 0)]
        theirs = KMeans(9, init=initial, n_init=1, algorithm="lloyd", tol=0, max_iter=500)
        theirs.fit(features)
        ours = lloyd(features, initial, iterations=500)
        assert np.array_equal(ours.ids, theirs.labels_)
        np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=1e-6)
        assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-9)
        assert ours.iterations == theirs.n_iter_
        one = KMeans(9, init=initial, n_init=1, algorithm="lloyd", tol=0, max_iter=1).fit(features)
        assert lloyd(features, initial, iterations=1).inertia == pytest.approx(one.inertia_)


def test_an_empty_group_takes_the_farthest_sample_as_scikit_learns_does() -> None:
    features = noise(200)
    initial = features[:4].copy()
    initial[2] = 50.0  # nearest to none
    theirs = KMeans(4, init=initial, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(features)
    ours = lloyd(features, initial, iterations=300)
    assert (ours.sizes > 0).all()
    assert np.array_equal(ours.ids, theirs.labels_)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-9)


def test_several_empty_groups_are_all_filled() -> None:
    features = noise(200)
    initial = np.concatenate([features[:1], np.full((5, 5), 40.0)])
    assert (lloyd(features, initial, iterations=20).sizes > 0).all()


def test_more_groups_than_different_samples_leave_some_empty() -> None:
    features = np.repeat(np.eye(3), 4, axis=0)  # 12 samples, three places
    found = lloyd(features, features[[0, 4, 8, 0, 1]], iterations=10)
    assert (found.sizes > 0).sum() == 3 and found.inertia == 0
    assert np.isfinite(found.centroids).all()


SPLITS = {1: [200], 2: [150, 50], 3: [90, 0, 110], 4: [0, 1, 199, 0]}


def _lloyd_rank(
    rank_info: Any, features: Rows, initials: list[Rows]
) -> dict[tuple[int, int], Groups]:
    """What this rank finds among the first `world` ranks, for each world it belongs to and each beginning."""
    found = {}
    for world, sizes in SPLITS.items():
        group = dist.new_group(list(range(world)))  # all ranks call
        if rank_info.rank < world:
            start = sum(sizes[: rank_info.rank])
            shard = features[start : start + sizes[rank_info.rank]]
            for number, initial in enumerate(initials):
                found[world, number] = lloyd(shard, initial, iterations=100, group=group)
    return found


def test_ranks_together_equal_one(ranks: Callable) -> None:
    """Unequal shards, empty ones, and groups that must move to a sample of another rank."""
    features = noise(200)
    initial = features[beginning(200, 7, 3, 0)]
    empty = initial.copy()
    empty[[1, 4]] = 30.0
    everywhere = ranks(4, _lloyd_rank, features, [initial, empty])
    for number, begun in enumerate((initial, empty)):
        alone = lloyd(features, begun, iterations=100)
        assert (alone.sizes > 0).all() and alone.iterations > 2
        for world in SPLITS:
            found = [everywhere[rank][world, number] for rank in range(world)]
            assert np.array_equal(np.concatenate([f.ids for f in found]), alone.ids)
            np.testing.assert_allclose(np.concatenate([f.distance for f in found]), alone.distance)
            for one in found:
                np.testing.assert_allclose(one.centroids, alone.centroids, atol=1e-6)
                assert one.inertia == pytest.approx(alone.inertia, rel=1e-12)
                assert np.array_equal(one.sizes, alone.sizes)
                assert one.iterations == alone.iterations


def test_both_engines_agree_from_one_beginning() -> None:
    features = noise(500, 6).astype(np.float32)
    for normalise in (True, False):
        ours = kmeans(features, 5, seed=4, restarts=1, iterations=200, normalise=normalise)
        rows = prepared(features, normalise)
        theirs = lloyd(rows, rows[beginning(500, 5, 4, 0)], iterations=200)
        assert np.array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.centroids, theirs.centroids, atol=1e-5)
        assert ours.inertia == pytest.approx(theirs.inertia, rel=1e-4)


def test_fit_and_assignment_see_the_same_features() -> None:
    """Lengths say nothing once features are normalised: not to the fit, and not to the ids."""
    features, _ = blobs()
    lengths = np.random.default_rng(3).uniform(0.01, 100, (len(features), 1))
    stretched = (features * lengths).astype(np.float32)
    plain, scaled = kmeans(features.astype(np.float32), 6), kmeans(stretched, 6)
    assert np.array_equal(plain.ids, scaled.ids)
    raw = kmeans(stretched, 6, normalise=False)
    assert not np.array_equal(raw.ids, scaled.ids)
    unit = stretched / np.linalg.norm(stretched, axis=1, keepdims=True)
    away = np.square(unit[:, None] - scaled.centroids[None]).sum(2)  # (N, K)
    assert np.array_equal(away.argmin(1), scaled.ids)
    np.testing.assert_allclose(away.min(1), scaled.distance, atol=1e-5)
    assert scaled.inertia == pytest.approx(away.min(1).sum(), rel=1e-4)


def test_no_sample_is_left_out() -> None:
    """faiss alone fits 256 samples a group; a centroid that is the mean of all its samples saw all of them."""
    features = noise(3000, 3).astype(np.float32)
    found = kmeans(features, 2, iterations=300, restarts=1, normalise=False)
    for group in range(2):
        mean = features[found.ids == group].mean(0)
        np.testing.assert_allclose(found.centroids[group], mean, atol=1e-4)
    assert found.sizes.sum() == 3000


def test_the_tightest_restart_is_kept() -> None:
    features = noise(300).astype(np.float32)
    rows = prepared(features, True)
    each = [lloyd(rows, rows[beginning(300, 12, 0, r)], iterations=100).inertia for r in range(6)]
    found = kmeans(features, 12, restarts=6, iterations=100)
    assert max(each) > 1.005 * min(each)
    assert found.inertia == pytest.approx(min(each), rel=1e-3)


def test_the_seed_is_all_there_is_to_it() -> None:
    features = noise(300).astype(np.float32)
    first, again = kmeans(features, 12, seed=1), kmeans(features, 12, seed=1)
    assert np.array_equal(first.ids, again.ids) and first.inertia == again.inertia
    assert not np.array_equal(first.ids, kmeans(features, 12, seed=2).ids)


def test_beginnings_are_distinct_samples_and_differ_by_restart() -> None:
    for restart in range(5):
        chosen = beginning(20, 15, 0, restart)
        assert len(set(chosen.tolist())) == 15 and chosen.min() >= 0 and chosen.max() < 20
    assert not np.array_equal(beginning(99, 9, 0, 0), beginning(99, 9, 0, 1))


def test_spherical_centroids_are_of_unit_length() -> None:
    features, _ = blobs(seed=2)
    found = kmeans(features.astype(np.float32), 4, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-5)
    initial = prepared(features[:4], True)
    by_ranks = lloyd(features, initial, spherical=True, normalise=True)
    np.testing.assert_allclose(np.linalg.norm(by_ranks.centroids, axis=1), 1, atol=1e-6)
    loose = lloyd(features, initial, normalise=True)
    assert np.linalg.norm(loose.centroids, axis=1).max() < 0.999


def test_features_may_be_mapped_and_are_not_written_to(tmp_path: Path) -> None:
    features, _ = blobs(seed=5)
    np.save(tmp_path / "rows.npy", features.astype(np.float16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert np.array_equal(kmeans(mapped, 6).ids, kmeans(np.array(mapped), 6).ids)
    initial = prepared(mapped[:6], True)
    assert lloyd(mapped, initial, normalise=True).sizes.sum() == 600
    own = features.astype(np.float32)
    before = own.copy()
    kmeans(own, 6)
    assert np.array_equal(own, before)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = noise(300)
    whole = lloyd(features, features[:8], iterations=50, normalise=True)
    flat = prepared(features, True)
    monkeypatch.setattr(module, "ROWS", 7)
    pieces = lloyd(features, features[:8], iterations=50, normalise=True)
    assert np.array_equal(whole.ids, pieces.ids) and whole.inertia == pytest.approx(pieces.inertia)
    assert np.array_equal(prepared(features, True), flat)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"groups": 31}, "groups=31 of 30 samples: take 1 to 30"),
        ({"groups": 0}, "groups=0"),
        ({"groups": 2, "iterations": 0}, "iterations=0: take 1 or more"),
        ({"groups": 2, "restarts": 0}, "restarts=0: take 1 or more"),
        ({"groups": 2, "spherical": True, "normalise": False}, "normalise them"),
    ],
)
def test_settings_that_no_fit_has_are_named(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        kmeans(noise(30), setting.pop("groups"), **setting)


def test_as_many_groups_as_samples_are_each_its_own() -> None:
    found = kmeans(noise(30), 30, normalise=False)
    assert sorted(found.ids.tolist()) == list(range(30)) and found.inertia < 1e-8


@pytest.mark.parametrize("where", [0, 8191, 8192, 9999])
def test_features_without_groups_in_them_are_refused(where: int) -> None:
    features = np.ones((10_000, 2), np.float32)
    with pytest.raises(UserError, match="of all 10,000 samples are the same"):
        checked(features)
    features[where, 1] = 2
    assert checked(features) is features
    features[where, 1] = np.nan
    with pytest.raises(UserError, match=f"of sample {where} are NaN"):
        checked(features)
    with pytest.raises(UserError, match="give \\(N, F\\)"):
        checked(features[:0])


def test_the_report_is_by_definition() -> None:
    ids = np.array([0, 0, 1, 1, 1, 3], np.int32)
    labels = np.array([5, 5, 7, 7, 5, 7])
    found = Groups(
        centroids=np.zeros((4, 1), np.float32),
        ids=ids,
        distance=np.ones(6, np.float32),
        sizes=np.bincount(ids, minlength=4),
        inertia=6.0,
        iterations=1,
    )
    said = report(found, labels)
    assert said["utilisation"] == 3 / 4 and said["largest"] == 1 / 2 and said["smallest"] == 0
    assert said["inertia"] == 6.0
    joint = np.array([[2, 0], [1, 2], [0, 1]]) / 6  # by hand: groups by labels
    p, q = joint.sum(1), joint.sum(0)
    mutual = sum(j * np.log(j / (p[a] * q[b])) for (a, b), j in np.ndenumerate(joint) if j)
    entropies = -(p * np.log(p)).sum() - (q * np.log(q)).sum()
    assert said["nmi"] == pytest.approx(2 * mutual / entropies)
    assert said["ari"] == pytest.approx(adjusted_rand_score(labels, ids))
    assert set(report(found)) == {"inertia", "utilisation", "largest", "smallest"}
    random = np.random.default_rng(0)
    drawn = Groups(
        **{**found.__dict__, "ids": random.integers(0, 4, 4000), "sizes": np.full(4, 1000)}
    )
    chance = report(drawn, random.integers(0, 9, 4000))
    assert abs(chance["ari"]) < 0.01 and abs(chance["ami"]) < 0.01
