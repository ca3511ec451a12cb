"""`python -m launcher.plan experiment=NAME key=value ...`, or `RUN`: how long it will take, and how that is known."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from launcher import folder, jobs
from launcher.follow import minutes
from launcher.reconcile import decide
from launcher.reconcile.forecast import Costs, End, Forecast, best_interval_s, forecast, given
from launcher.reconcile.hours import gpu_hours
from launcher.reconcile.lived import Lived, read_lived
from launcher.reconcile.past import Known, Past
from launcher.reconcile.spans import measured
from launcher.reconcile.view import LOOK_S, RunView, read
from launcher.sites import takes_config_dir
from launcher.submission import absolute, check_weak_snapshots, resolve
from selfguide.spec.config import Config
from selfguide.spec.run import RunFolder
from selfguide.spec.validate import validate
from shards import cli, storage
from shards.errors import UserError

# a forecast beyond this is none
LONGEST_S = 10 * 365 * 86400.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be expected of one run, in seconds."""

    # None of one that was not submitted
    run: str | None
    experiment: str
    # that need not be trained any more, and to train on
    images: int
    of: int
    ranks: int
    # what GPU-hours count: "GPU" or "rank"
    unit: str
    # seconds since 1970
    now: float
    costs: Costs
    expected: Forecast
    # from now on, evaluations included, and before
    gpu_hours: float
    gpu_hours_before: float | None
    # images between two checkpoints: as configured, and at least cost; None where nothing fails
    checkpoint_every: int
    best_checkpoint_every: int | None
    # seconds that the run would then end earlier
    best_saves_s: float | None
    known: Mapping[str, Known]
    # until the end, where it was said when jobs will be ended
    given_s: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def finish(self) -> float:
        """Seconds since 1970, where it need not wait for its turn."""
        return self.now + self.expected.wall_s


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.plan",
        "Says when a run will have finished, what it will take, and where each number comes from. Takes a run,\n"
        "or the settings of a new one as launcher.submit does.",
        "experiment=in1k_dit cluster=slurm nodes=4",
    )
    folder.takes_run(parser, nargs="*", what="run; or experiment=NAME key=value ...")
    takes_config_dir(parser)
    parser.add_argument("--images-per-s", type=float, metavar="N", help="speed, where no run tells")
    parser.add_argument(
        "--ends",
        type=storage.expanded,
        metavar="FILE",
        help="when jobs will be ended, in place of averages: lines such as '90.5 failure' and '600 preemption', in "
        "seconds from now",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.images_per_s is not None and not options.images_per_s > 0:
        raise UserError(f"--images-per-s={options.images_per_s} must be more than 0")
    run, config = _meant(options.run, Path(options.runs))
    root = run.root.parent.parent if run else Path(config.runs) if config else Path(options.runs)
    others = [each for each in folder.runs(root.resolve()) if each != run]
    lived, _ = read_lived(others, ask=False)
    view = None
    if run is not None:
        (view,) = measured([read(run, patience_s=LOOK_S)], ask=False)
        config = view.config
        if config is None:
            raise UserError(f"{run.root.name}: {'; '.join(view.problems)}")
        lived.append(Lived.of(view))
    assert config is not None
    made = plan(view, config, lived, options.images_per_s)
    if options.ends is not None:
        made = replace(made, given_s=given(made.costs, read_ends(options.ends)))
    print(json.dumps(plain(made), indent=1) if options.json else _text(made))
    return 0


def read_ends(path: Path) -> list[tuple[float, End]]:
    """Returns when jobs will be ended, and how.

    Raises:
        UserError: a line is something else.
    """
    found: list[tuple[float, End]] = []
    try:
        for line in path.read_text().splitlines():
            seconds, kind = line.split()
            if kind not in get_args(End):
                raise ValueError(line)
            found.append((float(seconds), cast(End, kind)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--ends {path}: {error}; give lines of seconds from now and {' or '.join(get_args(End))}"
        ) from error
    return found


def _meant(words: Sequence[str], runs: Path) -> tuple[RunFolder | None, Config | None]:
    """The run that is meant, or the config of a new one."""
    if any("=" in word for word in words):
        config = absolute(resolve(words))
        validate(config)
        check_weak_snapshots(config)
        return None, config
    if len(words) != 1:
        raise UserError(
            f"name one run, or settings as experiment=NAME key=value, not {' '.join(words) or 'nothing'}"
        )
    return folder.find(words[0], runs), None


def plan(
    view: RunView | None,
    config: Config,
    lived: Sequence[Lived],
    images_per_s: float | None = None,
) -> Plan:
    """Returns what is to be expected of a run, or of a new one with this config.

    Args:
        lived: all that ran here, this run included.
        images_per_s: speed of training, where no run tells.

    Raises:
        UserError: nobody knows how fast it trains.
    """
    known = Past.of(view.folder if view else None, config, lived).known()
    if images_per_s:
        known["images_per_s"] = Known(images_per_s, "given")
    if "images_per_s" not in known:
        raise UserError(
            f"no run on cluster={config.cluster.kind} below {config.runs} tells how fast this one would train; give "
            "--images-per-s N, for example that of a short run with the same model and batch"
        )
    costs, images, total = _costs(view, config, known)
    expected = forecast(costs)
    rate = known["images_per_s"].value
    best = best_interval_s(costs.save_s, costs.failures_per_s)
    batch = config.train.batch
    every = None if best is None else batch * max(1, round(best * rate / batch))
    at_best = forecast(replace(costs, interval_s=every / rate)) if every else None
    unit = "GPU" if _takes_gpus(config) else "rank"
    spent = config.ranks * expected.allocated_s
    if unit == "rank" and "evaluation_s" in known:
        snapshots = math.ceil((total - images) / config.train.snapshot_every)
        spent += snapshots * known["evaluation_s"].value
    return Plan(
        run=view.id if view else None,
        experiment=config.experiment,
        images=images,
        of=total,
        ranks=config.ranks,
        unit=unit,
        now=view.time if view else time.time(),
        costs=costs,
        expected=expected,
        gpu_hours=spent / 3600,
        gpu_hours_before=gpu_hours(view) if view else None,
        checkpoint_every=config.train.checkpoint_every,
        best_checkpoint_every=every,
        best_saves_s=expected.wall_s - at_best.wall_s if at_best else None,
        known=known,
        notes=tuple(_notes(view, config, costs, expected)),
    )


def _costs(
    view: RunView | None, config: Config, known: Mapping[str, Known]
) -> tuple[Costs, int, int]:
    """What the run has before it, from which image on, and to which."""
    total, images, used = config.train.images, 0, None
    if view is not None:
        total, at = view.images, view.newest
        works = at is not None and at.began is not None and decide.training_state(view) == "running"
        images = decide.progress(view).images if works else max(view.checkpoints, default=0)
        if works and at is not None and at.began is not None:
            used = view.time - at.began
            # it has not made its first step
            used = used if images > (at.resumed_from or 0) else None
    rate, cluster, save_s = known["images_per_s"].value, config.cluster, known["save_s"].value
    preempted = known.get("preemptions_per_s")
    costs = Costs(
        work_s=max(0, total - images) / rate,
        interval_s=config.train.checkpoint_every / rate,
        save_s=save_s,
        start_s=known["start_s"].value,
        gap_s=known["gap_s"].value,
        limit_s=60.0 * cluster.timeout_min - jobs.warning(config, save_s),
        used_s=used,
        failures_per_s=known["failures_per_node_s"].value * config.nodes,
        preemptions_per_s=preempted.value if preempted else 0.0,
    )
    return costs, min(images, total), total


def _takes_gpus(config: Config) -> bool:
    cluster = config.cluster
    return bool(jobs.training_devices(cluster)) if cluster.one_machine else cluster.request_gpus


def _notes(view: RunView | None, config: Config, costs: Costs, expected: Forecast) -> list[str]:
    notes = []
    if view is not None and view.finished:
        notes.append(f"it has finished; python -m launcher.ledger {view.id} says what it took")
    restart = config.cluster.restart
    follows = restart == "watcher" or not (config.cluster.one_machine or restart == "none")
    if not follows and expected.limits > 0.5:
        notes.append(
            f"it reaches its time limit of {config.cluster.timeout_min} min, and nothing follows by itself here: "
            "submit it again then, or give a longer cluster.timeout_min"
        )
    if costs.limit_s is not None and costs.limit_s <= costs.start_s:
        notes.append(
            "a job reaches its time limit before its first step: give a longer cluster.timeout_min"
        )
    return notes


def plain(made: Plan) -> dict[str, Any]:
    """Returns a plan as JSON holds it; a run that never ends has null for times."""

    def number(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: number(each) for name, each in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return number({**asdict(made), "finish": made.finish})


# ---- for people --------------------------------------------------------------------------------------


def _text(made: Plan) -> str:
    expected, rate = made.expected, made.known["images_per_s"].value
    rows = [
        ("run", f"{made.run or 'a new one'}, {made.experiment}, {made.ranks} ranks"),
        ("to train", f"{made.of - made.images:,} of {made.of:,} images"),
    ]
    if expected.wall_s > LONGEST_S:
        rows.append(("finish", "never: jobs fail before they have saved anything"))
    else:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(made.finish))
        before = made.gpu_hours_before
        total = f", {before + made.gpu_hours:,.2f} in all" if before else ""
        ends = (
            decide.counted(round(expected.limits), "time limit"),
            f"{expected.failures:.1f} failures",
            f"{expected.preemptions:.1f} preemptions",
        )
        rows += [
            ("finish", f"{when}, in {minutes(expected.wall_s)}, without time in the queue"),
            (f"{made.unit}-hours", f"{made.gpu_hours:,.2f} from now on{total}"),
            ("effective", f"{expected.effective:.1%} of that time is training that is kept"),
            ("jobs", f"{expected.jobs:.1f}: {', '.join(ends)} on the way"),
        ]
    if made.given_s is not None:
        rows.append(("", f"in {minutes(made.given_s)}, where jobs end when --ends says"))
    every = (
        f"every {made.checkpoint_every:,} images, which is {minutes(made.checkpoint_every / rate)}"
    )
    rows.append(("checkpoint", every))
    if made.best_checkpoint_every:
        best = made.best_checkpoint_every
        saves = made.best_saves_s or 0.0
        what = (
            f"ends {minutes(saves)} earlier"
            if math.isfinite(saves) and saves >= 1
            else "costs the same"
        )
        rows.append(
            (
                "",
                f"by Young and Daly every {best:,} images ({minutes(best / rate)}) is best, and {what}",
            )
        )
    rows.append(("", ""))
    for name, label, form in _SHOWN:
        if name in made.known:
            each = made.known[name]
            rows.append((label, f"{form(each.value):<12} {each.source}"))
    lines = [f"{name:<17}{value}".rstrip() for name, value in rows]
    return "\n".join([*lines, *made.notes])


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 60 else minutes(value)


def _mean_time(rate: float) -> str:
    """Between two faults."""
    return f"each {minutes(1 / rate)}" if rate else "none"


_SHOWN = (
    ("images_per_s", "images/s", lambda value: f"{value:,.0f}"),
    ("save_s", "a checkpoint", _seconds),
    ("start_s", "a start", _seconds),
    ("gap_s", "between jobs", _seconds),
    ("queued_s", "in the queue", _seconds),
    ("evaluation_s", "an evaluation", _seconds),
    ("failures_per_node_s", "failures a node", _mean_time),
    ("preemptions_per_s", "preemptions", _mean_time),
)


if __name__ == "__main__":
    cli.run(main)
