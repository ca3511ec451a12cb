"""`python -m launcher.submit experiment=NAME key=value ...`: a submission, top to bottom.

Compose, choose the cluster, check everything, and only then write and queue: run folder, attempt, code copy, job,
watcher. A run is what is learned, so the same settings again mean the same run: joined while it works, resumed by a
new attempt where it stopped, extended where only `train.images` of a named run grew, and left alone once it has
finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import backends, watch
from launcher.compose import compose, without_group
from launcher.new_attempt import submitting
from launcher.reconcile import act, decide, launch
from launcher.reconcile.decide import Submission
from launcher.reconcile.view import RunView, read
from selfguide.spec.annotations import check_annotations, promises
from selfguide.spec.config import Config
from selfguide.spec.data_fit import check_fit
from selfguide.spec.identity import digest, identity
from selfguide.spec.initial_weights import check_weights
from selfguide.spec.run import RunFolder
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
    return carry_out(config, "--json" in flags)


def carry_out(config: Config, as_json: bool, run: RunFolder | None = None) -> int:
    """Submits, says what was done, and follows the run where the config says so; returns the exit code."""
    done = submit(config, run)
    print(json.dumps(done, indent=1) if as_json else _sentences(done, config), flush=True)
    if not config.follow:
        return 0
    from launcher.follow import follow

    return follow(RunFolder(Path(done["folder"])), sys.stderr if as_json else sys.stdout)


def resolve(overrides: Sequence[str]) -> Config:
    """The composed config with `cluster=auto` decided: Slurm where a controller answers, else this machine."""
    config = compose(overrides)
    if config.cluster.kind != "auto":
        return config
    chosen = f"cluster={backends.automatic()}"
    return compose([*without_group(overrides, "cluster"), chosen])


def submit(config: Config, run: RunFolder | None = None) -> dict[str, Any]:
    """Submits, joins, resumes or extends the run that `config` describes; returns what was done.

    Args:
        run: the run that is meant, where it is not the one that the config's name or hash says.

    Raises:
        UserError: something a user can mend is wrong. Nothing was queued, and nothing new is on disk.
    """
    config = absolute(config)
    manifest = check_data(config)
    sidecars = check_annotations(config, manifest)
    named = run or RunFolder(Path(config.runs) / config.experiment / str(config.name))
    wanted = identity(config, manifest, first_weights(config, named), promises(sidecars))
    if run is None and config.name is None:
        run = RunFolder(named.root.with_name(digest(wanted)))
    run = run or named
    view, decision = _decide(run, wanted)
    if decision.action != "join":
        notes = launch.check_jobs(config, run, watch.entry)
        with submitting(run):
            # two shells at once: the second waited here and now finds the first one's attempt
            view, decision = _decide(run, wanted)
            if decision.action != "join":
                return _launch(run, config, wanted, view, decision, notes)
    assert view is not None
    return _joined(view, decision)


def _decide(run: RunFolder, wanted: dict[str, Any]) -> tuple[RunView | None, Submission]:
    view = read(run) if run.run_json.exists() else None
    if view is not None and view.finished and not run.final_snapshot_holds():
        # its bytes are not those that were published: as if it were gone, the next attempt publishes it again
        left = {images: about for images, about in view.snapshots.items() if images != view.images}
        view = dataclasses.replace(view, snapshots=left)
    decision = decide.submission(view, wanted)
    if decision.action == "refuse":
        raise UserError(decision.reason)
    return view, decision


def _joined(view: RunView, decision: Submission) -> dict[str, Any]:
    """What there is to say of a run that works or has finished; its watcher is started again where it is missing."""
    for sentence in [] if decision.evaluate else watch.tend(view):
        print(f"note: {sentence}", file=sys.stderr)
    at, state = view.newest, decide.state(view).word
    if decision.evaluate and at is not None and view.config is not None:
        act.ask_for_scores(view.folder, retry=False)
        act.launch_watcher(at.files, view.config, watch.entry)
        state = "evaluating"
    return {
        "run": view.id,
        "folder": str(view.folder.root),
        "attempt": at.number if at else None,
        "job": at.job.label if at and at.job else None,
        "images": view.images,
        "state": state,
    }


def _launch(
    run: RunFolder,
    config: Config,
    wanted: dict[str, Any],
    view: RunView | None,
    decision: Submission,
    notes: list[str],
) -> dict[str, Any]:
    """The next attempt of the run, which may be its first."""
    target = decision.extends_to or (view.images if view else config.train.images)
    train = dataclasses.replace(config.train, images=target)
    config = dataclasses.replace(config, train=train)
    extension: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if decision.extends_to:
        extension = act.extended(run, decision.extends_to)
    shorter = None
    if view is None:
        shorter = _shorter(run, config, wanted)
        act.write_run(run, config, wanted)
    try:
        with extension:
            done = launch.launch_attempt(run, config, watch.entry)
    except BaseException:
        if view is None and not run.attempt_numbers():
            shutil.rmtree(run.root)
        raise
    return {
        "run": run.root.name,
        "folder": str(run.root),
        "attempt": done.at.number,
        "job": f"{done.job['kind']} {done.job['id']}",
        "watcher": f"{done.watcher['kind']} {done.watcher['id']}" if done.watcher else None,
        "notes": [*notes, *done.notes, *_notes(config)],
        "images": target,
        "extended_from": view.images if view and decision.extends_to else None,
        "shorter": shorter,
        "state": "submitted",
    }


def _notes(config: Config) -> list[str]:
    return backends.of(config.cluster).notes(config.cluster.gpus_per_node)


def _shorter(run: RunFolder, config: Config, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The run of this experiment that differs in images only and could have been extended, with the command."""
    siblings = [RunFolder(path.parent) for path in sorted(run.root.parent.glob("*/run.json"))]
    same = [each for each in siblings if _same_but_images(each, wanted)]
    found = decide.extendable([read(each) for each in same], wanted)
    if found is None:
        return None
    name, images = found.folder.root.name, config.train.images
    command = f"python -m launcher.resume {name} train.images={images}{_where(config)}"
    return {"run": name, "images": found.images, "command": command}


