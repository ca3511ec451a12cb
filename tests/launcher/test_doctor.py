"""What a site would cost a run: verdicts from what Slurm says, promises of file systems, nodes side by side."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import backends, doctor
from launcher.attempt import disks, node
from launcher.attempt.finding import Finding
from launcher.backends import slurm_site
from launcher.backends.local import Local
from launcher.backends.slurm import Slurm
from launcher.backends.slurm_site import Site
from launcher.checks import nodes, preemption
from launcher.checks.preemption import Plan
from launcher.compose import compose, compose_cluster
from launcher.folder import Attempt
from selfguide.spec.files import to_yaml
from selfguide.spec.run import RunFolder, write_record

CONFIG = """\
Configuration data as of 2026-11-28T15:00:00
AccountingStorageType   = accounting_storage/slurmdbd
JobRequeue              = 1
JobSubmitPlugins        = lua
KillWait                = 30 sec
MaxArraySize            = 1001
OverTimeLimit           = 5 min
PreemptMode             = REQUEUE
PreemptType             = preempt/{by}
{key}
SLURM_VERSION           = 23.11.4
SlurmdTimeout           = 300 sec
"""
PARTITIONS = (
    "PartitionName=main Default=YES GraceTime=60 MaxTime=UNLIMITED PreemptMode=REQUEUE State=UP\n"
    "PartitionName=short Default=NO GraceTime=0 MaxTime=1-02:30:00 PreemptMode=GANG,SUSPEND State=UP\n"
    "PartitionName=kill Default=NO GraceTime=10 MaxTime=04:00:00 PreemptMode=CANCEL State=UP\n"
)
QOS = "normal|00:00:00|cluster||\nhigh|00:02:00|off|3|12:00:00\n"
SHARES = "lab||normal\nother|2|high\n"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the disk of this machine is just now is none of the verdicts that are tested."""
    monkeypatch.setattr(disks, "SLOW_FSYNC_S", 600.0)
    monkeypatch.setattr(disks, "LATE_S", 600.0)


def ask(key: str = "PreemptParameters = (null)", by: str = "partition_prio") -> slurm_site.Ask:
    said = {
        "config": CONFIG.format(key=key, by=by),
        "partition": PARTITIONS,
        "qos": QOS,
        "assoc": SHARES,
    }
    return lambda command: next(text for word, text in said.items() if word in command)


def site(
    partition: str | None = None, qos: str | None = None, account: str | None = None, **how: str
) -> Site:
    return slurm_site.read(ask(**how), partition, account, qos)


def test_settings_of_the_default_partition_are_read() -> None:
    found = site()
    assert (found.version, found.kill_wait_s, found.grace_s, found.preempt_mode) == (
        "23.11.4",
        30,
        60,
        "REQUEUE",
    )
    assert (found.max_time_min, found.over_time_limit_min, found.max_array) == (None, 5, 1001)
    assert (found.submit_plugins, found.accounting, found.user_signal) == ("lua", True, False)


@pytest.mark.parametrize(
    "key",
    [
        "SlurmctldParameters = preempt_send_user_signal",
        "PreemptParameters = send_user_signal,strict_order",
    ],
)
def test_signal_before_a_preemption_is_known_by_its_old_and_its_new_key(key: str) -> None:
    assert site(key=key).user_signal


def test_least_generous_of_several_partitions_counts() -> None:
    found = site("main,kill")
    assert (found.grace_s, found.max_time_min, found.preempt_mode) == (10, 240, "CANCEL")
    assert site("short").max_time_min == 1590 and site("short").preempt_mode == "SUSPEND"


def test_preemption_by_qos_has_the_grace_of_the_qos() -> None:
    found = site(by="qos", qos="high", account="other")
    assert (found.preempt_mode, found.grace_s, found.max_time_min, found.max_submit) == (
        "OFF",
        120,
        720,
        2,
    )
    assert (site(by="qos").preempt_mode, site(by="qos").grace_s) == ("REQUEUE", 0)


def test_partition_above_which_there_is_none_is_not_preempted() -> None:
    above = PARTITIONS.replace("PartitionName=main", "PartitionName=main PriorityTier=10")
    said = {"config": CONFIG.format(key="", by="partition_prio"), "partition": above}
    for name, mode in (("main", "OFF"), ("kill", "CANCEL"), ("main,kill", "CANCEL")):
        found = slurm_site.read(lambda command: said.get(command[2], ""), name, None, None)
        assert found.preempt_mode == mode


def test_limits_of_a_partition_with_a_qos_of_its_own_hold_as_well() -> None:
    own = PARTITIONS.replace("PartitionName=main", "PartitionName=main QoS=high")
    said = {"config": CONFIG.format(key="", by="partition_prio"), "partition": own, "qos": QOS}
    found = slurm_site.read(
        lambda command: said.get(command[3 if "-nP" in command else 2], ""), None, None, None
    )
    assert (found.max_time_min, found.max_submit) == (720, 3)


