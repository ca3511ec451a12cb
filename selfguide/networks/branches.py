"""From the settings of a run to the branches of its network. A component that trains one registers it here."""

from __future__ import annotations

from selfguide.networks import auxiliary, projector
from selfguide.networks.branch import Branch
from selfguide.networks.contrastive_head import ContrastiveHead
from selfguide.spec.architecture import Architecture, PatchTransformer
from selfguide.spec.config import Config


def build_branches(config: Config, net: Architecture) -> dict[str, Branch]:
    """The branches beside the backbone `net`, by the name of the component that trains each."""
    found: dict[str, Branch] = {}
    if config.auxiliary.on:
        assert isinstance(net, PatchTransformer)
        found[auxiliary.NAME] = auxiliary.AuxiliaryHead(net, config.auxiliary.layer_in(net))
    if config.align.on:
        layer, teacher = config.align.layers_in(net)
        width, out = net.layers[layer - 1].width, net.layers[teacher - 1].width
        found[projector.NAME] = projector.Projector(layer, teacher, width, out)
    if config.contrastive.on:
        found["contrastive"] = ContrastiveHead(config.contrastive, net)
    return found
