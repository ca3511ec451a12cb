"""The board and its runs as JSON holds them: what `--json`, `export` and the server's answers are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from launcher.board.collect import Board, Row, Scored, Table
from launcher.board.others import Other
from launcher.board.read import Run
from launcher.board.states import chips

# of a row, what stands in other places of its JSON
_ELSEWHERE = ("runs", "chips", "expected")


def of_board(board: Board) -> dict[str, Any]:
    """The board in plain values; what a page shows of a run, without its curves."""
    return {
        "heard": board.heard,
        "problems": list(board.problems),
        "tables": [
            {
                "protocol_key": table.key,
                "protocol": dict(table.protocol),
                "metric": table.metric,
                "higher_is_better": table.higher_is_better,
                "rows": [of_row(row) for row in table.rows],
                "others": [of_other(other) for other in table.others],
            }
            for table in board.tables
        ],
        "waiting": [
            {"run": run.id, "experiment": run.experiment, "seed": run.seed} for run in board.waiting
        ],
    }


def of_row(row: Row) -> dict[str, Any]:
    """A row and the score of each of its runs."""
    plain = {
        f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name not in _ELSEWHERE
    }
    return {
        **plain,
        "variant": list(row.variant),
        # 0 stands for what nobody knows
        "error": row.error or None,
        "score": row.score and dataclasses.asdict(row.score),
        "scores": {name: dataclasses.asdict(spread) for name, spread in row.scores.items()},
        "expected": row.expected and dataclasses.asdict(row.expected),
        "states": [chip.label for chip in row.chips],
        "runs": [_of_scored(scored) for scored in row.runs],
    }


def of_other(other: Other) -> dict[str, Any]:
    """Others' samples and their scores."""
    record = other.record
    return {
        "name": record.name,
        "note": record.note,
        "place": other.place,
        "score": other.score,
        "error": other.error or None,
        "scores": dict(record.scores),
        "when": record.when,
        "host": record.host,
        "samples": record.samples,
        "stamp": record.stamp,
    }


def _of_scored(scored: Scored) -> dict[str, Any]:
    head = scored.headline
    return {
        "run": scored.run.id,
        "seed": scored.run.seed,
        "folder": str(scored.run.root),
        "images": head.images if head else None,
        "scores": dict(head.scores) if head else {},
        "snapshot_sha256": head.snapshot_sha256 if head else None,
    }


def of_run(run: Run) -> dict[str, Any]:
    """Everything about one run but its curves and logs."""
    return {
        "run": run.id,
        "experiment": run.experiment,
        "seed": run.seed,
        "folder": str(run.root),
        "states": [{"state": chip.label, "detail": chip.detail} for chip in chips(run)],
        "images": run.images,
        "seen": run.seen,
        "attempts": run.attempts,
        "created": run.created,
        "heard": run.heard,
        "gpu_hours": run.gpu_hours,
        "label_free": run.label_free,
        "snapshots": list(run.published),
        "deleted": [dataclasses.asdict(each) for each in run.deleted],
        "jobs": list(run.jobs),
        "code": run.code and dataclasses.asdict(run.code),
        "expected": [dataclasses.asdict(each) for each in run.expected],
        "lineage": [dataclasses.asdict(each) for each in run.lineage],
        "fronts": [dataclasses.asdict(each) for each in run.fronts],
        "records": [record.plain() for record in run.records],
        "quarantined": list(run.quarantined),
        "identity": dict(run.identity),
    }


def finite(value: Any) -> Any:
    """The value without NaN and infinities, which are no JSON: None stands for them."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat_rows(board: Board) -> list[dict[str, Any]]:
    """A flat mapping for each row, all with the same keys: what a spreadsheet or a data frame takes.

    Others' samples come behind the rows of their table.
    """
    rows = []
    for table in board.tables:
        rows += [_flat(table, row) for row in table.rows]
        rows += [_flat_other(table, other) for other in table.others]
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _flat(table: Table, row: Row) -> dict[str, Any]:
    score: Mapping[str, Any] = dataclasses.asdict(row.score) if row.score else {}
    return {
        "protocol": table.key,
        "metric": table.metric,
        "rank": row.rank,
        "tied": row.tied,
        "experiment": row.experiment,
        "variant": " ".join(row.variant),
        "score": score.get("mean"),
        "sd": score.get("sd"),
        "se": row.error or None,
        "seeds": row.seeds,
        "expected": row.expected.value if row.expected else None,
        "images": row.images,
        "final": row.final,
        "nfe": row.nfe,
        "gpu_hours": row.gpu_hours,
        "seconds": row.seconds,
        "label_free": row.label_free,
        "states": ", ".join(chip.label for chip in row.chips),
        "runs": " ".join(scored.run.id for scored in row.runs),
    } | {f"scores.{name}": spread.mean for name, spread in sorted(row.scores.items())}


def _flat_other(table: Table, other: Other) -> dict[str, Any]:
    return {
        "protocol": table.key,
        "metric": table.metric,
        "experiment": other.name,
        "score": other.score,
        "se": other.error or None,
        "states": "others'",
        "place": other.place,
    } | {f"scores.{name}": value for name, value in sorted(other.scores.items())}
