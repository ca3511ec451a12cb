"""`python -m launcher.submit experiment=NAME key=value ...`: the story of a submission, top to bottom.

Compose, choose the cluster, check everything, and only then write and queue: run folder, attempt, code copy, job,
watcher. A run is what is learned, so the same settings again mean the same run: joined while it works, resumed by a
new attempt where it stopped, and left alone once it has finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher import clusters, jobs, status
from launcher.compose import compose, without_group
from launcher.folder import Attempt
from launcher.lock import held
from selfguide.spec.annotations import absolute_annotations, check_annotations, promises
from selfguide.spec.config import Config
from selfguide.spec.data_fit import check_fit
from selfguide.spec.files import read_config, to_yaml
from selfguide.spec.identity import digest, identity
from selfguide.spec.initial_weights import check_weights
from selfguide.spec.run import RunFolder, write_record
from selfguide.spec.suggest import nearest
from selfguide.spec.validate import validate
from shards import cli, storage
from shards.errors import UserError

FLAGS = ("--json", "--help", "-h", "--completion")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; `arguments` are the words after its name. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags, overrides = _split(words)
    if "--help" in flags or "-h" in flags or "--completion" in flags:
        from launcher import usage

        print(usage.completion() if "--completion" in flags else usage.text())
        return 0
    config = resolve(overrides)
    validate(config)
    if config.dry_run:
        from launcher import describe

        print(
            json.dumps(describe.facts(config), indent=1)
            if "--json" in flags
            else describe.text(config)
        )
        return 0
    told = submit(config)
    print(json.dumps(told, indent=1) if "--json" in flags else _sentences(told, config), flush=True)
    if not config.follow:
        return 0
    from launcher.follow import follow

    return follow(RunFolder(Path(told["folder"])), sys.stderr if "--json" in flags else sys.stdout)


def resolve(overrides: Sequence[str]) -> Config:
    """The composed config with `cluster=auto` decided: Slurm where a controller answers, else this machine."""
    config = compose(overrides)
    if config.cluster.kind != "auto":
        return config
    kind = "slurm" if clusters.answers() else "local"
    return compose([*without_group(overrides, "cluster"), f"cluster={kind}"])


def submit(config: Config) -> dict[str, Any]:
    """Submits or joins the run that `config` describes; says what was done.

    Raises:
        UserError: something a user can mend is wrong. Nothing was queued, and nothing new is on disk.
    """
    config = absolute(config)
    manifest = check_data(config)
    sidecars = check_annotations(config, manifest)
    what = identity(config, manifest, first_weights(config), promises(sidecars))
    run = RunFolder(Path(config.runs) / config.experiment / (config.name or digest(what)))
    joined = join(run, what)
    if joined is not None:
        return joined
    _check_jobs(config, run)
    with _alone(run):
        # two shells at once: the second waited here and now finds the first one's attempt
        joined = join(run, what)
        if joined is not None:
            return joined
        new = _write_run(run, config, what)
        return _new_attempt(run, config, new)


def absolute(config: Config) -> Config:
    """Jobs run from their code copy, so paths must not depend on where they start."""
    root, *mix = map(_absolute_root, (config.data.root, *config.data.mix))
    # not resolved: each node has its own
    cache = config.data.cache and str(Path(config.data.cache).expanduser().absolute())
    # not resolved: a hub cache links names to blobs, and the name says what kind of file it is
    weights = config.init.path and str(Path(config.init.path).expanduser().absolute())
    return dataclasses.replace(
        config,
        runs=str(Path(config.runs).expanduser().resolve()),
        data=dataclasses.replace(config.data, root=root, mix=tuple(mix), cache=cache),
        init=dataclasses.replace(config.init, path=weights),
        guidance=absolute_annotations(config.guidance),
    )


def _absolute_root(root: str) -> str:
    return root if storage.is_remote(root) else str(Path(root).expanduser().resolve())


def first_weights(config: Config) -> str | None:
    """The sha256 of what the run begins from; None from scratch.

    A run that has a checkpoint needs those weights no more: where they are gone and `name` is that run's, its own
    record says what they were.

    Raises:
        UserError: no such weights, weights of another network, or weights gone that the run still needs.
    """
    path = Path(config.init.path or "")
    run = RunFolder(Path(config.runs) / config.experiment / str(config.name))
    if config.init.source == "scratch" or path.exists() or not run.run_json.exists():
        return check_weights(config)
    begun_on: str | None = run.describe()["identity"]["init"].get("sha256")
    if begun_on is not None and storage.newest_complete(run.checkpoints) is None:
        raise UserError(
            f"init.path={path} is gone, and run {run.root.name} has no checkpoint yet; put the weights back"
        )
    return begun_on


def check_data(config: Config) -> str:
    """The hash of the shards' manifest, or of all that are mixed, once they are what the experiment expects."""
    from shards.read import mixing  # needs NumPy, and a dry run does not

    _, found = mixing.load_alike(config.data.roots, config.data.shares)
    check_fit(config, found)
    return mixing.identity(found, config.data.shares)


