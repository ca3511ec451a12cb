"""Runs benchmark suites and prints medians, spread and ratios.

python -m tools.bench                     every suite
python -m tools.bench engine --repeats 40
python -m tools.bench models --sizes all  up to DiT-XL: hours on two cores, minutes on a GPU
python -m tools.bench shards --without litdata,streaming
python -m tools.bench engine --json
python -m tools.bench gpu --help          what one GPU does, in under ten minutes
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from typing import Any

from rich.table import Table

from shards import cli
from shards.errors import UserError

if __name__ == "__main__" and sys.argv[1:2] == ["gpu"]:
    # before the suites below, whose libraries a machine with a GPU may lack
    from tools.bench.gpu import command

    cli.run(lambda: command.main(sys.argv[2:]))

from tools.bench import engine, evaluation, models, sampling, saves, shards, sinkhorn, telemetry
from tools.bench.harness import Row

SUITES: dict[str, Any] = {
    "engine": engine,
    "evaluation": evaluation,
    "models": models,
    "sampling": sampling,
    "saves": saves,
    "shards": shards,
    "sinkhorn": sinkhorn,
    "telemetry": telemetry,
}
TURNS = {
    "evaluation": 5,
    "models": 7,
    "saves": 5,
    "shards": 5,
}  # a turn of whole networks or data sets takes seconds


def machine() -> str:
    """The line that every published figure carries."""
    import torch

    python = platform.python_version()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"Python {python}, torch {torch.__version__}"
    )


def table(title: str, rows: list[Row]) -> Table:
    made = Table(title=title, title_justify="left")
    for name in ("variant", "median ms", "quartiles ms", "ratio", "95 %", ""):
        made.add_column(name, justify="left" if name in ("variant", "") else "right")
    for row in rows:
        spread = f"{row.low * 1e3:.2f} to {row.high * 1e3:.2f}"
        inside = "" if row.interval is None else "{:.3f} to {:.3f}".format(*row.interval)
        made.add_row(
            row.name, f"{row.median * 1e3:.2f}", spread, f"{row.ratio:.3f}", inside, row.verdict
        )
    return made


def _chosen(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The options that are a suite's own."""
    if name == "models":
        clock = time.process_time if options.cpu else time.perf_counter
        return {"sizes": options.sizes, "clock": clock}
    if name == "shards":
        words = frozenset(word for word in options.without.split(",") if word)
        return {"quick": options.quick, "without": words}
    return {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help=f"of: {', '.join(SUITES)}")
    parser.add_argument(
        "--repeats",
        type=int,
        help="turns after those of warm-up (default 15; models 7, evaluation, saves and shards 5)",
    )
    parser.add_argument(
        "--sizes", choices=models.SIZES, default="s", help="of the suite models (default s)"
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="of the suite models: time the CPU of this process, where others use the machine",
    )
    parser.add_argument("--quick", action="store_true", help="of the suite shards: a tenth of it")
    parser.add_argument(
        "--without",
        default="",
        metavar="WORDS",
        help=f"of the suite shards, what to leave out: {', '.join((*shards.PARTS, *shards.RIVALS))}",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.repeats is not None and options.repeats < 2:
        raise UserError(f"--repeats={options.repeats}: take 2 or more, for a spread is of several")
    found = {}
    for name in options.suites or SUITES:
        turns = options.repeats or TURNS.get(name, 15)
        cli.console(stderr=True).print(f"running {name}, {turns} turns ...", style="dim")
        found[name] = SUITES[name].suite(turns, **_chosen(name, options))
        if not options.json:
            drawn = getattr(SUITES[name], "table", table)  # a suite may have figures of its own
            cli.console().print(drawn(SUITES[name].TITLE, found[name]))
    if options.json:
        rows = {name: [asdict(row) for row in rows] for name, rows in found.items()}
        print(json.dumps({"machine": machine(), "suites": rows}))
    else:
        cli.console().print(machine(), style="dim")
    return 0


if __name__ == "__main__":
    cli.run(main)