def test_without_preemption_modes_mean_nothing() -> None:
    assert site(by="none").preempt_mode == "OFF"


def test_commands_that_are_not_here_are_named_and_nothing_is_guessed() -> None:
    found = slurm_site.read(lambda command: "", None, None, None)
    assert (
        found.silent == ("scontrol", "sacctmgr")
        and found.preempt_mode == ""
        and found.kill_wait_s is None
    )
    plan = Plan(save_s=1.0)
    verdicts = [preemption.commands(found).verdict, preemption.preemption(found, plan).verdict]
    assert verdicts == ["warning", "warning"]
    assert (
        preemption.time_limit(found, plan).verdict == "ok"
        and preemption.lost_node(found, plan).verdict == "ok"
    )


PLAN = Plan(save_s=10.0, step_s=0.5, every=1000, batch=64, timeout_min=60, warn_s=80)


@pytest.mark.parametrize(
    ("grace", "save_s", "verdict", "word"),
    [
        (0, 14.0, "ok", "lossless"),  # 30 s of KillWait, two saves and a step
        (0, 14.9, "warning", "lossless, but loses up to 1,000 steps (8.3 min)"),
        (0, 29.6, "warning", "loses up to 1,000 steps (8.3 min)"),
        (60, 29.6, "ok", "lossless"),
    ],
)
def test_preemption_is_lossless_where_the_save_fits_in(
    grace: int, save_s: float, verdict: str, word: str
) -> None:
    where = Site(preempt_mode="REQUEUE", grace_s=grace, kill_wait_s=30)
    found = preemption.preemption(where, replace(PLAN, save_s=save_s))
    assert found.verdict == verdict and found.text.startswith(word)
    assert found.figures["left_s"] == grace + 30 and found.figures["save_s"] == save_s
    assert bool(found.cure) == (verdict != "ok")


def test_cure_of_a_loss_is_a_cadence_that_can_be_typed() -> None:
    found = preemption.preemption(Site(preempt_mode="REQUEUE", grace_s=0, kill_wait_s=1), PLAN)
    assert "train.checkpoint_every=16000" in found.cure and "GraceTime of 20 s" in found.cure


@pytest.mark.parametrize(
    ("mode", "changes", "verdict"),
    [
        ("REQUEUE", {"restart": "none"}, "bad"),
        ("CANCEL", {"restart": "requeue", "watched": False}, "bad"),
        ("CANCEL", {"restart": "requeue"}, "ok"),
        ("CANCEL", {}, "ok"),
        ("SUSPEND", {"restart": "none"}, "ok"),
        ("OFF", {"restart": "none"}, "ok"),
    ],
)
def test_preemption_after_which_nothing_goes_on_loses_the_run(
    mode: str, changes: dict[str, Any], verdict: str
) -> None:
    where = Site(preempt_mode=mode, grace_s=60, kill_wait_s=30)
    assert preemption.preemption(where, replace(PLAN, **changes)).verdict == verdict


def test_limits_that_a_run_does_not_fit_in_are_named_with_what_does() -> None:
    long = preemption.time_limit(Site(max_time_min=30), PLAN)
    assert (long.verdict, long.cure) == ("bad", "give cluster.timeout_min=30")
    scancel = preemption.outside(Site(kill_wait_s=5), PLAN)
    assert scancel.verdict == "ok" and scancel.text.startswith("loses up to 1,000 steps")
    assert (
        preemption.small_limit(Site(max_time_min=30), 60).cure
        == "give cluster.evaluation_timeout_min=30"
    )
    assert preemption.limits(Site(max_submit=3), PLAN).verdict == "warning"
    assert preemption.limits(Site(max_submit=4, max_array=10), PLAN).verdict == "ok"
    assert preemption.lost_node(Site(), replace(PLAN, step_s=4.0)).verdict == "warning"


# ---- file systems ------------------------------------------------------------------------------------


def verdicts(found: list[Finding]) -> dict[str, str]:
    return {each.check: each.verdict for each in found}


def test_file_system_of_this_machine_keeps_its_promises(tmp_path: Path) -> None:
    found = disks.alone(tmp_path, 1 << 20)
    assert verdicts(found) == {"file system": "ok", "disk speed": "ok", "room": "ok"}


def test_file_system_without_links_and_room_is_told_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(os, "link", refuse)
    found = disks.alone(tmp_path, 1 << 60)
    assert [each.verdict for each in found] == ["warning", "ok", "ok", "bad"]
    assert "hard links" in found[0].text and found[0].cure


