"""List checkpoints: images seen, attempt, ranks, engine, steps, averages, bytes and pins. Only sizes are checked.

examples:
  python -m tools.checkpoint show runs/in1k_dit/3f2a
  python -m tools.checkpoint show 3f2a --json
  python -m tools.checkpoint show s3://bucket/checkpoints/in1k_dit/3f2a41c09d5e
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from selfguide.spec.retention import pinned
from selfguide.training.checkpoint import averages_in
from selfguide.training.retention import images_of
from shards import storage
from shards.errors import DamagedError, UserError
from shards.storage import Url
from tools.checkpoint import target

_COLUMNS = ("images", "attempt", "ranks", "engine", "steps", "averages", "bytes", "pinned", "state")


def add(parser: argparse.ArgumentParser) -> None:
    target.add(parser, "only the checkpoint at N images seen (default: all)", target.STORED)


def run(options: argparse.Namespace) -> int:
    found = [describe(folder) for folder in target.anywhere(options)]
    if options.json:
        print(json.dumps({"checkpoints": found}))
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column)
    for each in found:
        table.add_row(*(_text(each[column]) for column in _COLUMNS))
    Console().print(table)
    return 0


def describe(folder: Url) -> Mapping[str, Any]:
    """What the manifest of a checkpoint says; None for what it does not know, as earlier manifests do not.

    Raises:
        UserError: it is of something else.
    """
    place, _, name = os.fspath(folder).rpartition("/")
    row: dict[str, Any] = {"checkpoint": name, **dict.fromkeys(_COLUMNS)}
    row |= {"pinned": name in pinned(place), "images": images_of(name)}
    try:
        manifest = storage.read_manifest(folder)
    except DamagedError:
        return row | {"state": "damaged"}
    if manifest is None:
        return row | {"state": target.state_without_manifest(folder)}
    if "ranges" not in manifest:
        raise UserError(
            f"{folder} is no checkpoint, though something was published there; give a run, or one of its checkpoints/"
        )
    keys, _, ranges = averages_in(manifest)
    state = "damaged" if storage.flaws(folder, manifest, "sizes") else "whole"
    if state == "damaged" and storage.read_manifest(folder) is None:
        # by a run that goes on
        return row | {"state": "deleted"}
    return row | {
        "images": manifest["images"],
        "attempt": manifest.get("attempt"),
        "ranks": len(ranges),
        "engine": manifest.get("engine"),
        "steps": manifest["steps"],
        "averages": [*keys],
        "ema_since": manifest["ema_since"],
        "parameters": manifest["total"],
        "bytes": sum(part["bytes"] for part in manifest["files"]),
        "state": state,
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(value) if isinstance(value, list) else str(value)
