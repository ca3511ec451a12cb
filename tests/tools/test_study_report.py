"""The report: orderings judged by data, tables of what was measured, and pages that fetch nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from launcher.compose import compose
from selfguide.evaluation.metrics.frechet import FrechetScore
from selfguide.snapshot import load
from selfguide.spec.run import RunFolder
from shards.format import manifest as manifests
from tests.selfguide.snapshots import write_snapshot
from tools.study import blocks, report
from tools.study.arms import ARMS, BY_NAME, CLASS, EMOJI
from tools.study.document import Block, Heading, Paragraph, Picture, Table, markdown, page
from tools.study.findings import Found, Point, draw_clusters, find_out
from tools.study.guided import Guided, Scores, Search
from tools.study.measure import Bench, Guide, both_nets
from tools.study.orderings import ORDERINGS, Ordering, askable
from tools.study.training import Trained


def test_every_arm_composes_and_every_ordering_is_of_two_arms() -> None:
    for arm in (*ARMS, *EMOJI):
        config = compose([*arm.settings, "seed=3", "cluster=local"])
        assert config.seed == 3
        assert config.guidance.source in ("none", "labels", "sidecar", "online")
        assert arm.label_free == (config.guidance.source != "labels")
        assert bool(arm.groups_by) == (config.guidance.source == "sidecar")
    assert len({arm.name for arm in (*ARMS, *EMOJI)}) == len(BY_NAME) == len(ARMS) + len(EMOJI)
    digits = [arm.name for arm in ARMS]
    assert askable(digits) == list(ORDERINGS)
    assert all(re.search(r"table \d", each.where) for each in ORDERINGS)


def fd(value: float) -> FrechetScore:
    return FrechetScore(value, 0.0, value, (value,) * 10)


def found(
    name: str,
    distances: dict[int, float],
    probe: float = 0.5,
    guided: dict[int, float] | None = None,
) -> Found:
    """An arm whose seeds have these distances, and with guidance the same or those of `guided`."""

    def of(values: dict[int, float]) -> list[Scores]:
        return [{"even": fd(value), "odd": fd(value)} for value in values.values()]

    scores = of(distances)
    point = {"groups": {}, "probe": {"linear_accuracy": probe, "linear_accuracy_se": 0.01}}
    config = compose(["experiment=digits_uncond", "cluster=local"])
    return Found(
        arm=BY_NAME[name],
        runs=[Trained(RunFolder(Path("none")), replace(config, seed=seed)) for seed in distances],
        curves=[[Point(images=7, fd=fd(value), **point)] for value in distances.values()],
        guided=Guided(
            searched={Guide(): [s["even"] for s in scores]},
            unguided=scores,
            best=of(guided or distances),
        ),
    )


ORDERING = Ordering(
    better="class", worse="unconditional", paper="P", where="table 1", published="1 < 2"
)


@pytest.mark.parametrize(
    ("better", "verdict"),
    [
        ({0: 1.0, 1: 1.1, 2: 0.9}, "holds"),
        ({0: 5.0, 1: 5.1, 2: 4.9}, "does not hold"),
        ({0: 1.0, 1: 4.0, 2: 3.5}, "not distinguishable"),
    ],
)
def test_an_ordering_is_judged_by_pairs_of_one_seed(better: dict[int, float], verdict: str) -> None:
    # in another order of seeds, of which one has no pair
    worse = {9: 0.0, 2: 3.0, 1: 3.1, 0: 2.9}
    known = {"class": found("class", better), "unconditional": found("unconditional", worse)}
    judged = blocks.judge(ORDERING, known)
    assert judged is not None and judged.verdict(judged.difference) == verdict
    assert judged.difference.each == pytest.approx([better[s] - worse[s] for s in (0, 1, 2)])


def test_an_ordering_is_judged_with_guidance_as_well() -> None:
    plain, better = {0: 3.0, 1: 3.1, 2: 2.9}, {0: 1.0, 1: 1.1, 2: 1.0}
    known = {
        "class": found("class", plain, guided=better),
        "unconditional": found("unconditional", plain),
    }
    judged = blocks.judge(ORDERING, known)
    assert judged is not None and judged.guided is not None
    assert judged.verdict(judged.difference) == "not distinguishable"
    assert judged.verdict(judged.guided) == "holds"
    row = blocks._verdict(judged)
    assert (row["here"], row["guided"]) == ("not distinguishable", "holds")


def test_an_ordering_of_no_shared_seed_is_not_judged_and_accuracies_are_the_other_way() -> None:
    arms = {"class": found("class", {0: 1.0}), "unconditional": found("unconditional", {1: 2.0})}
    assert blocks.judge(ORDERING, arms) is None
    probes = replace(ORDERING, metric="probe")
    for better, worse, verdict in ((0.9, 0.5, "holds"), (0.5, 0.9, "does not hold")):
        arms = {
            "class": found("class", {0: 1.0}, better),
            "unconditional": found("unconditional", {0: 1.0}, worse),
        }
        judged = blocks.judge(probes, arms)
        assert judged is not None and judged.verdict(judged.difference) == verdict
        assert judged.guided is None


def test_pages_say_the_same_escape_what_is_said_and_hold_their_pictures(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "grid.png")
    said: list[Block] = [
        Heading("Title", 1),
        Paragraph("a < b & c: `x <y>`"),
        Table([{"arm": "x|y", "distance": "1.0"}]),
        Picture(tmp_path / "grid.png", "samples", pixels=True),
        Picture(tmp_path / "grid.png", "lines"),
    ]
    text = markdown(said, tmp_path)
    assert text.splitlines()[0] == "# Title" and "![samples](grid.png)" in text
    assert "| arm | distance |\n| --- | --- |\n| x\\|y | 1.0 |" in text
    html = page(said, "<T>")
    assert (
        "a &lt; b &amp; c: <code>x &lt;y&gt;</code>" in html and "<title>&lt;T&gt;</title>" in html
    )
    assert "data:image/png;base64," in html and "http" not in html
    assert '<img class="pixels" alt="samples"' in html and '<img alt="lines"' in html


def test_the_report_of_an_arm_shows_what_was_measured(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two snapshots of a run of labels, and one of when it was made longer; probes, which take a minute, are tested
    elsewhere.
    """
    probe = {"linear_accuracy": 0.625, "linear_accuracy_se": 0.01}
    monkeypatch.setattr(Bench, "probed", lambda *_: probe)
    words = ("guidance=labels", "sampler.steps=2", "model.depth=1", "model.width=32")
    told = {"source": "labels", "told": True, "p": [0.1] * 10, "label_free": False}
    run = RunFolder(tmp_path / "runs" / "digits_class" / "one")
    config = compose(["experiment=digits_class", "cluster=local", "train.images=12800"])
    shards = manifests.load(digits)
    data = {"root": str(digits), "header": shards.header, "manifest": shards.hash}
    for images in (6400, 12800, 25600):
        write_snapshot(
            run.snapshot(images), digits, *words, guidance=told, images=images, data=data
        )
    bench = Bench(str(digits), tmp_path / "kept", both_nets())
    search = Search(weights=(1.5,), chooses=40, reports=60)
    found, left_out = find_out(bench, {CLASS: [Trained(run, config)]}, search)
    known = found["class"]
    assert not left_out
    # arms are compared at equal images
    assert known.images == [6400, 12800] and known.seeds == [0]
    assert [point.probe for point in known.last] == [probe]
    # it was told the groups
    assert known.last[0].groups == {}
    made = list(blocks.of_digits({"class": known}, tmp_path))
    (first, *_) = [block for block in made if isinstance(block, Table)]
    (row,) = first.rows
    assert row["probe"] == "62.5%" and row["NMI"] == "" and row["copies"] == "0.0%"
    score = known.guided.unguided[0]["odd"]
    assert row["distance"] == f"{score.corrected:.2f} ± {score.se:.2f} (SE)"
    pictures = [block for block in made if isinstance(block, Picture)]
    assert len(pictures) == 3 and all(block.file.is_file() for block in pictures)


def test_clusters_are_drawn_a_group_a_row_and_not_of_what_has_none(
    digits: Path, tmp_path: Path
) -> None:
    told = {"source": "labels", "told": True, "p": [0.0, 0.7, 0.3] + [0.0] * 7}
    words = ("guidance=labels", "sampler.steps=1", "model.depth=1", "model.width=32")
    one = load(write_snapshot(tmp_path / "class", digits, *words, guidance=told))
    assert draw_clusters(one, Guide(), tmp_path / "grid.png")
    # two groups occur: two rows of ten images of 8 pixels, three times as large, with lines between
    assert Image.open(tmp_path / "grid.png").size == (3 * (10 * 9 - 1), 3 * (2 * 9 - 1))
    none = load(write_snapshot(tmp_path / "none", digits, "sampler.steps=1"))
    assert not draw_clusters(none, Guide(), tmp_path / "none.png")


def test_a_report_is_written_where_there_is_no_git(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report._commit() == "of an installation"
