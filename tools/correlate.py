"""Scores of all runs against each other, with their rank correlation: whether one tells what another will say.

    python -m tools.correlate fid_adm linear_accuracy --figure figure3.png      DDAE++, figure 3
    python -m tools.correlate nmi fid_adm --figure figure9.png                  SGDM, figure 9
    python -m tools.correlate groups fid_adm utilisation --mark 500             C-EDM, figure 3: over K, with the bound
    python -m tools.correlate fid_adm linear_accuracy --literature others.yaml  others' rows beside, with sources

A point is a run, at the last snapshot that has all the scores. Beside scores there is what its groups are: `groups`,
how many, and of groups from a sidecar `utilisation`, `nmi`, `ari` and `ami` as its record says. --literature FILE is
YAML, a list of {name, source, scores: {fid_adm: 2.1, ...}}; these rows are drawn, and are no part of a correlation.
Spearman's rho needs no scale: two scores that order all runs alike have 1, or -1 where one of them is better low.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from launcher.board.read import Run, read_runs
from selfguide.spec.metrics import METRICS
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.suggest import check_known
from shards import cli, sidecar
from shards.errors import DamagedError, UserError
from tools import drawing, flags

# of a sidecar's groups, beside how many there are
FACTS = ("utilisation", "nmi", "ari", "ami")
NAMES = (*METRICS, "groups", "utilisation")
# fewer runs have no order to speak of
LEAST = 3
# of a protocol, what is measured; the rest is how it was sampled
_MEASURED = (
    "metric", "version", "feature_sha256", "resize", "quantisation", "reference", "samples", "net", "reference_sha256",
    "reference_count", "reference_seed", "crop", "sets",
)  # fmt: skip
_OURS, _THEIRS = "#4c78a8", "#9a9a9a"


@dataclass(frozen=True)
class Point:
    """A run, or a row of the literature, and its values by name."""

    name: str
    values: Mapping[str, float]
    images: int | None = None
    # of a row of the literature
    source: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    options = flags.command(
        "tools.correlate",
        __doc__,
        ("x", str, None, "a score, or groups, utilisation"),
        ("y SCORE+", str, None, "what is drawn over it"),
        flags.RUNS,
        ("--protocol KEY*", str, (), "protocols whose records count, by the beginnings of keys (all)"),
        ("--literature FILE", str, None, "rows of others, as YAML"),
        ("--mark X*", float, (), "lines at these x, such as a bound on K"),
        ("--figure FILE", str, None, "write the picture here"),
        flags.JSON,
    ).parse_args(argv)  # fmt: skip
    wanted = (options.x, *options.y)
    for name in wanted:
        check_known("a score", name, NAMES)
    others = literature(Path(options.literature)) if options.literature else []
    runs, problems = read_runs(Path(options.runs))
    points = of_runs(runs, wanted, options.protocol)
    if len(points) < LEAST:
        raise UserError(
            f"{len(points)} of {len(runs)} runs below {options.runs} have {', '.join(wanted)}; a correlation needs "
            f"{LEAST}. Score more: python -m launcher.evaluate RUN"
        )
    rho = {name: correlation(points, options.x, name) for name in options.y}
    if options.figure:
        draw(Path(options.figure), points, others, options.x, rho, options.mark)
    said = {
        "x": options.x,
        "rho": rho,
        "runs": [asdict(point) for point in points],
        "literature": [asdict(each) for each in others],
        "problems": list(problems),
    }
    if options.json:
        print(json.dumps(said))
        return 0
    rows = [_texts(point, wanted) for point in (*points, *others)]
    cli.console().print(drawing.table(f"{len(points)} runs", rows, names=1))
    for name, value in rho.items():
        cli.console().print(
            f"rank correlation of {options.x} and {name}: {value:.3f}, {len(points)} runs"
        )
    return 0


def of_runs(
    runs: Sequence[Run], wanted: Sequence[str], protocols: Sequence[str] = ()
) -> list[Point]:
    """A point for each run that has all that is wanted, at the last snapshot where it does.

    Raises:
        UserError: a score was measured in several ways, or of one snapshot several times.
    """
    _check_measured(runs, wanted, protocols)
    points = []
    for run in runs:
        known = facts(run)
        for images in sorted({record.images for record in run.own}, reverse=True):
            records = [r for r in _chosen(run, protocols) if r.images == images]
            values = known | _scores(run, records, wanted)
            if all(name in values for name in wanted):
                name = f"{run.experiment} {run.id[:6]}"
                points.append(Point(name, {each: values[each] for each in wanted}, images))
                break
    return points


def _chosen(run: Run, protocols: Sequence[str]) -> list[EvaluationRecord]:
    return [
        r for r in run.own if r.done and (not protocols or r.protocol_key.startswith((*protocols,)))
    ]


def _check_measured(runs: Sequence[Run], wanted: Sequence[str], protocols: Sequence[str]) -> None:
    """A score compares over runs where it was measured alike, however samples were drawn."""
    for name in wanted:
        ways: dict[str, str] = {}
        for record in (r for run in runs for r in _chosen(run, protocols) if name in r.scores):
            how = {key: record.protocol.get(key) for key in _MEASURED}
            ways.setdefault(json.dumps(how, sort_keys=True, default=str), record.protocol_key)
        if len(ways) > 1:
            raise UserError(
                f"{name} was measured in {len(ways)} ways, by protocols {', '.join(ways.values())} among others, and "
                "these do not compare; name those of one with --protocol KEY"
            )


def _scores(
    run: Run, records: Sequence[EvaluationRecord], wanted: Sequence[str]
) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in wanted:
        by_key = {r.protocol_key: r.scores[name] for r in records if name in r.scores}
        if len(by_key) > 1:
            raise UserError(
                f"run {run.id} has {name} under protocols {', '.join(by_key)}; name one with --protocol KEY"
            )
        if by_key:
            found[name] = next(iter(by_key.values()))
    return found


def facts(run: Run) -> dict[str, float]:
    """How many groups a run is conditioned on; and what the record of their sidecar says, where that still is."""
    groups = run.identity.get("guidance", {}).get("groups")
    found: dict[str, float] = {"groups": float(groups)} if groups else {}
    folder = run.config.guidance.folders.get("ids") if run.config is not None else None
    if folder is None:
        return found
    try:
        annotation = sidecar.read(folder)
    except (UserError, DamagedError):
        return found
    report = dict(annotation.provenance.get("report", {}))
    if annotation.provenance.get("method") == "temi" and annotation.groups:
        report["utilisation"] = annotation.provenance["used"] / annotation.groups
    return found | {name: float(report[name]) for name in FACTS if name in report}


def literature(file: Path) -> list[Point]:
    """Rows of others.

    Raises:
        UserError: no such file, no list of rows, one without a source, or of an unknown score.
    """
    try:
        rows = yaml.safe_load(file.read_text())
        points = [
            Point(row["name"], {k: float(v) for k, v in row["scores"].items()}, source=row.get("source") or "")
            for row in rows
        ]  # fmt: skip
    except OSError as error:
        raise UserError(f"--literature {file}: {error.strerror}") from error
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"--literature {file}: give a list of {{name, source, scores}} as YAML ({error!r})"
        ) from error
    for point in points:
        if not str(point.source).strip():
            raise UserError(f"--literature {file}: {point.name} has no source; say where it stands")
        for name in point.values:
            check_known(f"a score of {point.name}", name, NAMES)
    return points


def correlation(points: Sequence[Point], x: str, y: str) -> float:
    """Spearman's rank correlation of two values over points.

    Raises:
        UserError: all points have one value of either.
    """
    columns = [np.array([point.values[name] for point in points]) for name in (x, y)]
    for name, column in zip((x, y), columns, strict=True):
        if (column == column[0]).all():
            raise UserError(f"all {len(points)} runs have {name} {column[0]:g}: nothing is ordered")
    return float(stats.spearmanr(*columns).statistic)


def draw(
    file: Path,
    points: Sequence[Point],
    others: Sequence[Point],
    x: str,
    rho: Mapping[str, float],
    marks: Sequence[float],
) -> None:
    """A panel for each y: our runs as dots, others' rows as triangles with their names."""
    size = (1 + 5.5 * len(rho), 4.5)
    with drawing.figure(file, 1, len(rho), size=size) as (_, axes):
        for axis, (y, value) in zip(axes[0], rho.items(), strict=True):
            for these, marker, colour in ((points, "o", _OURS), (others, "^", _THEIRS)):
                shown = [each for each in these if {x, y} <= set(each.values)]
                at = [[each.values[name] for each in shown] for name in (x, y)]
                axis.plot(*at, marker, color=colour, markersize=6)
                for each, *place in zip(shown, *at, strict=True):
                    axis.annotate(
                        each.name, place, fontsize=7, xytext=(4, 3), textcoords="offset points"
                    )
            for mark in marks:
                axis.axvline(mark, color="black", linestyle="--", linewidth=1)
            if x == "groups":
                axis.set_xscale("log")
            axis.set(xlabel=_heading(x), ylabel=_heading(y))
            axis.set_title(f"rank correlation {value:.2f}, {len(points)} runs", fontsize=11)
            drawing.open_frame(axis)


def _heading(name: str) -> str:
    return METRICS[name].heading if name in METRICS else {"groups": "K"}.get(name, name)


def _texts(point: Point, wanted: Sequence[str]) -> dict[str, str]:
    values: dict[str, Any] = {
        _heading(n): f"{point.values[n]:.4g}" if n in point.values else "" for n in wanted
    }
    images = f"{point.images:,}" if point.images else ""
    return {"run": point.name, "images": images, **values, "source": point.source}


if __name__ == "__main__":
    cli.run(main)
