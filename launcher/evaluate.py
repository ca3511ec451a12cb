"""`python -m launcher.evaluate RUN [KEY=A,B ...]`: the scores that a run's snapshots still need, and sweeps of them.

With lists of settings of `sampler` and `evaluation` one snapshot is scored at each of their combinations, from the
same seeds: one Slurm array, one record a point, and the front of score against network evaluations with the run.
With --once this process does what watchers do, a single time and for all runs: for cron, and for login nodes.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from launcher import references, watch
from launcher.compose import changed, combinations
from launcher.folder import find, runs, takes_run
from launcher.reconcile import act, decide, prune
from launcher.reconcile.decide import Point, counted
from launcher.reconcile.view import RunView, read, read_many
from launcher.references import load_manifests
from selfguide.spec.config import Config, EvaluationConfig, SamplerConfig
from selfguide.spec.config.evaluation import PINS
from selfguide.spec.config.laws import as_typed
from selfguide.spec.config.sampler import protocol_settings, settings_read
from selfguide.spec.data_fit import check_samples
from selfguide.spec.lacks import encoder_of, lacks
from selfguide.spec.recipe import Front
from selfguide.spec.recipe import Point as Scored
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.retention import deletion, holding
from selfguide.spec.run import RunFolder
from selfguide.spec.score_sweep import ScoreSweep
from selfguide.spec.validate import validate_scoring
from selfguide.spec.weak import CONDITION, check_snapshots
from shards import cli
from shards.errors import UserError

EPILOG = """examples:
  {program} 3f2a                       the snapshots that have no score
  {program} 3f2a --retry               also those whose evaluation failed
  {program} 3f2a sampler.g=1,1.5,2 sampler.steps=10,20,50
                                       nine points of the newest snapshot, from the same seeds
  {program} 3f2a evaluation.samples=2000 sampler.g=1,1.5,2 --confirm 10000
                                       a pilot, and its winner once more from other seeds
  {program} --once --runs runs         for cron: a single look at all runs
