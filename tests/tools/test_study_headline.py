"""The headline: what chooses, what reports, and what the interval of paired differences says."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import shards
from selfguide.data.normaliser import Normaliser
from selfguide.evaluation.features.digitnet import embed
from selfguide.evaluation.metrics.frechet import FrechetScore, Reference, between, frechet
from selfguide.evaluation.metrics.moments import Moments
from selfguide.evaluation.paired import paired_difference
from selfguide.sampling.generate import NotFiniteError
from selfguide.sampling.groups import queried_prototypes
from selfguide.snapshot import Snapshot, load
from shards.format import manifest as manifests
from tests.selfguide.snapshots import write_snapshot
from tools.better import drawn_pixels
from tools.digitnet import digits as all_digits
from tools.study import measure
from tools.study.arms import CLASS, KMEANS, ONLINE
from tools.study.guided import (
    INTERVALS,
    Candidates,
    Guided,
    Paired,
    Scores,
    Search,
    chosen,
    guided,
    paired,
)
from tools.study.headline import summary
from tools.study.measure import Bench, Guide, Half, Set, Wanted, both_nets, difference, loaded


@pytest.fixture(scope="module")
def nets() -> dict:
    return both_nets()


@pytest.fixture(scope="module")
def labelled(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A snapshot that is conditioned on labels."""
    words = ("guidance=labels", "sampler.steps=2", "model.depth=1", "model.width=32")
    told = {"source": "labels", "told": True, "p": [0.1] * 10, "label_free": False}
    folder = tmp_path_factory.mktemp("snapshots") / "class"
    return load(write_snapshot(folder, digits, *words, guidance=told))


def data_of(root: Path) -> dict[str, Any]:
    """What a snapshot says of the shards that it was trained on."""
    found = manifests.load(root)
    return {"root": str(root), "header": found.header, "manifest": found.hash}


def bench(root: Path, kept: Path, nets: dict) -> Bench:
    return Bench(str(root), kept, nets)


def test_the_nets_are_fitted_on_scans_that_the_other_never_saw(nets: dict) -> None:
    scans, labels = all_digits()
    right = {
        half: [
            (net(scans[start::2]).argmax(1) == labels[start::2]).float().mean() for start in (0, 1)
        ]
        for half, (net, _) in nets.items()
    }
    assert right["even"][0] == right["odd"][1] == 1
    assert 0.97 < right["even"][1] < 1 and 0.97 < right["odd"][0] < 1
    assert nets["even"][1] != nets["odd"][1]


def test_a_distance_is_that_of_the_samples_to_all_scans_in_each_net(
    labelled: Snapshot, digits: Path, tmp_path: Path, nets: dict
) -> None:
    found = bench(digits, tmp_path, nets).sampled(labelled, Guide(g=1.5), Set(3, 200)).fd
    sampler = replace(labelled.config.sampler, g=1.5)
    by_hand = replace(labelled, config=replace(labelled.config, sampler=sampler))
    pixels = drawn_pixels(by_hand, 3, 200)(0, 200)
    scans = torch.as_tensor(shards.read_all(digits)["x"])
    for half, (net, _) in nets.items():
        real, made = (Moments.of(embed(net, images)[0]) for images in (scans, pixels))
        assert found[half].value == pytest.approx(between(real, made))
    assert found["even"].value != pytest.approx(found["odd"].value, rel=1e-3)


