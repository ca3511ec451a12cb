"""One run, a comparison, and curves as sentences and tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone

from launcher.board.chart import thinned
from launcher.board.columns import NOTHING, duration, number
from launcher.board.compare import Difference
from launcher.board.detail import newest_grid
from launcher.board.read import Code, Run
from launcher.board.states import chips
from launcher.board.sweeps import recipe_words
from launcher.reconcile.lineage import Parent
from selfguide.spec.records import EvaluationRecord

# of a sha256, as many as tell files apart
SHORT = 12
# widest bar and most lines of a curve in the terminal
BAR, LINES = 40, 24
# deleted snapshots that are named, the newest ones
_SHOWN = 8


def of_run(run: Run) -> Iterator[str]:
    """Everything about one run, a line each."""
    states = "; ".join(f"{chip.label} ({chip.detail})" for chip in chips(run))
    created = datetime.fromtimestamp(run.created, timezone.utc)
    yield f"{run.experiment} {run.id}, seed {run.seed}: {states}"
    hours = "" if run.gpu_hours is None else f", about {number(run.gpu_hours)} GPU-hours"
    yield f"folder     {run.root}"
    yield f"begun      {created:%Y-%m-%d %H:%M} UTC, attempts {run.attempts}{hours}"
    if run.code is not None:
        yield f"code       {_code(run.code)}"
    if run.jobs:
        yield f"jobs       {', '.join(run.jobs)}"
    yield f"labels     {'none seen' if run.label_free else 'seen'}"
    for parent in run.lineage:
        yield f"from       {_parent(parent)}"
    for each in run.expected:
        yield f"published  {each.metric} {number(each.value)}: {each.source}"
    for front in run.fronts:
        yield f"recipe     {recipe_words(front)}"
    if run.deleted:
        yield f"deleted    {deleted_words(run)}"
    if run.records:
        yield ""
        yield from lines(_records(run))
    found = newest_grid(run)
    if found is not None:
        yield f"samples    {found[1]}"
    for sentence in run.quarantined:
        yield f"warning: {sentence}"


def deleted_words(run: Run) -> str:
    """Which snapshots retention has deleted, and by which settings."""
    settings = ", ".join(dict.fromkeys(each.setting for each in run.deleted))
    images = ", ".join(f"{each.images:,}" for each in run.deleted[-_SHOWN:])
    more = f"{len(run.deleted) - _SHOWN} and those " if len(run.deleted) > _SHOWN else ""
    return f"snapshots: {more}at {images} images ({settings})"


def _code(code: Code) -> str:
    commit = f", commit {code.revision[:SHORT]}" if code.revision else ""
    return f"{code.hash}{commit}{' with changes that are not committed' if code.dirty else ''}"


def _parent(parent: Parent) -> str:
    facts = [
        f"guidance.{parent.field}" if parent.field else "",
        f"sha256 {parent.sha256[:SHORT]}" if parent.sha256 else "",
        "" if parent.images is None else f"{parent.images:,} images",
        f"of run {', '.join(parent.runs)}" if parent.runs else "",
    ]
    return f"{parent.kind} {parent.name or NOTHING} ({', '.join(filter(None, facts))})"


def _records(run: Run) -> list[tuple[str, ...]]:
    """The evaluations of a run, and a head."""
    rows: list[tuple[str, ...]] = [
        ("images", "protocol", "score", "standard error", "NFE", "took", "snapshot")
    ]
    for r in run.records:
        took = (number(r.nfe), duration(r.seconds), r.snapshot_sha256[:SHORT] or NOTHING)
        se = r.scores.get(f"{r.metric}_se")
        said = f"{r.metric} {number(r.score)}" if r.done else f"{r.status}: {_first(r.message)}"
        rows.append((f"{r.images:,}", r.protocol_key[:8] or NOTHING, said, number(se), *took))
    return rows


def _first(message: str) -> str:
    return message.strip().split("\n")[0] if message.strip() else "no reason given"


def of_settings(runs: Sequence[Run], found: Mapping[str, Sequence[object]]) -> Iterator[str]:
    """The settings that differ, a column for each run."""
    head = ("setting", *(f"{run.id} seed {run.seed}" for run in runs))
    if found:
        yield from lines([head, *((key, *map(str, values)) for key, values in found.items())])
    else:
        yield "no setting differs"


def of_differences(first: Run, found: Iterable[Difference]) -> Iterator[str]:
    """The score of each run less that of the first, a line each."""
    differences = list(found)
    if not differences:
        yield f"no protocol under which {first.id} and another of these have a score"
    for each in differences:
        error = NOTHING if each.se is None else number(each.se)
        how = "paired samples" if each.paired else "samples not paired"
        ours, theirs = each.images
        at = (
            f"at {ours:,} images"
            if ours == theirs
            else f"at {theirs:,} images, {ours:,} of the first"
        )
        yield (
            f"{each.run} less {first.id}: {each.metric} {each.difference:+.4g} ± {error} ({how}), "
            f"{number(each.score)} {at} (protocol {each.protocol_key[:8]})"
        )


def of_curve(name: str, points: Sequence[tuple[float, float, float | None]]) -> Iterator[str]:
    """A curve: a line for each point with a bar; noisy ones as means over equal parts."""
    if len(points) > LINES:
        points = thinned([(int(x), y) for x, y, _ in points], LINES)
    yield name
    top = max((abs(y) for _, y, _ in points), default=0.0) or 1.0
    rows = [
        (
            f"{x:,.0f}",
            number(y),
            "" if e is None else f"± {number(e)}",
            "█" * round(BAR * abs(y) / top),
        )
        for x, y, e in points
    ]
    yield from lines([("images", "value", "", ""), *rows], left=(3,))


def lines(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> Iterator[str]:
    """Rows of cells as aligned lines, the first of them a head: numbers to the right, words to the left."""
    count = len(rows[0])
    width = [max(len(row[i]) for row in rows) for i in range(count)]
    words = {i for i in range(count) if any(not _numeric(row[i]) for row in rows[1:])} | set(left)
    for row in rows:
        cells = (f"{cell:{'<' if i in words else '>'}{width[i]}}" for i, cell in enumerate(row))
        yield "  ".join(cells).rstrip()


def _numeric(cell: str) -> bool:
    return not cell or cell[0] in "0123456789-+±" or cell == NOTHING


def score_points(
    records: Iterable[EvaluationRecord], metric: str
) -> list[tuple[float, float, float | None]]:
    """(images, score, standard error) of records, ascending."""
    return [
        (float(r.images), r.scores[metric], r.scores.get(f"{metric}_se"))
        for r in records
        if metric in r.scores
    ]
