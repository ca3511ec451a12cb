"""How a rank ended: one typed, immutable record in the folder that it worked on."""

from __future__ import annotations

import logging
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selfguide.spec.run import Fenced, read_record, write_record
from shards.errors import UserError

# user: something a user can mend, which trying again repeats; fenced: a newer attempt holds the run;
# signal: ended from outside, by the scheduler or by another rank's failure
Kind = Literal["ok", "user", "fenced", "error", "signal"]


@dataclass(frozen=True, kw_only=True)
class Exit:
    """The end of one rank."""

    # of the process: 0 well, 2 user error, 128 + number of a signal, 1 anything else
    code: int
    # `class` in the file
    kind: Kind
    message: str = ""
    traceback: str = ""

    @classmethod
    def of(cls, error: Exception) -> Exit:
        """Returns the record of an exception that ends a rank; call it while the exception is handled."""
        kind: Kind = "error"
        if isinstance(error, UserError):
            kind = "user"
        elif isinstance(error, Fenced):
            kind = "fenced"
        return cls(
            code=UserError.exit_code if kind == "user" else 1,
            kind=kind,
            message=f"{type(error).__name__}: {error}",
            traceback=traceback.format_exc(),
        )

    @classmethod
    def read(cls, folder: Path, rank: int | str = 0) -> Exit | None:
        """Returns what `rank` left in `folder`; None where it works on, or was killed and left nothing."""
        found = read_record(exit_path(folder, rank))
        if found is None:
            return None
        return cls(
            code=found["code"],
            kind=found["class"],
            message=found["message"],
            traceback=found.get("traceback", ""),
        )

    def write(self, path: Path) -> None:
        """Writes the record, unless the rank left one before: a signal may arrive while it leaves."""
        record = {"code": self.code, "class": self.kind, "message": self.message}
        _write_once(path, record | {"traceback": self.traceback})


def write_start(folder: Path, rank: int | str) -> None:
    """Records that a rank began, which tells a rank that was killed from one that never came this far."""
    _write_once(start_path(folder, rank), {})


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
