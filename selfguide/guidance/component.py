"""What a training component is: a guidance source, a contrastive loss, an auxiliary head.

The loop knows components by these hooks alone. Each has a default that does nothing, and every rank calls every hook
equally often, so that a hook may hold collectives. Components see only this module and what lies below it: how weights
are sharded, averaged and stored is the business of `selfguide.training`, which hands them `Weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.diffusion.conditions import Condition
from selfguide.networks.student import Outputs, Student


@dataclass(frozen=True)
class Inputs:
    """What the student reads of a batch beside the noised images.

    `features` (rows, F) are read by the online head; None lets it read the training view.
    """

    condition: Condition
    features: Tensor | None = None


@dataclass(frozen=True)
class Stepped:
    """An optimiser step, as hooks see it."""

    applied: Tensor  # bool scalar on the device; false where gradients were not finite
    images: int  # seen by the run, this step's included
    batch: int  # images of the step


class Weights(Protocol):
    """The student's weights and their copies, as far as components may change them; all ranks call each method."""

    def normalise_rows(self, name: str, applied: Tensor) -> None:
        """Rows of the parameter `name` (K, P) become unit vectors, in the masters; nothing where not `applied`."""

    def replace_rows(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Rows (n,) of the parameter `name` (K, P) become `values` (n, P): in masters, averages and the teacher.

        The optimiser forgets their moments. `rows` and `values` are on the device, and alike on all ranks.
        """

    def restart_averages(self, images: int) -> None:
        """Every average becomes the live weights, and its history begins at `images`."""

    def refresh_teacher(self, *, buffers: bool) -> None:
        """The teacher takes the weights of the first average and, with `buffers`, the student's buffers."""


class Component:
    """One training component; override the hooks that it needs."""

    name: ClassVar[str]  # in the names of its scalars and of its state
    wants_teacher: ClassVar[bool] = False  # a teacher exists where a component asks for one

    def augment(self, x0: Tensor, position: Tensor) -> Tensor:
        """What to train on instead of the images (B, C, H, W) at `position` (B,) of the run, before they are noised.

        A pure function of both and of the seed, so that `condition` can say what was done.
        """
        return x0

    def condition(self, batch: Batch, teacher: Student | None, inputs: Inputs) -> Inputs:
        """The inputs of a step, made from those that the components before this one made; at first unconditional."""
        return inputs

    def loss(self, outputs: Outputs, batch: Batch, teacher: Student | None) -> Tensor | None:
        """The component's own objective of a batch, a weighted scalar, or None.

        Of a micro-batch, or with online guidance of all images that share statistics, in how many micro-batches so ever
        they come; then `outputs.prediction` is of the last of these.
        """
        return None

    def own_loss(self, outputs: Outputs, batch: Batch, teacher: Student | None) -> Tensor | None:
        """An objective of each micro-batch by itself, a weighted scalar, or None; `outputs` and `batch` are its own."""
        return None

    def after_step(self, weights: Weights, step: Stepped) -> None:
        """Between an optimiser step and its averages. Must change nothing where `step.applied` is false."""

    def after_average(self, weights: Weights, step: Stepped) -> None:
        """After the averages took the step in. Whatever depends on the step's gradients asks for `step.applied`."""

    def report(self, images: int, teacher: Student | None) -> dict[str, float]:
        """Scalars for the line of telemetry at so many images; what they count begins anew."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the weights, whole on rank 0."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], rank: int) -> None:
        """Takes from a `state_dict` what rank `rank` is to have of it, whatever the world size then and now."""

    def metadata(self) -> dict[str, Any]:
        """JSON for the snapshot: how to sample conditions, and `label_free`: whether nothing here saw labels."""
        return {}
