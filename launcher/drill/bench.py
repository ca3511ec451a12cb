"""Where faults are put on runs: a cluster, a folder, and what a user and an administrator would type and look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.backends.protocol import clean
from launcher.backends.slurm_queue import said
from launcher.reconcile import decide
from launcher.reconcile.view import RunView, read
from selfguide.spec.run import RunFolder, read_record
from shards import storage
from shards.wait import wait_until
from slurm import processes
from slurm.devcluster import Cluster

# code for ranks, which Python runs when it starts
INSIDE = Path(__file__).with_name("inside")
# of what a command of Slurm may take before a drill gives up
ANSWER_S = 60.0


def tiny(images: int, batch: int, *, checkpoint_every: int, log_every: int) -> list[str]:
    """The words of a run of some seconds on digits: a rank on each of two nodes, and the same bits each time.

    One thread a rank, because the bits of a sum depend on how many share it. Ranks write their checkpoints themselves:
    so one counts at the step that it is of, and what a kill may cost can be said in steps.
    """
    return [
        "experiment=digits_dit", "nodes=2", "cluster.gpus_per_node=1", "cluster.environment.OMP_NUM_THREADS=1",
        "evaluation=none", f"train.images={images}", f"train.snapshot_every={images}", f"train.batch={batch}",
        f"train.checkpoint_every={checkpoint_every}", f"train.log_every={log_every}", "train.warmup_images=256",
        "train.checkpoint_writer=here", "guidance.teacher_refresh=256",
        "model.width=32", "model.depth=2", "model.heads=2", "guidance.layer=1",
    ]  # fmt: skip


class LostRun(RuntimeError):
    """A run that was to go on by itself does not."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A Slurm, and a folder for runs on it that faults are put on."""

    # of every submission
    settings: Sequence[str]
    runs: Path
    # Python for ranks, by `inside`
    faults: Path
    # what Slurm's commands need beside this shell's environment
    reach: Mapping[str, str]
    # where the daemons are this machine's
    cluster: Cluster | None = None
    # a partition whose jobs preempt those of the runs; None where there is none
    urgent: str | None = "urgent"
    # in which commands are called
    home: Path = Path()

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(INSIDE), str(self.home.resolve())]
        inside = {"PYTHONPATH": os.pathsep.join(paths), "SELFGUIDE_INSIDE": str(self.faults)}
        return {**clean(os.environ), **self.reach, **inside}

    def inside(
        self, rank: int, code: str, *, always: bool = False, taken_s: float | None = None
    ) -> None:
        """Has a rank run this Python beside the trainer: once, or in every attempt as soon as it starts.

        Args:
            taken_s: waits so many seconds for the rank to begin with it.
        """
        name = f"{'always' if always else 'once'}-{rank}"
        taken = self.faults / f"{name}.taken"
        taken.unlink(missing_ok=True)
        draft = self.faults / f"draft-{rank}"
        draft.write_text(code)
        draft.rename(self.faults / f"{name}.py")
        if taken_s is not None:
            until(taken.exists, f"rank {rank} takes its fault", taken_s, poll_s=0.02)

    def command(self, module: str, *words: str) -> subprocess.CompletedProcess[str]:
        """What a user types."""
        command = [sys.executable, "-m", module, *words]
        return subprocess.run(
            command, cwd=self.home, env=self.environment, capture_output=True, text=True
        )

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands says.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=ANSWER_S
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def words(self, name: str, *more: str) -> list[str]:
        """The words of a submission."""
        return [*self.settings, f"name={name}", f"runs={self.runs}", *more]

    def submit(self, name: str, *more: str) -> RunFolder:
        """Submits a run of this name; two names of the same settings end at the same bits.

        Raises:
            RuntimeError: it was refused.
        """
        done = self.command("launcher.submit", *self.words(name, *more), "--json")
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return RunFolder(Path(json.loads(done.stdout)["folder"]))

    def jobs(self, run: RunFolder) -> dict[str, str]:
        """Id -> state of the run's jobs that Slurm has."""
        rows = self.ask("squeue", "--noheader", "--format=%i|%T|%k").splitlines()
        found = (row.split("|", 2) for row in rows)
        return {id: state for id, state, comment in found if said(comment.strip(), str(run.root))}

    def job(self, run: RunFolder) -> str:
        """The id of the newest attempt's job."""
        at = read(run).newest
        assert at is not None and at.job is not None
        return str(at.job.record["id"])

    def view(self, run: RunFolder) -> RunView:
        return read(run)

    def nodes(self, run: RunFolder) -> list[str]:
        """Those of the newest attempt, by rank where each has one."""
        named = self.ask("squeue", "--noheader", f"--jobs={self.job(run)}", "--format=%N")
        return self.ask("scontrol", "show", "hostnames", named.strip()).split()

    def images(self, run: RunFolder) -> int:
        """How far the newest attempt says that it is in training; 0 before."""
        numbers = run.attempt_numbers()
        said = read_record(run.attempt(numbers[-1]) / "progress.json") if numbers else None
        return int(said["images"]) if said and said.get("section") == "train" else 0

    def ranks(self, run: RunFolder) -> dict[int, int]:
        """Rank -> process id of the newest attempt, of those on this machine."""
        return {rank: pid for pid, rank in _ranks(self.job(run))}

    def trains(self, run: RunFolder, attempt: int, images: int, seconds: float = 90.0) -> None:
        """Waits until this attempt of the run has trained to so many images."""

        def so_far() -> bool:
            return run.attempt_numbers()[-1] >= attempt and self.images(run) >= images

        until(so_far, f"attempt {attempt} trains to {images} images", seconds)

    def finishes(self, run: RunFolder, seconds: float = 120.0) -> RunView:
        """Waits until the run has finished by itself, and none of its jobs is left.

        Raises:
            LostRun: it goes no further.
            TimeoutError: it takes longer.
        """
        deadline = time.monotonic() + seconds
        while True:
            view = read(run)
            jobs = self.jobs(run)
            if view.finished and not jobs:
                return view
            following = decide.next_attempt(view)
            if following.action == "stop" and not view.finished and not jobs:
                raise LostRun(f"it goes no further: {following.reason}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{decide.state(view)}, {jobs}")
            time.sleep(0.2)


