"""A storm: many faults, drawn with their times from a seed, on one run that nobody touches.

What is drawn is a pure function of the seed, and what is reported one of the event log.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from launcher.drill import faults
from launcher.drill.bench import Bench, learned
from launcher.drill.cells import CELLS
from launcher.reconcile.forecast import Costs, given
from launcher.reconcile.timeline import verdict
from launcher.reconcile.view import RunView, read
from selfguide.spec.run import RunFolder, read_record

# put on each step of a storm, so that a run lasts as long as its faults without being large
SLOWED_S = 0.1
# of training between a fault and the end of its attempt: a rank that fails stops the others at their next collective
_AFTER_S = 0.5
# of a step as it was measured, what a run is sized for: steps may take less beside the faults than before them
_SURE = 0.8
# between two looks of a person who restarts by hand what has ended
HAND_S = 600.0
# how often a cell is drawn; what takes long to be noticed is rarer than a rank that dies
_WEIGHTS = {"A5": 0.2, "B1": 0.4}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One of a storm."""

    cell: str
    rank: int
    # seconds of training before it
    after_s: float


@dataclass(frozen=True, kw_only=True)
class Event:
    """A line of the event log: something happened to the run at `time`, in seconds since 1970."""

    time: float
    # trains: the attempt did its first step; fault: `cell` was put on `rank`; finished
    kind: str
    attempt: int
    images: int
    cell: str = ""
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a storm showed. Seconds are of wall clock, shares of 1."""

    faults: int
    attempts: int
    # name -> of what differs from the undisturbed run; empty where all bits are the same
    differs: Sequence[str]
    # steps lost by each fault of which the ranks were warned
    lost_warned: Sequence[int]
    # and by each of the others
    lost_hard: Sequence[int]
    # from a fault to the first step behind it
    recovery_rank_s: float | None
    recovery_node_s: float | None
    step_s: float
    save_s: float
    wall_s: float
    # the same as `launcher.plan` foretells it, given when the faults came
    planned_s: float
    # of the wall clock, what the steps of the undisturbed run take
    effective: float
    # the most that the drawn faults allow, with these times of save and recovery (Young, Daly)
    bound: float
    # the same run, restarted by a person who looks every ten minutes
    by_hand: float
    # faults of which `launcher why` does not name the class and the rank, and what it names
    misnamed: Sequence[str]

    @property
    def share(self) -> float:
        """Of the bound, what was reached."""
        return self.effective / self.bound


def draw(seed: int, count: int, mean_s: float, ranks: int, cells: Sequence[str]) -> list[Fault]:
    """The faults of a seed: which, on which rank, and after how many seconds of training.

    Gaps are exponential around `mean_s`, and neither so short that nothing could be saved nor so long that a storm
    never ends.
    """
    source = random.Random(seed)
    weights = [_WEIGHTS.get(cell, 1.0) for cell in cells]
    return [
        Fault(
            cell=source.choices(cells, weights)[0],
            rank=source.randrange(ranks),
            after_s=round(min(max(source.expovariate(1 / mean_s), 0.3 * mean_s), 3 * mean_s), 2),
        )
        for _ in range(count)
    ]


def steps_of(plan: Sequence[Fault], step_s: float) -> int:
    """Steps of a run that all faults of a plan meet before it ends, where one was measured to take `step_s`."""
    seconds = sum(fault.after_s + _AFTER_S for fault in plan)
    return math.ceil(seconds / max(_SURE * step_s, SLOWED_S))


def patience_s(steps: int, step_s: float) -> float:
    """Seconds that a run of so many steps may take on a machine that others use, too."""
    return 300.0 + 5 * step_s * steps


def mean_step_s(run: RunFolder) -> float:
    """Seconds of a step of a storm, from a run without faults whose steps were not slowed."""
    return SLOWED_S + _costs([_lines(run, number) for number in run.attempt_numbers()])[0]


def put_on(
    bench: Bench,
    run: RunFolder,
    plan: Sequence[Fault],
    patience_s: float,
    say: Callable[[Event], None],
) -> list[Event]:
    """Puts the faults on the run one after the other, and waits `patience_s` for its end; returns the event log.

    Raises:
        LostRun: it does not go on by itself.
        TimeoutError: it takes too long to.
    """
    log: list[Event] = []

    def happened(kind: str, images: int, at: float | None = None, **more: Any) -> None:
        number = run.attempt_numbers()[-1]
        log.append(Event(time=at or time.time(), kind=kind, attempt=number, images=images, **more))
        say(log[-1])

    faults.slow(bench, SLOWED_S, always=True)
    down: list[str] = []
    with ExitStack() as stack:
        if any(fault.cell == "B1" for fault in plan):
            stack.enter_context(faults.impatient(bench))
        for fault in plan:
            number = _first_step(bench, run, log)
            happened("trains", *_began(run, number))
            for node in down:
                faults.restart_node(bench, node)
            down.clear()
            time.sleep(fault.after_s)
            down += [bench.nodes(run)[fault.rank]] if fault.cell == "B1" else []
            images, at = int(_lines(run, number)[-1]["images"]), time.time()
            when = CELLS[fault.cell].inject(bench, run, fault.rank)
            at = when if isinstance(when, float) else at
            happened("fault", images, at, cell=fault.cell, rank=fault.rank)
        # what is left of it need not be waited for
        number = _first_step(bench, run, log)
        happened("trains", *_began(run, number))
        view = bench.finishes(run, patience_s)
        for node in down:
            faults.restart_node(bench, node)
    ended = read_record(run.attempt(run.attempt_numbers()[-1]) / "exit-0.json") or {}
    happened("finished", view.images or 0, ended.get("time"))
    return log


def _first_step(bench: Bench, run: RunFolder, log: Sequence[Event]) -> int:
    """Waits for an attempt that trains and that no fault has met yet; returns its number."""
    wanted = log[-1].attempt + 1 if log else 1

    def trains() -> bool:
        numbers = run.attempt_numbers()
        return bool(numbers) and numbers[-1] >= wanted and bool(_lines(run, numbers[-1]))

    faults.until(trains, f"attempt {wanted} trains", 300.0)
    return run.attempt_numbers()[-1]


def _began(run: RunFolder, number: int) -> tuple[int, float]:
    """Images and time of an attempt's first line of telemetry."""
    first = _lines(run, number)[0]
    return int(first["images"]), float(first["time"])


