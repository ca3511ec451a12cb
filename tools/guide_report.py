"""What `tools.guide` found: a table, a picture, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfguide.sampling.cost import Cost, cost
from selfguide.snapshot import Snapshot
from selfguide.spec.recipe import difference
from shards import cli
from tools import drawing
from tools.guide_search import EVERYWHERE, Scored, Search

# two-sided 95 % point of Student's t with the 9 degrees of freedom of a jackknife over ten blocks
_T = 2.262


def answer(
    snapshot: Snapshot,
    search: Search,
    unguided: Scored,
    confirmed: Mapping[str, Scored],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """All that there is to say, as JSON; methods from the best reported score to the worst.

    `best` is the method with the best searched score: the best of several reported ones would be too good by chance,
    and its interval too narrow.
    """
    assert search.plain is not None
    base = cost(snapshot, search.sampler)
    rows = [
        _row(word, search, each, unguided, cost(snapshot, each.sampler), base)
        for word, each in sorted(confirmed.items(), key=lambda pair: pair[1].worth)
    ]
    best = min(confirmed, key=lambda word: _searched(search, word).worth)
    for row in rows:
        row["against_best"] = _paired(confirmed[row["weak"]], confirmed[best])
    guided = next(row["difference"] for row in rows if row["weak"] == best)
    return {
        "run": unguided.record.run,
        "images": snapshot.images,
        "label_free": bool(snapshot.guidance["label_free"]),
        "search": _by(search.plain),
        "report": _by(unguided),
        "complete": search.complete,
        "unguided": _score(unguided) | {"flops": base.flops, "evaluations": base.evaluations},
        "methods": rows,
        "best": best,
        # whether the interval of its paired difference to no guidance lies on the better side of 0
        "better_than_unguided": guided is not None and _excludes(guided, search),
        "missing": dict(missing),
    }


def _row(
    word: str, search: Search, reported: Scored, unguided: Scored, took: Cost, base: Cost
) -> dict[str, Any]:
    found = _searched(search, word)
    weights = search.grid.weights
    return {
        "weak": word,
        "g": reported.sampler.g,
        "interval": list(reported.sampler.interval),
        "searched": _score(found),
        "points": len(search.found[word]),
        # a better weight may lie behind it
        "at_the_end": reported.sampler.g == weights[-1],
        "reported": _score(reported),
        "difference": _paired(reported, unguided),
        "flops": took.flops,
        "cost": took.flops / base.flops,
        "curve": [
            {"g": each.sampler.g, **_score(each)}
            for each in sorted(search.found[word], key=lambda each: each.sampler.g)
            if each.sampler.interval == EVERYWHERE
        ],
    }


def _searched(search: Search, word: str) -> Scored:
    """The best point of a method that was searched."""
    found = search.best(word)
    assert found is not None
    return found


def _score(scored: Scored) -> dict[str, float | None]:
    record = scored.record
    return {"score": record.score, "se": record.scores.get(f"{record.metric}_se")}


def _by(scored: Scored) -> dict[str, Any]:
    protocol = scored.record.protocol
    names = ("metric", "feature_sha256", "samples", "seed")
    return {name: protocol[name] for name in names}


def _paired(scored: Scored, other: Scored) -> dict[str, float] | None:
    """The score less that of another from the same seeds, with its 95 % interval; None where nothing is known."""
    found = difference(scored.record, other.record)
    if found is None:
        return None
    value, se = found
    return {"value": value, "low": value - _T * se, "high": value + _T * se}


def _excludes(interval: Mapping[str, float], search: Search) -> bool:
    assert search.plain is not None
    better_is_less = search.plain.worth == search.plain.record.score
    return interval["high"] < 0 if better_is_less else interval["low"] > 0


def show(said: Mapping[str, Any]) -> None:
    """Prints the table."""
    console, by, report = cli.console(), said["search"], said["report"]
    title = (
        f"{report['metric']} of {report['samples']:,} samples from seed {report['seed']:,}; searched by "
        f"{by['metric']}, {by['samples']:,} samples from seed {by['seed']:,}"
    )
    unguided = dict.fromkeys(_COLUMNS, "") | {
        "weak model": "no guidance",
        "reported": _number(said["unguided"]),
        "FLOPs": "1.00",
    }
    console.print(drawing.table(title, [unguided, *map(_shown, said["methods"])]))
    if any(row["at_the_end"] for row in said["methods"]):
        console.print("+: the largest weight was the best; give larger --weights")
    if not said["complete"]:
        console.print("the search is not complete: the budget was spent; the same command goes on")
    for word, why in said["missing"].items():
        console.print(f"without {word}: {why}", soft_wrap=True)
    known = "better" if said["better_than_unguided"] else "not known to be better"
    console.print(
        f"the search chose {said['best']}, which is {known} than no guidance; {said['figure']}"
    )


_COLUMNS = (
    "weak model", "g", "noise-times", "searched", "reported", "less no guidance, 95 %", "FLOPs",
)  # fmt: skip


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    low, high = row["interval"]
    gap, cells = row["difference"], ["", "", "", "", "", "", ""]
    if gap is not None:
        cells[5] = f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
    cells[:5] = [
        row["weak"],
        f"{row['g']:g}{'+' if row['at_the_end'] else ''}",
        f"{low:g} to {high:g}",
        _number(row["searched"]).partition(" ")[0],
        _number(row["reported"]),
    ]
    cells[6] = f"{row['cost']:.2f}"
    return dict(zip(_COLUMNS, cells, strict=True))


def _number(found: Mapping[str, Any]) -> str:
    """A score with its standard error."""
    if found["score"] is None:
        return "none"
    return f"{found['score']:.3f}" + ("" if found["se"] is None else f" ± {found['se']:.3f}")


def plot(file: Path, search: Search, said: Mapping[str, Any]) -> None:
    """The searched score over g of each weak model, everywhere; stars are the best with their interval."""
    assert search.plain is not None
    none = search.plain.record.score
    with drawing.figure(file, 1, 1, size=(7.0, 4.5)) as (_, axes):
        axis = axes[0, 0]
        if none is not None:
            axis.axhline(none, color="grey", lw=1, ls="--", label="no guidance")
        for number, row in enumerate(said["methods"]):
            known = [each for each in row["curve"] if each["score"] is not None]
            start = [] if none is None else [(1.0, none)]
            at = [*start, *((each["g"], each["score"]) for each in known)]
            colour = f"C{number}"
            axis.plot(*zip(*at, strict=True), marker="o", ms=3, color=colour, label=row["weak"])
            best = row["searched"]["score"]
            if best is not None:
                axis.plot([row["g"]], [best], marker="*", ms=13, color=colour)
        axis.set_xlabel("guidance weight g (1 is none)")
        axis.set_ylabel(said["search"]["metric"])
        axis.set_yscale("log")
        axis.legend(fontsize=8)
        drawing.open_frame(axis)
