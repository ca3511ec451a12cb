"""The digits encoded by the command, and what the tiny network itself makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import shards
from selfguide.data.autoencoders import tiny as tiny_module
from selfguide.data.autoencoders.tiny import WEIGHTS, TinyVAE
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.sources.source import ArraySource
from shards.write import writer
from tools.shards import __main__ as command

IMAGES = Header(kind="image", shift=127.5, scale=1 / 127.5)
OWN = Path(tiny_module.__file__).parent / "weights" / WEIGHTS


def encode(root: Path, out: Path, *more: str) -> manifests.Manifest:
    """Of small shards, a block each."""
    words = ["encode", str(root), "--out", str(out), "--encoder", "tiny", "--shard-mb", "0.01"]
    assert command.main([*words, *more]) == 0
    return manifests.load(out)


def tree(root: Path) -> dict[str, bytes]:
    paths = [p for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(root)): p.read_bytes() for p in paths}


def levels(digits: Path) -> torch.Tensor:
    """The digits by ordinal, 0..255."""
    return (torch.from_numpy(shards.read_all(digits)["x"]).float() * (255 / 16)).round().byte()


def moments(images: torch.Tensor) -> np.ndarray:
    """Of the network alone, fed by hand."""
    net = TinyVAE()
    net.load_state_dict(load_file(OWN))
    with torch.no_grad():
        return net.eval().encode(images.float() / 127.5 - 1).numpy()


def images_of(root: Path, shape: tuple[int, ...], header: Header = IMAGES) -> Path:
    writer.write(root, ArraySource.of("x", np.zeros((4, *shape), np.uint8)), header=header)
    return root


def other_weights(path: Path) -> Path:
    """A network that is nearly the same."""
    save_file({n: 1.01 * t for n, t in load_file(OWN).items()}, path)
    return path
