"""tools.guide on a run's folder: what it searches, how it goes on, what it says and keeps, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from selfguide.spec import recipe
from selfguide.spec.metrics import FEATURES
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import EvaluationRecord, records
from selfguide.spec.run import RunFolder
from selfguide.spec.weight_files import EFFNET, locate
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.snapshots import write_snapshot
from tools import guide, guide_search, sample

GRID = ["--weights", "1.5", "2", "--intervals", "0,1", "0.2,0.8"]
FEW = [*GRID, "--samples", "40", "--report-samples", "60"]
ALL = ["condition", "average-5000", "snapshot-14", "snapshot-7", "head", "routed"]


@pytest.fixture(scope="module")
def made(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never trained, with snapshots at 7, 14 and 28 images."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "digits_guide" / "abc")
    manifest = manifests.load(digits)
    data = {"root": str(digits), "header": manifest.header, "manifest": manifest.hash}
    told = {"source": "online", "told": True, "p": [1 / 30] * 30, "level": "image"}
    for images in (7, 14, 28):
        write_snapshot(
            run.snapshot(images), digits, "sampler.steps=2", experiment="digits_guide",
            images=images, data=data, guidance=told, seed=images,
        )  # fmt: skip
    run.run_json.write_text(json.dumps({"id": "abc", "images": 28}))
    return run.root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(made, tmp_path / "digits_guide" / "abc")
    return RunFolder(tmp_path / "digits_guide" / "abc")


def answer(run: RunFolder, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert guide.main([str(run.root), *FEW, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def drawn(run: RunFolder) -> list[EvaluationRecord]:
    return [each for each in records(run) if each.sweep]


def test_every_weak_model_of_a_run_is_searched_and_reported_in_the_other_net(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answer(run, capsys)
    assert sorted(row["weak"] for row in said["methods"]) == sorted(ALL)
    assert said["complete"] and said["label_free"] and not said["missing"]
    search, report = said["search"], said["report"]
    assert (search["metric"], report["metric"]) == ("fd_digits", "fd_digits_odd")
    assert report["feature_sha256"] == FEATURES["fd_digits_odd"].sha256
    assert (search["samples"], search["seed"], report["samples"], report["seed"]) == (40, 0, 60, 40)
    for row in said["methods"]:
        # two weights, the other interval, and the other weight in it where that is better
        assert row["points"] in (3, 4)
        chosen = [
            each
            for each in records(run)
            if each.metric == "fd_digits" and each.protocol["settings"].get("weak", "condition") == row["weak"]
            and each.protocol["g"] != 1
        ]  # fmt: skip
        assert len(chosen) == row["points"]
        best = min(each.scores["fd_digits"] for each in chosen)
        assert row["searched"]["score"] == best
        assert row["cost"] > 1 and row["difference"]["low"] < row["difference"]["high"]
    odd = {
        each.protocol["settings"].get("weak", "condition") if each.protocol["g"] != 1 else "": each
        for each in records(run)
        if each.metric == "fd_digits_odd"
    }
    for row in said["methods"]:
        # below 0 where guidance is better
        assert row["reported"]["score"] == odd[row["weak"]].score
        gap, se = recipe.difference(odd[row["weak"]], odd[""])
        assert row["difference"]["value"] == pytest.approx(gap)
        assert row["difference"]["high"] - gap == pytest.approx(2.262 * se)
    scores = [row["reported"]["score"] for row in said["methods"]]
    assert scores == sorted(scores)
    # chosen by the search alone: by the reported scores it would be too good
    best = min(said["methods"], key=lambda row: row["searched"]["score"])
    assert said["best"] == best["weak"] and best["against_best"]["value"] == 0
    assert said["better_than_unguided"] == (best["difference"]["high"] < 0)
    assert (run.evals / "guide.png").is_file()
    assert json.loads((run.evals / "guide.json").read_text()) == said


def test_a_search_that_was_ended_goes_on_and_says_what_a_whole_one_says(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--methods", "condition", "head"]
    whole = answer(run, capsys, *words)
    points = {each.key for each in drawn(run)}
    lost = sorted(points)[::2]
    for path in [path for key in lost for path in run.evals.glob(f"{key}.*.json")]:
        path.unlink()
    again: list[str] = []
    real = guide_search.evaluate

    def evaluate(wanted: dict[str, Any], status: RankStatus) -> None:
        again.append(wanted["key"])
        real(wanted, status)

    monkeypatch.setattr(guide_search, "evaluate", evaluate)
    for _ in range(2):
        assert answer(run, capsys, *words) == whole
        assert {each.key for each in drawn(run)} == points
        assert sorted(again) == lost


def test_a_point_whose_samples_are_not_finite_is_the_worst_and_ends_no_search(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--methods", "head", "--intervals", "0,1"]
    for _ in range(2):  # also where all else is known
        said = answer(run, capsys, *words, "--weights", "1.5", "1e38")
        (row,) = said["methods"]
        assert said["complete"] and row["g"] == 1.5 and row["reported"]["score"] is not None
        assert [(each["g"], each["score"] is None) for each in row["curve"]] == [
            (1.5, False),
            (1e38, True),
        ]
    assert all(each.done for each in records(run))
    with pytest.raises(UserError, match=r"--weights 1e\+38: no weak model makes finite samples"):
        answer(run, capsys, *words, "--weights", "1e38")


def test_a_budget_ends_the_search_with_what_is_known_and_says_so(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--budget"):
        guide.main([str(run.root), *FEW, "--budget", "0"])
    assert not drawn(run)
    one = answer(run, capsys, "--methods", "head", "--intervals", "0,1")
    both = answer(run, capsys, "--methods", "head", "--budget", "0")
    assert one["complete"] and not both["complete"]
    assert both["methods"] == one["methods"]
    # one whose turn the budget left out is no model of samples that are not finite
    two = answer(run, capsys, "--methods", "head", "routed", "--budget", "0")
    assert "the budget ended before its turn" in json.dumps(two)
    assert "finite" not in json.dumps(two["missing"])
    assert guide.main([str(run.root), *FEW, "--methods", "head", "--budget", "0"]) == 0
    assert "not complete" in capsys.readouterr().out


def test_what_it_chose_is_a_recipe_that_sampling_takes(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answer(run, capsys, "--methods", "head", "routed")
    front = next(each for each in recipe.read(run) if each.metric == "fd_digits")
    point = next(each for each in front.points if each.key == front.best)
    plain = next(each for each in front.points if each.sampler["g"] == 1)
    searched = {row["weak"]: row["searched"]["score"] for row in said["methods"]}
    expected = min(
        {"condition": plain.score} | searched, key=({"condition": plain.score} | searched).get
    )
    assert point.sampler.get("weak", "condition") == expected
    words = [str(run.root), "--recipe", "fd_digits", "--count", "2", "--out", str(tmp_path / "out")]
    assert sample.main([*words, "--json"]) == 0
    sampled = json.loads(capsys.readouterr().out)["sampler"]
    assert sampled["g"] == front.recipe.sampler["g"]
    assert sampled["weak"] == front.recipe.sampler.get("weak", "condition")


def test_a_reported_score_says_by_which_net_its_point_was_chosen(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(run, capsys, "--methods", "head")
    answer(run, capsys, "--methods", "head", "--report-protocol", "fd_digits")
    flagged = {}
    for each in drawn(run):
        flagged.setdefault((each.metric, each.protocol["seed"]), set()).add(
            bool(each.contaminations)
        )
    assert flagged == {
        ("fd_digits", 0): {False},
        ("fd_digits_odd", 40): {False},
        ("fd_digits", 40): {True},
    }


@pytest.mark.parametrize("first", ["fd_digits", "fd_digits_odd"])
def test_a_net_that_searched_does_not_report(
    run: RunFolder, capsys: pytest.CaptureFixture[str], first: str
) -> None:
    said = answer(run, capsys, "--methods", "head", "--protocol", first, "--weights", "1.5")
    assert {said["search"]["metric"], said["report"]["metric"]} == {"fd_digits", "fd_digits_odd"}
    assert said["search"]["metric"] == first


def test_what_a_run_lacks_is_said_with_what_would_give_it(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "digits_class" / "plain")
    manifest = manifests.load(digits)
    data = {"root": str(digits), "header": manifest.header, "manifest": manifest.hash}
    labels = {"source": "labels", "told": True, "p": [0.1] * 10, "label_free": False}
    write_snapshot(
        run.snapshot(7), digits, "sampler.steps=2", experiment="digits_class", data=data,
        guidance=labels,
    )  # fmt: skip
    run.run_json.write_text(json.dumps({"id": "plain", "images": 7}))
    said = answer(run, capsys)
    assert [row["weak"] for row in said["methods"]] == ["condition"] and not said["label_free"]
    cures = {"head": "auxiliary.weight", "routed": "model.route", "average": "train.ema_halflife"}
    cures["snapshot"] = "train.snapshot_every"
    for word, cure in cures.items():
        assert cure in said["missing"][word]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--weights", "1"], "--weights 1"),
        (["--intervals", "0.8,0.2"], "--intervals 0.8,0.2"),
        (["--intervals", "some"], "--intervals some"),
        (["--methods", "snapshot-5"], "--methods snapshot-5"),
        (["--methods", "banana"], "--methods=banana"),
        (["--samples", "3"], "--samples 3"),
        (["--report-samples", "3"], "--report-samples 3"),
        (["--protocol", "fid_adm"], "--protocol fid_adm"),
        (["--ema", "4"], "--ema 4"),
    ],
)
def test_guide_refuses_what_cannot_be_searched_before_it_draws(
    run: RunFolder, words: list[str], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        guide.main([str(run.root), *FEW, *words])
    assert not drawn(run)


@pytest.mark.skipif(locate(EFFNET) is None, reason="the extra `features` is not installed")
def test_a_run_that_is_scored_by_nothing_is_searched_by_the_protocol_that_is_typed(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "digits_class" / "unscored")
    manifest = manifests.load(digits)
    data = {"root": str(digits), "header": manifest.header, "manifest": manifest.hash}
    labels = {"source": "labels", "told": True, "p": [0.1] * 10, "label_free": False}
    write_snapshot(
        run.snapshot(7), digits, "sampler.steps=2", "evaluation=none", f"data.root={digits}",
        experiment="digits_class", data=data, guidance=labels,
    )  # fmt: skip
    run.run_json.write_text(json.dumps({"id": "unscored", "images": 7}))
    said = answer(run, capsys, "evaluation=fd_effnet")
    assert said["search"]["metric"] == said["report"]["metric"] == "fd_effnet"
    first = drawn(run)
    assert first and {each.protocol["metric"] for each in first} == {"fd_effnet"}
    assert answer(run, capsys, "evaluation=fd_effnet")["methods"] == said["methods"]
    assert drawn(run) == first
    sets = answer(run, capsys, "evaluation=fd_effnet", "evaluation.sets=2", "--weights", "1.5")
    # two sets of 40 from seed 0 were searched
    assert sets["report"]["seed"] == 80
    first = drawn(run)
    for words, why in (
        (["evaluation=fd_effnet", "--report-samples", "12"], "--report-samples 12: .*take 20"),
        (["evaluation=fid_adm"], "the inception weights are not here"),
        (["evaluation=fd_effnet", f"evaluation.shards={tmp_path}"], "evaluation.shards="),
        (["evaluation=fd_efnet"], "fd_effnet"),
        (["sampler.g=2"], "sampler.g=2: settings say how to score samples"),
    ):
        with pytest.raises(UserError, match=why):
            guide.main([str(run.root), *FEW, *words])
    assert drawn(run) == first


def test_a_probe_of_layers_is_nothing_to_search_by(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads the network, however that is guided: every point would have one score."""
    run = RunFolder(tmp_path / "digits_class" / "probed")
    manifest = manifests.load(digits)
    data = {"root": str(digits), "header": manifest.header, "manifest": manifest.hash}
    labels = {"source": "labels", "told": True, "p": [0.1] * 10, "label_free": False}
    write_snapshot(
        run.snapshot(7), digits, "sampler.steps=2", "evaluation=[probe_digits,fd_digits]",
        experiment="digits_class", data=data, guidance=labels,
    )  # fmt: skip
    run.run_json.write_text(json.dumps({"id": "probed", "images": 7}))
    with pytest.raises(UserError, match=r"--protocol probe: samples .* scored by fd_digits"):
        guide.main([str(run.root), *FEW, "--protocol", "probe"])
    assert not drawn(run)
    assert answer(run, capsys)["search"]["metric"] == "fd_digits"
