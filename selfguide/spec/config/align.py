"""`align=`: self-representation alignment (SRA, Jiang et al. 2025, arXiv 2505.02831).

An early layer in more noise learns to say what a later layer of the averaged network says in less: no encoder, and no
label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from selfguide.spec.config.laws import AtLeast, Images, Positive, ReadWith, Within
from selfguide.spec.config.representation import ComponentSettings
from shards.errors import UserError

if TYPE_CHECKING:
    from selfguide.spec.architecture import Architecture
    from selfguide.spec.config import Config

_ON = ReadWith("weight=WEIGHT")


@dataclass(frozen=True, kw_only=True)
class AlignConfig(ComponentSettings):
    """Off without a weight; the source begins with 0.2 and lowers it late in training, which we leave out."""

    weight: Annotated[float | None, Positive()] = None
    # counted from 1; None are the source's, behind 8 and 20 of 28 blocks
    layer: Annotated[int | None, AtLeast(1), _ON] = None
    teacher_layer: Annotated[int | None, AtLeast(1), _ON] = None
    # the teacher's noise-time is the step's less as much at most, and never below the path's end (their t_max)
    noise_gap: Annotated[float, Within(0.0, 1.0), _ON] = 0.2
    # where nothing else refreshes the teacher: images between refreshes from the averages
    teacher_refresh: Annotated[int, Images(), _ON] = 1024

    wants_teacher: ClassVar[bool] = True

    @property
    def on(self) -> bool:
        return self.weight is not None

    def layers_in(self, net: Architecture) -> tuple[int, int]:
        """The student's and the teacher's layer.

        Raises:
            UserError: `net` has no such layer.
        """
        count = len(net.layers)
        found = []
        for name, given, share in (
            ("layer", self.layer, 8 / 28),
            ("teacher_layer", self.teacher_layer, 20 / 28),
        ):
            wanted = max(1, round(count * share)) if given is None else given
            if name == "layer" and wanted >= count > 1:
                raise UserError(
                    f"align.layer={wanted} is none of this network's {count} layers that another follows, from which "
                    f"it would learn; take align.layer={max(1, round(count * share))}"
                )
            found.append(net.layer(wanted, f"align.{name}"))
        return found[0], found[1]

    def reads(self, net: Architecture) -> int:
        return self.layers_in(net)[0]

    def check(self, config: Config, net: Architecture) -> None:
        layer, teacher = self.layers_in(net)
        if len(net.layers) == 1:
            raise UserError(
                f"align.weight={self.weight:g} needs a layer that follows another, and this network has one; take "
                "model.depth=3"
            )
        if teacher <= layer:
            raise UserError(
                f"align.teacher_layer={teacher} is no later than align.layer={layer}: the student learns from what "
                f"lies behind it; take align.teacher_layer={min(layer + 1, len(net.layers))} or later"
            )
        own, its = net.layers[layer - 1], net.layers[teacher - 1]
        if (own.tokens, own.extras) != (its.tokens, its.extras):
            raise UserError(
                f"align.layer={layer} ({own.name}) has {own.tokens} tokens and align.teacher_layer={teacher} "
                f"({its.name}) {its.tokens}: tokens are aligned one by one; take layers of one grid"
            )
        if config.guidance.learns_online or config.contrastive.on:
            self._check_unread(config)
        elif self.teacher_refresh % config.train.batch:
            raise UserError(
                f"align.teacher_refresh={self.teacher_refresh} counts images and must be a multiple of "
                f"train.batch={config.train.batch}; take align.teacher_refresh={config.train.batch}"
            )

    def _check_unread(self, config: Config) -> None:
        """Raises UserError where another component refreshes the one teacher, and a cadence is asked for here."""
        if self.teacher_refresh == AlignConfig.teacher_refresh:
            return
        refreshed = (
            f"contrastive.weight={config.contrastive.weight} refreshes the teacher at every step"
        )
        if config.guidance.learns_online:
            refreshed = "guidance.source=online refreshes the teacher, by guidance.teacher_refresh"
        raise UserError(
            f"align.teacher_refresh={self.teacher_refresh} is not read: {refreshed}; leave it out, which is "
            f"align.teacher_refresh={AlignConfig.teacher_refresh}"
        )

    def parameters(self, net: Architecture) -> int:
        layer, teacher = self.layers_in(net)
        width, out = net.layers[layer - 1].width, net.layers[teacher - 1].width
        hidden = width + out
        return (width * hidden + hidden) + (hidden * out + out)