def join(run: RunFolder, what: dict[str, Any]) -> dict[str, Any] | None:
    """What to tell where this run is finished or works; None where it needs a new attempt.

    Raises:
        UserError: the folder holds another run, or nobody can say whether its last attempt lives.
    """
    if not run.run_json.exists():
        return None
    about = run.describe()
    if about["hash"] != digest(what):
        raise UserError(
            f"name={run.root.name} is taken by a run with other settings: {difference(about['identity'], what)}; "
            "choose another name, or set these back"
        )
    at = Attempt.newest(run)
    stands = status.read(run)
    told = {
        "run": about["id"],
        "folder": str(run.root),
        "attempt": at.number if at else None,
        "job": stands.job,
    }
    if run.finished():
        waiting = status.unscored(run, at, run.published()) if at else []
        if at and waiting and stands.state != "evaluating":
            from launcher import watch

            watch.launch(at, read_config(at.config))
            return told | {"state": "evaluating"}
        return told | {"state": stands.state}
    if stands.state == "unknown":
        raise UserError(
            f"run {about['id']}: nobody can say whether attempt {stands.attempts} ({stands.job}) still works; "
            "try again when its cluster or machine answers"
        )
    # an attempt without a job: its submitter still holds the run's lock, which we take next, or it died
    works = stands.state in ("queued", "running") and stands.job is not None
    return told | {"state": stands.state} if works else None


def _check_jobs(config: Config, run: RunFolder) -> None:
    """Asks the cluster about every job of the run before the first is queued."""
    at, name = Attempt(run.attempt(1)), run.root.name
    wanted = [jobs.training(config, at, name)]
    if config.evaluation.protocol != "none":
        from launcher import watch

        wanted.append(jobs.evaluation(config, at, name, run.evals / "request.json"))
        wanted.append(jobs.watcher(config, at, name, watch.entry, None))
    for job in wanted:
        clusters.check(job, config.cluster)


