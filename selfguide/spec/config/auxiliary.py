"""`auxiliary=`: a head at a middle layer that predicts what the whole network does, and is its weak model in sampling.

Internal guidance (Zhou et al. 2025, arXiv 2512.24176): an output layer of its own, trained beside by the same loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from selfguide.spec.architecture import PatchTransformer
from selfguide.spec.config.laws import AtLeast, Positive, ReadWith
from selfguide.spec.config.representation import ComponentSettings
from selfguide.spec.dit import TIME_FREQUENCIES
from shards.errors import UserError

if TYPE_CHECKING:
    from selfguide.spec.architecture import Architecture
    from selfguide.spec.config import Config

_ON = ReadWith("weight=WEIGHT")


@dataclass(frozen=True, kw_only=True)
class AuxiliaryConfig(ComponentSettings):
    """Off without a weight; the source's code weighs the head's loss by 0.5."""

    weight: Annotated[float | None, Positive()] = None
    # counted from 1; None is where the source has it in its largest network, behind 8 of 28 blocks
    layer: Annotated[int | None, AtLeast(1), _ON] = None

    @property
    def on(self) -> bool:
        return self.weight is not None

    def layer_in(self, net: Architecture) -> int:
        """The layer whose tokens the head reads.

        Raises:
            UserError: `net` has no such layer.
        """
        count = len(net.layers)
        wanted = max(1, round(count * 8 / 28)) if self.layer is None else self.layer
        if wanted >= count:
            what = f"is the last of {count} layers, where a head is no weaker than the network"
            beyond = f"is none of this network's 1 to {count}"
            # a network of one layer has no place for a head
            cure = f"auxiliary.layer={count // 2}" if count > 1 else f"model.depth={wanted + 1}"
            raise UserError(
                f"auxiliary.layer={wanted} {what if wanted == count else beyond}; take {cure}"
            )
        return net.layer(wanted, "auxiliary.layer")

    def reads(self, net: Architecture) -> int:
        return self.layer_in(net)

    def check(self, config: Config, net: Architecture) -> None:
        if not isinstance(net, PatchTransformer):
            raise UserError(
                f"auxiliary.weight={self.weight:g} trains a head on the patch tokens of a transformer, and "
                f"model.name={config.model.name!r} is a UNet; take auxiliary.weight=null, or a DiT or U-ViT"
            )
        self.layer_in(net)

    def parameters(self, net: Architecture) -> int:
        assert isinstance(net, PatchTransformer)
        d, out = net.width, net.patch**2 * net.channels
        time = TIME_FREQUENCIES * d + d + d * d + d
        return time + (2 * d * d + 2 * d) + (d * out + out)
