"""What srun writes into a job's log when a rank ends badly: no accounting keeps the signal that killed it."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from launcher.backends.protocol import Ending

# of the end of a log, where srun's lines are
_BYTES = 64_000
# which ranks, and what happened to them
_LINE = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.+)$", re.MULTILINE)
_CODE = re.compile(r"Exited with exit code (\d+)")
_SIGNALS = {signal.strsignal(each): int(each) for each in signal.valid_signals()}


def read_log(path: Path) -> Ending:
    """Returns `signals_in` the end of a log; nothing where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _BYTES))
            return signals_in(file.read().decode(errors="replace"))
    except OSError:
        return {}


def signals_in(log: str) -> Ending:
    """Returns `signals`, `codes` and `first` of an ending by lines such as "srun: error: n1: task 3: Killed"."""
    signals: dict[str, int] = {}
    codes: dict[str, int] = {}
    failed: list[str] = []
    for ranks, what in _LINE.findall(log):
        named = [str(rank) for part in ranks.split(",") for rank in _numbers(part)]
        failed += named
        if number := _SIGNALS.get(what.removesuffix(" (core dumped)").strip()):
            signals = dict.fromkeys(named, number) | signals
        elif code := _CODE.fullmatch(what.strip()):
            codes = dict.fromkeys(named, int(code[1])) | codes
    return {"signals": signals, "codes": codes, "first": failed[0]} if failed else {}


def _numbers(part: str) -> range:
    """2-4 and 3 as ranges of ranks."""
    low, _, high = part.partition("-")
    return range(int(low), int(high or low) + 1)
