"""The report's tables and pictures, of what was found out about each arm."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.reconcile.hours import trained_s
from launcher.reconcile.view import read_many
from selfguide.evaluation.metrics.frechet import FrechetScore
from selfguide.snapshot import load
from selfguide.spec.records import EvaluationRecord, records
from selfguide.spec.weak import CONDITION, weak_models
from tools import drawing
from tools.guide_search import EVERYWHERE
from tools.study.arms import Arm
from tools.study.document import Block, Heading, Paragraph, Picture, Table
from tools.study.findings import Found, Point, draw_clusters
from tools.study.guided import Paired, Scores, paired
from tools.study.measure import REPORTS, Guide
from tools.study.orderings import Judged, Ordering, askable
from tools.study.training import Trained

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = Callable[[Point], float | None]
PROBE = "linear_accuracy"
# degrees of freedom of an accuracy's standard error, which is one of a share
_MANY = 1_000


def of_digits(found: Mapping[str, Found], out: Path) -> Iterator[Block]:
    """Everything about the arms on the digits; pictures are written into `out`."""
    yield Heading("At equal images")
    yield Paragraph(
        "Frechet distances, lower is better, are those of a digit net that chose nothing (fitted on the odd scans), "
        "of samples that chose nothing, without the bias of their finite number. Guidance is chosen in the other net. "
        "A mean over seeds has their standard deviation beside it, a single seed the standard error of its samples. "
        "NMI and groups in use are those of the last snapshots, of groups that were found; copies is the share of "
        "unguided samples that are nearer to a training image than all but 1 % of these are to one another; probe is "
        "the accuracy of a linear one."
    )
    yield Table([_row(each) for each in found.values()])
    if "patch" in found:
        yield Paragraph(
            "`patch` is sampled with the layouts of training images, a group for each of their patches: it is told "
            "more of an image than one group says, and what it draws is nearer to images that there are."
        )
    yield Heading("What the papers found to be better")
    verdicts = [known for each in askable(list(found)) if (known := judge(each, found))]
    yield Paragraph(
        "The difference is the better arm's score less the worse one's, over pairs of runs of one seed, with the "
        "interval that holds its mean with 95 %: of runs of other seeds, or of one pair of other samples. Papers "
        "guide in most of these tables: distances are compared without guidance, and with each arm's best."
    )
    if verdicts:
        yield Table([_verdict(each) for each in verdicts])
    yield Heading("Through training")
    yield from _curves(found, out / "fd-over-images.png")
    yield Heading("Over guidance")
    yield from _guidance(found, out / "fd-over-guidance.png")
    yield Heading("Clusters")
    yield Paragraph(
        "Samples of the largest groups of each first seed, a group a row, at its arm's best guidance."
    )
    for name, each in found.items():
        file = out / f"clusters-{name}.png"
        if draw_clusters(load(each.runs[0].final), each.guided.chosen, file):
            yield Picture(file, f"{name}: {each.arm.title}", pixels=True)


def _row(each: Found) -> dict[str, str]:
    unguided, best = (
        [one[REPORTS] for one in of] for of in (each.guided.unguided, each.guided.best)
    )
    guide = each.guided.chosen
    ends = guide.g != 1 and guide.g == max(other.g for other in each.guided.searched)
    return {
        "arm": each.arm.name,
        "conditioned on": each.arm.title,
        "distance": spread(unguided),
        "each seed": ", ".join(f"{score.corrected:.2f}" for score in unguided),
        "best guidance": f"{guide}{', the largest g that was searched' if ends else ''}",
        "guided": spread(best),
        "NMI": _mean(each.last, lambda point: point.groups.get("nmi"), ".3f"),
        "groups in use": _mean(each.last, lambda point: point.groups.get("utilisation"), ".0%"),
        "copies": f"{statistics.fmean(each.copies):.1%}" if each.copies else "",
        "probe": _mean(each.last, lambda point: point.probe.get(PROBE), ".1%"),
    }


def spread(scores: Sequence[FrechetScore]) -> str:
    """Mean of distances and their standard deviation; of a single one, the standard error of its samples."""
    values = [score.corrected for score in scores]
    wide = f"{statistics.stdev(values):.2f}" if len(values) > 1 else f"{scores[0].se:.2f} (SE)"
    return f"{statistics.fmean(values):.2f} ± {wide}"


def _mean(points: Sequence[Point], value: Value, form: str) -> str:
    values = [found for point in points if (found := value(point)) is not None]
    return format(statistics.fmean(values), form) if values else ""


def judge(ordering: Ordering, found: Mapping[str, Found]) -> Judged | None:
    """An ordering by the runs of seeds that both arms have; None where they share none.

    Distances are those without guidance and those with each arm's best, accuracies those of the last snapshots.
    """
    better, worse = found[ordering.better], found[ordering.worse]
    pairs = [
        (better.seeds.index(seed), worse.seeds.index(seed))
        for seed in better.seeds
        if seed in worse.seeds
    ]
    if not pairs:
        return None
    if ordering.metric == "fd":

        def difference(a: Sequence[Scores], b: Sequence[Scores]) -> Paired:
            return paired([a[i][REPORTS] for i, _ in pairs], [b[j][REPORTS] for _, j in pairs])

        return Judged(
            ordering=ordering,
            difference=difference(better.guided.unguided, worse.guided.unguided),
            guided=difference(better.guided.best, worse.guided.best),
        )
    probes = [(better.last[i].probe, worse.last[j].probe) for i, j in pairs]
    each = [x[PROBE] - y[PROBE] for x, y in probes]
    # of one pair, by the errors of both as if their test images were others: too wide rather than too narrow
    se = sum(x[f"{PROBE}_se"] ** 2 for x in probes[0]) ** 0.5
    return Judged(ordering=ordering, difference=Paired.of(each, se, _MANY))


def _verdict(each: Judged) -> dict[str, str]:
    ordering = each.ordering
    return {
        "ordering": ordering.name,
        "paper": f"{ordering.paper}, {ordering.where}: {ordering.published}"
        f"{f' ({ordering.differs})' if ordering.differs else ''}",
        **_said(each, each.difference, "difference here", "here"),
        **_said(each, each.guided, "difference, guided", "guided"),
    }


def _said(each: Judged, found: Paired | None, difference: str, verdict: str) -> dict[str, str]:
    if found is None:
        return {difference: "", verdict: ""}
    interval = f"{found.mean:+.3g} [{found.low:+.3g}, {found.high:+.3g}] of {found.over}"
    return {difference: interval, verdict: each.verdict(found)}


def _curves(found: Mapping[str, Found], file: Path) -> Iterator[Block]:
    named: dict[str, tuple[Value, str]] = {
        "Distance in the net that chooses, 1,000 samples": (
            lambda point: point.fd.corrected,
            ".2f",
        ),
        "NMI of the groups with the labels": (lambda point: point.groups.get("nmi"), ".3f"),
        "Share of the groups in use": (lambda point: point.groups.get("utilisation"), ".0%"),
        "Accuracy of a linear probe, of the first seed before the end": (
            lambda point: point.probe.get(PROBE),
            ".1%",
        ),
    }
    images = sorted({n for each in found.values() for n in each.images})
    for title, (value, form) in named.items():
        rows = [
            {"arm": name, **{f"{n:,} images": _mean(each.at(n), value, form) for n in images}}
            for name, each in found.items()
        ]
        if any(any(list(row.values())[1:]) for row in rows):
            yield Paragraph(title)
            yield Table(rows)
    lines = {
        name: (
            each.images,
            [statistics.fmean(p.fd.corrected for p in each.at(n)) for n in each.images],
        )
        for name, each in found.items()
    }
    yield _chart(file, lines, "images seen", "Frechet distance over images")


def _guidance(found: Mapping[str, Found], file: Path) -> Iterator[Block]:
    means = {
        name: {
            guide: statistics.fmean(score.corrected for score in scores)
            for guide, scores in each.guided.searched.items()
        }
        for name, each in found.items()
    }
    # arms without a condition have fewer
    guides = list(dict.fromkeys(guide for of in means.values() for guide in of))
    yield Paragraph("Means over seeds in the net that chooses.")
    yield Table(
        [
            {"guidance": str(guide)}
            | {name: f"{of[guide]:.2f}" if guide in of else "" for name, of in means.items()}
            for guide in guides
        ]
    )
    yield _over_weights(file, means)


def _over_weights(file: Path, means: Mapping[str, Mapping[Guide, float]]) -> Picture:
    """Distances over the weight, guided at all noise-times: a panel a weak model, without guidance at its left end."""
    weak = {guide.weak for of in means.values() for guide in of if guide.g != 1} or {CONDITION}
    with drawing.figure(file, 1, len(weak), size=(8, 4), sharey=True) as (whole, axes):
        drawn: dict[str, Any] = {}
        for axis, away in zip(axes[0], sorted(weak), strict=True):
            for n, (name, of) in enumerate(means.items()):
                points = {
                    guide.g: distance
                    for guide, distance in of.items()
                    if guide.g == 1 or (guide.weak == away and guide.interval == EVERYWHERE)
                }
                if len(points) > 1:
                    at = sorted(points)
                    style = {"marker": "o", "markersize": 3, "color": f"C{n}"}
                    (drawn[name],) = axis.plot(at, [points[g] for g in at], **style)
            axis.set(xlabel="guidance weight g")
            axis.set_title(f"away from {_weak(away)}", fontsize=9)
            _of_distances(axis)
        axes[0, 0].set(ylabel="distance")
        listed = [name for name in means if name in drawn]
        whole.legend(
            [drawn[name] for name in listed],
            listed,
            loc="outside lower center",
            ncols=4,
            frameon=False,
            fontsize=8,
        )
    return Picture(file, "Distance over guidance, by what it leads away from")


def _of_distances(axis: Axes) -> None:
    """Makes the upward axis one of ratios above 1, and even below: a distance without its bias may be less than 0."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

    # linear below 1, and as high there as a factor of 3 is above
    axis.set_yscale("symlog", linthresh=1, linscale=0.5)
    low, high = axis.get_ylim()
    marks = [-10, -3, -1, 0, *(m * 10**e for e in range(5) for m in (1, 3))]
    shown = [m for m in marks if low <= m <= high]
    # distances may all lie between two of them
    axis.yaxis.set_major_locator(FixedLocator(shown) if len(shown) > 1 else MaxNLocator(4))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    drawing.open_frame(axis)


