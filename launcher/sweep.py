"""`python -m launcher.submit -m seed=0,1,2 experiment=NAME ...`: the runs that lists of values mean, in one go.

Each is an ordinary run with its own id, jobs, successor and watcher, so that everything else about runs holds for it.
All of them are checked before the first is queued. The same command again starts what failed or is missing. On Slurm
all are queued at once. On one machine they share the cores: a process of this machine, `python -m launcher.sweep
FOLDER`, starts the next one when there is room. No command for users.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import backends, code_copy
from launcher.attempt import logs
from launcher.backends import Job
from launcher.backends.local import gpus
from launcher.compose import Frames, combinations
from launcher.reconcile import decide
from launcher.reconcile.view import read_many
from launcher.references import load_manifests
from launcher.submission import (
    Meant,
    Prepared,
    check,
    enter,
    job_shape,
    meant,
    prepare,
    resolve,
)
from launcher.sweep_folder import PREFIX, SweepFolder, of_id
from selfguide.spec.config import Config
from selfguide.spec.files import read_config, to_yaml
from selfguide.spec.identity import digest
from selfguide.spec.run import read_record, write_record
from selfguide.spec.validate import validate
from shards import cli, storage
from shards.errors import UserError

log = logging.getLogger("launcher.sweep")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    # the values that tell it from the others, as they can be typed
    swept: tuple[str, ...]
    prepared: Prepared

    @property
    def label(self) -> str:
        return " ".join(self.swept)


def carry_out(overrides: Sequence[str], *, as_json: bool) -> int:
    """Submits the sweep, or shows it where it is a dry run, and says what was done; returns the exit code."""
    points = plan(overrides)
    dry = points[0].prepared.config.dry_run
    done = describe(points) if dry else submit(points, overrides)
    print(json.dumps(done, indent=1) if as_json else _sentences(done, dry), flush=True)
    return 0


def plan(overrides: Sequence[str]) -> list[Point]:
    """Checks all runs of a sweep and finds out what submitting each does; writes and asks nothing.

    Raises:
        UserError: one of them is wrong, or two are the same.
    """
    return planned(combinations(overrides))


def planned(listed: Iterable[tuple[tuple[str, ...], tuple[str, ...]]]) -> list[Point]:
    """The same of runs that no product of lists makes: all settings of each, and of these what tells it from others.

    Raises:
        UserError: one of them is wrong, or two are the same.
    """
    # a controller is asked once, and data are read once, however many the runs
    automatic, load = functools.cache(backends.automatic), functools.cache(load_manifests)
    frames: Frames = {}
    found: list[tuple[tuple[str, ...], Meant]] = []
    for settings, swept in listed:
        try:
            config = resolve(settings, automatic, frames)
            if config.follow:
                raise UserError("follow=true: a sweep has many runs; follow one of them by its id")
            validate(config)
            found.append((swept, meant(config, load=load)))
        except UserError as error:
            raise UserError(f"{' '.join(swept)}: {error}") from error
    _refuse_twins(found)
    begun = [each.run for _, each in found if each.run.run_json.exists()]
    views, _ = read_many(begun, configs=True, history=True, patience_s=None)
    known = {view.folder.root: view for view in views}
    points = []
    for swept, each in found:
        try:
            prepared = prepare(each, known.get(each.run.root))
        except UserError as error:
            raise UserError(f"{' '.join(swept)}: {error}") from error
        points.append(Point(swept=swept, prepared=prepared))
    return points


def _refuse_twins(found: Sequence[tuple[tuple[str, ...], Meant]]) -> None:
    """Raises UserError where two points of a sweep mean one run."""
    count = Counter(each.run.root for _, each in found)
    twins = [each for each in found if count[each[1].run.root] > 1]
    if not twins:
        return
    first = twins[0][1]
    same = [(swept, each) for swept, each in twins if each.run == first.run]
    labels = " and ".join(f"'{' '.join(swept)}'" for swept, _ in same)
    if len({digest(each.identity) for _, each in same}) > 1:
        name = first.config.name
        raise UserError(f"name={name} for {labels}: drop it, and each run is named by its hash")
    one, other = (each.config for _, each in same[:2])
    keys = [text.partition("=")[0] for text in same[0][0]]
    differ = [key for key in keys if _value(one, key) != _value(other, key)]
    kept = {key: _once(found, key)[: 1 if key in differ else None] for key in keys}
    words = " ".join(shlex.quote(f"{key}={','.join(values)}") for key, values in kept.items())
    drop = "" if any(len(values) > 1 for values in kept.values()) else ", and drop -m"
    if not differ:
        raise UserError(
            f"{labels} are the same run {first.run.root.name}: give each value once, {words}{drop}"
        )
    alone = " ".join(shlex.quote(text) for text in same[0][0])
    raise UserError(
        f"{labels} are the same run {first.run.root.name}, for {' and '.join(differ)} is no part of what a run is: "
        f"give one value, {words}{drop}, or submit each by itself with a name of its own, {alone} name=NAME"
    )


def _once(found: Sequence[tuple[tuple[str, ...], Meant]], key: str) -> list[str]:
    """The values of a key that is swept, as they were typed; of those that mean the same, the first."""
    texts: list[str] = []
    values: list[Any] = []
    for swept, each in found:
        text = next(word for word in swept if word.startswith(f"{key}="))
        if (value := _value(each.config, key)) not in values:
            values.append(value)
            texts.append(text.partition("=")[2])
    return texts


def _value(config: Config, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else getattr(found, part, None)
    return found


def describe(points: Sequence[Point]) -> dict[str, Any]:
    """Returns what submitting the sweep would do."""
    rows = []
    for each in points:
        prepared = each.prepared
        state = decide.state(prepared.view).word if prepared.view else "new"
        about = {"run": prepared.run.root.name, "folder": str(prepared.run.root)}
        rows.append(
            {**about, "overrides": each.swept, "state": state, "action": prepared.decision.action}
        )
    return {"sweep": _folder(points).id, "runs": rows}


def submit(points: Sequence[Point], command: Sequence[str]) -> dict[str, Any]:
    """Submits what is neither at work nor finished; returns what was done with each run.

    Args:
        command: the settings as they were typed.

    Raises:
        UserError: the cluster refuses one; nothing was queued. Or it takes no more of them: it says how many it took.
    """
    notes = _check(points)
    folder = _folder(points)
    runs = [
        {"run": p.run.root.name, "experiment": p.config.experiment, "overrides": each.swept}
        for each in points
        if (p := each.prepared)
    ]
    write_record(
        folder.record, {"id": folder.id, "command": list(command), "runs": runs}, replace=True
    )
    if points[0].prepared.config.cluster.one_machine:
        done, runner = _queue(folder, points)
    else:
        done, runner = _submit_all(points), None
    rows = [{**row, "overrides": each.swept} for row, each in zip(done, points, strict=True)]
    return {"sweep": folder.id, "folder": str(folder.root), "runner": runner, "notes": notes} | {
        "runs": rows
    }


def _folder(points: Sequence[Point]) -> SweepFolder:
    """By its runs: the same sweep is the same folder, in whatever order and words."""
    ids = sorted(str(each.prepared.run.root) for each in points)
    return of_id(Path(points[0].prepared.config.runs), f"{PREFIX}{digest(ids, 8)}")


def _check(points: Sequence[Point]) -> list[str]:
    """Asks the cluster once for each kind of job; returns its notes."""
    notes: dict[str, None] = {}
    asked = set()
    for each in points:
        if (shape := job_shape(each.prepared)) in asked:
            continue
        asked.add(shape)
        try:
            notes |= dict.fromkeys(check(each.prepared))
        except UserError as error:
            raise UserError(f"{each.label}: {error}") from error
    return list(notes)


def _submit_all(points: Sequence[Point]) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = []
    with code_copy.one_for_all():
        for each in points:
            try:
                done.append(enter(each.prepared))
            except (UserError, KeyboardInterrupt) as error:
                so_far = f"{len(done)} of {len(points)} runs are submitted, and the same command goes on from there"
                if isinstance(error, UserError):
                    raise UserError(f"{each.label}: {error}; {so_far}") from error
                print(f"\n{so_far}", file=sys.stderr)
                raise
    return done


# ---- one machine -------------------------------------------------------------------------------------


def _queue(folder: SweepFolder, points: Sequence[Point]) -> tuple[list[dict[str, Any]], str | None]:
    """Joins what works or has finished, and has the others started when the machine has room for them."""
    rows: list[dict[str, Any]] = []
    with folder.queue() as waiting:
        works = folder.runs_on()
        if not works:
            # of a process that was killed
            waiting.clear()
        for each in points:
            prepared = each.prepared
            if prepared.decision.action == "join":
                rows.append(enter(prepared))
                continue
            key = f"{prepared.config.experiment}/{prepared.run.root.name}"
            storage.publish(
                str(folder.config(key)), to_yaml(prepared.config).encode(), replace=True
            )
            if key not in waiting:
                waiting.append(key)
            about = {"run": prepared.run.root.name, "folder": str(prepared.run.root)}
            images = prepared.decision.extends_to or prepared.config.train.images
            rows.append(
                {**about, "attempt": None, "job": None, "images": images, "state": "waiting"}
            )
        if waiting and not works:
            write_record(folder.runner, _start_runner(folder, points), replace=True)
        record = read_record(folder.runner)
    return rows, f"{record['kind']} job {record['id']}" if waiting and record else None


def _start_runner(folder: SweepFolder, points: Sequence[Point]) -> dict[str, Any]:
    if not folder.code.exists():
        code_copy.copy(folder.code)
    config = points[0].prepared.config
    job = Job(
        function=_by_command,
        argument=str(folder.root),
        folder=folder.root / "runner",
        code=code_copy.current(folder.code, folder.root),
        name=f"sg-{folder.id}",
        comment=str(folder.root),
        timeout_min=config.cluster.timeout_min,
        command=(sys.executable, "-m", "launcher.sweep", str(folder.root)),
    )
    return backends.of(config.cluster).submit(job)


def _by_command(folder: str) -> None:
    work(SweepFolder(Path(folder)))


def work(folder: SweepFolder) -> None:
    """Starts the waiting runs of a sweep, one whenever the machine has room, until none waits."""
    while True:
        with folder.queue() as waiting:
            if not waiting:
                folder.runner.unlink(missing_ok=True)
                return
            config = read_config(folder.config(waiting[0]))
            views, _ = read_many(folder.begun())
            busy = sum(decide.training_state(view) in ("queued", "running") for view in views)
            if busy < side_by_side(config):
                _start(config)
                waiting.pop(0)
                continue
        time.sleep(backends.of(config.cluster).poll_s)


def _start(config: Config) -> None:
    try:
        done = enter(prepare(meant(config)))
        log.info(f"run {done['run']}: {done['state']}, {done['job']}")
    except UserError as error:
        # the others are to run all the same; submitting the sweep again says why this one cannot
        log.error(f"{config.experiment} seed={config.seed}: {error}")


def side_by_side(config: Config) -> int:
    """Returns how many runs of this config the machine holds at once.

    A run takes all cores, and GPUs from the first, unless cluster.environment.OMP_NUM_THREADS says otherwise.
    """
    threads = config.cluster.environment.get("OMP_NUM_THREADS", "")
    if gpus() or not threads.isdigit():
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // (config.cluster.gpus_per_node * max(1, int(threads))))


# ---- words -------------------------------------------------------------------------------------------


def _sentences(done: dict[str, Any], dry: bool) -> str:
    rows = done["runs"]
    width = max(len(row["run"]) for row in rows)
    lines = [f"sweep   {done['sweep']}, {len(rows)} runs"]
    for row in rows:
        what = row.get("action") if dry and row["action"] != "join" else row["state"]
        job = row.get("job") or ""
        lines.append(f"  {row['run']:<{width}}  {what:<10} {job:<12} {' '.join(row['overrides'])}")
    lines += [f"        {note}" for note in done.get("notes", ())]
    if done.get("runner"):
        lines.append(f"        {done['runner']} starts the waiting runs when this machine has room")
    if dry:
        return "\n".join([*lines, "", "dry run: nothing was written, asked or queued"])
    return "\n".join([*lines, "", f"  python -m launcher.cancel {done['sweep']}     end all of it"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.sweep",
        "Starts the waiting runs of a sweep on this machine, one after another. `launcher.submit -m` calls it.",
    )
    parser.add_argument("folder", type=Path, help="of the sweep")
    options = parser.parse_args(arguments)
    logs.configure(None)
    work(SweepFolder(options.folder))
    return 0


if __name__ == "__main__":
    cli.run(main)
