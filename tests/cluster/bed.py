"""A small run on a real Slurm, faults that are put on it, and what must hold when it has ended by itself."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.drill.bench import Bench, learned, lost, tiny, until
from launcher.reconcile import decide
from launcher.reconcile.hours import Hours, hours
from launcher.reconcile.spans import measured
from launcher.reconcile.view import JobView, RunView, read
from selfguide.spec.records import PARTS, records
from selfguide.spec.run import RunFolder
from shards.wait import wait_until
from slurm import processes
from slurm.devcluster import Cluster
from tests.cluster.corpus import explained

__all__ = ["Bed", "attempts", "gone", "learned", "lost", "same_end", "trains", "until"]

ROOT = Path(__file__).parents[2]
BATCH = 128
STEPS = 120
SETTINGS = (
    *tiny(STEPS * BATCH, BATCH, checkpoint_every=20 * BATCH, log_every=4 * BATCH),
    "cluster=devcluster",
    "cluster.timeout_min=5",
)
# samples of an epoch
DIGITS = 1797
# a line of rank 0's log
_WHOLE = re.compile(rf"epoch (\d+): {DIGITS:,} seen \+ 0 substituted = {DIGITS:,}$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Bed(Bench):
    """A bench on the development cluster, and the digits that runs on it train on."""

    digits: Path
    # not None
    cluster: Cluster

    @classmethod
    def of(cls, cluster: Cluster, digits: Path, folder: Path) -> Bed:
        """On this cluster, with runs and faults in a folder."""
        faults = folder / "faults"
        faults.mkdir()
        return cls(
            settings=(*SETTINGS, f"data.root={digits}"), runs=folder / "runs", faults=faults,
            reach=cluster.environment(), cluster=cluster, home=ROOT, digits=digits,
        )  # fmt: skip


def trains(bed: Bed, run: RunFolder, attempt: int = 1, images: int = 24 * BATCH) -> None:
    """Waits until this attempt of the run has trained to so many images, some of them saved."""
    bed.trains(run, attempt, images)


def attempts(view: RunView) -> list[str]:
    """Why each attempt ended."""
    return [decide.cause(at).kind for at in view.attempts]


def same_end(
    bed: Bed, run: RunFolder, unharmed: dict[str, Any], *, tries: int = 2, seconds: float = 120.0
) -> RunView:
    """The run finishes by itself in so many attempts: at the same bits, every sample read once, and nothing left."""
    # U3: nobody does anything
    view = bed.finishes(run, seconds)
    assert view.tries == tries, attempts(view)
    # U1
    assert learned(run) == unharmed
    # U2
    assert read_whole(run) == set(range(STEPS * BATCH // DIGITS))
    # U4
    gone(bed, run)
    # U5
    explained(run)
    # U6
    adds_up(bed, run)
    # U7
    scores = Counter((record.images, record.key) for record in records(run) if record.done)
    assert set(scores.values()) <= {1}, scores
    return view


def read_whole(run: RunFolder) -> set[int]:
    """The epochs of which an attempt proved that all ranks and attempts together read every sample once."""
    logs = run.attempts.glob("*/job/*_0_log.out")
    return {int(epoch) for path in logs for epoch in _WHOLE.findall(path.read_text())}


def left(bed: Bed, run: RunFolder) -> list[str]:
    """What nobody needs any more and is still there: processes, jobs, files whose final name never came.

    A port goes with its process.
    """
    found = [f"process {pid}" for pid in _processes(str(run.root))]
    found += [f"job {id} {state}" for id, state in bed.jobs(run).items()]
    folders = [path for path in run.root.rglob("*") if "code" not in path.parts]
    found += [str(path) for path in folders if path.name.startswith(".") and not _kept(path.name)]
    return found


def gone(bed: Bed, run: RunFolder) -> None:
    # a guard against hanging: on a busy machine what ends at once takes its time to be gone
    assert wait_until(lambda: not left(bed, run), timeout_s=180, poll_s=0.1), left(bed, run)


def adds_up(bed: Bed, run: RunFolder) -> Hours:
    """For each job of the run, the classes of the ledger add up to what Slurm's accounting says; returns the hours."""

    def jobs(view: RunView) -> list[JobView]:
        found = [job for at in view.attempts for job in (at.job, at.successor, at.watcher)]
        found += [job for at in view.attempts for job in at.former_watchers.values()]
        return [job for job in [*found, *(each.job for each in view.evaluations)] if job]

    def known() -> bool:
        # the database hears of an end a moment after it
        (view,) = measured([read(run)])
        ran = [at.job for at in view.attempts if at.job and at.starts]
        ended = all(span.end is not None for job in jobs(view) for span in job.spans)
        return ended and all(job.spans for job in ran)

    until(known, "accounting knows the end of every job", 60)
    (view,) = measured([read(run)])
    found = hours(view)
    elapsed: dict[str, float] = {}
    for row in found.jobs:
        assert not row.about and all(value >= 0 for value in row.seconds.values())
        elapsed[row.job] = elapsed.get(row.job, 0.0) + sum(row.seconds.values())
    for job in jobs(view):
        command = ["sacct", "-X", "-D", "-n", "-P", "-o", "ElapsedRaw", "-j", job.record["id"]]
        told = sum(map(int, bed.ask(*command).split()))
        assert abs(elapsed.get(job.label, 0.0) - told) <= 1, (job.label, found)
    return found


def _processes(mark: str) -> list[int]:
    found = ((each.pid, processes.read(each.pid, "cmdline")) for each in processes.table())
    return [pid for pid, text in found if f"{mark}/".encode() in text.replace(b"\0", b"/") + b"/"]


def _kept(name: str) -> bool:
    """Hidden files that belong to a run: Submitit's scripts, who may publish, where parts of evaluations were."""
    return name.startswith(".submission_file_") or name in (".leases", PARTS)