"""


# settings of `evaluation` that change no score, and what to give in their place
_OF_RUNS = {
    "evaluation.in_flight": "give --in-flight N",
    "evaluation.snapshots": "give --images N",
    "evaluation.milestone_images": "give --images N",
    "evaluation.attempts": "drop it, and add --retry where points have failed",
}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.evaluate",
        "Scores the snapshots of a run that have no score, as its config says; returns at once. What is\n"
        "being scored already is left alone. With lists of settings it scores one snapshot at each of\n"
        "their combinations, and keeps the front of score against network evaluations with the run.",
    )
    parser.epilog = EPILOG.format(program=cli.program("launcher.evaluate"))
    takes_run(parser, "?")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=A,B",
        help="settings of sampler and evaluation, some with several values",
    )
    parser.add_argument("--retry", action="store_true", help="also those whose evaluation failed")
    sweeps = parser.add_argument_group("with settings")
    sweeps.add_argument("--images", type=int, metavar="N", help="the snapshot at N images (newest)")
    sweeps.add_argument(
        "--confirm",
        type=int,
        metavar="N",
        help="then the chosen point once more: N samples from other seeds",
    )
    sweeps.add_argument(
        "--in-flight", type=int, metavar="N", help="jobs at once (all of them on a cluster)"
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="start what runs need now (all of them, or those named), and say only what goes wrong",
    )
    options = parser.parse_intermixed_args(arguments)
    words = [word for word in (options.run, *options.settings) if word is not None]
    for word in [word for word in words if word.startswith("runs=")]:
        words.remove(word)
        options.runs = word.removeprefix("runs=")
    if options.once:
        return _once(words, options)
    if not words:
        parser.error("name a run, or give --once")
    if "=" in words[0] and not Path(words[0]).exists():
        raise UserError(f"{words[0]} is a setting: name the run before it")
    run = find(words[0], Path(options.runs))
    if len(words) == 1:
        return _missing(run, options)
    return _sweep(run, words[1:], options)


# ---- what a run's config wants -----------------------------------------------------------------------


def _missing(run: RunFolder, options: Namespace) -> int:
    _refuse_sweep(options)
    done = evaluate(run, retry=options.retry)
    if options.json:
        print(json.dumps(done, indent=1))
        return 0
    images = ", ".join(f"{each:,}" for each in done["snapshots"])
    for sentence in done["waits_for"] if images else ():
        print(f"waiting: {sentence}")
    if images:
        print(f"{counted(len(done['snapshots']), 'snapshot')} to score, at {images} images")
        if done["watcher"]:
            print(f"watcher {done['watcher']} starts their evaluations")
    else:
        print(f"every snapshot of run {done['run']} has an outcome; nothing was started")
    if done["failed"]:
        failed = counted(len(done["failed"]), "evaluation")
        print(f"{failed} failed: --retry tries again")
    _show_fronts(act.keep_recipe(read(run)))
    return 0


def _refuse_sweep(options: Namespace) -> None:
    """Raises UserError where an option of sweeps is given, and no settings."""
    given = [
        flag for flag in ("images", "confirm", "in_flight") if getattr(options, flag) is not None
    ]
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} is of a sweep: give settings with several values, such as sampler.g=1,2, "
            "of one run, without --once"
        )


def evaluate(run: RunFolder, *, retry: bool) -> dict[str, Any]:
    """Sees to it that a watcher starts what is missing; returns which snapshots that are, and who does it.

    Raises:
        UserError: the run is evaluated by nothing, or the cluster refused the watcher.
    """
    view, config = _known(run)
    if not config.scored_by and not view.sweeps:
        raise UserError(
            f"run {view.id} was submitted with evaluation=none, so nothing says how to score it"
        )
    # what is tried again is not deleted meanwhile
    with holding(run):
        act.ask_for_scores(run, retry=retry)
    view = read(run)
    missing = decide.unscored(view)
    return {
        "run": view.id,
        "snapshots": list(missing),
        "failed": sorted(set(decide.unscorable(view)) - set(missing)),
        "skipped": sorted(set(decide.skipped(view)) - set(missing)),
        "watcher": _watcher(view, config),
        "waits_for": [lack.sentence for lack in view.lacks],
        "fronts": [asdict(front) for front in act.keep_recipe(view)],
    }


def _known(run: RunFolder) -> tuple[RunView, Config]:
    view = read(run)
    if view.newest is None or view.config is None:
        problem = view.problems[0] if view.problems else f"run {view.id} has no attempt yet"
        raise UserError(f"{problem}; submit it again by its own command")
    return view, view.config


def _watcher(view: RunView, config: Config) -> str | None:
    """Who starts what is missing: the run's watcher, which is started where none works; None where nothing is."""
    if not decide.startable(view):
        return None
    if view.watcher and decide.watched(view):
        return view.watcher.label
    assert view.newest is not None
    record = act.launch_watcher(view.newest.files, config, watch.entry)
    return f"{record['kind']} job {record['id']}"


# ---- a sweep -----------------------------------------------------------------------------------------


