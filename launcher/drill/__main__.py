"""`python -m launcher.drill --cells A1,C3 cluster=NAME`: whether runs survive faults on this cluster.

Each cell puts one fault on a run of some seconds; it must go on by itself and learn the bits of a run that nothing
happened to. `storm` puts many on one run. Exit codes: 0 all passed, 1 something did not hold, 2 a user error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher import backends
from launcher.compose import compose
from launcher.drill import storm
from launcher.drill.bench import Bench, LostRun, learned, tiny
from launcher.drill.cells import CELLS, Result, drill, refusal
from selfguide.spec.config import Config
from selfguide.spec.run import RunFolder
from selfguide.spec.suggest import nearest
from shards import cli, storage
from shards.errors import UserError
from shards.words import Parser

BATCH = 128
# of the run that a cell is put on
STEPS, INTERVAL = 120, 20
# of the run that a storm measures a step with
PROBED = 60
# what a checkpoint is taken to cost when a storm chooses how often to save
SAVE_S = 0.1

EPILOG = """
examples:
  python -m launcher.drill cluster=slurm cluster.partition=gpu
  python -m launcher.drill --cells A1,C3 --urgent urgent cluster=devcluster
  python -m launcher.drill storm --faults 10 --seed 1 cluster=devcluster
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    if options.list:
        for name, cell in CELLS.items():
            print(f"{name}  {cell.about}")
        return 0
    cells = _cells(options.cells)
    bench, config = _bench(options)
    refused = {cell: reason for cell in cells if (reason := refusal(cell, bench))}
    put = [cell for cell in cells if cell not in refused]
    if options.words[:1] == ["storm"]:
        return _storm(bench, config, put, options)
    return _drill(bench, config, cells, refused, options.json)


def _drill(
    bench: Bench,
    config: Config,
    cells: Sequence[str],
    refused: dict[str, str],
    as_json: bool,
) -> int:
    say = sys.stderr if as_json else sys.stdout
    settings = tiny(STEPS * BATCH, BATCH, checkpoint_every=INTERVAL * BATCH, log_every=4 * BATCH)
    bench = replace(bench, settings=[*settings, *bench.settings])
    calm = _calm(bench) if len(refused) < len(cells) else {}
    results = []
    for cell in cells:
        if reason := refused.get(cell):
            found = Result(cell=cell, about=CELLS[cell].about, outcome="refused", reasons=[reason])
        else:
            found = drill(cell, bench, calm, BATCH, INTERVAL * BATCH)
        results.append(found)
        print(_row(found), file=say, flush=True)
    facts: dict[str, Any] = {
        "cluster": config.cluster.kind,
        "python": sys.version.split()[0],
        "host": os.uname().nodename,
    }
    facts |= {"cells": [asdict(each) for each in results], "time": time.time()}
    path = bench.faults.parent / "drill.json"
    path.write_text(json.dumps(facts, indent=1))
    print(f"{path} is what a report of a bug needs", file=say)
    if as_json:
        print(json.dumps(facts, indent=1))
    return int(any(each.outcome == "failed" for each in results))


def _row(found: Result) -> str:
    recovered = f"{found.recovery_s:6.1f} s" if found.recovery_s is not None else " " * 8
    again = f"{found.lost:7,}" if found.lost is not None else " " * 7
    what = textwrap.shorten("; ".join(found.reasons) or found.cause, 120)
    return f"{found.cell:3} {found.outcome:8} {recovered} {again}  {found.about}: {what}"


