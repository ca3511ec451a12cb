"""A small run on a real Slurm, faults that are put on it, and what must hold when it has ended by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.reconcile import decide
from launcher.reconcile.hours import Hours, hours
from launcher.reconcile.spans import measured
from launcher.reconcile.view import RunView, read
from selfguide.spec.run import RunFolder
from shards import storage
from slurm.devcluster import Cluster

ROOT = Path(__file__).parents[2]
BATCH = 128
STEPS = 120
# two ranks on two nodes, deterministic: a sum's bits depend on how many threads share it
SETTINGS = [
    "experiment=digits_dit", "cluster=devcluster", "nodes=2", "cluster.gpus_per_node=1", "cluster.timeout_min=5",
    "cluster.environment.OMP_NUM_THREADS=1", "evaluation=none", f"train.images={STEPS * BATCH}",
    f"train.batch={BATCH}", f"train.log_every={4 * BATCH}", f"train.snapshot_every={STEPS * BATCH}",
    f"train.checkpoint_every={20 * BATCH}", "train.warmup_images=256", "guidance.teacher_refresh=256",
    "model.width=32", "model.depth=2", "model.heads=2", "guidance.layer=1",
]  # fmt: skip


@dataclass(frozen=True)
class Bed:
    """A cluster, and a folder for runs on it."""

    cluster: Cluster
    digits: Path
    runs: Path
    # code for ranks, by `inside`
    faults: Path

    @property
    def environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        paths = [str(ROOT / "tests/cluster/inside"), str(ROOT)]
        inside = {"PYTHONPATH": os.pathsep.join(paths), "SELFGUIDE_INSIDE": str(self.faults)}
        return {**clean, **self.cluster.environment(), **inside}

    def inside(self, rank: int, code: str, *, always: bool = False) -> None:
        """Has a rank run this Python beside the trainer: once, or in every attempt as soon as it starts."""
        draft = self.faults / "draft"
        draft.write_text(code)
        draft.rename(self.faults / f"{'always' if always else 'once'}-{rank}.py")

    def command(self, module: str, *words: str) -> subprocess.CompletedProcess[str]:
        """What a user types."""
        command = [sys.executable, "-m", module, *words]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True
        )

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands says."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def words(self, name: str, *more: str) -> list[str]:
        return [
            *SETTINGS,
            f"name={name}",
            f"runs={self.runs}",
            f"data.root={self.digits}",
            *more,
        ]

    def submit(self, name: str, *more: str) -> RunFolder:
        """Submits a run of this name; two names of the same settings end at the same bits."""
        done = self.command("launcher.submit", *self.words(name, *more))
        assert done.returncode == 0, done.stdout + done.stderr
        return RunFolder(self.runs / "digits_dit" / name)

    def jobs(self, run: RunFolder) -> dict[str, str]:
        """Id -> state of the run's jobs that Slurm has."""
        rows = self.ask("squeue", "--noheader", "--format=%i|%T|%k").splitlines()
        found = (row.split("|", 2) for row in rows)
        return {id: state for id, state, comment in found if comment.strip() == str(run.root)}

    def job(self, run: RunFolder) -> str:
        """The id of the newest attempt's job."""
        at = self.view(run).newest
        assert at is not None and at.job is not None
        return str(at.job.record["id"])

    def view(self, run: RunFolder) -> RunView:
        return read(run)

    def images(self, run: RunFolder) -> int:
        """How far the newest attempt says that it is in training; 0 before."""
        at = self.view(run).newest
        said = at.progress if at else {}
        return int(said["images"]) if said.get("section") == "train" else 0

    def ranks(self, run: RunFolder) -> dict[int, int]:
        """Rank -> process id of the newest attempt."""
        return {rank: pid for pid, rank in _ranks(self.job(run))}


