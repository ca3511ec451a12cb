"""Resuming a run by its own config, and extending it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import payloads
import pytest
import yaml
from waiting import until

from launcher import backends, cancel, resume, submit
from launcher.folder import Attempt
from launcher.reconcile import act, decide, launch
from launcher.reconcile.view import read
from selfguide.spec.corrections import CORRECTIONS
from selfguide.spec.files import read_config
from selfguide.spec.run import RunFolder, read_record
from shards import storage
from shards.errors import UserError
from tests.guard.runs import FIXTURES


def send(settings: list[str], *more: str) -> dict:
    return submit.submit(submit.resolve([*settings, *more]))


def ended(run: RunFolder) -> bool:
    return backends.state(read_record(Attempt.newest(run).job)) == "gone"


@pytest.fixture
def free(settings: list[str]) -> list[str]:
    """Settings in which nothing depends on the length of training."""
    return [*settings, "guidance=none"]


@pytest.fixture
def finished(free: list[str], payload: Callable[..., None]) -> RunFolder:
    """A run of 1280 images that has published its last snapshot."""
    payload(train=payloads.publish_all)
    run = RunFolder(Path(send(free)["folder"]))
    until(lambda: ended(run))
    assert decide.state(read(run)).word == "finished"
    payload(train=payloads.nap)
    return run


def test_resume_of_a_stopped_run_takes_its_own_config_with_the_settings_given(
    free: list[str], payload: Callable[..., None], capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    payload(train=payloads.nap)
    run = RunFolder(Path(send(free, "train.log_every=256", "cluster.gpus_per_node=1")["folder"]))
    cancel.cancel(run)
    assert resume.main([run.root.name[:6], "--runs", str(runs), "nodes=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attempt"] == 2
    config = read_config(Attempt(run.attempt(2)).config)
    assert (config.train.log_every, config.cluster.gpus_per_node) == (256, 1)
    cancel.cancel(run)
    assert resume.main([str(run.root), "cluster.gpus_per_node=2", "evaluation=none"]) == 0
    assert read_config(Attempt(run.attempt(3)).config).cluster.gpus_per_node == 2
    assert resume.main([str(run.root), "--json"]) == 0  # joins it
    assert run.attempt_numbers() == [1, 2, 3]


def test_resume_with_more_images_extends_the_run_under_its_id(finished: RunFolder) -> None:
    before = finished.describe()
    assert resume.main([str(finished.root), "train.images=2_560"]) == 0
    after = finished.describe()
    assert (after["id"], after["hash"], after["images"]) == (before["id"], before["hash"], 2560)
    (extension,) = after["extensions"]
    assert (extension["from"], extension["to"]) == (1280, 2560)
    assert extension["time"] > before["created"] and "@" in extension["by"]
    assert read_config(Attempt(finished.attempt(2)).config).train.images == 2560
    assert not finished.finished() and finished.published() == [640, 1280]
    assert decide.state(read(finished)).word == "running"


def test_submit_of_an_extended_run_by_its_first_command_trains_to_the_new_length(
    finished: RunFolder, free: list[str], payload: Callable[..., None]
) -> None:
    resume.main([str(finished.root), "train.images=2560"])
    cancel.cancel(finished)
    done = send(free)
    assert (done["run"], done["attempt"], done["images"]) == (finished.root.name, 3, 2560)
    assert read_config(Attempt(finished.attempt(3)).config).train.images == 2560
    assert len(finished.describe()["extensions"]) == 1


def test_submit_by_name_with_more_images_extends_that_run(
    free: list[str], payload: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    payload(train=payloads.publish_all)
    run = RunFolder(Path(send(free, "name=first")["folder"]))
    until(lambda: ended(run))
    assert submit.main([*free, "name=first", "train.images=2560"]) == 0
    assert "extended from 1,280 to 2,560 images" in capsys.readouterr().out
    assert run.describe()["images"] == 2560 and run.attempt_numbers() == [1, 2]
    with pytest.raises(UserError, match=r"train\.images=640"):
        send(free, "name=first", "train.images=640")


def test_plain_submit_that_differs_in_images_prints_the_command_that_extends(
    finished: RunFolder, free: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = [*free, "train.images=2560"]
    assert submit.main([*longer, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["run"] != finished.root.name and done["state"] == "submitted"
    assert done["shorter"]["run"] == finished.root.name
    program, module, command, *arguments = done["shorter"]["command"].split()
    assert (program, module, command) == ("python", "-m", "launcher.resume")
    # as printed
    assert resume.main(arguments) == 0
    assert finished.describe()["images"] == 2560


def test_extension_that_the_cluster_refuses_leaves_the_run_as_it_was(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("no room")

    before = finished.describe()
    monkeypatch.setattr(launch, "launch_attempt", refuse)
    with pytest.raises(UserError, match="no room"):
        resume.main([str(finished.root), "train.images=2560"])
    assert finished.describe() == before and finished.attempt_numbers() == [1]


def test_extension_after_the_switch_of_online_guidance_is_refused(
    settings: list[str], payload: Callable[..., None]
) -> None:
    payload(train=payloads.publish_all)
    run = RunFolder(Path(send(settings)["folder"]))
    until(lambda: ended(run))
    with pytest.raises(UserError, match=r"guidance\.switch"):
        resume.main([str(run.root), "train.images=2560"])
    assert "extensions" not in run.describe()


def test_resume_with_a_setting_of_what_the_run_is_is_refused_with_the_difference(
    finished: RunFolder,
) -> None:
    with pytest.raises(UserError, match="seed was 0 and is 3"):
        resume.main([str(finished.root), "seed=3"])
    for wrong in ("name=other", "runs=/elsewhere", "experiment=toy"):
        with pytest.raises(UserError):
            resume.main([str(finished.root), wrong])
    assert finished.attempt_numbers() == [1]


def test_evaluation_of_a_run_of_older_code_gets_a_copy_of_todays(
    finished: RunFolder, payload: Callable[..., None]
) -> None:
    at = Attempt(finished.attempt(1))
    assert act._current_code(at) == at.code
    about = json.loads(at.code.with_suffix(".json").read_text())
    at.code.with_suffix(".json").write_text(json.dumps(about | {"hash": "older"}))
    copy = act._current_code(at)
    assert copy.parent == finished.root / "code" and (copy / "launcher" / "attempt").is_dir()
    assert act._current_code(at) == copy


def test_resume_of_a_choice_that_was_corrected_since_says_what_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run of guidance=sgfm_code, whose config knows none of the fields that came later."""
    run = RunFolder(tmp_path / "digits_dit" / "torch_online")
    shutil.copytree(FIXTURES / "torch_online", run.root)
    path = Attempt.newest(run).config
    values = yaml.safe_load(path.read_text())
    before = CORRECTIONS[-1]
    known = dict(before.known_by)
    known["told_rows"] = known.pop("condition_rows")  # its name then
    values["guidance"] |= known
    path.write_text(yaml.safe_dump(values))
    assert resume.main([str(run.root), "dry_run=true"]) == 0
    assert "guidance=sgfm_code was corrected since" in caplog.text
    assert all(f"guidance.{name}=" in caplog.text for name in before.now)