def _lines(run: RunFolder, number: int) -> list[dict[str, Any]]:
    """The lines of telemetry of an attempt, one a step in a storm."""
    path = run.metrics / f"train-{number:04d}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # the last one may be half written
    return [json.loads(line) for line in lines if line.endswith("\n")]


def report(
    run: RunFolder, calm: Mapping[str, Any], log: Sequence[Event], batch: int, interval: int
) -> Report:
    """What the event log and the run's own files say; `interval` is in images between two checkpoints."""
    lines = {number: _lines(run, number) for number in run.attempt_numbers()}
    step_s, save_s = _costs(lines.values(), interval)
    met = [event for event in log if event.kind == "fault"]
    recovered = dict(zip(met, recoveries(log), strict=True))
    lost = {event: _lost(run, lines, event, batch) for event in met}
    hard = [event for event in met if not CELLS[event.cell].warned]
    last = log[-1]
    wall = last.time - log[0].time
    work = step_s * last.images / batch
    found = learned(run)
    view = read(run, evidence=True)
    return Report(
        faults=len(met),
        attempts=len(lines),
        differs=[name for name in calm if found.get(name) != calm[name]],
        lost_warned=[lost[event] for event in met if CELLS[event.cell].warned],
        lost_hard=[lost[event] for event in hard],
        recovery_rank_s=_median(
            [s for e, s in recovered.items() if e.cell[0] in "AD" and e.cell != "A5"]
        ),
        recovery_node_s=_median([s for e, s in recovered.items() if e.cell == "B1"]),
        step_s=step_s,
        save_s=save_s,
        wall_s=wall,
        planned_s=given(
            Costs(
                work_s=work,
                interval_s=step_s * interval / batch,
                save_s=save_s,
                start_s=statistics.mean(recovered.values()) if recovered else 0.0,
                gap_s=0.0,
                used_s=0.0,
            ),
            [
                (event.time - log[0].time, "failure" if event in hard else "preemption")
                for event in met
            ],
        ),
        effective=work / wall,
        bound=bound(work, save_s, len(hard), sum(_down(lines, event) for event in met)),
        by_hand=by_hand(
            work,
            [(step_s * event.images / batch, event in hard) for event in met],
            step_s * interval / batch,
            _median([*recovered.values()]) or 0.0,
        ),
        misnamed=misnamed(view, met),
    )


