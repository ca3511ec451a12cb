"""`launcher.tune`: asks a run that trains, refuses what cannot be, and tells what became of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import tune
from launcher.compose import compose
from selfguide.spec import tuning
from selfguide.spec.files import to_yaml
from selfguide.spec.run import RunFolder, write_record
from shards.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """One whose second attempt is the newest; batches of 128 images."""
    found = RunFolder(tmp_path / "runs" / "test" / "3f2a")
    write_record(found.run_json, {"id": "3f2a", "name": None, "experiment": "test", "images": 1280})
    config = compose(["experiment=digits_uncond", "cluster=local", "train.batch=128"])
    for number in (1, 2):
        found.attempt(number).mkdir(parents=True)
        (found.attempt(number) / "config.yaml").write_text(to_yaml(config))
    return found


def asked(
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    word: str,
    *settings: str,
    exits: dict[str, Any] | None = None,
) -> int:
    view = SimpleNamespace(id="3f2a", attempts=[SimpleNamespace(exits=exits or {})])
    monkeypatch.setattr(tune, "read", lambda *_, **__: view)
    monkeypatch.setattr(tune.decide, "state", lambda _: SimpleNamespace(word=word))
    return tune.main(["3f2a", *settings, "--runs", str(run.root.parents[1]), "--json"])


def test_a_request_is_of_the_newest_attempt_and_listed_with_what_became_of_it(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(run, monkeypatch, "running", "log_every=256", "save=now") == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["request"] == 1 and said["attempt"] == 2
    assert said["settings"] == {"log_every": 256, "save": True}
    tuning.record_applied(run, 1, 2, 640)
    assert asked(run, monkeypatch, "running") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["applied"]["images"] == 640


@pytest.mark.parametrize(
    "settings", [["log_every=100"], ["lr=1"], ["trace"], ["save=now", "stop=1"]]
)
def test_a_setting_that_cannot_be_leaves_nothing_asked(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    with pytest.raises(UserError):
        asked(run, monkeypatch, "running", *settings)
    assert tuning.newest(run) == 0


@pytest.mark.parametrize("word", ["finished", "failed", "cancelled"])
def test_a_run_that_has_ended_is_asked_nothing(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    with pytest.raises(UserError, match=r"launcher\.resume"):
        asked(run, monkeypatch, word, "save=now")
    assert tuning.newest(run) == 0


@pytest.mark.parametrize("setting", ["stop=after_save", "save=now", "trace=5"])
def test_what_no_attempt_would_apply_is_refused_between_two_of_them(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """The next attempt applies what was asked of itself alone; a cadence holds in it, too."""
    ended: dict[str, Any] = {"0": {"class": "ok"}}
    with pytest.raises(UserError, match=rf"attempt 2 .* give {setting} again .*launcher\.cancel"):
        asked(run, monkeypatch, "queued", setting, exits=ended)
    assert tuning.newest(run) == 0
    assert asked(run, monkeypatch, "queued", "log_every=256", exits=ended) == 0