def _weak(word: str) -> str:
    """A weak model that a study searches over, in words."""
    (weak,) = weak_models(word)
    if weak.images is None:
        return "the dropped condition"
    return f"the snapshot after {weak.images:,} images"


def _chart(
    file: Path, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, text: str
) -> Picture:
    """Lines by name, written to `file`."""
    with drawing.figure(file, 1, 1, size=(7, 3.6)) as (_, axes):
        axis = axes[0, 0]
        for name, (at, values) in lines.items():
            axis.plot(at, values, marker="o", markersize=3, label=name)
        axis.set(xlabel=x, ylabel="distance")
        axis.legend(frameon=False, fontsize=8)
        _of_distances(axis)
    return Picture(file, text)


def of_emoji(runs: Mapping[Arm, Sequence[Trained]]) -> Iterator[Block]:
    """One run of each arm on the emoji's latents, by the scores of its snapshots."""
    scores = {arm: _own(several[0]) for arm, several in runs.items()}
    images = sorted({record.images for of in scores.values() for record in of})
    if not images:
        return
    yield Heading("Emoji, one seed")
    yield Paragraph("Scores of each run's own protocol, with the standard errors of its samples.")
    yield Table(
        [
            {"arm": arm.name, "conditioned on": arm.title}
            | {f"{n:,} images": _of(of, n) for n in images}
            for arm, of in scores.items()
        ]
    )
    why = {record.message for of in scores.values() for record in of if record.score is None}
    yield from (Paragraph(f"No score: {each}") for each in sorted(why) if each)


