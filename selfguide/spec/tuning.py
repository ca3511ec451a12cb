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
# of these, what is asked for is a whole number from 1 on; of the others true
_NUMBERS = frozenset({"log_every", "trace"})


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
    return max(_numbers(run), default=0)


def requests(run: RunFolder, after: int = 0) -> list[dict[str, Any]]:
    """Requests by number, those beyond `after`.

    Each has `number`, `attempt`, `settings`, `time`, `refused`, None or why it asks for nothing, and `applied`, what
    became of it, or None.
    """
    found = []
    for number in _numbers(run):
        request = _read(_request(run, number)) if number > after else None
        if request is not None:
            applied = read_record(_applied(run, number))
            found.append({"number": number, **request, "applied": applied})
    return found


def _numbers(run: RunFolder) -> list[int]:
    """Of the requests that are there, ascending; other names are none."""
    stems = [Path(name).stem for name in names_in(run.root / "tune") if name.endswith(".json")]
    # ranks tell each other the newest one as a number of 32 bits
    found = [int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) < 10]
    return sorted({number for number in found if number and f"{number:04d}" in stems})


def _read(path: Path) -> dict[str, Any] | None:
    """A request; None where there is none. One that was written by hand may be anything, and must stop no training."""
    refused = {"attempt": 0, "settings": {}, "time": None}
    try:
        record: Any = read_record(path)
    except (OSError, ValueError) as error:
        return {**refused, "refused": f"it cannot be read: {error}"}
    if record is None:
        return None
    if why := _wrong(record):
        return {**refused, "refused": why}
    settings, when = record["settings"], record.get("time")
    return {"attempt": record["attempt"], "settings": settings, "time": when, "refused": None}


def _wrong(record: Any) -> str | None:
    """Why a record is none that `ask` writes; None where it is."""
    record = record if isinstance(record, dict) else {}
    settings = record.get("settings")
    if not (_is_whole(record.get("attempt")) and isinstance(settings, dict)):
        return "it names no attempt, or no settings"
    for key, value in settings.items():
        try:
            check_known("setting", key, list(KEYS))
        except UserError as error:
            return str(error)
        if not (_is_whole(value) if key in _NUMBERS else value is True):
            return f"{key}={value!r} is nothing that could be asked"
    if settings.get("trace", 0) > LONGEST_TRACE:
        return f"trace={settings['trace']} is too many steps"
    return None


def _is_whole(value: Any) -> bool:
    return type(value) is int and value > 0


def record_applied(run: RunFolder, number: int, attempt: int, images: int) -> None:
    """Records at which image count an attempt applied a request."""
    write_record(_applied(run, number), {"attempt": attempt, "images": images}, replace=True)


def _request(run: RunFolder, number: int) -> Path:
    return run.root / "tune" / f"{number:04d}.json"


def _applied(run: RunFolder, number: int) -> Path:
    return run.root / "tune" / f"{number:04d}.applied.json"