def until(condition: Callable[[], object], what: str, seconds: float = 90.0) -> None:
    """Waits for a condition, and fails the test where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def trains(bed: Bed, run: RunFolder, attempt: int = 1, images: int = 24 * BATCH) -> None:
    """Waits until this attempt of the run has trained to so many images, some of them saved."""
    until(
        lambda: run.attempt_numbers()[-1] == attempt and bed.images(run) >= images,
        f"attempt {attempt} trains",
    )


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, number)


def finishes(bed: Bed, run: RunFolder, seconds: float = 120.0) -> RunView:
    """Waits until the run has finished by itself, and none of its jobs is left."""
    deadline = time.monotonic() + seconds
    while True:
        view = bed.view(run)
        if view.finished and not bed.jobs(run):
            return view
        following = decide.next_attempt(view)
        lost = following.action == "stop" and not view.finished and not bed.jobs(run)
        assert not lost, f"it goes no further: {following.reason}"
        assert time.monotonic() < deadline, f"{decide.state(view)}, {bed.jobs(run)}"
        time.sleep(0.2)


def learned(run: RunFolder) -> dict[str, str]:
    """sha256 of all weights of the final snapshot, and of weights, moments and averages of the final checkpoint."""
    images = STEPS * BATCH
    return {
        f"{folder.parent.name}/{path.name}": storage.sha256(path)
        for folder in (run.snapshot(images), run.checkpoint(images))
        for path in sorted(folder.glob("*.safetensors"))
    }


def left(bed: Bed, run: RunFolder) -> list[str]:
    """What nobody needs any more and is still there: processes, jobs, files of which the final name never came."""
    found = [f"process {pid}" for pid in _processes(str(run.root))]
    found += [f"job {id} {state}" for id, state in bed.jobs(run).items()]
    folders = [path for path in run.root.rglob("*") if "code" not in path.parts]
    found += [str(path) for path in folders if path.name.startswith(".") and not _kept(path.name)]
    return found


def gone(bed: Bed, run: RunFolder) -> None:
    until(lambda: not left(bed, run), "nothing of the run is left", 30)


def adds_up(bed: Bed, run: RunFolder) -> Hours:
    """For each job of the run, the classes of the ledger add up to what Slurm's accounting says; returns the hours."""

    def known() -> bool:
        # the database hears of an end a moment after it
        (view,) = measured([read(run)])
        jobs = [job for at in view.attempts for job in (at.job, at.successor) if job]
        return all(span.end is not None for job in jobs for span in job.spans)

    until(known, "accounting knows the end of every job", 30)
    (view,) = measured([read(run)])
    found = hours(view)
    elapsed: dict[str, float] = {}
    for row in found.jobs:
        assert not row.about and all(value >= 0 for value in row.seconds.values())
        elapsed[row.job] = elapsed.get(row.job, 0.0) + sum(row.seconds.values())
    for at in view.attempts:
        for job in filter(None, (at.job, at.successor)):
            command = ["sacct", "-X", "-D", "-n", "-P", "-o", "ElapsedRaw", "-j", job.record["id"]]
            told = sum(map(int, bed.ask(*command).split()))
            assert abs(elapsed.get(job.label, 0.0) - told) <= 1, (job.label, found)
    return found


def lost(run: RunFolder) -> list[int]:
    """Of each attempt after the first: images that it trained again, as far as lines of telemetry show."""
    found, reached = [], 0
    for number in run.attempt_numbers():
        lines = (run.metrics / f"train-{number:04d}.jsonl").read_text().splitlines()
        images = [json.loads(line)["images"] for line in lines]
        report: dict[str, Any] = json.loads((run.attempt(number) / "progress.json").read_text())
        if number > 1:
            found.append(max(0, reached - int(report["resumed_from"] or 0)))
        reached = max([*images, reached])
    return found


def _ranks(job: str) -> Iterator[tuple[int, int]]:
    mark = f"SLURM_JOB_ID={job}".encode()
    for pid in _numbers():
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # ended meanwhile, or another user's
            continue
        if mark in environ and b"submitit.core._submit" in command and b"srun" not in command:
            rank = next((part for part in environ if part.startswith(b"SLURM_PROCID=")), None)
            if rank is not None:
                yield pid, int(rank.partition(b"=")[2])


def _processes(mark: str) -> list[int]:
    found = []
    for pid in _numbers():
        try:
            text = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if f"{mark}/".encode() in text + b"/":
            found.append(pid)
    return found


def _kept(name: str) -> bool:
    """Hidden files that belong to a run: Submitit's scripts, and who may publish."""
    return name.startswith(".submission_file_") or name == ".leases"


def _numbers() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