def _storm(bench: Bench, config: Config, cells: Sequence[str], options: argparse.Namespace) -> int:
    say = sys.stderr if options.json else sys.stdout
    plan = storm.draw(options.seed, options.faults, options.mean_s, config.ranks, cells)
    step_s = _step_s(bench)
    # of the Young-Daly interval, in steps
    interval = max(1, round((2 * SAVE_S * options.mean_s) ** 0.5 / step_s)) * BATCH
    steps = storm.steps_of(plan, step_s)
    steps += -steps % (interval // BATCH)
    patience_s = storm.patience_s(steps, step_s)
    settings = tiny(steps * BATCH, BATCH, checkpoint_every=interval, log_every=BATCH)
    bench = replace(bench, settings=[*settings, *bench.settings])
    about = f"{steps:,} steps of {step_s:.2f} s, saved every {interval // BATCH}"
    print(f"{len(plan)} faults on a run of {about}", file=say, flush=True)
    calm = _calm(bench, patience_s)

    def tell(event: storm.Event) -> None:
        what = f"{event.cell} {CELLS[event.cell].about}" if event.cell else event.kind
        print(f"{event.images:>9,} images, attempt {event.attempt}: {what}", file=say, flush=True)

    run = bench.submit(f"storm-{bench.faults.parent.name}")
    path = bench.faults.parent / "events.jsonl"
    try:
        log = storm.put_on(bench, run, plan, patience_s, tell)
    except (LostRun, TimeoutError, RuntimeError) as error:
        print(f"error: {run.root}: {error}", file=sys.stderr)
        bench.command("launcher.cancel", str(run.root))
        return 1
    storm.write_log(path, plan, log)
    found = storm.report(run, calm, log, BATCH, interval)
    facts = {
        "seed": options.seed,
        **asdict(found),
        "share_of_bound": found.share,
        "events": str(path),
    }
    print(json.dumps(facts, indent=1) if options.json else _table(facts))
    return int(bool(found.differs or any(found.lost_warned)))


def _table(facts: dict[str, Any]) -> str:
    def seconds(name: str) -> str:
        return f"{facts[name]:.2f} s" if facts[name] is not None else "none drawn"

    rows = {
        "seed": facts["seed"],
        "faults, attempts": f"{facts['faults']}, {facts['attempts']}",
        "bits of the undisturbed run": "the same" if not facts["differs"] else f"differ: {facts['differs']}",
        "steps lost, warned": sum(facts["lost_warned"]),
        "steps lost, without warning": f"{sum(facts['lost_hard'])} ({max(facts['lost_hard'], default=0)} at most)",
        "recovery of a rank, median": seconds("recovery_rank_s"),
        "recovery of a lost node, median": seconds("recovery_node_s"),
        "a step, a save": f"{facts['step_s']:.3f} s, {facts['save_s']:.3f} s",
        "wall clock": f"{facts['wall_s']:.0f} s; planned, with these faults: {facts['planned_s']:.0f} s",
        "effective training time": f"{facts['effective']:.3f}",
        "at most, by Young and Daly": f"{facts['bound']:.3f}, of which {facts['share_of_bound']:.1%}",
        "by hand, every ten minutes": f"{facts['by_hand']:.3f}",
        "named by `why`": f"{facts['faults'] - len(facts['misnamed'])} of {facts['faults']}",
        "events": facts["events"],
    }  # fmt: skip
    return "\n".join(f"{name:32} {value}" for name, value in rows.items())


def _step_s(bench: Bench) -> float:
    """Seconds of a step of a storm on this cluster, from a run of some seconds."""
    images = PROBED * BATCH
    settings = tiny(images, BATCH, checkpoint_every=images, log_every=BATCH)
    bench = replace(bench, settings=[*settings, *bench.settings])
    return storm.mean_step_s(_undisturbed(bench, "probe"))


def _calm(bench: Bench, seconds: float = 900.0) -> dict[str, Any]:
    """What a run learns that nothing happens to, and that may take `seconds`."""
    return learned(_undisturbed(bench, "calm", seconds))


def _undisturbed(bench: Bench, name: str, seconds: float = 900.0) -> RunFolder:
    """A run that nothing happens to, once it has finished.

    Raises:
        UserError: it is refused, or does not finish: then a drill would show nothing.
    """
    try:
        run = bench.submit(f"{name}-{bench.faults.parent.name}")
        bench.finishes(run, seconds)
    except (RuntimeError, TimeoutError) as error:
        raise UserError(f"the run without faults: {str(error).strip()}") from error
    return run


def _cells(text: str) -> list[str]:
    """The cells that `--cells` names.

    Raises:
        UserError: there is none of a name.
    """
    names = [name.strip().upper() for name in text.split(",")] if text else [*CELLS]
    for name in names:
        if name not in CELLS:
            raise UserError(
                f"--cells {name}: no such cell{nearest(name, CELLS)}; `python -m launcher.drill --list` shows them"
            )
    return names


def _bench(options: argparse.Namespace) -> tuple[Bench, Config]:
    """Where a drill works: a folder of its own below `--runs`, with the digits beside it.

    Raises:
        UserError: there is no Slurm, or the digits could not be written.
    """
    root = Path(options.runs).expanduser().resolve()
    digits = root / "digits"
    # hangs are noticed sooner than in runs whose steps may take long
    words = [
        f"data.root={digits}",
        "cluster.hang_step_s=20",
        *(word for word in options.words if word != "storm"),
    ]
    if not any(word.startswith("cluster=") for word in words):
        words.append(f"cluster={backends.automatic()}")
    config = compose([*tiny(BATCH, BATCH, checkpoint_every=BATCH, log_every=BATCH), *words])
    if config.cluster.kind == "local":
        raise UserError("cluster=local: nothing follows by itself on one machine; name a Slurm")
    cluster = None
    if config.cluster.kind == "devcluster":
        from slurm import devcluster

        cluster = devcluster.find()
        if cluster is None:
            raise UserError("cluster=devcluster: none is up; start it with `make cluster-up`")
    if not digits.exists():
        command = [sys.executable, "-m", "tools.shards", "make", "digits", "--out", str(digits)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{digits}: {done.stderr.strip()}")
    folder = root / time.strftime("%Y%m%d-%H%M%S")
    faults = folder / "faults"
    faults.mkdir(parents=True)
    reach = cluster.environment() if cluster else {}
    urgent = options.urgent or ("urgent" if cluster else None)
    bench = Bench(
        settings=words, runs=folder, faults=faults, reach=reach, cluster=cluster, urgent=urgent
    )
    return bench, config


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=cli.program("launcher.drill"),
        description="Puts faults on small runs of this cluster; each must go on by itself and end at the same bits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="storm | key=value",
        help="storm: many faults on one run; settings as of launcher.submit",
    )
    parser.add_argument(
        "--cells",
        default="",
        help="faults of the matrix in docs/cluster.md, such as A1,C3 (all that can be put on here)",
    )
    parser.add_argument("--list", action="store_true", help="list the cells, and do nothing")
    parser.add_argument(
        "--urgent",
        metavar="PARTITION",
        help="a partition whose jobs preempt those of others, for C3 (none)",
    )
    parser.add_argument("--faults", type=int, default=10, help="how many a storm has (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="draws a storm's faults and times (%(default)s)"
    )
    parser.add_argument(
        "--mean-s",
        type=float,
        default=15.0,
        help="seconds of training between two faults of a storm, on average (%(default)s)",
    )
    parser.add_argument(
        "--runs",
        type=storage.place,
        default="runs/drill",
        metavar="DIR",
        help="where the runs of the drill go (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


if __name__ == "__main__":
    cli.run(main)
