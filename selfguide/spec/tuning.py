"""What may be asked of a run while it trains, and the folder in which it is asked: `tune/` of the run.

A request is one small file, numbered from 1 and written once, so that none is lost and none is applied twice. Rank 0
watches the folder; all ranks apply a request at one step boundary, and what became of it is recorded beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfguide.spec.run import RunFolder, names_in, read_record, write_record
from selfguide.spec.suggest import check_known
from shards.errors import UserError

# steps that one trace may hold: it takes memory and megabytes for each
LONGEST_TRACE = 1000


def _log_every(value: str, batch: int) -> int:
    images = _whole("log_every", value)
    if images % batch:
        raise UserError(
            f"log_every={value} is no multiple of train.batch={batch}; take {max(1, images // batch) * batch}"
        )
    return images


def _trace(value: str, batch: int) -> int:
    steps = _whole("trace", value)
    if steps > LONGEST_TRACE:
        raise UserError(f"trace={value} is too many steps; take {LONGEST_TRACE} or fewer")
    return steps


def _whole(key: str, value: str) -> int:
    digits = value.replace("_", "")
    if not (digits.isascii() and digits.isdigit() and int(digits)):
        raise UserError(f"{key}={value} is no whole number from 1 on")
    return int(digits)


def _word(key: str, word: str) -> Callable[[str, int], bool]:
    def read(value: str, batch: int) -> bool:
        if value != word:
            raise UserError(f"{key}={value} means nothing; give {key}={word}")
        return True

    return read


# of a typed value and the run's global batch, what is asked for
KEYS: Mapping[str, Callable[[str, int], Any]] = {
    "log_every": _log_every,
    "trace": _trace,
    "save": _word("save", "now"),
    "stop": _word("stop", "after_save"),
}


def parse(words: Sequence[str], batch: int) -> dict[str, Any]:
    """Settings as somebody types them, `key=value`.

    Raises:
        UserError: a key that is not known or given twice, or a value that cannot be.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        check_known("setting", key, list(KEYS))
        if not sign:
            raise UserError(f"{word!r} has no value; give {key}=VALUE")
        if key in found:
            raise UserError(f"{key} is given twice; give it once")
        found[key] = KEYS[key](value, batch)
    return found


def ask(run: RunFolder, attempt: int, settings: Mapping[str, Any]) -> int:
    """Asks `settings` of a run, whose newest attempt is meant; returns the number of the request."""
    while True:
        number = newest(run) + 1
        try:
            write_record(_request(run, number), {"attempt": attempt, "settings": dict(settings)})
            return number
        except FileExistsError:
            continue


def newest(run: RunFolder) -> int:
    """Number of the newest request; 0 where there is none."""
    names = (name.removesuffix(".json") for name in names_in(run.root / "tune"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def requests(run: RunFolder, after: int = 0) -> list[dict[str, Any]]:
    """Requests by number, those beyond `after`: `number`, `attempt`, `settings`, `time`, and `applied` or None."""
    found = []
    for number in range(after + 1, newest(run) + 1):
        record = read_record(_request(run, number))
        if record is not None:
            found.append(
                {"number": number, **record, "applied": read_record(_applied(run, number))}
            )
    return found


def record_applied(run: RunFolder, number: int, attempt: int, images: int) -> None:
    """Records at which image count an attempt applied a request."""
    write_record(_applied(run, number), {"attempt": attempt, "images": images}, replace=True)


def _request(run: RunFolder, number: int) -> Path:
    return run.root / "tune" / f"{number:04d}.json"


def _applied(run: RunFolder, number: int) -> Path:
    return run.root / "tune" / f"{number:04d}.applied.json"
