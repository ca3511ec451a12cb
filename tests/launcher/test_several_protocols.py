"""A run with several protocols: each scores every snapshot, and one that lacks a file holds up no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.compose import changed, compose
from launcher.folder import Attempt
from launcher.reconcile import decide
from launcher.reconcile.model import AttemptView, JobView, RunView
from selfguide.spec.config import Config
from selfguide.spec.files import plain
from selfguide.spec.identity import identity
from selfguide.spec.lacks import lacks
from selfguide.spec.records import EvaluationRecord, Protocol, record_key
from selfguide.spec.run import RunFolder
from selfguide.spec.validate import validate
from selfguide.spec.weight_files import FOLDER
from shards.errors import UserError

BASE = ["experiment=digits_dit", "cluster=local"]
ABOUT = {"data": {"manifest": "m", "header": {"kind": "image"}}, "guidance": {}}


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv(FOLDER, str(tmp_path / "weights"))


def config_of(*overrides: str) -> Config:
    found = compose([*BASE, *overrides])
    validate(found)
    return found


def record_of(by: Config, images: int, status: str = "done") -> EvaluationRecord:
    protocol = Protocol.of(by, ABOUT)
    return EvaluationRecord(
        status=status,  # type: ignore[arg-type]
        key=record_key(images, protocol),
        attempt=1,
        images=images,
        protocol=protocol.plain(),
        protocol_key=protocol.key,
        scores={str(protocol.metric): float(images)} if status == "done" else {},
    )


def view_of(config: Config, *records: EvaluationRecord) -> RunView:
    """A finished run with snapshots at 64 and 128 images."""
    run = RunFolder(Path("/runs/digits_dit/abc"))
    job = JobView(record={"kind": "local", "id": "1", "nodes": 1, "tasks": 1}, state="gone")
    return RunView(
        folder=run, time=1000.0, id="abc", experiment="digits_dit", name=None, hash="0",
        identity=identity(config, "m"), images=128, created=0.0, tries=1,
        attempts=(AttemptView(files=Attempt(run.attempt(1)), opened=0.0, world=1, job=job),),
        config=config, snapshots=dict.fromkeys((64, 128), ABOUT), records=records,
        lacks=lacks(config, None),
    )  # fmt: skip


def test_each_named_protocol_has_the_settings_of_its_own_and_all_that_are_given() -> None:
    config = config_of("evaluation=[fd_digits,fid_clean]", "evaluation.seed=7")
    assert [c.evaluation.protocol for c in config.scored_by] == ["fd_digits", "fid_clean"]
    assert [c.evaluation.samples for c in config.scored_by] == [5000, 50_000]
    assert {c.evaluation.seed for c in config.scored_by} == {7}
    assert not any(c.more_evaluations for c in config.scored_by)
    one = config_of("evaluation=fd_digits", "evaluation.seed=7")
    assert identity(config, "m") == identity(one, "m")
    assert config.scored_by[0] == one == one.scored_by[0]


def test_a_choice_replaces_all_protocols_of_a_run_and_a_key_is_each_ones() -> None:
    several = config_of("evaluation=[fd_digits,fid_clean]")
    assert not changed(several, ["evaluation=fd_digits"]).more_evaluations
    found = changed(several, ["evaluation.attempts=5"])
    assert [c.evaluation.attempts for c in found.scored_by] == [5, 5]
    added = changed(config_of(), ["evaluation=[fd_digits,fid_adm]"])
    assert [c.evaluation.protocol for c in added.scored_by] == ["fd_digits", "fid_adm"]


@pytest.mark.parametrize("given", ["[fd_digits,none]", "[fd_digits,fd_digits]", "[]"])
def test_protocols_that_make_no_list_are_refused_with_one_that_does(given: str) -> None:
    with pytest.raises(UserError) as error:
        compose([*BASE, f"evaluation={given}"])
    cure = str(error.value).rpartition(" ")[2]
    assert config_of(cure).evaluation.protocol == "fd_digits"


def test_an_unknown_protocol_in_a_list_is_named() -> None:
    with pytest.raises(UserError, match="evaluation=fid_clen"):
        compose([*BASE, "evaluation=[fd_digits,fid_clen]"])


def test_snapshot_is_unscored_until_every_protocol_has_its_record() -> None:
    config = config_of("evaluation=[fd_digits,fid_clean]")
    digits, clean = config.scored_by
    assert decide.unscored(view_of(config)) == (64, 128)
    view = view_of(config, record_of(digits, 64), record_of(digits, 128), record_of(clean, 64))
    assert decide.unscored(view) == (128,)
    assert decide.unscored(view, digits) == ()
    assert decide.unscored(view, clean) == (128,)
    failed = view_of(config, record_of(digits, 64), record_of(clean, 64, "failed"))
    assert decide.unscorable(failed) == (64,)


def test_only_the_protocol_that_lacks_its_file_waits() -> None:
    config = config_of("evaluation=[fd_digits,fid_clean]")
    digits, clean = config.scored_by
    view = view_of(config)
    assert [lack.what for lack in view.lacks] == ["inception weights"]
    assert decide.evaluations_wanted(view, digits).start == (128, 64)
    assert decide.evaluations_wanted(view, clean).start == ()
    assert decide.startable(view)
    done = view_of(config, record_of(digits, 64), record_of(digits, 128))
    assert not decide.startable(done)


def test_newest_score_of_several_protocols_is_that_of_the_first() -> None:
    config = config_of("evaluation=[fd_digits,fid_clean]")
    digits, clean = config.scored_by
    view = view_of(config, record_of(digits, 64), record_of(clean, 64), record_of(clean, 128))
    newest = decide.newest_score(view)
    assert newest is not None
    assert (newest.metric, newest.images) == ("fd_digits", 64)


def test_config_of_several_protocols_is_read_again_as_it_was_written() -> None:
    from selfguide.spec.config import build

    config = config_of("evaluation=[fd_digits,fid_clean]")
    assert build(Config, plain(config)) == config
