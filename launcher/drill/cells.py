"""Cells of the fault matrix that a drill puts on a run of its own: what is injected, and what must hold afterwards.

Each run must go on by itself and end at the bits of a run that nothing happened to. `docs/cluster.md` lists the whole
matrix; `tests/cluster` proves all of it on the development cluster.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from launcher.drill import faults
from launcher.drill.bench import Bench, LostRun, learned, lost, until
from launcher.reconcile import decide
from selfguide.spec.run import RunFolder

# what a cell needs beyond a partition to submit to
Need = Literal["", "urgent", "daemons"]
NEEDS: Mapping[Need, str] = {
    "urgent": "it needs a partition whose jobs preempt others: --urgent PARTITION",
    "daemons": "it kills daemons of Slurm, which needs root: only cluster=devcluster",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One fault, for a run that trains."""

    about: str
    # (bench, run, rank): puts it on; returns once it is there, and the time where that was not at once
    inject: Callable[[Bench, RunFolder, int], object]
    # why the attempt must have ended, by `decide.cause`
    kinds: Sequence[str]
    # the ranks are warned, so that no step may be lost
    warned: bool = False
    needs: Need = ""
    # checkpoint intervals that may be trained again
    intervals: int = 1
    # seconds until it is noticed, in which the ranks train on
    noticed_s: float = 3.0


def _flip_and_kill(bench: Bench, run: RunFolder, rank: int) -> None:
    until(lambda: len(run.saved()) > 1, "a checkpoint and one before it")
    faults.flip_newest(run, rank)
    faults.kill_rank(bench, rank)


def _tear_and_kill(bench: Bench, run: RunFolder, rank: int) -> None:
    until(lambda: len(run.saved()) > 1, "a checkpoint and one before it")
    faults.tear_manifest(run)
    faults.kill_rank(bench, rank)


def _litter_and_kill(bench: Bench, run: RunFolder, rank: int) -> None:
    faults.litter(run)
    faults.kill_rank(bench, rank)


def _lose_node(bench: Bench, run: RunFolder, rank: int) -> None:
    """The slurmd under a rank; whoever drills starts it again (`faults.restart_node`)."""
    assert bench.cluster is not None
    faults.kill_daemon(bench.cluster, bench.nodes(run)[rank])


