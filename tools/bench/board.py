"""What the leaderboard costs with many runs: a first build, a build after an earlier one, and a refresh of the server.

Processor time of one process, since other work on the machine and cold disks would be most of anything else. Sorting
is timed in a browser, where there is one: from the click until the table is laid out.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launcher.board.collect import collect
from launcher.board.page import render, write
from launcher.board.read import read_runs
from launcher.board.serve import Live
from tools.bench.board_runs import make
from tools.bench.harness import Row

RUNS = 1000
# seconds that each may take
BUILD_S, REFRESH_S, SORT_S = 5.0, 1.0, 0.1

# milliseconds of each turn by heading; each turn sorts by another heading before
_CLICKS = """
const heads = [...document.querySelectorAll(".sheet:not([hidden]) th[aria-sort] .sort")];
const taken = heads.map(() => []);
for (let turn = 0; turn < arguments[0]; turn++) {
  heads.forEach((head, i) => {
    const start = performance.now();
    head.click();
    document.body.offsetHeight;
    taken[i].push(performance.now() - start);
  });
}
return heads.map((head, i) => [head.textContent.trim(), taken[i]]);
"""


def suite(repeats: int) -> list[Row]:
    """The rows; `ratio` is the median over what it may take."""
    before = os.environ.get("SELFGUIDE_CACHE")
    with tempfile.TemporaryDirectory(prefix="bench-board-") as folder:
        root, kept = Path(folder) / "runs", Path(folder) / "cache"
        make(root, RUNS)
        try:
            return [*_measured(root, kept, repeats), *sorting(root, repeats)]
        finally:
            if before is None:
                os.environ.pop("SELFGUIDE_CACHE", None)
            else:
                os.environ["SELFGUIDE_CACHE"] = before


def _measured(root: Path, kept: Path, repeats: int) -> list[Row]:
    def build() -> None:
        render(collect(*read_runs(root)), built=0.0)

    def first_build(turn: int) -> None:
        os.environ["SELFGUIDE_CACHE"] = str(kept / str(turn))
        build()

    live = Live(root, None, 0.0)
    live.seen()
    records = sorted(root.glob("*/*/evals/img-*.1.json"))
    what = f"board of {RUNS:,} runs"
    return [
        _row(f"{what}: first build", first_build, repeats, BUILD_S),
        _row(f"{what}: build after another", lambda turn: build(), repeats, BUILD_S),
        _row(f"{what}: refresh, nothing new", lambda turn: _look(live), repeats, REFRESH_S),
        _row(
            f"{what}: refresh, one new record",
            lambda turn: _look(live, records[turn], turn),
            repeats,
            REFRESH_S,
        ),
    ]


def sorting(root: Path, repeats: int) -> list[Row]:
    """The heading that takes longest to sort a page with a row for each run; empty without Chromium and selenium."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return []
    try:
        from selenium import webdriver
    except ImportError:
        return []
    runs, problems = read_runs(root)
    rows = [replace(run, identity={**run.identity, "row": n}) for n, run in enumerate(runs)]
    page = root / "rows.html"
    write(collect(rows, problems), page, built=0.0)
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    profile = f"--user-data-dir={root / 'chromium'}"
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", profile):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=str(shutil.which("chromedriver")))
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.get(page.as_uri())
        found = browser.execute_script(_CLICKS, repeats)
    heading, taken = max(found, key=lambda each: statistics.median(each[1]))
    seconds = [ms / 1000 for ms in taken]
    what = f"board of {len(rows):,} rows: sort by the slowest heading, {heading}"
    return [_judged(what, seconds, SORT_S, "in the browser")]


def _look(live: Live, record: Path | None = None, turn: int = 0) -> None:
    """Looks once more, at a run that has got another try of an evaluation."""
    if record is not None:
        newer = json.loads(record.read_text()) | {"attempt": 2, "seconds": 41.0 + turn}
        record.with_name(record.name.replace(".1.json", ".2.json")).write_text(json.dumps(newer))
    live.seen()


def _row(name: str, call: Callable[[int], None], repeats: int, limit_s: float) -> Row:
    taken = []
    for turn in range(repeats):
        start = time.process_time()
        call(turn)
        taken.append(time.process_time() - start)
    return _judged(name, taken, limit_s, "of processor time")


def _judged(name: str, taken: list[float], limit_s: float, what: str) -> Row:
    middle = statistics.median(taken)
    verdict = f"{'within' if middle <= limit_s else 'over'} {limit_s:g} s {what}"
    return Row(name, middle, min(taken), max(taken), middle / limit_s, verdict)
