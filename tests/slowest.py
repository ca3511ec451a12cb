"""Where the minutes of the tests go: a plugin of pytest that notes them, and a command that shows them.

    python -m pytest -p tests.slowest --notes .pytest_cache/notes/a.json tests/shards
    python -m tests.slowest .pytest_cache/notes          the slowest tests, and the total beside the budget

`make test` does both; `make lint` and installing are not counted. Above the budget the command fails with --hold only:
on a machine that others use, tests that all pass may take any time. The budget is one of an idle machine with two usual
cores: where they are slower, or neighbours take them, it grows by as much, up to twice the minutes. A fixed piece of
work measures that before and after.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from shards import cli

BUDGET = 41.0  # minutes on two usual cores: 26 is the aim, and the rest is margin for neighbours and slow cores
SHOWN = 20
MOST = 2.0  # times the budget, whatever the machine
CORES = 2
USUAL = 0.2  # seconds that an idle core at about 3 GHz takes for the work
_WORK = """
import time
begun, total = time.perf_counter(), 0
for number in range(3_000_000):
    total += number
print(time.perf_counter() - begun)
"""


@dataclass(frozen=True)
class Notes:
    """What one session of pytest took."""

    seconds: float
    slowness: float
    tests: dict[str, float]


def slowness() -> float:
    """How much longer all cores take than usual ones that are idle: at least 1, and beside busy processes about 2."""
    command = [sys.executable, "-c", _WORK]
    working = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(CORES)]
    return max(1.0, sum(float(each.communicate()[0]) for each in working) / CORES / USUAL)


class Recorder:
    """Adds up set-up, call and tear-down of each test, of all workers, and writes them when the session ends."""

    def __init__(self, path: Path) -> None:
        self.path, self.before, self.begun = path, slowness(), time.monotonic()
        self.tests: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        seconds = time.monotonic() - self.begun
        notes = Notes(seconds, (self.before + slowness()) / 2, dict(self.tests))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(asdict(notes)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--notes", type=Path, help="write what each test took to this file, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--notes")
    # a worker of pytest-xdist reports to the session that started it
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path.absolute()), "recorder")


def read(folder: Path) -> list[Notes]:
    return [Notes(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def judge(sessions: list[Notes], minutes: float) -> dict[str, Any]:
    """The slowest tests, the total and what it may be, in seconds; `slowness` is the sessions' mean over time."""
    total = sum(each.seconds for each in sessions)
    tests = {name: seconds for each in sessions for name, seconds in each.tests.items()}
    weighed = sum(each.seconds * each.slowness for each in sessions)
    slower = weighed / total if total else 1.0
    limit = 60 * minutes * min(MOST, slower)
    slowest = sorted(tests.items(), key=lambda item: -item[1])[:SHOWN]
    return {
        "total": total,
        "limit": limit,
        "slowness": slower,
        "tests": len(tests),
        "within": total <= limit,
        "slowest": dict(slowest),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the slowest tests and the total; returns 1 above a budget that is held, exits 2 without notes."""
    parser = argparse.ArgumentParser(prog="python -m tests.slowest", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="holds the files that --notes wrote")
    parser.add_argument(
        "--minutes", type=float, default=BUDGET, help="the budget on two usual cores (%(default)g)"
    )
    parser.add_argument("--hold", action="store_true", help="exit 1 above the budget")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    sessions = read(options.folder)
    if not sessions:
        parser.error(f"{options.folder} holds no notes; `make test` writes them")
    found = judge(sessions, options.minutes)
    print(json.dumps(found, indent=1) if options.json else _table(found))
    return 1 if options.hold and not found["within"] else 0


def _table(found: dict[str, Any]) -> str:
    rows = [f"{seconds:7.1f} s  {name}" for name, seconds in found["slowest"].items()]
    taken, limit = found["total"] / 60, found["limit"] / 60
    verdict = "within" if found["within"] else "ABOVE"
    last = (
        f"{found['tests']} tests in {taken:.1f} minutes, {verdict} the budget of {limit:.1f} "
        f"(cores {found['slowness']:.2f} times as slow as usual)"
    )
    return "\n".join([f"slowest {len(rows)} tests", *rows, last])


if __name__ == "__main__":
    cli.run(main)
