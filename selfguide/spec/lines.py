"""Lines of telemetry, one a report (`metrics/train-NNNN.jsonl`): which of them tell of the run as it is now."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def ascending(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the lines but those whose images a later line has come to again, so that `images` ascend.

    A run trains images again where an attempt goes on from a checkpoint, and where one goes back to it
    (`train.unstable=roll_back`): what was said of them before is of weights that are no more.
    """
    kept = []
    least: float = math.inf
    for line in reversed(lines):
        images = int(line["images"])
        if images < least:
            kept.append(line)
            least = images
    return kept[::-1]


def before(metrics: Path, attempt: int, images: int, count: int) -> list[Mapping[str, Any]]:
    """Returns the last `count` lines up to `images` of the attempts before that one, oldest first.

    What a line has no number for is left out of it, and so are lines that a node has torn as it went down.

    Raises:
        OSError: a file cannot be read.
    """
    files = {_attempt(path): path for path in metrics.glob("train-*.jsonl")}
    found: list[Mapping[str, Any]] = []
    kept: list[Mapping[str, Any]] = []
    # the newest first: a long run has many
    for number in sorted((each for each in files if each < attempt), reverse=True):
        found = ascending([*_whole(files[number]), *found])
        kept = [line for line in found if line["images"] <= images]
        if len(kept) >= count:
            break
    return kept[-count:]


def _attempt(path: Path) -> float:
    """The attempt whose lines a file holds, infinity where its name says none."""
    number = path.stem.removeprefix("train-")
    return int(number) if number.isdecimal() else math.inf


def _whole(path: Path) -> list[Mapping[str, Any]]:
    """The lines of a file that are whole."""
    found: list[Mapping[str, Any]] = []
    for text in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            line = {name: value for name, value in json.loads(text).items() if value is not None}
            line["images"] = int(line["images"])
            found.append(line)
    return found
