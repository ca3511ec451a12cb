"""The study's commands, of runs whose training is taken as done: what they ask for, write and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.compose import compose
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.run import RunFolder
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.snapshots import write_snapshot
from tools.study import __main__ as study
from tools.study import blocks, measure, report, work
from tools.study.arms import BY_NAME, CLASS, EMOJI, KMEANS, UNCONDITIONAL, Arm
from tools.study.guided import Search
from tools.study.measure import Bench
from tools.study.training import Trained

Asked = dict[Arm, list[int]]
IMAGES = (6400, 12800)


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Arm, int], Trained]:
    """A run of an arm and a seed with two snapshots, which were never trained."""
    root, shards = tmp_path_factory.mktemp("runs"), manifests.load(digits)
    data = {"root": str(digits), "header": shards.header, "manifest": shards.hash}
    small = ("sampler.steps=2", "model.depth=1", "model.width=32")
    told = {"source": "labels", "told": True, "p": [0.1] * 10, "label_free": False}

    def of(arm: Arm, seed: int) -> Trained:
        run = RunFolder(root / arm.name / str(seed))
        for images in IMAGES if not run.root.exists() else ():
            guided = () if arm is UNCONDITIONAL else ("guidance=labels",)
            write_snapshot(
                run.snapshot(images), digits, *small, *guided, images=images, data=data,
                guidance=None if arm is UNCONDITIONAL else told,
                seed=images + seed + 100 * len(arm.name),
            )  # fmt: skip
        words = ["experiment=digits_uncond", "cluster=local", "train.images=12800", f"seed={seed}"]
        return Trained(run, compose(words))

    return of


@pytest.fixture
def asked(
    runs: Callable[[Arm, int], Trained], monkeypatch: pytest.MonkeyPatch
) -> list[Mapping[Arm, Sequence[int]]]:
    """What was to be trained, and is; a search takes a few samples, and probes, which take a minute, none."""
    calls: list[Mapping[Arm, Sequence[int]]] = []

    def train(_: work.Study, seeds: Mapping[Arm, Sequence[int]]) -> work.Runs:
        calls.append(seeds)
        return {arm: [runs(arm, seed) for seed in own] for arm, own in seeds.items()}

    def few(**settings: Any) -> Search:
        return Search(**{**settings, "chooses": 40, "reports": 60})

    probe = {"linear_accuracy": 0.625, "linear_accuracy_se": 0.01}
    monkeypatch.setattr(work.Study, "train", train)
    monkeypatch.setattr(report, "Search", few)
    monkeypatch.setattr(Bench, "probed", lambda *_: probe)
    return calls


def never(*_: object) -> None:
    raise AssertionError("drawn again")


def test_run_writes_a_report_of_what_was_asked_for_and_measures_it_once(
    asked: list[Mapping[Arm, Sequence[int]]],
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--quick", "--arms", "unconditional", "class", "--seeds", "3", "4"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert study.main(["run", *words, f"data.root={digits}", "--json"]) == 0
    assert asked == [{UNCONDITIONAL: [3], CLASS: [3]}]
    said = json.loads(capsys.readouterr().out)
    text, page = (Path(said[kind]).read_text() for kind in ("markdown", "html"))
    for part in (
        "# How far can a model guide itself?",
        "python -m tools.study run --arms unconditional class --seeds 3 4 --quick",
        "## At equal images",
        "| class | human labels |",
        "## What the papers found to be better",
        "| class has a lower distance than unconditional | ",
        "## Through training",
        "Accuracy of a linear probe",
        "## Over guidance",
        "g=1.5 in [0.2, 0.8] from snapshot-6400",
        "## Clusters",
        "![class: human labels](clusters-class.png)",
        "## Runs",
    ):
        assert part in text, part
    # who was told what images are found no groups
    assert "NMI of the groups" not in text
    assert page.count('src="data:image/png;base64,') == text.count("![") == 3 and "://" not in page
    # the same command goes on: what is known is not measured again, and a seed more is measured alone
    monkeypatch.setattr(measure, "drawn_pixels", never)
    assert study.main(["run", *words, f"data.root={digits}"]) == 0
    assert said["markdown"] in capsys.readouterr().out
    with pytest.raises(AssertionError, match="drawn again"):
        study.main(["run", *words[1:], f"data.root={digits}"])
    assert asked[-1] == {UNCONDITIONAL: [3, 4], CLASS: [3, 4]}


def test_a_quick_study_has_one_seed_and_fewer_points_samples_and_probes() -> None:
    def planned(*words: str) -> tuple[dict[Arm, list[int]], Search]:
        options = study.verbs.parse("tools.study", None, study.VERBS, ["report", *words])
        return report.seeds([CLASS, EMOJI[0]], options), report.searched(options)

    emoji = EMOJI[0]
    quick = Search(weights=(1.5,), chooses=1000, reports=1000, probes_through=False)
    whole = Search(weights=(1.3, 2.0), chooses=1000, reports=5000, probes_through=True)
    assert planned() == ({CLASS: [0, 1, 2], emoji: [0]}, whole)
    assert planned("--quick") == ({CLASS: [0], emoji: [0]}, quick)
    assert planned("--quick", "--seeds", "5", "6")[0] == {CLASS: [5], emoji: [5]}


def test_arms_of_emoji_have_one_seed_and_come_where_their_latents_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted: list[Asked] = []

    def train(_: work.Study, seeds: Asked) -> work.Runs:
        wanted.append(seeds)
        raise UserError("enough")

    monkeypatch.setattr(work.Study, "train", train)
    for there in ((), EMOJI):
        monkeypatch.setattr(work, "emoji", lambda there=there: there)
        with pytest.raises(UserError, match="enough"):
            study.main(["run", "--seeds", "1", "2"])
    assert "make demo-latents" in capsys.readouterr().err
    few, many = wanted
    assert not any(arm.data == "emoji" for arm in few)
    assert many == few | {arm: [1] for arm in EMOJI}
    assert all(seeds == [1, 2] for seeds in few.values())
    assert {arm.name for arm in many} == set(BY_NAME)


def test_a_report_of_nothing_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(work.Study, "known", lambda *_: {})
    with pytest.raises(UserError, match=r"no arm has finished .*tools\.study run"):
        study.main(["report", "--out", str(tmp_path / "out")])


def test_a_report_leaves_out_a_run_of_other_snapshots_and_says_so(
    runs: Callable[[Arm, int], Trained],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Somebody may have started it, and the report needs no other folder because of that; `run` would."""
    there = {arm: runs(arm, 0) for arm in (UNCONDITIONAL, CLASS)}

    def every(run: Trained, images: int) -> Trained:
        train = replace(run.config.train, snapshot_every=images)
        return Trained(run.run, replace(run.config, train=train))

    there = {
        UNCONDITIONAL: every(there[UNCONDITIONAL], 6400),
        CLASS: every(there[CLASS], 3200),
        # whose snapshots are not read
        EMOJI[1]: every(there[CLASS], 3200),
    }
    monkeypatch.setattr(work, "named", lambda listed, _: list(there.values())[: len(listed)])
    monkeypatch.setattr(Trained, "finished", True)
    of = work.Study(tmp_path / "runs", tmp_path / "out")
    known = of.known({arm: [0] for arm in there})
    assert known == {arm: [there[arm]] for arm in (UNCONDITIONAL, EMOJI[1])}
    said = capsys.readouterr().err
    assert "class, seed 0, is left out: " in said and "after 3,200, 9,600 images" in said