def _sweep(run: RunFolder, settings: Sequence[str], options: Namespace) -> int:
    for flag in ("confirm", "in_flight"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be 1 or more")
    done = sweep(
        run,
        settings,
        images=options.images,
        confirm=options.confirm,
        in_flight=options.in_flight,
        retry=options.retry,
    )
    if options.json:
        print(json.dumps(done, indent=1))
        return 0
    print(
        f"sweep {done['sweep']} of the snapshot at {done['images']:,} images of run {done['run']}"
    )
    for point in done["points"]:
        score = "" if point["score"] is None else f"{point['metric']} {point['score']:.4g}"
        if point["confirms"]:
            point["label"] += f", chosen: {point['samples']:,} samples from seed {point['seed']}"
        print(f"  {point['state']:<10} {score:<18} {point['message'] or point['label']}")
    for sentence in done["waits_for"]:
        print(f"waiting: {sentence}")
    if done["watcher"]:
        print(f"watcher {done['watcher']} sees to it; the same command shows how far it is")
    _show_fronts(act.keep_recipe(read(run)))
    return 0


def sweep(
    run: RunFolder,
    settings: Sequence[str],
    *,
    images: int | None = None,
    confirm: int | None = None,
    in_flight: int | None = None,
    retry: bool = False,
) -> dict[str, Any]:
    """Has one snapshot scored at every combination of settings; joins the same sweep. Returns its points.

    Args:
        images: of the snapshot; the newest one by default.
        confirm: samples, from other seeds, for which the chosen point is scored once more at the end.
        in_flight: jobs at once at most.

    Raises:
        UserError: there is no such snapshot, a point cannot be scored, or the cluster refused the jobs.
    """
    view, config = _known(run)
    published = view.published
    if not published:
        raise UserError(f"run {view.id} has published no snapshot yet")
    images = published[-1] if images is None else images
    if gone := deletion(run.snapshot(images)):
        known = ", ".join(map(str, published))
        raise UserError(f"--images {images}: {gone}; take one of {known}")
    if images not in published:
        known = ", ".join(map(str, published))
        raise UserError(f"--images {images}: run {view.id} has snapshots at {known}")
    configs = _configs(view, config, settings, images)
    if confirm is not None:
        _check_confirming(view, configs, images, confirm)
    found = ScoreSweep.at(images, configs, in_flight=in_flight, confirm=confirm)
    # what is asked for is either seen by whoever would delete the snapshot, or refused
    with holding(run):
        if gone := deletion(run.snapshot(images)):
            raise UserError(f"--images {images}: {gone}; take another one")
        found.publish(run)
        act.ask_for_scores(run, retry=retry)
    view = read(run)
    if not decide.watched(view):
        wanted = decide.all_wanted(view, config)
        watch.settle(view, wanted)
        watch.start(view, wanted)
        view = read(run)
    watcher, points = _watcher(view, config), _points(view, config, found)
    lacked = (lack.sentence for each in points for lack in decide.lacked(view, each))
    return {
        "run": view.id,
        "sweep": found.id,
        "images": images,
        "points": [_told(view, each, _varied(points)) for each in points],
        "watcher": watcher,
        "waits_for": list(dict.fromkeys(lacked)),
        "fronts": [asdict(front) for front in act.keep_recipe(view)],
    }


def _configs(view: RunView, config: Config, settings: Sequence[str], images: int) -> list[Config]:
    """The config of each point, once each."""
    _check_settings(settings)
    found: dict[str, Config] = {}
    # of several protocols the first, unless the settings name another
    before = (config.evaluation, *config.more_evaluations)
    config, load = next(iter(config.scored_by), config), functools.cache(load_manifests)
    for words, _ in combinations(settings, several=False):
        of = changed(replace(config, sampler=_plain(config.sampler, words)), words)
        if of.evaluation.protocol == "none":
            raise UserError(
                f"run {view.id} was submitted with evaluation=none: say how to score it, such as evaluation=fd_digits"
            )
        if of.sampler.g != 1:
            check_snapshots(of.sampler.weak, images, view.published)
        validate_scoring(of)
        header = view.snapshots[images]["data"].get("header")
        of = references.resolved(of, header, before, load)
        missing = lacks(of, _encoder(view, images))
        # a net without its weights has no sha256, and its scores have no key yet
        keyless = of.evaluation.protocol == "fd_timm" and of.evaluation.sha256 is None
        if missing and (keyless or not view.lacks):
            raise UserError(missing[0].sentence)
        # what a sampler does not read makes no other point
        found.setdefault(decide.protocol(view, of, images).key, of)
    swept = (each.evaluation for sweep in view.sweeps for each in sweep.configs(config))
    asked = (each.evaluation for each in found.values())
    references.check_told_apart(asked, (*before, *swept))
    return list(found.values())


def _check_confirming(view: RunView, configs: Sequence[Config], images: int, samples: int) -> None:
    """Raises UserError where the point that is chosen could not be scored once more by so many samples."""
    latents = _encoder(view, images) is not None
    for each in configs:
        try:
            more = decide.confirming(each, samples)
            validate_scoring(more)
            check_samples(more, latents)
        except UserError as error:
            raise UserError(f"--confirm {samples}: {error}") from error


def _check_settings(settings: Sequence[str]) -> None:
    """Raises UserError for a setting that says nothing of how one snapshot is scored, or is given twice."""
    given: dict[str, str] = {}
    for word in settings:
        key, _, value = word.partition("=")
        if key.partition(".")[0] not in ("sampler", "evaluation"):
            raise UserError(
                f"{word}: a snapshot is scored under settings of sampler and evaluation, and the others were trained"
            )
        if key in _OF_RUNS:
            raise UserError(
                f"{word} says which snapshots of a run are scored, and when: {_OF_RUNS[key]}"
            )
        if key == "evaluation" and value.startswith("["):
            each = value.strip("[]").replace(" ", "")
            raise UserError(
                f"{word}: a point is scored by one protocol; give evaluation={each} for a point of each"
            )
        if key in given:
            raise UserError(
                f"{given[key]} and {word}: give each setting once, several values as {key}=A,B"
            )
        given[key] = word


def _plain(sampler: SamplerConfig, words: Sequence[str]) -> SamplerConfig:
    """Without what only this sampler reads, where the words name another."""
    names = [word.partition("=")[2] for word in words if word.startswith("sampler.name=")]
    if not names or names[-1] == sampler.name:
        return sampler
    defaults = SamplerConfig()
    return replace(sampler, **{name: getattr(defaults, name) for name in settings_read(sampler)})


def _encoder(view: RunView, images: int) -> str | None:
    return encoder_of(view.snapshots[images]["data"].get("header", {}))


def _points(view: RunView, config: Config, found: ScoreSweep) -> list[Point]:
    """Those of one sweep, with what confirms its choice."""
    return decide.points(replace(view, sweeps=(found,)), config)


def _varied(points: Sequence[Point]) -> list[str]:
    """The settings of `evaluation` in which points differ, but for what is shown of each anyway, or follows."""
    shown = {"protocol", "average", "sha256", *PINS.values()}
    of = [each.config.evaluation for each in points if not each.selected]
    names = (each.name for each in fields(EvaluationConfig) if each.name not in shown)
    return [name for name in names if any(getattr(e, name) != getattr(of[0], name) for e in of)]


def _told(view: RunView, point: Point, varied: Sequence[str] = ()) -> dict[str, Any]:
    """What is known of a point, which differs from others in these settings of `evaluation`."""
    tries = [record for record in view.records if record.key == point.key]
    record: EvaluationRecord | None = next((each for each in tries if each.done), None)
    record = record or (tries[-1] if tries and tries[-1].time >= view.retry_asked else None)
    jobs = [each.job for each in view.evaluations if each.key == point.key and each.job]
    live = [job.state for job in jobs if job.state != "gone"]
    state = record.status if record else live[-1] if live else "waiting"
    return {
        "key": point.key,
        "label": " ".join(
            [
                label(point.config.sampler, point.config.evaluation.average),
                *(f"{each}={as_typed(getattr(point.config.evaluation, each))}" for each in varied),
            ]
        ),
        "state": state,
        "metric": point.config.evaluation.protocol,
        "score": record.score if record else None,
        "nfe": record.nfe if record else None,
        "samples": point.config.evaluation.samples,
        "seed": point.config.evaluation.seed,
        "confirms": bool(point.selected),
        "job": jobs[-1].label if jobs else None,
        "message": record.message if record and not record.done else "",
    }


def label(sampler: SamplerConfig, average: int | str) -> str:
    """A point in a few words."""
    parts: list[str] = [sampler.name]
    if sampler.name != "dopri5":
        parts.append(counted(sampler.steps, "step"))
    parts.append(f"g={sampler.g:g}")
    if sampler.g != 1 and sampler.interval != (0.0, 1.0):
        parts.append(f"in [{sampler.interval[0]:g}, {sampler.interval[1]:g}]")
    if sampler.g != 1 and sampler.weak != CONDITION:
        parts.append(f"from {sampler.weak}")
    default, read = SamplerConfig(), settings_read(sampler) | protocol_settings(sampler)
    others = (each for each in read if each != "weak" and read[each] != getattr(default, each))
    parts += [f"{each}={as_typed(read[each])}" for each in others]
    return " ".join([*parts, *([f"average {average}"] if average else [])])


def _show_fronts(found: Sequence[Front]) -> None:
    for front in found:
        print(
            f"\n{front.metric} of the snapshot at {front.images:,} images over network evaluations, {front.samples:,} "
            f"samples from seed {front.seed}:"
        )
        for point in front.points:
            print(f"  {_row(front, point)}")
        print(f"  on the front: *; the recipe, selected by {front.selected_by['net']}: **")


def _row(front: Front, point: Scored) -> str:
    several = len({each.average for each in front.points}) > 1
    mark = "**" if point.key == front.chosen else "*" if point.key in front.front else ""
    error = "" if point.se is None else f" ± {point.se:.2g}"
    worse = ""
    if point.worse is not None and point.worse_se is not None:
        worse = f"{point.worse:+.3g} ± {point.worse_se:.2g} to the best"
    words = label(_sampler(point), point.average if several else "")
    return f"{mark:<2} {point.nfe:>5g} evaluations  {point.score:.4g}{error}  {words}  {worse}".rstrip()


def _sampler(point: Scored) -> SamplerConfig:
    # as JSON holds them, tuples are lists
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in point.sampler.items()
    }
    return SamplerConfig(**values)