CELLS: Mapping[str, Cell] = {
    "A1": Cell(
        about="a rank is killed in a step",
        inject=lambda bench, run, rank: faults.kill_rank(bench, rank),
        kinds=("killed",),
    ),
    "A2": Cell(
        about="a rank exits with 7",
        inject=lambda bench, run, rank: faults.exit_rank(bench, rank, 7),
        kinds=("error",),
    ),
    "A3": Cell(
        about="a rank raises an exception",
        inject=lambda bench, run, rank: faults.raise_in_rank(bench, rank, "ValueError('drill')"),
        kinds=("error",),
    ),
    "A4": Cell(
        about="a rank crashes by SIGSEGV",
        inject=lambda bench, run, rank: faults.kill_rank(bench, rank, signal.SIGSEGV),
        kinds=("crash",),
    ),
    "A5": Cell(
        about="a rank is stopped by SIGSTOP",
        inject=lambda bench, run, rank: faults.kill_rank(bench, rank, signal.SIGSTOP),
        kinds=("hang",),
    ),
    "B1": Cell(
        about="a node's slurmd is killed",
        inject=_lose_node,
        kinds=("node",),
        needs="daemons",
        noticed_s=40.0,
    ),
    "C1": Cell(
        about="SIGUSR2 to all ranks",
        inject=lambda bench, run, rank: faults.signal_job(bench, run),
        kinds=("preempted", "limit"),
        warned=True,
    ),
    "C3": Cell(
        about="preemption",
        inject=lambda bench, run, rank: faults.preempt_run(bench, run),
        kinds=("preempted",),
        warned=True,
        needs="urgent",
    ),
    "C4": Cell(
        about="scancel: SIGTERM, and SIGKILL after KillWait",
        inject=lambda bench, run, rank: faults.scancel(bench, run),
        kinds=("outside", "preempted"),
        warned=True,
    ),
    "C8": Cell(
        about="SIGUSR2 to one rank",
        inject=lambda bench, run, rank: faults.kill_rank(bench, rank, signal.SIGUSR2),
        kinds=("preempted", "limit"),
        warned=True,
    ),
    "D2": Cell(
        about="a rank is killed in a save",
        inject=lambda bench, run, rank: faults.kill_in_next_save(bench, run, rank),
        kinds=("killed",),
    ),
    "D3": Cell(
        about="a bit of the newest checkpoint turns, and a rank is killed",
        inject=_flip_and_kill,
        kinds=("killed",),
        intervals=2,
    ),
    "D4": Cell(
        about="the newest manifest is emptied, and a rank is killed",
        inject=_tear_and_kill,
        kinds=("killed",),
        intervals=2,
    ),
    "D6": Cell(
        about="an attempt leaves drafts and half a checkpoint, and a rank is killed",
        inject=_litter_and_kill,
        kinds=("killed",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one cell."""

    cell: str
    about: str
    # refused: it cannot be put on here
    outcome: Literal["passed", "failed", "refused"]
    # what did not hold, or why it was refused
    reasons: Sequence[str] = ()
    # why the attempt ended, in words
    cause: str = ""
    # from the fault to the first step of the next attempt
    recovery_s: float | None = None
    # images trained again
    lost: int | None = None
    seconds: float = 0.0
    run: str = ""


def refusal(cell: str, bench: Bench) -> str:
    """Why a cell cannot be put on here; "" where it can."""
    needs = CELLS[cell].needs
    lacks = {"": False, "urgent": bench.urgent is None, "daemons": bench.cluster is None}
    return NEEDS[needs] if lacks[needs] else ""


def drill(cell: str, bench: Bench, calm: Mapping[str, Any], batch: int, interval: int) -> Result:
    """Puts a cell on a run of its own, and waits for its end.

    Args:
        calm: what the same run learns without a fault.
        batch: images of a step.
        interval: images between two checkpoints.
    """
    what, began = CELLS[cell], time.monotonic()
    stack = ExitStack()
    if cell == "B1":
        stack.enter_context(faults.impatient(bench))
    run = bench.submit(f"{cell.lower()}-{bench.faults.parent.name}")
    reasons: list[str] = []
    recovery_s, cause, again = None, "", None
    node = None
    try:
        bench.trains(run, 1, interval + 4 * batch)
        faults.slow(bench, what.noticed_s / 80, ranks=range(2))
        node = bench.nodes(run)[1] if cell == "B1" else None
        what.inject(bench, run, 1)
        injected = time.monotonic()
        # a hang is taken for one after a minute, and more where steps take long
        bench.trains(run, 2, batch, 240.0)
        recovery_s = time.monotonic() - injected
        view = bench.finishes(run)
        ended = decide.cause(view.attempts[0])
        cause, again = f"{ended.kind}: {ended.message}", sum(lost(run))
        if ended.kind not in what.kinds:
            reasons.append(f"the cause is said to be {ended.kind}, not {' or '.join(what.kinds)}")
        if view.tries != 2:
            reasons.append(f"it took {view.tries} attempts")
        allowed = 0 if what.warned else (what.intervals * interval)
        if again > allowed:
            reasons.append(f"{again} images were trained again, {allowed} are allowed")
        found = learned(run)
        reasons += [f"{name} differs" for name in calm if found.get(name) != calm[name]]
    except (TimeoutError, LostRun, RuntimeError) as error:
        reasons.append(str(error))
        bench.command("launcher.cancel", str(run.root))
    finally:
        if node is not None:
            faults.restart_node(bench, node)
        stack.close()
    return Result(
        cell=cell, about=what.about, outcome="failed" if reasons else "passed", reasons=reasons, cause=cause,
        recovery_s=recovery_s, lost=again, seconds=time.monotonic() - began, run=str(run.root),
    )  # fmt: skip
