"""The page's charts: what is drawn of a table, a row, or a run that has no score, each with its numbers as a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from launcher.board import sweeps
from launcher.board.chart import COLOURS, MOST, Point, Series, line_chart, thinned
from launcher.board.collect import Row, Table, over_seeds
from launcher.board.read import Run
from selfguide.spec.metrics import METRICS
from selfguide.spec.recipe import Front

# curves of a run's training that share a chart, and what the chart says of them
AGREEMENT = ("nmi", "agreement of the groups with human labels over training", "NMI")
USE = ("perplexity", "use of the groups over training (exp(entropy) over their number)", "used")
# a level that a chart marks: its name and where it lies
Level = tuple[str, float]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart, its legend as (colour class, name), and the same numbers as a table."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...]
    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]


def figure(
    title: str,
    series: Iterable[Series],
    *,
    label: str,
    x_label: str = "images seen",
    at: Callable[[float], str] = "{:,.0f} images".format,
    x_form: Callable[[float], str] = "{:,.0f}".format,
    reference: Level | None = None,
    until: float = 0.0,
    log_x: bool = False,
    may_log_y: bool = True,
) -> Figure | None:
    """The series as chart and table; None where nothing is to be drawn."""
    drawn = [s for s in series if s.points]
    svg = line_chart(
        drawn,
        label=title,
        x_label=x_label,
        y_label=label,
        reference=None if reference is None else reference[1],
        until=until,
        log_x=log_x,
        may_log_y=may_log_y,
        at=at,
    )
    if not svg:
        return None
    xs = sorted({x for s in drawn for x, _, _ in s.points})
    lookup = [{x: (y, e) for x, y, e in s.points} for s in drawn]
    return Figure(
        title=title,
        svg=svg,
        legend=(
            *((s.css, s.name) for s in drawn),
            *([] if reference is None else [("floor", "{} {:.4g}".format(*reference))]),
        ),
        head=(x_label.removesuffix(" seen"), *(s.name for s in drawn)),
        body=tuple((x_form(x), *(_reading(each.get(x)) for each in lookup)) for x in xs),
    )


def _reading(point: tuple[float, float | None] | None) -> str:
    if point is None:
        return ""
    value, error = point
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def name_of(row: Row) -> str:
    """What a row is called in a legend: its experiment and what tells it from others."""
    return " ".join((row.experiment, *row.variant))


# ---- of a table --------------------------------------------------------------------------------------


def of_table(table: Table) -> tuple[Figure, ...]:
    """The best rows over training, what they cost, over NFE and guidance where somebody swept, and their groups."""
    found = (
        _overview(table),
        _pareto(table),
        _over_nfe(table),
        _over_guidance(table),
        _means_of(table, *AGREEMENT),
        _means_of(table, *USE),
    )
    return tuple(each for each in found if each is not None)


def _floor(rows: Sequence[Row]) -> Level | None:
    """What a perfect model would reach: of latents it is that of the data's, decoded, where all rows are of some."""
    for name in ("floor_reconstruction", "floor"):
        found = [row.scores[name].mean for row in rows if name in row.scores]
        if found and (name == "floor" or len(found) == len(rows)):
            return METRICS[name].heading, min(found)
    return None


def _overview(table: Table) -> Figure | None:
    """The best rows over training: mean over seeds, bands of one standard deviation."""
    series = [
        Series(name=name_of(row), points=_means(row, table.metric), colour=i, band=True)
        for i, row in enumerate(table.rows[:COLOURS])
    ]
    more = f", best {COLOURS} rows" if len(table.rows) > COLOURS else ""
    title = f"{table.metric} over training{more} (mean and standard deviation over seeds)"
    floor = _floor(table.rows) if not table.higher_is_better else None
    return figure(title, series, label=table.metric, reference=floor)


def _means(row: Row, metric: str) -> tuple[Point, ...]:
    by_images: dict[int, list[tuple[int, float | None]]] = defaultdict(list)
    for scored in row.runs:
        for record in scored.history:
            by_images[record.images].append((scored.run.seed, record.scores.get(metric)))
    return _over_seeds(by_images)


