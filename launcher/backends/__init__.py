"""Where jobs run: this machine, or a Slurm. `of(config.cluster)` submits; records of jobs need no config.

A new site is a file in `configs/cluster/`; a new scheduler is a module here that follows `Backend`, and its name in
`_BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from launcher.backends import slurm
from launcher.backends.local import Local
from launcher.backends.protocol import (
    Backend,
    Ending,
    Job,
    Node,
    Record,
    Span,
    State,
    Waiting,
    new_record,
    settled,
)
from launcher.backends.slurm import Slurm
from selfguide.spec.config import ClusterConfig

__all__ = [
    "Backend",
    "Ending",
    "Job",
    "Node",
    "Record",
    "Span",
    "State",
    "Waiting",
    "automatic",
    "cancel",
    "cancel_all",
    "endings",
    "new_record",
    "of",
    "of_record",
    "settled",
    "spans",
    "state",
    "states",
    "strays",
    "waiting",
]

T = TypeVar("T")


class _Factory(Protocol):
    def __call__(self, cluster: ClusterConfig | None, conf: str | None = None) -> Backend: ...


# `kind` of a config and of a job's record
_BACKENDS: dict[str, _Factory] = {
    "local": lambda cluster, conf=None: Local(),
    **{kind: partial(Slurm, kind) for kind in slurm.PROFILES},
}


def automatic() -> str:
    """Returns the cluster that `cluster=auto` means here: slurm where a controller answers within 2 s, else local."""
    return "slurm" if slurm.answers() else "local"


def of(cluster: ClusterConfig) -> Backend:
    """Returns the backend that a config asks for, ready to submit; nothing is asked yet."""
    return _BACKENDS[cluster.kind](cluster)


def check_record(record: Record) -> None:
    """Raises KeyError or ValueError for a record that no backend could ask about."""
    if record["kind"] not in _BACKENDS:
        raise ValueError(f"no cluster of kind {record['kind']!r}")
    if record["id"] is None:
        raise ValueError("id is null")


def of_record(record: Record) -> Backend:
    """Returns the backend that a job was given to, whatever this shell's variables mean now."""
    return _BACKENDS[record["kind"]](None, record.get("conf"))


def states(records: Sequence[Record], patience_s: float | None = None) -> list[State]:
    """Returns the state of each job; every Slurm is asked once, and this machine's process table read once.

    Args:
        patience_s: with a scheduler that does not answer, whose jobs are then unknown; None is the backend's own.
    """
    return _each(records, lambda backend, some: backend.states(some, patience_s))


def endings(
    records: Sequence[Record], patience_s: float | None = None, *, deep: bool = False
) -> list[Ending]:
    """Returns how jobs that are gone ended, as far as their schedulers still know (`Backend.endings`)."""
    return _each(records, lambda backend, some: backend.endings(some, patience_s, deep=deep))


def waiting(records: Sequence[Record], patience_s: float | None = None) -> list[Waiting]:
    """Returns why each of these queued jobs waits, as far as its scheduler says."""
    return _each(records, lambda backend, some: backend.waiting(some, patience_s))


def spans(records: Sequence[Record], patience_s: float | None = None) -> list[tuple[Span, ...]]:
    """Returns when each job had its nodes, as its scheduler or its own controller says."""
    return _each(records, lambda backend, some: backend.spans(some, patience_s))


def state(record: Record) -> State:
    """Returns the state of one job."""
    return states([record])[0]


def cancel(record: Record) -> bool:
    """Ends one job and returns once it is gone; returns whether it existed. Safe to call again.

    Raises:
        UserError: it cannot be reached from here.
    """
    return bool(cancel_all([record]))


def cancel_all(records: Sequence[Record]) -> int:
    """Does what `cancel` does for many jobs, with one `scancel` for each Slurm; returns how many existed."""
    grouped = _grouped(records)
    return sum(backend.cancel([records[i] for i in numbers]) for numbers, backend in grouped)


def strays(comment: str, record: Record) -> list[Record]:
    """Returns jobs with this comment in the scheduler that `record` was given to, recorded or not."""
    return of_record(record).strays(comment)


def _each(
    records: Sequence[Record], ask: Callable[[Backend, Sequence[Record]], Sequence[T]]
) -> list[T]:
    """The answer about each record, in their order, with one question a backend."""
    found: dict[int, T] = {}
    for numbers, backend in _grouped(records):
        found |= zip(numbers, ask(backend, [records[i] for i in numbers]), strict=True)
    return [found[i] for i in range(len(records))]


def _grouped(records: Sequence[Record]) -> list[tuple[list[int], Backend]]:
    """Positions of the records of each backend."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault((record["kind"], record.get("conf")), []).append(i)
    return [(numbers, of_record(records[numbers[0]])) for numbers in groups.values()]