def _own(run: Trained) -> list[EvaluationRecord]:
    """Of its own protocol: a sweep's are of others."""
    return [record for record in records(run.run) if not record.sweep]


def _of(found: Sequence[EvaluationRecord], images: int) -> str:
    scored = [r for r in found if r.images == images and r.done and r.score is not None]
    said = (
        f"{r.metric} {r.score:.1f}"
        + (f" ± {se:.1f}" if (se := r.scores.get(f"{r.metric}_se")) else "")
        for r in scored
    )
    return ", ".join(said) or "no score"


def of_training(runs: Mapping[Arm, Sequence[Trained]]) -> Iterator[Block]:
    """Which runs these are, and how long each was trained."""
    yield Heading("Runs")
    yield Table(
        [
            {
                "arm": arm.name,
                "runs": ", ".join(each.run.root.name for each in several),
                "images": f"{several[0].config.train.images:,}",
                "minutes of training": ", ".join(_minutes(each) for each in several),
            }
            for arm, several in runs.items()
        ]
    )


def _minutes(run: Trained) -> str:
    """Of all its ranks together; empty where nobody wrote that down."""
    views, _ = read_many([run.run])
    spent = [seconds for view in views if (seconds := trained_s(view)) is not None]
    return f"{spent[0] / 60:.0f}" if spent else ""