def pair(folder: Path, timeout_s: float = 300.0) -> list[Finding]:
    """Both nodes as threads of this process."""
    answers: dict[int, list[Finding]] = {}
    threads = [
        threading.Thread(
            target=lambda me=me: answers.update({me: disks.together(folder, me, timeout_s)})
        )  # type: ignore[misc]
        for me in (0, 1)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert answers[1] == []
    return answers[0]


def test_two_that_share_a_file_system_agree(tmp_path: Path) -> None:
    found = pair(tmp_path)
    checks = ("two nodes", "clocks", "one winner", "locks", "fresh reads")
    assert verdicts(found) == dict.fromkeys(checks, "ok")
    won = found[2].figures
    assert sum(won["won"]) == disks.FILES and (won["both"], won["nobody"]) == (0, 0)


def test_two_winners_of_one_file_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def loose(source: Path, target: Path) -> None:
        if not Path(target).name.startswith("won-"):
            real(source, target)

    monkeypatch.setattr(os, "link", loose)
    found = next(each for each in pair(tmp_path) if each.check == "one winner")
    assert found.verdict == "bad" and found.figures["both"] == disks.FILES // 2


def test_node_that_sees_nothing_of_the_other_is_bad(tmp_path: Path) -> None:
    (found,) = disks.together(tmp_path, 0, timeout_s=0.2)
    assert (found.check, found.verdict) == ("two nodes", "bad") and "runs=" in found.cure


# ---- nodes -------------------------------------------------------------------------------------------

REPORT: dict[str, Any] = {
    "node": "n1",
    "python": "3.11.7",
    "executable": "/env/bin/python",
    "packages": {"torch": "2.7", "numpy": "2.0"},
    "torch": {"version": "2.7", "cuda": "12.6", "gpus": 8, "names": ["H100"]},
    "commands": ["sbatch", "squeue", "scancel", "scontrol"],
    "scratch": {"wanted": "", "found": "/tmp", "free": 1 << 40},
    "data": {"s3://bucket/shards": ""},
    "weights": False,
}


def compared(cluster: list[str] = [], **other: Any) -> dict[str, Finding]:  # noqa: B006 - never changed
    reports = [REPORT, {**REPORT, "node": "n2", **other}]
    made = compose_cluster(["cluster=slurm", *cluster])
    found = nodes.compare(reports, REPORT["packages"], made, "/weights")
    return {each.check: each for each in found}


def test_equal_nodes_are_well() -> None:
    found = compared()
    assert {each.verdict for each in found.values()} == {"ok"}
    assert set(found) == {
        "python",
        "packages",
        "torch",
        "scratch",
        "slurm in jobs",
        "data",
        "weights",
    }


@pytest.mark.parametrize(
    ("check", "verdict", "words", "other"),
    [
        ("python", "bad", "3.12", {"python": "3.12.1"}),
        ("packages", "bad", "torch 2.7 and 2.8", {"packages": {"torch": "2.8", "numpy": "2.0"}}),
        ("torch", "bad", "8 GPUs a node are promised", {"torch": {**REPORT["torch"], "gpus": 7}}),
        ("torch", "bad", "libcudart", {"torch": {"error": "libcudart.so is missing"}}),
        (
            "scratch",
            "warning",
            "/local/7",
            {"scratch": {"wanted": "/local/7", "found": "/tmp", "free": 1 << 40}},
        ),
        ("scratch", "warning", "n2", {"scratch": {"wanted": "", "found": "/tmp", "free": 1 << 20}}),
        ("slurm in jobs", "warning", "sbatch", {"commands": ["squeue", "scancel"]}),
        ("data", "bad", "s3://bucket/shards", {"data": {"s3://bucket/shards": "no answer"}}),
        ("weights", "bad", "n2", {"weights": True}),
    ],
)
def test_node_that_differs_is_named_with_the_cure(
    check: str, verdict: str, words: str, other: dict[str, Any]
) -> None:
    found = compared(**other)[check]
    assert found.verdict == verdict and words in found.text + found.cure and found.cure


def test_container_may_hold_other_packages_than_this_machine() -> None:
    reports = [{**REPORT, "packages": {"torch": "2.9"}}]
    for more, verdict in (([], "warning"), (["cluster.container='run x.sif'"], "ok")):
        found = nodes.compare(
            reports, REPORT["packages"], compose_cluster(["cluster=slurm", *more])
        )
        assert {each.check: each.verdict for each in found}["packages"] == verdict


def test_node_tells_what_is_installed_and_which_data_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "_torch", dict)
    found = node.node([str(tmp_path / "gone")], str(tmp_path / "gone.safetensors"))
    assert (
        found["packages"]["hydra-core"]
        and found["weights"]
        and found["data"][str(tmp_path / "gone")]
    )


# ---- the command -------------------------------------------------------------------------------------