def until(
    condition: Callable[[], object], what: str, seconds: float = 90.0, *, poll_s: float = 0.1
) -> None:
    """Waits for a condition.

    Raises:
        TimeoutError: it does not come.
    """
    if not wait_until(condition, timeout_s=seconds, poll_s=poll_s):
        raise TimeoutError(f"not within {seconds} s: {what}")


def learned(run: RunFolder) -> dict[str, Any]:
    """All that a finished run has learned, to be compared bit by bit.

    The sha256 of its final snapshot's weights, and of the weights, moments, averages and what else the final checkpoint
    holds, by file; then where its schedules, optimiser and averages stand, and the sums that say which samples were
    read of the epoch under way. Random numbers and the order of samples are functions of the images.
    """
    images = int(run.describe()["images"])
    found: dict[str, Any] = {
        f"{folder.parent.name}/{path.name}": storage.sha256(path)
        for folder in (run.snapshot(images), run.checkpoint(images))
        for path in sorted(folder.glob("*.safetensors"))
    }
    about = storage.read_manifest(run.checkpoint(images)) or {}
    return found | {name: about[name] for name in ("images", "steps", "ema_since", "accounts")}


def lost(run: RunFolder) -> list[int]:
    """Of each attempt after the first: images that it trained again, as far as lines of telemetry show."""
    found, reached = [], 0
    for number in run.attempt_numbers():
        path = run.metrics / f"train-{number:04d}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        images = [json.loads(line)["images"] for line in lines]
        report = read_record(run.attempt(number) / "progress.json") or {}
        if number > 1:
            found.append(max(0, reached - int(report.get("resumed_from") or 0)))
        reached = max([*images, reached])
    return found


def _ranks(job: str) -> Iterator[tuple[int, int]]:
    mark = f"SLURM_JOB_ID={job}".encode()
    for process in processes.table():
        environ = processes.read(process.pid, "environ").split(b"\0")
        command = processes.read(process.pid, "cmdline")
        if mark in environ and b"submitit.core._submit" in command and b"srun" not in command:
            rank = next((part for part in environ if part.startswith(b"SLURM_PROCID=")), None)
            if rank is not None:
                yield process.pid, int(rank.partition(b"=")[2])