def difference(old: Any, new: Any, where: str = "") -> str:
    """'key: old is a, this has b' for every leaf that differs, as both are in JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        parts = [difference(old.get(k), new.get(k), f"{where}.{k}" if where else k) for k in keys]
        return ", ".join(part for part in parts if part)
    before, now = (json.dumps(value, default=str) for value in (old, new))
    return "" if before == now else f"{where} was {before} and is {now}"


def _write_run(run: RunFolder, config: Config, what: dict[str, Any]) -> bool:
    """run.json and the first config; whether they are new. Whoever comes second joins the first."""
    if run.run_json.exists():
        return False
    storage.publish(str(run.root / "config.yaml"), to_yaml(config).encode(), replace=True)
    about = {
        "id": run.root.name,
        "name": config.name,
        "experiment": config.experiment,
        "hash": digest(what),
    }
    write_record(
        run.run_json,
        {**about, "identity": what, "images": config.train.images, "created": time.time()},
    )
    return True


def _new_attempt(run: RunFolder, config: Config, new_run: bool) -> dict[str, Any]:
    """The next attempt's folder, its code copy, its job and the watcher."""
    from launcher import code_copy, watch

    at = Attempt(run.attempt(run.open_attempt()))
    try:
        code_copy.copy(at.code)
        storage.publish(str(at.config), to_yaml(config).encode())
        job = jobs.training(config, at, run.root.name)
        asked = {"kind": config.cluster.kind, "nodes": job.nodes, "tasks": job.tasks}
        write_record(at.submission, {**asked, "world": job.nodes * job.tasks})
        record = clusters.submit(job, config.cluster)
    except BaseException:
        shutil.rmtree(run.root if new_run else at.root)  # no job exists that could miss it
        raise
    write_record(at.job, record)
    try:
        watcher = watch.launch(at, config) if config.evaluation.protocol != "none" else None
    except BaseException:
        clusters.cancel(record)  # nothing is left queued of a submission that failed
        raise
    return {
        "run": run.root.name,
        "folder": str(run.root),
        "attempt": at.number,
        "job": f"{record['kind']} {record['id']}",
        "watcher": f"{watcher['kind']} {watcher['id']}" if watcher else None,
        "state": "submitted",
    }


@contextlib.contextmanager
def _alone(run: RunFolder) -> Iterator[None]:
    """Holds the run against other submissions.

    Raises:
        UserError: the runs folder cannot be written.
    """
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        (run.root / "submit.lock").touch()
    except OSError as error:
        where = run.root.parent.parent
        raise UserError(
            f"runs={where} cannot be written ({error.strerror}); give another runs=FOLDER"
        ) from error
    with held(run.root / "submit.lock"):
        yield


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """(flags, overrides)."""
    flags, overrides = [word for word in words if word.startswith("-")], []
    for flag in flags:
        if flag not in FLAGS:
            raise UserError(
                f"unknown option {flag!r}{nearest(flag, FLAGS)}; settings are written key=value"
            )
    overrides = [word for word in words if not word.startswith("-")]
    if "--completion" in flags and overrides != ["bash"]:
        raise UserError(
            f"--completion {' '.join(overrides)}: only bash is known; write --completion bash"
        )
    return flags, overrides


def _sentences(told: dict[str, Any], config: Config) -> str:
    """What was done, and the commands to go on with."""
    what = {
        "submitted": f"submitted attempt {told['attempt']}: {config.ranks} ranks, job {told['job']}",
        "queued": f"attempt {told['attempt']} is queued already, job {told['job']}; nothing new was submitted",
        "running": f"attempt {told['attempt']} is running already, job {told['job']}; nothing new was submitted",
        "evaluating": "training has finished; its last snapshots are being scored",
        "finished": "the run has finished; nothing was submitted",
    }
    where = "" if config.runs == "runs" else f" --runs {config.runs}"
    lines = [
        f"run     {told['run']}",
        f"folder  {told['folder']}",
        f"        {what[told['state']]}",
    ]
    if config.cluster.kind == "local" and told["state"] == "submitted":
        lines += _gpu_note(config)
    return "\n".join(
        [
            *lines,
            "",
            f"  python -m launcher.runs {told['run']}{where}       how it stands",
            f"  python -m launcher.logs {told['run']}{where} -f    what it says",
            f"  python -m launcher.cancel {told['run']}{where}     end it",
        ]
    )


def _gpu_note(config: Config) -> list[str]:
    """A setting that quietly changes where the work is done is said aloud."""
    from launcher.backends.local import gpus

    found = len(gpus())
    if not 0 < found < config.cluster.gpus_per_node:
        return []
    return [
        f"        {found} GPU for {config.ranks} ranks: training on CPU; cluster.gpus_per_node={found} uses it"
    ]


if __name__ == "__main__":
    cli.run(main)
