"""tools.best: the snapshot that training images' scores choose, written down as a choice; the last one beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfguide.spec.run import RunFolder
from selfguide.spec.selections import selections
from shards.errors import UserError
from tests.board.fakes import PROTOCOL, add_record, make_run
from tools.best import main

NUMBERS = (64_000, 128_000, 192_000, 256_000)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Four snapshots with scores against training images, and against others."""
    made = make_run(tmp_path / "runs")
    said = json.loads(made.run_json.read_text())
    manifest = said["identity"]["data"]["manifest"]
    for images, train, val in zip(NUMBERS, (9.0, 3.0, 4.0, 5.0), (8.0, 6.0, 2.0, 7.0), strict=True):
        against = {"reference": manifest}
        add_record(made, images, {"fd_digits": train, "nmi": train / 10}, protocol=against)
        add_record(made, images, {"fd_digits": val}, protocol={"reference": "val"})
    return made


def asked(run: RunFolder, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([str(run.root), "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_best_on_training_images_is_chosen_and_the_last_stands_beside_it(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    said = asked(run, capsys)
    assert (said["selection"], said["metric"]) == ("best_on_train", "fd_digits")
    assert (said["best"]["images"], said["last"]["images"]) == (128_000, 256_000)
    # both have what they score against other images, which chose nothing
    for which, values in (("best", {3.0, 6.0}), ("last", {5.0, 7.0})):
        found = {scores["fd_digits"] for scores in said[which]["scores"].values()}
        assert found == values
    (choice,) = selections(run)
    assert (choice.by, choice.images) == ("best_on_train", 128_000)
    assert len(choice.among) == len(NUMBERS) and choice.sha256 == PROTOCOL.feature_sha256
    # the one that was chosen, and none behind it
    assert [choice.holds_for(images) for images in NUMBERS] == [False, True, False, False]
    # the same question again is the same choice
    assert asked(run, capsys) == said and len(selections(run)) == 1


def test_the_best_beside_a_malformed_record_is_that_of_the_whole_ones_and_names_its_file(
    run: RunFolder, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = asked(run, capsys)
    for name, text in (("img-000320000-cut.1", '{"schema": 1, "sta'), ("img-000320000-of.1", "[]")):
        (run.evals / f"{name}.json").write_text(text)
    caplog.clear()
    assert asked(run, capsys) == whole
    assert "img-000320000-cut.1.json" in caplog.text and "img-000320000-of.1.json" in caplog.text


def test_a_score_that_is_better_high_is_chosen_by_its_highest(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(run, capsys, "--metric", "nmi")["best"]["images"] == 64_000


def test_a_choice_that_cannot_be_made_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fd_digitz"):
        main([str(run.root), "--metric", "fd_digitz"])
    identity = json.loads(run.run_json.read_text())["identity"]
    again = {"reference": identity["data"]["manifest"], "g": 2.0}
    add_record(run, 256_000, {"fd_digits": 1.0}, protocol=again)
    with pytest.raises(UserError, match="--protocol KEY"):
        main([str(run.root)])
    one = make_run(tmp_path / "other")
    add_record(one, 64_000, {"fd_digits": 1.0}, protocol={"reference": "val"})
    with pytest.raises(UserError, match="leaves no choice"):
        main([str(one.root)])
    assert not selections(run) and not selections(one)
