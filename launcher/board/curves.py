"""Curves over training as the trainer's metric lines hold them: loss, use of groups, and GPU-hours.

Names are those of the lines; `CURVES` says which the board keeps:

    loss                       training loss, a mean over the reporting window
    used, perplexity, largest  shares of online groups in use and of the largest; exp(entropy) over their number
    churn                      share of images whose group changed
    code_loss                  L_SK of online groups over ln K
    nmi, ari, ami              agreement of groups with labels, where somebody logs it
    gpu_hours                  of training until then, all attempts; GPU-hours, or rank-hours where a run has no GPUs
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.reconcile import parse
from selfguide.spec.lines import ascending
from selfguide.spec.records import LARGEST

CURVES = ("loss", "used", "perplexity", "largest", "churn", "code_loss", "nmi", "ari", "ami")
GPU_HOURS = "gpu_hours"

Curve = tuple[tuple[int, float], ...]
# images and values of one file
Columns = tuple[array, array]


def read_lines(path: str) -> dict[str, Columns]:
    """The curves of one metrics file by name, and `time` (seconds since 1970); one line is read as it is written.

    Images ascend: lines that a run left behind as it went back are not there.

    Raises:
        OSError, ValueError, KeyError, TypeError: it cannot be read, or a line is no report.
    """
    text = parse.content(path).decode()
    # its writer may be in the middle of the last line
    whole = text[: text.rfind("\n") + 1].split("\n")
    lines = json.loads(f"[{','.join(line for line in whole if line)}]")
    if set(map(type, lines)) - {dict}:
        raise TypeError("a line is no object")
    lines = ascending(lines)
    # of ten curves most runs have three
    there = set().union(*lines)
    wanted = (name for name in (*CURVES, "time") if name in there)
    return {name: column for name in wanted if (column := _column(lines, name))[0]}


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> Columns:
    """Images and values of the lines that have a value that is finite, as are sums and axes of such values."""
    having = [line for line in lines if line.get(name) is not None]
    values = array("d", [line[name] for line in having])
    if not sum(map(abs, values)) <= LARGEST:
        having = [line for line in having if abs(line[name]) <= LARGEST]
        values = array("d", [line[name] for line in having])
    return array("q", [int(line["images"]) for line in having]), values


def joined(files: Sequence[Mapping[str, Columns]], name: str) -> Curve:
    """One curve of the files of all attempts, oldest first: what was trained again replaces what was lost."""
    kept: list[tuple[int, float]] = []
    for file in files:
        # of its first line, which may lack this value
        first = min((images[0] for images, _ in file.values()), default=None)
        if kept and first is not None and first <= kept[-1][0]:
            kept = [point for point in kept if point[0] < first]
        if name in file:
            kept.extend(zip(*file[name], strict=True))
    return tuple(kept)


def gpu_hours(file: Mapping[str, Columns], *, began: float, world: int, spent_s: float) -> Columns:
    """GPU-hours of training until each line of an attempt that `began` after `spent_s` GPU-seconds of others."""
    images, times = file["time"]
    hours = ((spent_s + world * max(0.0, time - began)) / 3600 for time in times)
    return images, array("d", hours)