def test_what_is_measured_once_is_not_measured_again_and_other_samples_are(
    labelled: Snapshot,
    digits: Path,
    tmp_path: Path,
    nets: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = bench(digits, tmp_path, nets).sampled(labelled, Guide(), Set(0, 40))
    assert first.grid.is_file()

    def never(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(measure, "drawn_pixels", never)
    assert bench(digits, tmp_path, nets).sampled(labelled, Guide(), Set(0, 40)) == first
    for guide, images in ((Guide(g=2), Set(0, 40)), (Guide(), Set(1, 40)), (Guide(), Set(0, 50))):
        with pytest.raises(AssertionError, match="drawn again"):
            bench(digits, tmp_path, nets).sampled(labelled, guide, images)


def test_processes_measure_what_one_does_and_keep_what_is_not_finite(
    digits: Path, tmp_path: Path, nets: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes of a thread each; a network of huge weights draws samples that are not finite."""
    words = ("guidance=labels", "sampler.steps=2", "model.depth=1", "model.width=32")
    told = {"source": "labels", "told": True, "p": [0.1] * 10, "label_free": False}
    data = data_of(digits)
    one = write_snapshot(tmp_path / "class", digits, *words, guidance=told, data=data)
    first = Set(0, 40)
    wanted = [Wanted(one, Guide(g=g), first) for g in (1.0, 1.5, 1e38)]
    kept = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        bench = Bench(str(digits), folder, nets, workers)
        bench.measure([*wanted, wanted[0]], "measuring")
        records = sorted(folder.glob("*.json"))
        assert len(records) == 3
        kept[workers] = {file.name: json.loads(file.read_text())["found"] for file in records}
        assert all(bench.sampled(loaded(one), each.guide, first).fd for each in wanted[:2])
        with pytest.raises(NotFiniteError, match="NaN or infinite"):
            bench.sampled(loaded(one), wanted[2].guide, first)
        assert len(bench.seconds) == 3 and min(bench.seconds.values()) > 0
    assert kept[1] == kept[2]
    assert capsys.readouterr().out == ""


def test_groups_of_patches_have_a_share_in_use_and_told_ones_nothing(
    labelled: Snapshot, digits: Path, tmp_path: Path, nets: dict
) -> None:
    patches = ("guidance=digits_patch", "guidance.groups=20", "model.width=32")
    found = {"source": "online", "level": "patch", "told": True, "p": [0.05] * 20}
    data = data_of(digits)
    folder = write_snapshot(
        tmp_path / "patch", digits, *patches, experiment="digits_dit", guidance=found, data=data
    )
    snapshot = load(folder)
    of = bench(digits, tmp_path / "kept", nets)
    x0 = Normaliser.of(manifests.load(digits).header).encode(
        torch.as_tensor(shards.read_all(digits)["x"])
    )
    every = queried_prototypes(snapshot, x0, torch.arange(len(x0)))
    # four patches an image side
    assert len(every) == len(x0) * 16
    assert of.groups(snapshot) == {"utilisation": len(every.unique()) / 20}
    assert of.groups(labelled) == {}


def test_differences_of_kept_scores_are_those_of_the_moments(nets: dict, digits: Path) -> None:
    net = nets["even"][0]
    scans = torch.as_tensor(shards.read_all(digits)["x"])
    reference = Reference.of(Moments.of(embed(net, scans)[0]))
    moments = []
    for noise in (1, 3):
        made = Moments(reference.mean)
        made.update(embed(net, (scans[:300].int() + noise).clamp(max=16))[0], 0)
        moments.append(made)
    kept = difference(*(frechet(reference, each) for each in moments))
    whole = paired_difference(reference, *moments)
    assert kept.corrected == pytest.approx(whole.corrected) and kept.se == pytest.approx(whole.se)


def score(value: float) -> FrechetScore:
    """A distance whose blocks all agree, so that its correction is nothing."""
    return FrechetScore(value, 0.0, value, (value,) * 10)


def test_one_guidance_is_chosen_for_all_seeds_by_the_mean() -> None:
    searched = {
        Guide(): [score(3.0), score(3.0)],
        Guide(g=1.5): [score(1.0), score(4.0)],
        Guide(g=2): [score(0.5), score(9.0)],
    }
    assert chosen(searched) == Guide(g=1.5)
    assert chosen({guide: [score(2.0)] for guide in searched}) == Guide()


class Recorded:
    """Scores that a table gives, and which samples were asked for."""

    def __init__(self, even: dict[Guide, float], odd: dict[Guide, float]) -> None:
        self.table: dict[Half, dict[Guide, float]] = {"even": even, "odd": odd}
        self.measured: list[list[Wanted]] = []
        self.asked: list[tuple[Guide, Set]] = []
        # samples that are not finite, by their guidance and number
        self.broken: set[tuple[float, int]] = set()

    def measure(self, wanted: Iterable[Wanted], _: str) -> None:
        self.measured.append(list(wanted))

    def sampled(self, _: object, guide: Guide, images: Set) -> argparse.Namespace:
        self.asked.append((guide, images))
        if (guide.g, images.count) in self.broken:
            raise NotFiniteError("samples are not finite")
        return argparse.Namespace(fd={half: score(t[guide]) for half, t in self.table.items()})


@pytest.fixture
def of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots are not read."""
    monkeypatch.setattr("tools.study.guided.loaded", lambda folder: folder)


SNAPSHOT = argparse.Namespace(never_null=False, conditioned=True, images=100)


def candidates(search: Search) -> Candidates:
    guides = search.guides(SNAPSHOT, (25, 100))  # type: ignore[arg-type]
    return Candidates("arm", [Path("0"), Path("1")], guides)


@pytest.mark.usefixtures("of_a_table")
def test_one_net_chooses_and_the_other_reports_other_samples() -> None:
    search = Search(weights=(1.5, 2.0), chooses=10, reports=20)
    arm = candidates(search)
    even = dict.fromkeys(arm.guides, 5.0) | {Guide(g=2.0): 1.0}
    # the net that reports would have chosen none
    odd = dict.fromkeys(arm.guides, 5.0) | {Guide(): 2.0}
    recorded = Recorded(even, odd)
    found = guided(recorded, [arm], search)["arm"]  # type: ignore[arg-type]
    assert found.chosen == Guide(g=2.0) and found.choice == 1.0
    assert [each["odd"].value for each in found.best] == [5.0, 5.0]
    assert [each["odd"].value for each in found.unguided] == [2.0, 2.0]
    chose = {(images.seed, images.count) for _, images in recorded.asked[: 2 * len(arm.guides)]}
    fresh = {(images.seed, images.count) for _, images in recorded.asked[2 * len(arm.guides) :]}
    assert chose == {(0, 10)} and {count for _, count in fresh} == {20}
    assert min(seed for seed, _ in fresh) >= 10
    # all that is read has been measured, many at once
    before = {(each.guide, each.images) for each in itertools.chain(*recorded.measured)}
    assert before == set(recorded.asked) and len(recorded.measured) == 2


@pytest.mark.usefixtures("of_a_table")
def test_a_guidance_whose_samples_are_not_finite_is_left_out_of_the_search(capsys: Any) -> None:
    search = Search(weights=(1.5, 9.0), chooses=10, reports=20)
    arm = candidates(search)
    even = dict.fromkeys(arm.guides, 5.0) | {Guide(g=1.5): 1.0}
    recorded = Recorded(even, even)
    recorded.broken = {(9, 10)}
    found = guided(recorded, [arm], search)["arm"]  # type: ignore[arg-type]
    assert {guide.g for guide in found.searched} == {1, 1.5} and found.chosen == Guide(g=1.5)
    assert "arm: g=9 is left out of the search" in capsys.readouterr().err
    # the best one's fresh samples may be what is not
    recorded.broken = {(9, 10), (1.5, 20)}
    found = guided(recorded, [arm], search)["arm"]  # type: ignore[arg-type]
    assert found.chosen == Guide() and [each["odd"].value for each in found.best] == [5.0, 5.0]
    for broken in ((1, 10), (1, 20)):
        recorded.broken = {broken}
        with pytest.raises(NotFiniteError):
            guided(recorded, [arm], search)  # type: ignore[arg-type]


def test_a_condition_that_was_never_dropped_is_not_searched() -> None:
    snapshot = argparse.Namespace(never_null=True, conditioned=True, images=100)
    guides = Search(weights=(1.5,)).guides(snapshot, (25, 100))  # type: ignore[arg-type]
    assert {guide.weak for guide in guides if guide.g != 1} == {"snapshot-25"}


def test_what_has_no_condition_is_guided_by_an_earlier_snapshot_alone() -> None:
    search = Search(weights=(1, 1.5))
    none, one = (
        argparse.Namespace(never_null=False, conditioned=told, images=256_000)
        for told in (False, True)
    )
    early = {Guide(g=1.5, interval=where, weak="snapshot-64000") for where in INTERVALS}
    away = {Guide(g=1.5, interval=where) for where in INTERVALS}
    published = (8_000, 64_000, 128_000, 256_000)
    assert set(search.guides(none, published)) == {Guide()} | early  # type: ignore[arg-type]
    assert set(search.guides(one, published)) == {Guide()} | early | away  # type: ignore[arg-type]
    # a run of which nothing earlier is left
    assert search.guides(none, (256_000,)) == [Guide()]  # type: ignore[arg-type]


def test_the_interval_is_students_of_the_pairs_and_covers_their_mean_as_often_as_it_says() -> None:
    a, b = [score(x) for x in (1.0, 2.0, 4.0)], [score(x) for x in (2.0, 2.5, 4.5)]
    found = paired(a, b)
    test = stats.ttest_rel([1.0, 2.0, 4.0], [2.0, 2.5, 4.5])
    low, high = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high)) and found.over == "runs"
    drawn = np.random.default_rng(0).normal(0.3, 1.0, (2000, 5))
    covers = [each.low < 0.3 < each.high for row in drawn if (each := Paired.of(list(row), 0, 9))]
    assert statistics.fmean(covers) == pytest.approx(0.95, abs=0.02)


def test_the_interval_of_one_pair_is_that_of_its_samples() -> None:
    blocks = FrechetScore(2.0, 0.0, 2.0, tuple(2 + 0.1 * n for n in range(-4, 6)))
    found = paired([blocks], [score(1.0)])
    assert found.over == "samples"
    half = stats.t.ppf(0.975, 9) * difference(blocks, score(1.0)).se
    assert found.high - found.mean == pytest.approx(half)


def test_the_best_label_free_arm_is_the_choice_of_the_net_that_reports_nothing() -> None:
    def arm(even: float, odd: float) -> Guided:
        scores: list[Scores] = [{"even": score(even), "odd": score(odd)}] * 3
        return Guided(searched={Guide(): [score(even)] * 3}, unguided=scores, best=scores)

    said = summary({CLASS: arm(2.0, 2.0), KMEANS: arm(1.0, 3.0), ONLINE: arm(1.5, 1.0)})
    assert said["best_label_free"] == "kmeans"
    assert said["differences"]["kmeans"]["guided"]["mean"] == pytest.approx(1.0)
    assert said["differences"]["kmeans"]["guided"]["verdict"] == "worse"
    assert said["differences"]["online"]["guided"]["verdict"] == "better"
