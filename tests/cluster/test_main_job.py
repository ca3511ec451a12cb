"""The main job on a real Slurm: two nodes of two ranks, evaluations as Slurm jobs, everything in accounting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from selfguide.spec.records import records
from selfguide.spec.run import RunFolder
from shards import storage
from slurm.devcluster import Cluster
from tools.s3.server import Server
from tools.shards import __main__ as shards_command

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_the_demo_on_two_nodes_with_evaluation_jobs(
    devcluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    runs, environment = tmp_path / "runs", {**os.environ, **devcluster.environment()}
    done = subprocess.run(
        [
            sys.executable, "-m", "launcher.submit", "experiment=digits_dit", "cluster=devcluster", "nodes=2",
            f"data.root={digits}", f"runs={runs}", "follow=true", "train.images=38_400",
            "train.snapshot_every=12_800", "train.checkpoint_every=38_400", "evaluation.samples=400",
        ],
        env=environment, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (description,) = runs.glob("*/*/run.json")
    run = RunFolder(description.parent)
    exits = [json.loads(p.read_text()) for p in run.attempt(1).glob("exit-*.json")]
    assert len(exits) == 4 and {e["class"] for e in exits} == {"ok"}

    found = list(records(run))
    assert [r.images for r in found if r.done] == [12_800, 25_600, 38_400]
    early = [r for r in found if r.started < min(e["time"] for e in exits)]
    assert early, "no snapshot was scored while training went on"

    training = json.loads((run.attempt(1) / "job.json").read_text())["id"]
    scorers = {json.loads(p.read_text())["id"] for p in run.evals.glob("jobs/*/job.json")}
    watcher = json.loads((run.attempt(1) / "watcher.json").read_text())["id"]
    jobs = _accounted([training, watcher, *scorers], environment)
    assert jobs.pop(training) == ["COMPLETED", "2"] and len(scorers) == 3
    assert all(state == ["COMPLETED", "1"] for state in jobs.values()), jobs


def test_it_learns_the_same_bits_from_s3_with_and_without_a_cache(
    devcluster: Cluster,
    server: Server,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Credentials are those of the submitting shell, and are nowhere to be read afterwards."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    remote, cache = f"s3://{server.bucket}/main-job-{uuid.uuid4().hex[:8]}", tmp_path / "node"
    assert shards_command.main(["copy", str(digits), remote]) == 0
    sources = {
        "local": [f"data.root={digits}"],
        "s3": [f"data.root={remote}"],
        "cache": [f"data.root={remote}", f"data.cache={cache}"],
    }
    environment = {**os.environ, **devcluster.environment()}
    followed = {
        name: subprocess.Popen(
            [
                sys.executable, "-m", "launcher.submit", "experiment=digits_dit", "cluster=devcluster",
                "evaluation=none", "follow=true", f"runs={tmp_path / name}", "train.images=2_560", "train.batch=256",
                "train.warmup_images=256", "train.log_every=1_280", "train.snapshot_every=2_560",
                "train.checkpoint_every=2_560", "guidance.teacher_refresh=256", *words,
            ],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name, words in sources.items()
    }  # fmt: skip
    for name, process in followed.items():
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: {said}"
    learned = {name: _learned(tmp_path / name) for name in sources}
    assert len(learned["local"]) == 4 and learned["local"] == learned["s3"] == learned["cache"]
    held = [path for path in cache.rglob("*-*") if path.is_file()]
    assert sum(path.stat().st_size for path in held) > 1797 * 64
    secret = server.environment()["AWS_SECRET_ACCESS_KEY"].encode()
    files = [path for name in sources for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) > 50 and not [path for path in files if secret in path.read_bytes()]


def _learned(runs: Path) -> dict[str, str]:
    """sha256 of all weights in the last snapshot and checkpoint."""
    (run,) = (path.parent for path in runs.glob("*/*/run.json"))
    return {
        f"{folder}/{path.name}": storage.sha256(path)
        for folder in ("snapshots", "checkpoints")
        for path in sorted((run / folder / "img-000002560").glob("*.safetensors"))
    }


def _accounted(jobs: list[str], environment: dict[str, str]) -> dict[str, list[str]]:
    """Job -> [state, nodes] by sacct, once none is on its way: accounting lags behind by seconds."""
    command = ["sacct", "-X", "-P", "-n", "-o", "JobID,State,NNodes", "-j", ",".join(jobs)]
    deadline = time.monotonic() + 60
    while True:
        rows = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout
        found = {row.split("|")[0]: row.split("|")[1:] for row in rows.split()}
        over = len(found) == len(jobs) and not {"RUNNING", "PENDING"} & {
            s for s, _ in found.values()
        }
        if over or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def test_a_partition_that_does_not_exist_is_refused_before_anything_is_written(
    devcluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "launcher.submit", "experiment=digits_dit", "cluster=devcluster",
            "cluster.partition=nowhere", f"data.root={digits}", f"runs={tmp_path / 'runs'}",
        ],
        env={**os.environ, **devcluster.environment()}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "nowhere" in done.stderr and "main" in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()
    assert "Traceback" not in done.stderr
