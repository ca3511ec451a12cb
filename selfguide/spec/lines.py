"""Lines of telemetry, one a report (`metrics/train-NNNN.jsonl`): which of them tell of the run as it is now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
