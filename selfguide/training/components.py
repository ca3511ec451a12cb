"""The components of a run as one: they make one input of a step and one sum of losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.diffusion.conditions import Condition
from selfguide.guidance.component import Component, Inputs, Stepped, Weights
from selfguide.networks.student import Outputs, Student

# of a run without guidance
UNCONDITIONAL = {"source": "none", "told": False, "p": None}


class Components(tuple[Component, ...]):
    """In the order in which they make a step's inputs. See `Component` for what each hook means."""

    @property
    def want_teacher(self) -> bool:
        return any(component.wants_teacher for component in self)

    def augment(self, x0: Tensor, position: Tensor) -> Tensor:
        for component in self:
            x0 = component.augment(x0, position)
        return x0

    def inputs(self, batch: Batch, teacher: Student | None) -> Inputs:
        """What all of them together give the student to read."""
        inputs = Inputs(Condition.unconditional(len(batch.x0), batch.x0.device))
        for component in self:
            inputs = component.condition(batch, teacher, inputs)
        return inputs

    def losses(self, outputs: Outputs, batch: Batch, teacher: Student | None) -> dict[str, Tensor]:
        """The objectives of images that share statistics, by the name that telemetry gives them."""
        return _named({c.name: c.loss(outputs, batch, teacher) for c in self})

    def own_losses(
        self, outputs: Outputs, batch: Batch, teacher: Student | None
    ) -> dict[str, Tensor]:
        """The objectives of one micro-batch, likewise."""
        return _named({c.name: c.own_loss(outputs, batch, teacher) for c in self})

    def after_step(self, weights: Weights, step: Stepped) -> None:
        for component in self:
            component.after_step(weights, step)

    def after_average(self, weights: Weights, step: Stepped) -> None:
        for component in self:
            component.after_average(weights, step)

    def report(self, images: int, teacher: Student | None) -> dict[str, float]:
        found: dict[str, float] = {}
        for component in self:
            found |= component.report(images, teacher)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{_prefix(component)}{key}": value
            for component in self
            for key, value in component.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], rank: int) -> None:
        """From a checkpoint's tensors, among which there may be others."""
        for component in self:
            prefix = _prefix(component)
            mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            component.load_state_dict(mine, rank)

    def metadata(self) -> dict[str, Any]:
        """For the snapshot; label-free is what all of them are."""
        found: dict[str, Any] = {}
        label_free = True
        for component in self:
            theirs = component.metadata()
            label_free = label_free and theirs.get("label_free", True)
            found |= theirs
        return ({} if "source" in found else UNCONDITIONAL) | found | {"label_free": label_free}


def _named(losses: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {f"{name}_loss": loss for name, loss in losses.items() if loss is not None}


def _prefix(component: Component) -> str:
    """Of its tensors in a checkpoint, where guidance has had this one since the first."""
    return "source." if component.name == "guidance" else f"component.{component.name}."
