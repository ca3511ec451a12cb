"""How a rank ended: one typed, immutable record in the folder that it worked on."""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from selfguide.spec.nodes import NodeRefused, node_name
from selfguide.spec.rank_status import Preempted, RankStatus
from selfguide.spec.run import Fenced, read_record, write_record
from shards.errors import DamagedError, StoreError, UserError

# user: something a user can mend, which trying again repeats; fenced: a newer attempt holds the run; preempted: asked
# to stop, and nothing is lost; signal: ended from outside, by the scheduler or by another rank's failure; node: the
# node failed a check before training; killed: cut off from its scheduler by the death of what had started it
Kind = Literal[
    "ok",
    "user",
    "fenced",
    "preempted",
    "numeric",
    "storage",
    "memory",
    "hang",
    "killed",
    "node",
    "error",
    "signal",
]

# of the process, as sysexits.h has it where it has one; 128 + number of a signal, 1 of anything else
PREEMPTED, NOTHING_SAVED = 75, 76
CODES: dict[Kind, int] = {"ok": 0, "user": UserError.exit_code, "numeric": 86, "storage": 87}
CODES |= {"memory": 84, "hang": 85, "node": 88, "killed": 137}

# how torch says that memory is short where it raises no class of its own
_NO_MEMORY = ("out of memory", "DefaultCPUAllocator: can't allocate memory")
# how torch says that a collective broke, with gloo and with NCCL
_PEER_GONE = ("gloo/transport", "DistBackendError", "DistNetworkError")
# of OSError, what says nothing of a disk or a store
_NO_STORAGE = (TimeoutError, ConnectionError, ChildProcessError, ProcessLookupError)


@dataclass(frozen=True, kw_only=True)
class Exit:
    """The end of one rank. All but code, kind and message came later and may be missing in a record."""

    code: int
    # `class` in the file
    kind: Kind
    message: str = ""
    traceback: str = ""
    # name of the exception's class
    type: str | None = None
    # of the trainer when it ended, None before training
    images: int | None = None
    # what it was doing, as `RankStatus` names it
    section: str | None = None
    # image count of the checkpoint that was written on the way out
    saved: int | None = None
    # of class `node`: which one failed what before training
    node: str | None = None
    check: str | None = None
    # a collective broke: another rank is gone, and the cause is there
    peer_gone: bool = False
    # of each class of time until the last progress, and of training's what went by waiting for data
    seconds: Mapping[str, float] | None = None
    waited_s: float | None = None

    @classmethod
    def of(cls, error: BaseException, status: RankStatus) -> Exit:
        """Returns the record of an exception that ends a rank; call it while the exception is handled."""
        kind = _kind(error)
        saved = error.saved if isinstance(error, Preempted) else None
        code = CODES.get(kind, 1)
        if kind == "preempted":
            code = NOTHING_SAVED if saved is None else PREEMPTED
        elif isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code or code
        return cls(
            code=code,
            kind=kind,
            message=f"{type(error).__name__}: {error}",
            traceback=traceback.format_exc(),
            type=type(error).__name__,
            saved=saved,
            node=error.node if isinstance(error, NodeRefused) else None,
            check=error.check if isinstance(error, NodeRefused) else None,
            peer_gone=any(text in f"{type(error).__name__}: {error}" for text in _PEER_GONE),
            **_place(status),
        )

    @classmethod
    def signalled(cls, number: int, status: RankStatus, *, preempted: bool) -> Exit:
        """Returns the record of a rank that a signal ends where it is; `preempted` where nothing is lost."""
        name = signal.Signals(number).name
        return cls(
            code=NOTHING_SAVED if preempted else 128 + number,
            kind="preempted" if preempted else "signal",
            message=f"ended by {name}",
            **_place(status),
        )

    @classmethod
    def well(cls, status: RankStatus) -> Exit:
        """Returns the record of a rank that has done its work."""
        return cls(code=0, kind="ok", **_place(status))

    @classmethod
    def read(cls, folder: Path, rank: int | str = 0) -> Exit | None:
        """Returns what `rank` left in `folder`; None where it works on, or was killed and left nothing."""
        found = read_record(exit_path(folder, rank))
        if found is None:
            return None
        found["kind"] = found.pop("class")
        return cls(**{each.name: found[each.name] for each in fields(cls) if each.name in found})

    def write(self, path: Path) -> None:
        """Writes the record, unless the rank left one before: a signal may arrive while it leaves."""
        record = asdict(self)
        record["class"] = record.pop("kind")
        _write_once(path, record)


def _place(status: RankStatus) -> dict[str, Any]:
    """How far a rank came, and where its time went."""
    names = ("images", "section", "seconds", "waited_s")
    return {name: getattr(status, name) for name in names}


def _kind(error: BaseException) -> Kind:
    """The class of an error; torch's are known by name, since this module does not import it."""
    names = {each.__name__ for each in type(error).__mro__}
    short = isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    # before user errors: a full disk is one, and may have room again
    if isinstance(error, StoreError | DamagedError):
        return "storage"
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, Fenced):
        return "fenced"
    if isinstance(error, Preempted):
        return "preempted"
    if isinstance(error, NodeRefused):
        return "node"
    if short or names & {"MemoryError", "OutOfMemoryError"}:
        return "memory"
    if isinstance(error, FloatingPointError):
        return "numeric"
    if isinstance(error, OSError) and not isinstance(error, _NO_STORAGE):
        return "storage"
    return "error"


def peer_failed(folder: Path, rank: str) -> bool:
    """Whether another rank left a record of a failure: then `rank` waits for it in vain."""
    mine = exit_path(folder, rank)
    records = (read_record(path) for path in folder.glob("exit-*.json") if path != mine)
    well = (0, PREEMPTED, NOTHING_SAVED)
    return any(record is not None and record["code"] not in well for record in records)


def write_start(folder: Path, rank: int | str) -> None:
    """Records that a rank began, and where, which tells a rank that was killed from one that never came this far."""
    _write_once(start_path(folder, rank), {"node": node_name()})


def _write_once(path: Path, record: dict[str, Any]) -> None:
    try:
        write_record(path, {**record, "host": os.uname().nodename, "pid": os.getpid()})
    except FileExistsError:
        logging.getLogger(__name__).warning("%s exists already", path)


def exit_path(folder: Path, rank: int | str) -> Path:
    """Returns the path of a rank's exit record; `unknown` is a rank whose environment was incomplete."""
    return folder / f"exit-{rank}.json"


def start_path(folder: Path, rank: int | str) -> Path:
    """Returns the path of the record that a rank writes when it starts."""
    return folder / f"start-{rank}.json"


def verdict_path(folder: Path) -> Path:
    """Returns where the first monitor that ends an attempt says whom it blames."""
    return folder / "hang.json"