# ---- a single look -----------------------------------------------------------------------------------


def _once(words: Sequence[str], options: Namespace) -> int:
    root = Path(options.runs)
    _refuse_sweep(options)
    for word in words:
        if "=" in word and not Path(word).exists():
            raise UserError(f"--once scores runs as their configs say: drop {word}, or drop --once")
    if not words and not root.is_dir():
        raise UserError(f"runs={root} is no folder; give --runs FOLDER")
    done = once([find(word, root) for word in words] or runs(root.resolve()), retry=options.retry)
    problems = [problem for each in done for problem in each["problems"]]
    if options.json:
        print(json.dumps({"runs": done}, indent=1))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def once(folders: Sequence[RunFolder], *, retry: bool = False) -> list[dict[str, Any]]:
    """Starts what these runs need now, gives up what is hopeless, and says of each run what was done.

    Runs whose watcher works are left to it, and those of other users to these. Nothing is started twice, however many
    do this at once: a job belongs to whoever has written its request first.
    """
    mine = [run for run in folders if run.root.stat().st_uid == os.getuid()]
    problems: list[str] = []
    for run in mine if retry else ():
        try:
            act.ask_for_scores(run, retry=True)
        except OSError as error:
            # the others are looked at all the same
            problems.append(f"{run.root.name}: {error}")
    views, unread = read_many(mine, configs=True, history=True, patience_s=None)
    problems += unread
    done: list[dict[str, Any]] = [{"run": None, "problems": problems}] if problems else []
    return done + [found for view in views if (found := _look(view))]


def _look(view: RunView) -> dict[str, Any] | None:
    """What is done for one run; None where there is nothing to say."""
    found: dict[str, Any] = {"run": view.id, "folder": str(view.folder.root)}
    if view.newest is None or decide.watched(view):
        return None
    try:
        if view.config is None:
            if not decide.unscored(view) or not view.problems:
                return None
            raise UserError(view.problems[0])
        wanted = decide.all_wanted(view, view.config)
        act.keep_endings(view)
        watch.settle(view, wanted)
        pruned = prune.prune(view)
        found |= {
            "started": watch.start(view, wanted),
            "deleted": list(pruned.deleted),
            "failed": [point.key for point in wanted.give_up],
            "skipped": [point.key for point in wanted.skip],
            "waits_for": [lack.sentence for lack in view.lacks],
        }
    except (UserError, OSError) as error:
        return {**found, "problems": [f"{view.id}: {error}"]}
    problems = [f"{view.id}: {each}" for each in pruned.problems]
    said = problems or any(map(found.get, ("started", "failed", "skipped", "deleted")))
    return {**found, "problems": problems} if said else None


if __name__ == "__main__":
    cli.run(main)