def _same_but_images(run: RunFolder, wanted: dict[str, Any]) -> bool:
    try:
        return decide.same_but_images(run.describe()["identity"], wanted)
    except (OSError, ValueError, KeyError, TypeError):  # no run that could be extended
        return False


def _where(config: Config) -> str:
    return "" if config.runs == "runs" else f" --runs {config.runs}"


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
        guidance=config.guidance.absolute(),
    )


def _absolute_root(root: str) -> str:
    return root if storage.is_remote(root) else str(Path(root).expanduser().resolve())


def first_weights(config: Config, run: RunFolder) -> str | None:
    """The sha256 of what the run begins from; None from scratch.

    A run that has a checkpoint needs those weights no more: where they are gone and `run` exists, its own record says
    what they were.

    Raises:
        UserError: no such weights, weights of another network, or weights gone that the run still needs.
    """
    path = Path(config.init.path or "")
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


def _sentences(done: dict[str, Any], config: Config) -> str:
    """What was done, and the commands to go on with."""
    attempt, job, state = done["attempt"], done["job"], done["state"]
    what = {
        "submitted": f"submitted attempt {attempt}: {config.ranks} ranks, job {job}",
        "queued": f"attempt {attempt} is queued already, job {job}; nothing new was submitted",
        "running": f"attempt {attempt} is running already, job {job}; nothing new was submitted",
        "evaluating": "training has finished; its last snapshots are being scored",
        "finished": "the run has finished; nothing was submitted",
        "unknown": "training has finished; nobody can say whether its snapshots are being scored",
    }
    lines = [f"run     {done['run']}", f"folder  {done['folder']}", f"        {what[state]}"]
    if done.get("extended_from"):
        lines.append(
            f"        extended from {done['extended_from']:,} to {done['images']:,} images"
        )
    elif done["images"] != config.train.images:
        lines.append(f"        it was extended to {done['images']:,} images, and trains to those")
    if shorter := done.get("shorter"):
        lines += [
            f"        run {shorter['run']} differs in its {shorter['images']:,} images only; in place of this new "
            "run it can be trained on:",
            f"        {shorter['command']}",
        ]
    lines += [f"        {note}" for note in done.get("notes", ())]
    run = f"{done['run']}{_where(config)}"
    return "\n".join(
        [
            *lines,
            "",
            f"  python -m launcher.runs {run}       its state",
            f"  python -m launcher.logs {run} -f    its messages",
            f"  python -m launcher.cancel {run}     end it",
        ]
    )


if __name__ == "__main__":
    cli.run(main)