def test_guidance_of_a_run_that_goes_on_leads_away_from_what_is_published_or_will_be(
    free: list[str], payload: Callable[..., None], runs: Path
) -> None:
    payload(train=payloads.publish_all)
    # its last snapshot is at no multiple of snapshot_every
    settings = [*free, "train.snapshot_every=1024", "auxiliary.weight=0.5"]
    run = RunFolder(Path(send(settings)["folder"]))
    until(lambda: ended(run))
    payloads.publish(run, 1280)
    run.checkpoint(1280).mkdir(parents=True)
    (run.checkpoint(1280) / "part").write_bytes(b"x")
    storage.publish_folder(run.checkpoint(1280), extra={"images": 1280})
    assert run.published() == [1024, 1280]
    longer = [
        str(run.root),
        "train.images=5120",
        "train.snapshot_every=640",
        "sampler.g=2",
        "dry_run=true",
    ]
    for images in (1024, 1280, 1920, 2560, 4480):
        assert resume.main([*longer, f"sampler.weak=snapshot-{images}"]) == 0, images
    # passed without one
    with pytest.raises(
        UserError, match=r"take sampler\.weak=snapshot-1024 or sampler\.weak=snapshot-1280$"
    ):
        resume.main([*longer, "sampler.weak=snapshot-640"])
    with pytest.raises(
        UserError, match=r"=head\+snapshot-1280 or sampler\.weak=head\+snapshot-1920$"
    ):
        resume.main([*longer[:-1], "sampler.weak=head+snapshot-1600"])
    assert run.attempt_numbers() == [1] and run.describe()["images"] == 1280
