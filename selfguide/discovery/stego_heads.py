"""STEGO's published heads: a Lightning checkpoint's tensors, by the names that its authors' code gives them.

Hamilton et al. 2022 (arXiv 2203.08414), code mhamilton723/STEGO. Beside the head and the cluster probe such a file
holds the frozen DINO, a linear probe that learned from labels and is left where it is, and a configuration of classes
that are never imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from selfguide.discovery.stego import Segmenter, StegoConfig
from selfguide.weights import put, read_weights
from shards.errors import UserError

BACKBONE = "net.model."
# a checkpoint's names -> ours; what else it holds says nothing of the masks
NAMES = {
    "net.cluster1.0.weight": "linear.weight",
    "net.cluster1.0.bias": "linear.bias",
    "net.cluster2.0.weight": "bend.0.weight",
    "net.cluster2.0.bias": "bend.0.bias",
    "net.cluster2.2.weight": "bend.2.weight",
    "net.cluster2.2.bias": "bend.2.bias",
    "cluster_probe.clusters": "centroids",
}


def read_heads(file: Path, net: nn.Module, name: str) -> Segmenter:
    """The head and probe of a published checkpoint, in eval mode on the CPU.

    Args:
        net: the ViT of timm, called `name`, whose features the head is to read.

    Raises:
        UserError: no such file, or one that holds no such head, or whose backbone is another than `net`.
    """
    if not file.is_file():
        raise UserError(f"heads={file}: no such file")
    tensors = read_weights(file, str(file), strangers=True)
    absent = [theirs for theirs in NAMES if theirs not in tensors]
    if absent:
        raise UserError(
            f"{file} lacks {absent[0]}: give a checkpoint of STEGO's authors with a nonlinear head, such as "
            "cocostuff27_vit_base_5.ckpt"
        )
    _refuse_other_backbone(file, tensors, net, name)
    found = {ours: tensors[theirs] for theirs, ours in NAMES.items()}
    groups, width = found["centroids"].shape
    features = found["linear.weight"].shape[1]
    made = Segmenter(features, StegoConfig(groups=groups, width=width))
    put(made, {**found, "idle": made.idle}, str(file))
    return made.eval().requires_grad_(False)


def _refuse_other_backbone(
    file: Path, tensors: Mapping[str, Tensor], net: nn.Module, name: str
) -> None:
    """A head reads features of the net that it was trained on; a checkpoint without one is taken at its word."""
    own = net.state_dict()
    theirs = {n.removeprefix(BACKBONE): t for n, t in tensors.items() if n.startswith(BACKBONE)}
    for part, tensor in theirs.items():
        if part not in own or not torch.equal(own[part].cpu().float(), tensor):
            raise UserError(
                f"{file} was trained on another net than {name}: {part} differs; name the DINO that its file name "
                "says, such as vit_base_patch8_224.dino"
            )