def run_doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = doctor.main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_doctor_on_this_machine_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = run_doctor(
        capsys,
        "cluster=local",
        "experiment=digits_dit",
        "--no-jobs",
        "--runs",
        str(tmp_path / "runs"),
    )
    assert (code, told["verdict"]) == (0, "ok") and not (tmp_path / "runs").exists()
    assert [each["check"] for each in told["checks"]] == [
        "this machine",
        "file system",
        "disk speed",
        "room",
    ]


def test_doctor_without_slurm_says_so_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, told = run_doctor(capsys, "cluster=slurm", "--no-jobs", f"runs={tmp_path}")
    found = {each["check"]: each["verdict"] for each in told["checks"]}
    assert code == 2 and found["slurm"] == found["preemption"] == "warning"
    assert found["training job"] == "bad" and found["file system"] == "ok"


def test_doctor_of_a_folder_that_cannot_be_written_is_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    code, told = run_doctor(
        capsys, "cluster=local", "--no-jobs", "--runs", str(tmp_path / "file" / "runs")
    )
    assert code == 2 and told["checks"][-1]["verdict"] == "bad"


def test_finding_is_one_line_with_its_cure_below() -> None:
    found = Finding(check="locks", verdict="warning", text="both", cure="one at a time")
    assert doctor.line(found).splitlines() == [
        "warning locks          both",
        " " * 23 + "-> one at a time",
    ]


def test_doctor_of_a_run_takes_its_own_saves_and_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Slurm that leaves 30 s; one of this machine would say that nothing preempts."""
    config = compose(["experiment=digits_dit", "cluster=slurm", f"runs={tmp_path}", "name=mine"])
    run = RunFolder(tmp_path / "digits_dit" / "mine")
    identity = {"train": {"images": config.train.images, "batch": config.train.batch}}
    about = {
        "id": "mine",
        "name": "mine",
        "experiment": "digits_dit",
        "hash": "",
        "images": config.train.images,
    }
    write_record(run.run_json, {**about, "identity": identity, "created": 0.0, "extensions": []})
    at = Attempt(run.attempt(1))
    write_record(at.root / "progress.json", {"section": "train", "images": 1280, "save_s": 25.0})
    at.config.write_text(to_yaml(config))
    said = {
        "config": CONFIG.format(key="", by="partition_prio"),
        "partition": PARTITIONS.replace("GraceTime=60", "GraceTime=0"),
    }
    monkeypatch.setattr(Slurm, "ask", lambda self, command: said.get(command[2], ""))
    monkeypatch.setattr(Slurm, "check", lambda self, job: [])
    code, told = run_doctor(capsys, "mine", "--no-jobs", "--runs", str(tmp_path))
    found = next(each for each in told["checks"] if each["check"] == "preemption")
    assert (code, found["verdict"], found["figures"]["save_s"]) == (1, "warning", 25.0)
    assert found["text"].startswith("lossless, but loses up to")


@pytest.mark.parametrize("state", ["queued", "unknown"])
def test_job_that_does_not_begin_is_given_up_and_cancelled(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"kind": "slurm", "id": "7", "nodes": 2}
    cancelled: list[Any] = []
    monkeypatch.setattr(backends, "state", lambda record: state)
    monkeypatch.setattr(backends, "cancel", cancelled.append)
    monkeypatch.setattr(Slurm, "check", lambda self, job: [])
    monkeypatch.setattr(Slurm, "submit", lambda self, job: record)
    asked = doctor.read_words(["cluster=slurm"], str(tmp_path))
    (found,) = doctor._nodes(asked, wait_s=0.0)
    assert (found.check, found.verdict) == ("job", "warning") and cancelled == [record]
    assert not list(tmp_path.iterdir())


def test_doctor_asks_about_every_data_set_and_says_who_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's folder is looked at in place of running it."""
    asked: list[dict[str, Any]] = []

    def look(self: Local, job: Any) -> dict[str, Any]:
        asked.append(json.loads((job.folder.parent / "request.json").read_text()))
        return {"kind": "local", "id": "1", "nodes": 1}

    monkeypatch.setattr(Local, "submit", look)
    monkeypatch.setattr(backends, "state", lambda record: "gone")
    monkeypatch.setattr(backends, "cancel", lambda record: False)
    monkeypatch.setenv("SELFGUIDE_NOTIFY", "json://localhost")
    mixed = ["data.root=/a", "data.mix=[s3://b/c]", "data.weights=[1,1]", "evaluation=none"]
    code, told = run_doctor(
        capsys, "cluster=local", "experiment=digits_dit", *mixed, f"runs={tmp_path}"
    )
    assert asked[0]["roots"] == ["/a", "s3://b/c"]
    assert told["checks"][0]["check"] == "messages" and told["checks"][-1]["check"] == "job"
    # no rank left a word
    assert code == 2
