"""`python -m launcher.doctor [RUN] [cluster=... experiment=... nodes=N]`: what a run would lose here, before it does.

It reads what Slurm says of itself, tests the file system of `runs=`, and sends a short job to two nodes at once, which
look at each other's files and at their own Python, GPUs and data. One line a check, with the cure where one is due.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import textwrap
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from launcher import attempt, backends, code_copy, jobs, notify, watch
from launcher.attempt import disks, node
from launcher.attempt.exits import Exit
from launcher.attempt.finding import CODES, Finding, code
from launcher.backends import Job, slurm_site
from launcher.backends.slurm import Slurm
from launcher.checks import nodes, preemption
from launcher.checks.preemption import Plan
from launcher.choices import options
from launcher.compose import changed
from launcher.folder import Attempt, find, runs, tail
from launcher.reconcile.lived import read_lived
from launcher.reconcile.past import Past
from launcher.reconcile.view import RunView, read
from launcher.sites import takes_config_dir
from launcher.submission import absolute, check_weak_snapshots, resolve
from launcher.usage import complete_setting
from selfguide.spec.config import Config, TrainConfig
from selfguide.spec.config.cluster import check_cluster
from selfguide.spec.config.laws import check
from selfguide.spec.run import RunFolder, read_record, write_record
from selfguide.spec.sizes import footprint
from selfguide.spec.validate import validate
from shards import cli, storage
from shards.errors import UserError
from shards.words import Parser

# a job that waits longer for two nodes is given up
WAIT_S = 300.0
LIMIT_MIN = 15
# before a person reads that it waits
TELL_S = 5.0
MARKS = {"ok": "ok      ", "warning": "warning ", "bad": "bad     "}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be examined."""

    config: Config
    # the run that was named, where it is there
    run: RunFolder | None
    # whether it is this experiment that matters, and not the cluster alone
    sized: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0 where all is well, 1 after a warning, 2 where something is bad."""
    parser = Parser(
        prog=cli.program("launcher.doctor"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Says whether a preemption, a time limit or a lost node would lose work here, and tests the file\n"
        "system, the nodes and the data that a run would use. Nothing is left behind.",
        epilog="examples:\n  python -m launcher.doctor cluster=slurm experiment=in1k_dit nodes=4\n"
        "  python -m launcher.doctor 3f2a --no-jobs\n\n"
        "Exit codes: 0 all is well, 1 a warning, 2 something that a run would fail at, or a mistake in the settings.",
    )
    words = parser.add_argument(
        "words", nargs="*", metavar="RUN or KEY=VALUE", help="a run, or settings as of submit"
    )
    words.completer = complete_setting  # type: ignore[attr-defined]
    parser.add_argument(
        "--runs", type=storage.place, default="runs", metavar="DIR", help="where runs are (runs)"
    )
    takes_config_dir(parser)
    parser.add_argument("--no-jobs", action="store_true", help="only what this machine can tell")
    parser.add_argument(
        "--wait",
        type=float,
        default=WAIT_S,
        metavar="S",
        help=f"seconds that the job may wait for nodes ({WAIT_S:.0f})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_intermixed_args(arguments)
    asked = read_words(given.words, given.runs)
    root = Path(asked.config.runs)
    new, found = not root.exists(), list[Finding]()
    jobs_too = () if given.no_jobs else (partial(_nodes, wait_s=given.wait),)
    for look in (_messages, _cluster, _files, *jobs_too):
        found += (findings := look(asked))
        if not given.json:
            print("".join(line(each) for each in findings), end="", flush=True)
    if new and root.is_dir() and not any(root.iterdir()):
        root.rmdir()
    worst = code(found)
    if given.json:
        verdict = next(name for name, number in CODES.items() if number == worst)
        print(
            json.dumps({"verdict": verdict, "checks": [asdict(each) for each in found]}, indent=1)
        )
    return worst


def line(found: Finding) -> str:
    """A finding as people read it."""
    head = f"{MARKS[found.verdict]}{found.check:<14} "
    lines = textwrap.wrap(found.text, 116 - len(head)) + [
        f"-> {part}" if not i else f"   {part}"
        for i, part in enumerate(textwrap.wrap(found.cure, 113 - len(head)))
    ]
    return "\n".join([head + lines[0], *(" " * len(head) + each for each in lines[1:])]) + "\n"


def read_words(words: Sequence[str], root: str) -> Asked:
    """Returns what is meant: a run by its name or folder, an experiment, or a cluster alone.

    Raises:
        UserError: nothing that could be.
    """
    named = [word for word in words if "=" not in word]
    settings = [word for word in words if "=" in word]
    if len(named) > 1:
        raise UserError(f"{' '.join(named)}: give one run")
    if named:
        run = find(named[0], Path(root))
        view = read(run)
        kept = view.config
        if kept is None:
            raise UserError(
                f"run {run.root.name} has no config that this version reads; give experiment=NAME"
            )
        config = changed(replace(kept, runs=str(run.root.parent.parent)), settings)
        return Asked(config=_checked(config, view), run=run, sized=True)
    keys = {word.partition("=")[0] for word in settings}
    if "runs" not in keys:
        settings = [*settings, f"runs={root}"]
    sized = "experiment" in keys
    if not sized:
        settings = [f"experiment={options('experiment')[0]}", *settings]
    config = resolve(settings)
    run = RunFolder(Path(config.runs) / config.experiment / str(config.name))
    there = run.run_json.exists()
    config = _checked(config, read(run) if there else None, sized=sized)
    return Asked(config=config, run=run if there else None, sized=sized)


def _checked(config: Config, view: RunView | None, *, sized: bool = True) -> Config:
    """
    Args:
        view: of the run, where there is one.

    Raises:
        UserError: it could not be submitted.
    """
    if sized:
        validate(config)
        check_weak_snapshots(config, view)
    else:
        check(config.cluster, "cluster")
        check_cluster(config.cluster, config.nodes)
    return absolute(config)


def _messages(asked: Asked) -> list[Finding]:
    """Whether messages could be sent, where anybody is to get them."""
    if not notify.urls():
        return []
    there = importlib.util.find_spec("apprise") is not None
    text = f"{len(notify.urls())} to be notified" + (
        "" if there else ", and apprise is not installed"
    )
    cure = "" if there else "pip install 'selfguide[notify]', for the Python of jobs, too"
    return [Finding(check="messages", verdict="ok" if there else "warning", text=text, cure=cure)]


# ---- what the cluster says ---------------------------------------------------------------------------


def _cluster(asked: Asked) -> list[Finding]:
    """Whether ends of jobs lose work, and whether the jobs of a run would be accepted."""
    config, backend = asked.config, backends.of(asked.config.cluster)
    plan = _plan(asked)
    if not isinstance(backend, Slurm):
        save = f"; a save takes {plan.save_s:.1f} s" if plan.save_s is not None else ""
        follows = "the run's watcher" if plan.restart == "watcher" else "nothing"
        text = f"nothing preempts jobs of this machine, and {follows} goes on with them{save}"
        return [Finding(check="this machine", verdict="ok", text=text)]
    cluster = config.cluster
    site = slurm_site.read(backend.ask, cluster.partition, cluster.account, cluster.qos)
    found = [
        preemption.commands(site),
        preemption.preemption(site, plan),
        preemption.outside(site, plan),
        preemption.time_limit(site, plan),
        preemption.lost_node(site, plan),
        preemption.limits(site, plan),
    ]
    if apart := cluster.evaluation_partition:
        other = slurm_site.read(backend.ask, apart, cluster.account, cluster.qos)
        found.append(preemption.small_limit(other, cluster.evaluation_timeout_min))
    return [*found, *(_accepted(name, job, backend) for name, job in _jobs(config))]


def _plan(asked: Asked) -> Plan:
    config, run = asked.config, asked.run
    slowest = run.slowest_save_s() if run else None
    common = Plan(
        save_s=None,
        batch=config.train.batch,
        restart=config.cluster.restart,
        watched=config.evaluation.protocol != "none",
        timeout_min=config.cluster.timeout_min,
        warn_s=jobs.warning(config, slowest),
    )
    if not asked.sized:
        return common
    lived, _ = read_lived(runs(Path(config.runs)), ask=False)
    known = Past.of(run, config, lived).known()
    save, rate = known["save_s"], known.get("images_per_s")
    return replace(
        common,
        save_s=slowest or save.value,
        source="measured: the slowest of this run" if slowest else save.source,
        step_s=config.train.batch / rate.value if rate else None,
        every=config.train.checkpoint_every // config.train.batch,
    )


def _jobs(config: Config) -> list[tuple[str, Job]]:
    """The jobs of a run, by what they are for."""
    at = Attempt(Path(config.runs) / config.experiment / "doctor" / "attempts" / "0001")
    found = [("training job", jobs.training(config, at, "doctor"))]
    if config.evaluation.protocol != "none":
        found.append(
            ("evaluation job", jobs.evaluation(config, at, "doctor", at.run.evals / "request.json"))
        )
        found.append(("watcher job", jobs.watcher(config, at, "doctor", watch.entry, None)))
    return found


def _accepted(name: str, job: Job, backend: Slurm) -> Finding:
    try:
        notes = backend.check(job)
    except UserError as error:
        return Finding(
            check=name,
            verdict="bad",
            text=str(error),
            cure="see the keys of cluster.* in docs/cluster.md",
        )
    if notes:
        return Finding(
            check=name,
            verdict="warning",
            text="; ".join(notes),
            cure="it would be queued until then",
        )
    what = f"{job.nodes} nodes x {job.tasks} ranks" if job.nodes > 1 else f"{job.tasks} ranks"
    return Finding(
        check=name, verdict="ok", text=f"would be accepted: {what}, {job.timeout_min} min"
    )


# ---- the file system ---------------------------------------------------------------------------------


def _files(asked: Asked) -> list[Finding]:
    """What the folder of runs promises to one process here."""
    root = Path(asked.config.runs)
    folder = root / ".doctor" / uuid.uuid4().hex[:12]
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        text = f"runs={root} cannot be written: {error.strerror}"
        return [
            Finding(check="file system", verdict="bad", text=text, cure="give another runs=FOLDER")
        ]
    try:
        return disks.alone(folder, _needed(asked.config) if asked.sized else None)
    except OSError as error:
        text = f"{folder} cannot be written: {error.strerror}"
        return [
            Finding(
                check="file system",
                verdict="bad",
                text=text,
                cure="make room, or give another runs=",
            )
        ]
    finally:
        _remove(folder)


def _needed(config: Config) -> int:
    size = footprint(config)
    # one more than is kept, until the oldest is deleted
    checkpoints = (config.train.keep_checkpoints + 1) * size.checkpoint
    return checkpoints + _snapshots(config.train) * size.snapshot


def _snapshots(train: TrainConfig) -> int:
    """So many snapshots of a run are there at once, as far as its settings say."""
    published = -(-train.images // train.snapshot_every)
    if train.keep_snapshots is None:
        return published
    every = train.keep_snapshots_every
    kept = train.keep_snapshots + (train.images // every if every else 0)
    # the best one, and one that waits for its score
    return min(published, kept + 2)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


# ---- the nodes ---------------------------------------------------------------------------------------


def _nodes(asked: Asked, wait_s: float) -> list[Finding]:
    """Sends a job to two nodes, or starts two processes here, and reads what they found."""
    config, folder = asked.config, Path(asked.config.runs) / ".doctor" / uuid.uuid4().hex[:12]
    backend = backends.of(config.cluster)
    try:
        folder.mkdir(parents=True)
        job = _job(config, folder)
        if isinstance(backend, Slurm):
            job = _fitting(backend, job)
        code_copy.copy(folder / "code")
        roots = [config.data.root, *config.data.mix] if asked.sized else []
        write_record(folder / "request.json", {"roots": roots, "weights": config.init.path})
        write_record(folder / "submission.json", {"world": job.nodes * job.tasks})
        record = backend.submit(job)
        try:
            over = _wait(record, wait_s)
        finally:
            backends.cancel(record)
        return [over] if over else _answers(asked, folder, job)
    except UserError as error:
        return [
            Finding(
                check="job",
                verdict="bad",
                text=str(error),
                cure="see the keys of cluster.* in docs/cluster.md",
            )
        ]
    except OSError as error:
        text = f"no check can be sent from runs={config.runs}: {error.strerror}"
        return [Finding(check="job", verdict="bad", text=text, cure="give another runs=FOLDER")]
    finally:
        _remove(folder)


def _job(config: Config, folder: Path) -> Job:
    """One rank on each of two nodes with all of their GPUs; two on one machine."""
    cluster = config.cluster
    return Job(
        function=attempt.examine,
        argument=str(folder),
        folder=folder / "job",
        code=folder / "code",
        name="sg-doctor",
        comment=str(folder),
        nodes=1 if cluster.one_machine else 2,
        tasks=2 if cluster.one_machine else 1,
        gpus=cluster.gpus_per_node if cluster.request_gpus else 0,
        devices=jobs.training_devices(cluster),
        cpus_per_task=cluster.cpus_per_task,
        mem_gb=cluster.mem_gb,
        exclusive=cluster.exclusive,
        timeout_min=LIMIT_MIN,
        environment=cluster.environment,
    )


def _fitting(backend: Slurm, job: Job) -> Job:
    """The same on one node, where the partition has no second one."""
    try:
        backend.check(job)
        return job
    except UserError:
        single = replace(job, nodes=1)
        backend.check(single)
        return single


def _wait(record: backends.Record, wait_s: float) -> Finding | None:
    """Returns when the job is over; what keeps it, where it does not begin in time or nobody says."""
    poll_s, began = backends.of_record(record).poll_s, time.monotonic()
    label, warned = f"{record['kind']} job {record['id']}", False
    while (state := backends.state(record)) != "gone":
        late = time.monotonic() - began - wait_s
        if (late > 0 and state != "running") or late > 60 * LIMIT_MIN:
            text = f"{label} for {record['nodes']} nodes is {state} after {wait_s:.0f} s, and was cancelled"
            cure = "try again later, or give --wait SECONDS"
            return Finding(check="job", verdict="warning", text=text, cure=cure)
        if state == "queued" and not warned and time.monotonic() > began + TELL_S:
            print(f"{label} waits for {record['nodes']} nodes", file=sys.stderr, flush=True)
            warned = True
        time.sleep(min(poll_s, 1.0))
    return None


def _answers(asked: Asked, folder: Path, job: Job) -> list[Finding]:
    """What the ranks of a job that is over have left."""
    ended = [exit for rank in range(job.nodes * job.tasks) if (exit := Exit.read(folder, rank))]
    reports = [read_record(path) or {} for path in sorted(folder.glob("node-*.json"))]
    config, found = asked.config, list[Finding]()
    if reports:
        weights = (config.init.path or "") if asked.sized else None
        found = nodes.compare(reports, node.packages(), config.cluster, weights)
    two = read_record(folder / "two-0.json")
    found += [Finding(**each) for each in two["findings"]] if two else []
    failed = [exit for exit in ended if exit.code]
    complete = len(reports) == job.nodes and (two is not None or job.nodes * job.tasks < 2)
    if failed or not complete:
        log = next((tail(path, 3) for path in sorted((folder / "job").glob("*_log.out"))), "")
        why = failed[0].message if failed else " ".join(log.split()) or "it left no word"
        text = f"the check of {job.nodes} nodes did not come to its end: {why}"
        found.append(
            Finding(
                check="job",
                verdict="bad",
                text=text,
                cure="see cluster.setup, cluster.modules and cluster.container",
            )
        )
    elif job.nodes * job.tasks < 2:
        text = "one node only, so that nothing is known of two"
        found.append(Finding(check="two nodes", verdict="warning", text=text))
    return found


if __name__ == "__main__":
    cli.run(main)