def test_emoji_are_shown_by_the_scores_of_their_own_protocol(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one")
    run.evals.mkdir(parents=True)
    for images, score, sweep in ((64_000, 700.0, ""), (128_000, 655.4, ""), (128_000, 1.0, "s")):
        EvaluationRecord(
            status="done", key=f"img-{images:09d}-{sweep}a", attempt=1, images=images, protocol_key="a",
            protocol={"metric": "fd_effnet"}, scores={"fd_effnet": score, "fd_effnet_se": 2.5}, sweep=sweep,
        ).publish(run)  # fmt: skip
    EvaluationRecord(
        status="skipped", key="img-000192000-a", attempt=1, images=192_000, message="no weights"
    ).publish(run)
    config = compose(["experiment=emoji_dit", "cluster=local"])
    heading, _, table, why = blocks.of_emoji({BY_NAME["emoji-online"]: [Trained(run, config)]})
    assert heading == blocks.Heading("Emoji, one seed")
    assert isinstance(table, blocks.Table)
    assert table.rows == [
        {
            "arm": "emoji-online",
            "conditioned on": "groups found online",
            "64,000 images": "fd_effnet 700.0 ± 2.5",
            "128,000 images": "fd_effnet 655.4 ± 2.5",
            "192,000 images": "no score",
        }
    ]
    assert why == blocks.Paragraph("No score: no weights")
    assert not list(blocks.of_emoji({}))


def test_headline_is_of_labels_and_what_is_named_over_all_seeds(
    asked: list[Mapping[Arm, Sequence[int]]],
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--arms", "kmeans", "--seeds", "0", "1", "--weights", "1.5", "--search", "40"]
    words += ["--samples", "60", "--workers", "1", "--out", str(tmp_path / "out")]
    words += [f"data.root={digits}"]
    assert study.main(["headline", *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert asked == [{CLASS: [0, 1], KMEANS: [0, 1]}]
    assert said["best_label_free"] == "kmeans" and set(said["arms"]) == {"class", "kmeans"}
    guided = said["differences"]["kmeans"]["guided"]
    arms = {name: said["arms"][name]["guided"]["odd"] for name in ("kmeans", "class")}
    assert guided["over"] == "runs"
    assert len(guided["each"]) == 2 and guided["low"] < guided["mean"] < guided["high"]
    gaps = [a - b for a, b in zip(arms["kmeans"], arms["class"], strict=True)]
    assert guided["each"] == pytest.approx(gaps, abs=1e-6)
    for arm in said["arms"].values():
        # away from the dropped condition and from the earlier snapshot, in two intervals
        assert len(arm["searched"]) == 5
        means = {guide: sum(values) / 2 for guide, values in arm["searched"].items()}
        assert arm["guidance"] == min(means, key=means.__getitem__)
    assert study.main(["headline", *words]) == 0
    assert "kmeans less class, guided: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--weights", "1"], "--weights 1:"),
        (["--weights", "0.5"], "--weights 0.5:"),
        (["--arms", "class"], "--arms class: name what it is compared with, kmeans, online"),
        (["--search", "3"], "--search 3: take 20 or more"),
        (["--samples", "3"], "--samples 3: take 20 or more"),
    ],
)
def test_headline_refuses_what_cannot_be_searched_before_it_trains(
    asked: list[Mapping[Arm, Sequence[int]]], words: list[str], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        study.main(["headline", *words])
    assert not asked
