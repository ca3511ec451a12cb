"""One run's submission: everything that can be refused is checked first, and only then is something written and queued.

A run is what is learned, so the same settings again mean the same run: joined while it works, resumed by a new attempt
where it stopped, extended where only `train.images` of a named run grew, and left alone once it has finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import backends, jobs, references, watch
from launcher.compose import Frames, compose, without_group
from launcher.folder import Attempt
from launcher.new_attempt import submitting
from launcher.reconcile import act, decide, launch
from launcher.reconcile.decide import Submission
from launcher.reconcile.submission import leaves
from launcher.reconcile.view import RunView, read
from launcher.references import Load, load_manifests
from selfguide.spec.annotations import check_annotations, promises
from selfguide.spec.config import Config, EvaluationConfig
from selfguide.spec.data_fit import check_fit
from selfguide.spec.files import plain
from selfguide.spec.identity import digest, identity
from selfguide.spec.initial_weights import begins_fresh, check_weights
from selfguide.spec.lacks import encoder_of, lacks, lacks_autoencoder
from selfguide.spec.run import RunFolder
from selfguide.spec.sizes import footprint
from selfguide.spec.weak import check_snapshots
from shards import storage
from shards.errors import UserError

if TYPE_CHECKING:
    from shards.format.manifest import Manifest


# settings of the command itself, which say nothing of the run
_OF_COMMAND: dict[str, Any] = {"runs": "", "name": None, "follow": False, "dry_run": False}


@dataclass(frozen=True, kw_only=True)
class Meant:
    """A run whose settings, data and weights have been checked."""

    # with absolute paths
    config: Config
    run: RunFolder
    identity: dict[str, Any]
    # sentences for the user: what its evaluations wait for, and what its first weights lack
    warnings: tuple[str, ...] = ()
    # the config before hashes of what it is scored with were filled in
    typed: Config


@dataclass(frozen=True, kw_only=True)
class Prepared(Meant):
    """The same, and what submitting it does."""

    # as it was found; None where there is no run of this identity yet
    view: RunView | None
    decision: Submission


def resolve(
    overrides: Sequence[str],
    automatic: Callable[[], str] | None = None,
    frames: Frames | None = None,
) -> Config:
    """The composed config with `cluster=auto` decided: Slurm where a controller answers, else this machine.

    Args:
        automatic: decides it in place of `backends.automatic`.
        frames: as `compose` takes them.
    """
    config = compose(overrides, frames)
    if config.cluster.kind != "auto":
        return config
    chosen = f"cluster={(automatic or backends.automatic)()}"
    return compose([*without_group(overrides, "cluster"), chosen], frames)


def submit(config: Config, run: RunFolder | None = None) -> dict[str, Any]:
    """Submits, joins, resumes or extends the run that `config` describes; returns what was done.

    Args:
        run: the run that is meant, where it is not the one that the config's name or hash says.

    Raises:
        UserError: something a user can mend is wrong. Nothing was queued, and nothing new is on disk.
    """
    prepared = prepare(meant(config, run))
    return enter(prepared, check(prepared))


def meant(config: Config, run: RunFolder | None = None, load: Load | None = None) -> Meant:
    """Returns the run that `config` describes, once all is checked that needs no cluster; writes and asks nothing.

    Args:
        run: the run that is meant, where it is not the one that the config's name or hash says.
        load: reads the manifests, where it is not to be `load_manifests`.

    Raises:
        UserError: something a user can mend is wrong.
    """
    load, typed = functools.cache(load or load_manifests), absolute(config)
    config = with_reference(typed, load)
    found = load(config.data.roots, config.data.shares)
    manifest = check_data(config, lambda *_: found)
    warnings = check_files(config, found[0])
    check_store(config.train.checkpoint_store)
    sidecars = check_annotations(config, manifest)
    named = run or RunFolder(Path(config.runs) / config.experiment / str(config.name))
    wanted = identity(config, manifest, first_weights(config, named), promises(sidecars))
    if run is None and config.name is None:
        run = RunFolder(named.root.with_name(digest(wanted)))
    warnings = (*warnings, *begins_fresh(config))
    return Meant(config=config, run=run or named, identity=wanted, warnings=warnings, typed=typed)


def prepare(found: Meant, view: RunView | None = None) -> Prepared:
    """Finds out what submitting a run does.

    Args:
        view: of the run, where it has been read already.

    Raises:
        UserError: it may not be submitted.
    """
    if view is None and found.run.run_json.exists():
        view = read(found.run)
    if view is not None and view.finished and not found.run.final_snapshot_holds():
        # its bytes are not those that were published: as if it were gone, the next attempt publishes it again
        left = {images: about for images, about in view.snapshots.items() if images != view.images}
        view = dataclasses.replace(view, snapshots=left)
    decision = decide.submission(view, found.identity)
    if decision.action == "refuse":
        raise UserError(decision.reason)
    before = view.config if view is not None else None
    config = found.config if before is None else _as_before(found, before)
    if decision.action != "join":
        references.check_told_apart(_evaluations(config), _evaluations(before))
        check_weak_snapshots(config, view, decision.extends_to)
    about = {each.name: getattr(found, each.name) for each in dataclasses.fields(Meant)}
    about["config"] = config
    return Prepared(**about, view=view, decision=decision)


def check_weak_snapshots(
    config: Config, view: RunView | None = None, extends_to: int | None = None
) -> None:
    """Returns when guidance leads away from snapshots that the run has, or will have before its last.

    Args:
        view: of the run; None of one that is new. It goes on from its newest checkpoint: what was not published up to
            there never will be, and what an earlier attempt published is there, however often this one publishes.
        extends_to: the images that the run is extended to.

    Raises:
        UserError: there is no such snapshot.
    """
    if config.sampler.g == 1:
        return
    train = config.train
    last = extends_to or (view.images if view else train.images)
    passed = max(view.checkpoints, default=0) if view else 0
    every = train.snapshot_every
    planned = range(every * max(1, -(-passed // every)), last, every)
    check_snapshots(config.sampler.weak, last, view.published if view else (), planned)


def check(prepared: Prepared) -> list[str]:
    """Asks the cluster about every job that the submission would queue; returns why they would wait, if they do.

    Raises:
        UserError: it would refuse one.
    """
    if prepared.decision.action == "join":
        return []
    notes = launch.check_jobs(prepared.config, prepared.run, watch.entry)
    return [*notes, *prepared.warnings]


def enter(prepared: Prepared, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Carries out what was prepared; returns what was done.

    Args:
        notes: sentences for the user, of `check`.

    Raises:
        UserError: the cluster refused it. Nothing was queued, and nothing new is on disk.
    """
    if prepared.decision.action != "join":
        with submitting(prepared.run):
            # two shells at once: the second waited here and now finds the first one's attempt
            prepared = prepare(prepared)
            if prepared.decision.action != "join":
                return _launch(prepared, notes)
    assert prepared.view is not None
    done = _joined(prepared.view, prepared.decision)
    return done | {"notes": _not_taken(prepared.view, prepared.config)}