def _over_seeds(by_images: dict[int, list[tuple[int, float | None]]]) -> tuple[Point, ...]:
    spreads = ((at, over_seeds(values)) for at, values in sorted(by_images.items()))
    return tuple((float(at), found.mean, found.sd) for at, found in spreads if found is not None)


def _pareto(table: Table) -> Figure | None:
    """Every row's score over what it cost, and the rows that none is both cheaper and better than."""
    costs = [(r.gpu_hours, r.score.mean, r) for r in table.rows if r.gpu_hours and r.score]
    ordered = sorted(costs, key=lambda each: (each[0], each[1]))
    if len(ordered) < 2:
        return None
    best = sweeps.front([each[:2] for each in ordered], higher_is_better=table.higher_is_better)
    cloud = Series(
        name="all rows",
        points=tuple((hours, score, row.error or None) for hours, score, row in ordered),
        names=tuple(name_of(row) for *_, row in ordered),
        line=False,
    )
    front = Series(name="Pareto front", points=tuple((x, y, None) for x, y in best), colour=1)
    found = figure(
        f"{table.metric} over GPU-hours of one run",
        [cloud, front],
        label=table.metric,
        x_label="GPU-hours",
        at=lambda x: f"{x:.3g} GPU-hours",
        log_x=ordered[-1][0] > 20 * ordered[0][0],
    )
    assert found is not None
    lines = tuple(
        (
            name_of(row),
            f"{hours:.3g}",
            _reading((score, row.error or None)),
            "yes" if (hours, score) in best else "",
        )
        for hours, score, row in ordered
    )
    return Figure(
        title=found.title,
        svg=found.svg,
        legend=found.legend,
        head=("row", "GPU-hours", table.metric, "on the front"),
        body=lines,
    )


def _over_nfe(table: Table) -> Figure | None:
    return _swept(
        table,
        f"{table.metric} over network evaluations a sample",
        "NFE",
        lambda p: p.nfe,
        lambda p: (p.g, p.interval, p.weak, p.ema),
        log_x=True,
    )


def _over_guidance(table: Table) -> Figure | None:
    return _swept(
        table,
        f"{table.metric} over guidance (1 is none)",
        "guidance g",
        lambda p: p.g,
        lambda p: (p.sampler, p.steps, p.interval, p.weak, p.ema),
        log_x=False,
    )


def _swept(
    table: Table,
    title: str,
    x_label: str,
    x_of: Callable[[sweeps.Point], float | None],
    fixed: Callable[[sweeps.Point], object],
    *,
    log_x: bool,
) -> Figure | None:
    """Lines of the best rows that have several x, over points that share the table's own value of all else."""
    series: list[Series] = []
    for row in table.rows:
        found = sweeps.points(table, row)
        own = {fixed(p) for p in found if p.own}
        by_x: dict[tuple[str, float], list[sweeps.Point]] = defaultdict(list)
        for point in found:
            x = x_of(point)
            if x is not None and fixed(point) in own:
                by_x[point.sampler, x].append(point)
        for sampler in dict.fromkeys(sampler for sampler, _ in by_x):
            points = tuple(_mean_of(x, by_x[s, x]) for s, x in sorted(by_x) if s == sampler)
            if len(points) > 1:
                name = " ".join(filter(None, (name_of(row), sampler)))
                series.append(Series(name=name, points=points, colour=len(series)))
        if len(series) >= COLOURS:
            break
    return figure(
        title,
        series[:COLOURS],
        label=table.metric,
        x_label=x_label,
        at=lambda x: f"{x_label} {x:g}",
        x_form=lambda x: f"{x:g}",
        log_x=log_x,
    )


def _mean_of(x: float, points: Sequence[sweeps.Point]) -> Point:
    """Mean over seeds with its standard deviation, or the one score with its standard error."""
    found = over_seeds((p.seed, p.score) for p in points)
    assert found is not None
    return x, found.mean, points[0].se if found.sd is None else found.sd


