"""What a profile asks of a site, on a real Slurm: nodes, features, reservations, partitions, containers; the doctor."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launcher import attempt, backends, doctor, jobs, watch
from selfguide.spec.files import read_config
from slurm.devcluster import Cluster
from tests.cluster.test_launcher import ended, payloads, send, settings, until  # noqa: F401 - fixtures

pytestmark = pytest.mark.cluster


def scontrol(*words: str) -> None:
    subprocess.run(["scontrol", *words], check=True, capture_output=True)


@pytest.fixture
def features(payloads: ModuleType) -> Iterator[None]:  # noqa: F811
    """Two nodes with a feature, and one that is reserved."""
    for node in ("devnode2", "devnode3"):
        scontrol("update", f"nodename={node}", "availablefeatures=a100", "activefeatures=a100")
    reserved = ["users=root", "nodes=devnode4", "starttime=now", "duration=30"]
    scontrol("create", "reservation", "reservationname=spring", *reserved)
    yield
    subprocess.run(["scancel", "--me"], check=True)
    until(lambda: not subprocess.run(["squeue", "-h"], capture_output=True).stdout)
    scontrol("delete", "reservationname=spring")
    for node in ("devnode2", "devnode3"):
        scontrol("update", f"nodename={node}", "availablefeatures=", "activefeatures=")


def job(id: str) -> dict[str, str]:
    """What the controller knows of a job."""
    text = subprocess.run(
        ["scontrol", "show", "job", id], check=True, capture_output=True, text=True
    ).stdout
    return dict(word.partition("=")[::2] for word in text.split() if "=" in word)


def places(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [
        json.loads((folder / f"place-{rank}.json").read_text())["environment"]
        for rank in range(ranks)
    ]


def test_features_excluded_nodes_and_free_options_are_what_slurm_does(
    payloads: ModuleType,  # noqa: F811
    settings: list[str],  # noqa: F811
    features: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt, "train", payloads.look_around)
    more = [
        "cluster.constraint=a100",
        "cluster.exclude='devnode[1,4]'",
        "cluster.exclusive=true",
        "nodes=2",
    ]
    more += ["cluster.gpus_per_node=1", "cluster.cpus_per_task=2"]
    at = send(settings, *more, "cluster.sbatch={nice: 7, spread-job: true, hint: nomultithread}")
    known = job(json.loads(at.job.read_text())["id"])
    assert (known["Features"], known["ExcNodeList"], known["Nice"]) == ("a100", "devnode[1,4]", "7")
    assert known["OverSubscribe"] == "NO"
    until(lambda: ended(at))
    seen = places(at.root, 2)
    assert {each["SLURMD_NODENAME"] for each in seen} == {"devnode2", "devnode3"}
    # srun has not had it of the job since 22.05
    assert {each["SLURM_CPUS_PER_TASK"] for each in seen} == {"2"}


def test_profile_prepares_every_job_of_a_run(
    payloads: ModuleType,  # noqa: F811
    settings: list[str],  # noqa: F811
    features: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reservation, modules, setup, scratch and container; evaluation and watcher on their own partition."""
    container = tmp_path / "enter"
    container.write_text('#!/bin/sh\nINSIDE=image exec "$@"\n')
    container.chmod(0o755)
    (tmp_path / "scratch").mkdir()
    profile = tmp_path / "lab.yaml"
    profile.write_text(
        "defaults: [devcluster]\nreservation: spring\nevaluation_partition: debug\n"
        f"evaluation_timeout_min: 10\ncontainer: {container}\nmodules: [cuda/12.6, gcc]\n"
        f"setup: ['export SITE=\"a b\"']\nscratch: {tmp_path}/scratch/$SLURM_JOB_ID\n"
    )
    # as a login shell hands it down
    monkeypatch.setenv("BASH_FUNC_module%%", '() {  export LOADED="$*"\n}')
    monkeypatch.setattr(attempt, "train", payloads.look_around)
    monkeypatch.setattr(attempt, "evaluate", payloads.look_around)
    words = [word for word in settings if not word.startswith("cluster=")]
    at = send(words, f"cluster={profile}", "nodes=1", "cluster.gpus_per_node=1")
    until(lambda: ended(at))
    config = read_config(at.config)
    backend = backends.of(config.cluster)
    small = {}
    for name, made in (
        ("evaluation", jobs.evaluation(config, at, "x", tmp_path / "evaluation" / "request.json")),
        ("watcher", jobs.watcher(config, at, "x", payloads.look_around, None)),
    ):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "submission.json").write_text(json.dumps({"world": 1}))
        record = backend.submit(
            jobs.replace(made, argument=str(folder), function=payloads.look_around)
        )
        known = job(record["id"])
        assert known["Partition"] == "debug" and "Reservation" not in known
        small[name] = record, folder
    until(lambda: all(backends.state(record) == "gone" for record, _ in small.values()))
    (trained,) = places(at.root, 1)
    assert trained["SLURMD_NODENAME"] == "devnode4"
    for each in (trained, *(places(folder, 1)[0] for _, folder in small.values())):
        assert (each["INSIDE"], each["LOADED"], each["SITE"]) == (
            "image",
            "load cuda/12.6 gcc",
            "a b",
        )
        assert each["TMPDIR"] == f"{tmp_path}/scratch/{each['SLURM_JOB_ID']}"


def test_job_of_slurm_tells_by_the_variable_of_the_shell_that_submitted(
    payloads: ModuleType,  # noqa: F811
    settings: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt, "train", payloads.publish_all)
    with importlib.import_module("listening").listening() as (url, told):
        monkeypatch.setenv("SELFGUIDE_NOTIFY", url)
        at = send(settings)
        until(lambda: ended(at))
        config = read_config(at.config)
        backends.of(config.cluster).submit(jobs.watcher(config, at, "x", watch.entry, None))
        until(lambda: told)
    assert at.run.root.name in told[0]["title"] and "finished" in told[0]["title"]


def test_doctor_asks_slurm_disks_and_two_nodes_and_leaves_nothing(
    payloads: ModuleType,  # noqa: F811
    devcluster: Cluster,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = tmp_path / "runs"
    words = [
        "cluster=devcluster",
        "experiment=digits_dit",
        f"data.root={digits}",
        f"runs={runs}",
        "--json",
    ]
    # 1 where the machine is so busy that its disks or files are late
    assert doctor.main(words) in (0, 1)
    told = {each["check"]: each for each in json.loads(capsys.readouterr().out)["checks"]}
    late = {"disk speed", "two nodes", "fresh reads", "clocks"}
    assert {each["verdict"] for name, each in told.items() if name not in late} == {"ok"}
    assert told["preemption"]["figures"]["left_s"] == 65
    assert set(told) >= {
        "two nodes",
        "one winner",
        "locks",
        "clocks",
        "torch",
        "data",
        "slurm in jobs",
    }
    assert not runs.exists() and not backends.of(read_cluster()).strays(str(runs), "sg-doctor")


def read_cluster() -> Any:
    from launcher.compose import compose_cluster

    return compose_cluster(["cluster=devcluster"])
