"""`python -m tools.sample --grid KEY=A,B,C`: one noise a row, one value a column."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from selfguide.sampling.grid import write_grid
from selfguide.spec.suggest import check_known
from shards.errors import UserError
from tools import flags

KEYS = ("g", "steps", "images", "runs")


def columns(options: argparse.Namespace) -> list[tuple[str, argparse.Namespace]]:
    """Returns the columns that --grid asks for: what each is called, and the options it is drawn by.

    Raises:
        UserError: another key, no values, one that cannot be read or comes twice, or options of other pictures.
    """
    key, equals, listed = options.grid.partition("=")
    check_known("--grid", key, KEYS)
    values = [value for value in listed.split(",") if value] if equals else []
    if len(values) < 2 or len(set(values)) < len(values):
        raise UserError(
            f"--grid {options.grid}: give two values or more, each once, as --grid {key}=A,B"
        )
    for name in ("chain", "npz", "between"):
        if getattr(options, name):
            raise UserError(f"--grid and --{name} are pictures of other kinds: drop one")
    field = {"runs": "run"}.get(key, key)
    if key != "runs" and getattr(options, field) is not None:
        raise UserError(
            f"--grid {options.grid} and --{field}: the grid has its values; drop the flag"
        )
    return [(f"{key}={value}", _with(options, field, value)) for value in values]


def _with(options: argparse.Namespace, field: str, value: str) -> argparse.Namespace:
    changed = copy.copy(options)
    setattr(changed, field, value if field == "run" else _number(field, value))
    return changed


def _number(field: str, value: str) -> float:
    try:
        return flags.finite(value) if field == "g" else int(value)
    except (argparse.ArgumentTypeError, ValueError):
        kind = "numbers" if field == "g" else "whole numbers"
        raise UserError(f"--grid {field}={value}: give {kind}") from None


def write(out: Path, names: Sequence[str], drawn: Sequence[Tensor]) -> dict[str, object]:
    """Writes grid.png and sample.json of columns (N, C, H, W); returns what there is to say.

    Raises:
        UserError: runs whose images have several sizes.
    """
    if len({tuple(each.shape) for each in drawn}) > 1:
        raise UserError(
            f"{', '.join(names)}: their images differ in size; take runs of one data set"
        )
    sheet = torch.stack(list(drawn), 1).flatten(0, 1)
    out.mkdir(parents=True, exist_ok=True)
    zoom = max(1, 64 // sheet.shape[-1])
    write_grid(out / "grid.png", sheet, columns=len(names), zoom=zoom)
    said = {"grid": str(out / "grid.png"), "columns": list(names), "rows": len(drawn[0])}
    (out / "sample.json").write_text(json.dumps(said, indent=1))
    return said