def _not_taken(view: RunView, config: Config) -> list[str]:
    """What a config has otherwise than a run that it joins, which keeps what it was submitted with."""
    if view.config is None:
        return []
    old, new = (plain(dataclasses.replace(each, **_OF_COMMAND)) for each in (view.config, config))
    # it may have been extended
    changed = [each for each in leaves(old, new) if each[0] != "train.images"]
    if not changed:
        return []
    kept = ", ".join(f"{key}={before}, not {now}" for key, before, now in changed)
    notes = [f"the run keeps what it was submitted with: {kept}"]
    if any(key.startswith("evaluation.") for key, _, _ in changed):
        asked = [f"{key}={now}" for key, _, now in changed if key.startswith("evaluation.")]
        command = shlex.join(["python", "-m", "launcher.evaluate", str(view.folder.root), *asked])
        notes.append(f"to score it as typed as well: {command}")
    return notes


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


def _launch(prepared: Prepared, notes: Sequence[str]) -> dict[str, Any]:
    """The next attempt of the run, which may be its first."""
    run, config, wanted = prepared.run, prepared.config, prepared.identity
    view, decision = prepared.view, prepared.decision
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
    command = f"python -m launcher.resume {name} train.images={images}{where(config)}"
    return {"run": name, "images": found.images, "command": command}


def _same_but_images(run: RunFolder, wanted: dict[str, Any]) -> bool:
    try:
        return decide.same_but_images(run.describe()["identity"], wanted)
    except (OSError, ValueError, KeyError, TypeError):  # no run that could be extended
        return False


