"""A checkpoint read whole on one machine, without an engine: its fp32 weights, averages and buffers by name."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from selfguide.networks.student import build_student
from selfguide.spec.averages import AverageSpec
from selfguide.spec.files import read_config
from selfguide.spec.run import RunFolder
from selfguide.training.checkpoint import REPLICATED, averages_in, read_vectors
from selfguide.training.engine.build import layout_of
from selfguide.training.engine.layout import Layout, Owned, ParameterSpace
from shards import storage
from shards.errors import DamagedError, UserError

# the vector of the fp32 weights that the optimiser steps
MASTER = "master"


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's folder holds; tensors are read when they are asked for."""

    folder: Path
    manifest: Mapping[str, Any]
    layout: Layout
    # buffers that a state_dict holds
    persistent: frozenset[str]

    @property
    def averages(self) -> tuple[AverageSpec, ...]:
        keys, _, _ = averages_in(self.manifest)
        return tuple(AverageSpec.of(key) for key in keys)

    def weights(self, average: AverageSpec | None = None) -> dict[str, Tensor]:
        """Full fp32 weights by name, of an average or, without one, of the optimiser, and the persistent buffers.

        Raises:
            UserError: there is no such average in it, or it has been deleted since it was opened.
        """
        keys, names, ranges = averages_in(self.manifest)
        vector = MASTER
        if average is not None:
            if average.key not in keys:
                raise UserError(f"{self.folder} holds no average {average.key}: {', '.join(keys)}")
            vector = names[keys.index(average.key)]
        full = torch.empty(self.layout.total)
        space = ParameterSpace(self.layout, [Owned(0, self.layout.total, full)], replicated=True)
        try:
            read_vectors(self.folder, ranges, {vector: (full,)}, space)
            with safe_open(self.folder / REPLICATED, framework="pt") as file:
                kept = sorted(self.persistent)
                buffers = {name: file.get_tensor(f"buffer.{name}") for name in kept}
        except FileNotFoundError as error:
            raise deleted(self.folder) from error
        return self.layout.split(full) | buffers


def open_checkpoint(folder: Path) -> Stored:
    """The checkpoint in `folder`, whose bytes are verified.

    Raises:
        UserError: there is no complete checkpoint, or it was deleted meanwhile.
        DamagedError: a part of it is not what was written.
    """
    manifest = storage.read_manifest(folder)
    if manifest is None or "ranges" not in manifest:
        raise UserError(f"{folder} is no complete checkpoint; `show` lists those of a run")
    if flaws := storage.flaws(folder, manifest, "hashes"):
        # the manifest is the first that retention deletes
        if storage.read_manifest(folder) is None:
            raise deleted(folder)
        raise DamagedError(f"{folder} is damaged: {'; '.join(map(str, flaws))}")
    if "shapes" in manifest:
        layout = Layout.of_shapes(manifest["names"], manifest["shapes"])
        return Stored(folder, manifest, layout, frozenset(manifest["persistent"]))
    # an earlier one says neither shapes nor which buffers are kept, so its model is built
    run = RunFolder(folder.resolve().parent.parent)
    config = read_config(run.attempt(manifest["attempt"]) / "config.yaml")
    student = build_student(config, config.seed)
    buffers = {name for name, _ in student.named_buffers()} & student.state_dict().keys()
    return Stored(folder, manifest, layout_of(config, student), frozenset(buffers))


def deleted(folder: Path, kind: str = "checkpoint") -> UserError:
    """What is said of a checkpoint, or another `kind` of folder, that retention deleted while it was read."""
    what = "" if kind == "checkpoint" else f" --{kind}"
    return UserError(
        f"{folder} was deleted while it was read: the run trains on, and its retention keeps the newest. Pin one first "
        f"(python -m tools.checkpoint pin {shlex.quote(str(folder.parent.parent))}{what} --images N), and take that by "
        "--images N"
    )
