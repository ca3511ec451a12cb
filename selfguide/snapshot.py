"""A published snapshot, read: averaged student and buffers, how to draw its conditions, and its config.

A snapshot is all that sampling and evaluation need. `selfguide.training.publish` writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from selfguide.networks.student import Student, build_student
from selfguide.spec.averages import AverageSpec, averages_of
from selfguide.spec.config import Config
from selfguide.spec.corrections import kept_from_before
from selfguide.spec.files import read_config
from selfguide.weights import put
from shards import storage
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests

CONFIG = "config.yaml"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A published student in eval mode, fp32, and what its manifest says."""

    student: Student
    config: Config
    images: int
    guidance: dict[str, Any]
    data: dict[str, Any]
    sha256: str
    average: AverageSpec
    saw_labels: bool  # the weights, or anything that they came from
    origin: Mapping[str, Any]  # where training began; see `selfguide.training.initialise`
    folder: Path | None = None  # where it was read

    @property
    def ema(self) -> int | str:
        """The average as records name it."""
        return self.average.plain

    @property
    def conditioned(self) -> bool:
        """Whether the student was conditioned on anything yet; manifests have it as `told` since the first version."""
        return self.guidance["told"]

    @property
    def never_null(self) -> bool:
        """Whether the student is conditioned, and was never trained without its condition."""
        return self.conditioned and not self.config.trains_null

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels that it was trained on, from 0; empty where they are not known, or it knows no labels.

        Snapshots from before they were kept take them from the data, where these are at hand and still the same.
        """
        if self.guidance["source"] != "labels":
            return ()
        if "class_names" in self.data:
            return tuple(self.data["class_names"])
        try:
            manifest = manifests.load(self.data["root"])
        except (UserError, DamagedError, OSError):
            return ()
        return manifest.class_names if manifest.hash == self.data["manifest"] else ()

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
    for kept in kept_from_before(config):
        log.warning(f"{folder}: {kept}")
    average = averages_of(config)[index]
    student = build_student(config, config.seed)
    put(student, load_file(folder / average.file), str(folder / average.file))
    sha256 = next(f["sha256"] for f in manifest["files"] if f["name"] == average.file)
    student.eval().requires_grad_(False)
    return Snapshot(
        student,
        config,
        manifest["images"],
        manifest["guidance"],
        manifest["data"],
        sha256,
        average,
        manifest["saw_labels"],
        manifest["origin"],
        folder,
    )