def where(config: Config) -> str:
    """Returns how commands find the run's folder, " --runs DIR" where it is not the usual one."""
    return "" if config.runs == "runs" else f" --runs {shlex.quote(config.runs)}"


def absolute(config: Config) -> Config:
    """Jobs run from their code copy, so paths must not depend on where they start."""
    root, *mix = map(references.absolute_root, (config.data.root, *config.data.mix))
    # not resolved: each node has its own
    cache = config.data.cache and str(storage.expanded(config.data.cache).absolute())
    # not resolved: a hub cache links names to blobs, and the name says what kind of file it is
    weights = config.init.path and str(storage.expanded(config.init.path).absolute())
    return dataclasses.replace(
        config,
        runs=str(storage.expanded(config.runs).resolve()),
        data=dataclasses.replace(config.data, root=root, mix=tuple(mix), cache=cache),
        init=dataclasses.replace(config.init, path=weights),
        guidance=config.guidance.absolute(),
        evaluation=references.absolute(config.evaluation),
        more_evaluations=tuple(map(references.absolute, config.more_evaluations)),
    )


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


def with_reference(config: Config, load: Load | None = None) -> Config:
    """The config with the hashes of the shards that samples are to be compared with, where it names any."""
    first, *more = (
        references.pinned(config, each, load)
        for each in (config.evaluation, *config.more_evaluations)
    )
    if (first, tuple(more)) == (config.evaluation, config.more_evaluations):
        return config
    return dataclasses.replace(config, evaluation=first, more_evaluations=tuple(more))


def _as_before(found: Meant, before: Config) -> Config:
    """The config with what the run's own leaves open of the references that it keeps."""
    first, *more = (
        references.as_before(each, typed, _evaluations(before))
        for each, typed in zip(_evaluations(found.config), _evaluations(found.typed), strict=True)
    )
    return dataclasses.replace(found.config, evaluation=first, more_evaluations=tuple(more))


def _evaluations(*configs: Config | None) -> list[EvaluationConfig]:
    return [e for each in configs if each for e in (each.evaluation, *each.more_evaluations)]


def check_files(config: Config, manifest: Manifest) -> tuple[str, ...]:
    """Sentences about files that the run's evaluations will wait for.

    Raises:
        UserError: there are some, and the config requires them, or previews need them.
    """
    encoder = encoder_of(manifest.header)
    if config.train.preview and encoder is not None:
        lack = lacks_autoencoder(encoder, config.evaluation.decoder)
        if lack is not None:
            raise UserError(
                f"train.preview={config.train.preview} shows latents as pictures, and {lack.sentence}; or take "
                "train.preview=0"
            )
    found = []
    for each in config.scored_by:
        missing = [lack.sentence for lack in lacks(each, encoder)]
        if missing and each.evaluation.require:
            raise UserError(f"evaluation.require=true, and {missing[0]}")
        found += missing
    warning = "training needs no such file, but its evaluations wait: "
    return tuple(dict.fromkeys(warning + each for each in found))


def check_store(store: str | None) -> None:
    """Returns when the store of checkpoints, an s3:// prefix or None, can be reached; writes nothing there.

    Raises:
        UserError: the place that checkpoints are to be copied to cannot be reached.
    """
    if store is None:
        return
    try:
        storage.list(store)
    except (UserError, OSError) as error:
        reason = error.strerror if isinstance(error, PermissionError) else str(error)
        raise UserError(
            f"train.checkpoint_store={store}: {reason}; mend that, or take train.checkpoint_store=null"
        ) from error


def check_data(config: Config, load: Load | None = None) -> str:
    """The hash of the shards' manifest, or of all that are mixed, once they are what the experiment expects."""
    from shards.read import mixing  # needs NumPy, and a dry run does not

    found = (load or load_manifests)(config.data.roots, config.data.shares)
    check_fit(config, found)
    return mixing.identity(found, config.data.shares)


def job_shape(prepared: Prepared) -> str:
    """Returns what of a run's jobs matters to a cluster that is asked whether it would take them."""
    config, run = prepared.config, prepared.run
    job = jobs.training(config, Attempt(run.attempt(1)), "", run.slowest_save_s())
    shared = dataclasses.replace(
        job, argument="", folder=Path(), code=Path(), name="", comment="", requeue=()
    )
    return f"{config.evaluation.protocol} {config.cluster} {shared} {footprint(config).checkpoint}"
