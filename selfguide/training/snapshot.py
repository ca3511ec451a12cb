"""Published weights: averaged student and buffers as safetensors, how to draw its conditions, and its config.

A snapshot is all that sampling and evaluation need; it is small, immutable, and its manifest is written last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from selfguide.distributed import Place, decided_by_rank_0
from selfguide.spec.config import Config
from selfguide.spec.files import read_config, to_yaml
from selfguide.spec.run import Lease
from selfguide.student import Student, build_student
from selfguide.training.checkpoint import State
from selfguide.weights import put
from shards import storage

CONFIG = "config.yaml"


def ema_file(halflife: int) -> str:
    return f"ema-{halflife}.safetensors"


def publish(
    folder: Path, state: State, config: Config, data: dict[str, Any], place: Place, lease: Lease
) -> None:
    """All ranks call. `data` is the shards' manifest hash and header, which decoding needs."""
    lease.check()
    guidance = state.source.state()
    saw_labels = state.origin["saw_labels"] or not guidance["label_free"]
    if decided_by_rank_0(storage.read_complete(folder, verify="sizes") is not None):
        return
    kept = state.engine.module.state_dict().keys()  # fixed tables, such as positions, are not
    buffers = {
        n: b.detach().cpu().clone() for n, b in state.engine.module.named_buffers() if n in kept
    }
    for index, halflife in enumerate(state.averages.halflives):
        weights = state.averages.weights(index)
        if place.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {n: t.detach().cpu().clone() for n, t in weights.items()} | buffers
            save_file(tensors, folder / ema_file(halflife))
    if place.rank == 0:
        (folder / CONFIG).write_text(to_yaml(config))
        lease.check()
        extra = {
            "images": state.images,
            "guidance": guidance | {"label_free": not saw_labels},
            "data": data,
            "saw_labels": saw_labels,
            "origin": dict(state.origin),
        }
        storage.publish_folder(folder, extra=extra)
    dist.barrier()


@dataclass(frozen=True)
class Snapshot:
    """A published student in eval mode, fp32, and what its manifest says."""

    student: Student
    config: Config
    images: int
    guidance: dict[str, Any]
    data: dict[str, Any]
    sha256: str
    ema: int
    saw_labels: bool  # the weights, or anything that they came from
    origin: Mapping[str, Any]  # where training began; see `selfguide.initialise`

    @property
    def device(self) -> torch.device:
        """Where the student is: on the CPU until its user moves it."""
        return next(self.student.parameters()).device


def load(folder: Path, index: int = 0) -> Snapshot:
    """The snapshot with average `index`.

    Raises:
        FileNotFoundError: the folder's manifest is missing or does not hold.
        UserError: its weights are not those of its config, or not finite.
    """
    manifest = storage.read_complete(folder, verify="hashes")
    if manifest is None:
        raise FileNotFoundError(f"{folder} is not a complete snapshot")
    config = read_config(folder / CONFIG)
    halflife = config.train.ema_halflife[index]
    student = build_student(config, config.seed)
    put(student, load_file(folder / ema_file(halflife)), str(folder / ema_file(halflife)))
    sha256 = next(f["sha256"] for f in manifest["files"] if f["name"] == ema_file(halflife))
    student.eval().requires_grad_(False)
    return Snapshot(
        student,
        config,
        manifest["images"],
        manifest["guidance"],
        manifest["data"],
        sha256,
        halflife,
        manifest["saw_labels"],
        manifest["origin"],
    )
