"""Publishes a snapshot: averaged student and buffers as safetensors, how to draw its conditions, and its config.

A snapshot is small and immutable, and its manifest is written last. `selfguide.snapshot` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from selfguide.distributed import RankInfo, on_rank_0
from selfguide.snapshot import CONFIG
from selfguide.spec.config import Config
from selfguide.spec.files import to_yaml
from selfguide.spec.run import Lease
from selfguide.training.state import State
from selfguide.weights import publish_tensors
from shards import storage


def publish(
    folder: Path,
    state: State,
    config: Config,
    data: dict[str, Any],
    rank_info: RankInfo,
    lease: Lease,
) -> None:
    """All ranks call. `data` is the shards' manifest hash and header, which decoding needs.

    A snapshot that is there and does not hold is set aside.

    Raises:
        NoRoomError: the disk is full, or may not be written.
    """
    guidance = state.components.metadata()
    saw_labels = state.origin["saw_labels"] or not guidance["label_free"]
    if on_rank_0(lambda: lease.holds(folder)):
        return
    kept = state.engine.module.state_dict().keys()  # fixed tables, such as positions, are not
    taught = state.teaching if config.guidance.publishes_teacher else None
    held = (taught or state.engine.module).named_buffers()
    buffers = {n: b.detach().cpu().clone() for n, b in held if n in kept}
    fence = lease.fence(folder)

    def write(file: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        tensors = {n: t.detach().cpu().clone() for n, t in weights.items()} | buffers
        return publish_tensors(folder / file, tensors, fence)

    parts = []
    for index, spec in enumerate(state.averages.specs):
        weights = state.averages.weights(index)  # all ranks gather them
        parts.append(on_rank_0(partial(write, spec.file, weights)))

    def finish() -> None:
        storage.publish(folder / CONFIG, to_yaml(config).encode(), replace=True, fence=fence)
        extra = {
            "images": state.images,
            # when its averages began, from which their time is counted
            "ema_since": state.averages.since,
            "guidance": guidance | {"label_free": not saw_labels},
            "data": data,
            "saw_labels": saw_labels,
            "origin": dict(state.origin),
        }
        lease.publish(folder, extra=extra, parts=[storage.describe(folder, CONFIG), *parts])

    on_rank_0(finish)