def misnamed(view: RunView, met: Sequence[Event]) -> list[str]:
    """What `launcher why` says of faults whose class or rank it does not name; a rank only where one was hit."""
    found = []
    for event in met:
        cell, said = CELLS[event.cell], verdict(view, event.attempt)
        kind, rank = (said.kind, said.rank) if said else ("", None)
        if kind not in cell.kinds or not (cell.warned or rank == str(event.rank)):
            named = f"{said.kind}, rank {said.rank}" if said else "nothing"
            found.append(f"{event.cell} on rank {event.rank}, attempt {event.attempt}: {named}")
    return found


# of each attempt its lines of telemetry
_Lines = Mapping[int, Sequence[Mapping[str, Any]]]


def bound(work_s: float, save_s: float, hard: int, down_s: float) -> float:
    """The most of the wall clock that may be training, by Young and Daly.

    With a checkpoint every T seconds, work W costs W / T saves of C seconds, and each of H faults without warning T / 2
    seconds of work, so that T = sqrt(2 C W / H) is best and the two together cost sqrt(2 C W H); `down_s` is without a
    step, for all faults together.
    """
    return work_s / (work_s + math.sqrt(2 * save_s * work_s * hard) + down_s)


def by_hand(
    work_s: float, met: Sequence[tuple[float, bool]], interval_s: float, start_s: float
) -> float:
    """The share of training in the wall clock where a person looks every ten minutes and restarts what has ended.

    Args:
        met: seconds of work done when each fault came, and whether it came without warning.
        interval_s: between two checkpoints.
        start_s: from a restart to its first step.
    """
    now = done = 0.0
    for at, hard in met:
        now += max(at - done, 0.0)
        done = at // interval_s * interval_s if hard else at
        now = math.ceil(now / HAND_S) * HAND_S + start_s
    return work_s / (now + work_s - done)


def _costs(
    attempts: Iterable[Sequence[Mapping[str, Any]]], interval: int | None = None
) -> tuple[float, float]:
    """Seconds of a step, its mean, and what a save adds to one, a median; saves are `interval` images apart.

    The mean, because work is the time of all steps together: those beside others' jobs take longer than most.
    """
    plain: list[float] = []
    saving: list[float] = []
    for lines in attempts:
        for before, line in pairwise(lines):
            # a save follows the line of its step
            saved = interval is not None and before["images"] % interval == 0
            (saving if saved else plain).append(line["time"] - before["time"])
    save_s = statistics.median(saving) - statistics.median(plain) if saving else 0.0
    return statistics.mean(plain), max(save_s, 0.0)


def recoveries(log: Sequence[Event]) -> list[float]:
    """Seconds from each fault to the next first step."""
    return [
        next(later.time for later in log[index:] if later.kind != "fault") - event.time
        for index, event in enumerate(log)
        if event.kind == "fault"
    ]


def _lost(run: RunFolder, lines: _Lines, event: Event, batch: int) -> int:
    """Steps that were done again because of a fault."""
    done = int(lines[event.attempt][-1]["images"])
    began = read_record(run.attempt(_next(lines, event)) / "progress.json") or {}
    return max(0, done - int(began.get("resumed_from") or 0)) // batch


def _down(lines: _Lines, event: Event) -> float:
    """Seconds without a step because of a fault: ranks may work on until it is noticed."""
    return float(lines[_next(lines, event)][0]["time"] - lines[event.attempt][-1]["time"])


def _next(lines: _Lines, event: Event) -> int:
    """The attempt that trained after a fault."""
    return min(number for number in lines if number > event.attempt and lines[number])


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def write_log(path: Path, plan: Sequence[Fault], log: Sequence[Event]) -> None:
    """The plan and what happened, as JSON lines."""
    rows = [{"kind": "planned", **asdict(fault)} for fault in plan]
    rows += [asdict(event) for event in log]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
