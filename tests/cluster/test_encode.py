"""Images encoded by an array of Slurm jobs: the bytes of one process that nobody disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import array
from slurm.devcluster import Cluster

pytestmark = pytest.mark.cluster


def test_an_array_of_slurm_jobs_writes_what_one_process_writes(
    devcluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, **devcluster.environment()}
    command = [sys.executable, "-m", "tools.shards", "encode", str(digits), "--encoder", "tiny"]
    command += ["--shard-mb", "0.01", "--runs", str(tmp_path / "runs")]
    words = ["--out", str(tmp_path / "array"), "--tasks", "2", "--cluster", "devcluster"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, timeout=300
        )

    done = run(*words, "partition=nowhere")
    assert done.returncode == 2 and "partitions here: debug, main" in done.stderr
    assert not (tmp_path / "runs").exists() and not (tmp_path / "array").exists()

    done = run(*words, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.glob("runs/encode/*/attempts/0001")
    ids = [record["id"] for record in json.loads((folder / array.RECORD).read_text())["jobs"]]
    job = ids[0].partition("_")[0]
    assert ids == [f"{job}_0", f"{job}_1"]
    assert f"array {job}_[0-1]" in done.stdout and f"scancel {job}" in done.stdout
    assert "all 8 are there" in done.stdout
    for id in ids:
        assert "complete: 1,797 samples" in (folder / "job" / f"{id}_0_log.out").read_text()

    assert run("--out", str(tmp_path / "one")).returncode == 0
    assert _tree(tmp_path / "array") == _tree(tmp_path / "one")
    assert "already there, nothing submitted" in run(*words).stdout


def _tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