def _means_of(table: Table, name: str, title: str, label: str) -> Figure | None:
    """A curve of training of the best rows that have one, mean over seeds."""
    series: list[Series] = []
    for row in table.rows:
        by_images: dict[int, list[tuple[int, float | None]]] = defaultdict(list)
        for scored in row.runs:
            for at, value in scored.run.curve(name):
                by_images[at].append((scored.run.seed, value))
        points = [(int(x), y) for x, y, _ in _over_seeds(by_images)]
        if points:
            series.append(Series(name=name_of(row), points=thinned(points, 60), colour=len(series)))
        if len(series) == COLOURS:
            break
    return figure(title, series, label=label, may_log_y=False)


# ---- of a row, and of a run without a score ----------------------------------------------------------


def of_row(table: Table, row: Row, most: int = MOST) -> tuple[Figure, ...]:
    """A line for each run: its scores with standard errors, its loss, and what its groups did."""
    runs = [scored.run for scored in row.runs]
    found = (_scores(table, row), *of_runs(runs, most))
    return tuple(each for each in found if each is not None)


def of_runs(runs: Sequence[Run], most: int = MOST) -> tuple[Figure, ...]:
    """Loss, NMI and use of groups, where the runs wrote them, and the fronts of their sweeps."""
    curves = (("loss", "training loss", "loss"), AGREEMENT, USE)
    found = (
        *(_curve(runs, *each, most=most) for each in curves),
        *(_front(run, front) for run in runs for front in run.fronts),
    )
    return tuple(each for each in found if each is not None)


def _front(run: Run, front: Front) -> Figure | None:
    """Every point of a front over its network evaluations, and those that none is both cheaper and better than."""
    ordered = sorted(front.points, key=lambda p: (p.nfe, p.ranked_by))
    cloud = Series(
        name="points",
        points=tuple((p.nfe, p.ranked_by, p.se) for p in ordered),
        names=tuple(map(sweeps.drawing, ordered)),
        line=False,
    )
    best = [p for p in ordered if p.key in front.front]
    line = Series(
        name="Pareto front", points=tuple((p.nfe, p.ranked_by, None) for p in best), colour=1
    )
    found = figure(
        f"{front.metric} over network evaluations, seed {run.seed}, {front.images:,} images, {front.samples:,} samples",
        [cloud, line],
        label=front.metric,
        x_label="NFE",
        at=lambda x: f"{x:g} NFE",
        log_x=ordered[-1].nfe > 20 * ordered[0].nfe,
    )
    if found is None:
        return None
    body = tuple(
        (
            sweeps.drawing(p),
            f"{p.nfe:g}",
            _reading((p.ranked_by, p.se)),
            "yes" if p.key in front.front else "",
            "yes" if p.key == front.chosen else "",
        )
        for p in ordered
    )
    head = ("samples drawn by", "NFE", front.metric, "on the front", "recipe")
    return replace(found, head=head, body=body)


def _scores(table: Table, row: Row) -> Figure | None:
    metric = table.metric
    series = [
        Series(
            name=f"seed {s.run.seed}",
            points=tuple(
                (float(r.images), r.scores[metric], r.scores.get(f"{metric}_se"))
                for r in s.history
                if metric in r.scores
            ),
            colour=i,
        )
        for i, s in enumerate(row.runs)
    ]
    floor = None if table.higher_is_better else _floor([row])
    title = f"{metric} (bars: standard error)"
    until = max(s.run.seen for s in row.runs)
    return figure(title, series, label=metric, reference=floor, until=until)


def _curve(runs: Sequence[Run], name: str, title: str, label: str, *, most: int) -> Figure | None:
    series = [
        Series(name=f"seed {run.seed}", points=thinned(run.curve(name), most), colour=i)
        for i, run in enumerate(runs)
    ]
    until = max(run.seen for run in runs)
    return figure(title, series, label=label, until=until, may_log_y=name == "loss")
