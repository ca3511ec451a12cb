"""What verbs share that depend on the order of samples: its options, and samples by position."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.format.manifest import Manifest
from shards.format.order import WINDOW, Order
from shards.read.blocks import Arrays
from shards.read.reader import Reader
from tools import flags


def add_order(parser: argparse.ArgumentParser) -> None:
    """The flags that fix the order of samples in a run; `order_of` reads them."""
    flags.add(
        parser,
        ("--seed", int, 0, "seed of the run (default 0)"),
        ("--mode", ("window", "global"), "window", "data.mode of the run (default window)"),
        ("--window", int, WINDOW, f"blocks in a window (default {WINDOW})"),
    )


def order_of(options: argparse.Namespace, manifest: Manifest) -> Order:
    """The order of a run with these flags over this data set."""
    return Order(
        count=manifest.count,
        seed=options.seed,
        mode=options.mode,
        block=manifest.block,
        window=options.window,
    )


def read(root: str, manifest: Manifest, ordinals: NDArray[np.int64]) -> Arrays:
    """The samples, and `shard` (n,): the names of the tars they lie in."""
    with closing(Reader(root, manifest)) as reader:
        found = reader.gather(ordinals)
    shards = manifest.shards_of(ordinals)
    return {**found, "shard": np.array([manifest.shards[s].name for s in shards])}


def rows_of(found: Arrays, positions: NDArray[np.int64] | None) -> list[dict[str, object]]:
    """One plain row a sample."""
    names = [n for n in ("key", "ordinal", "shard", "y") if n in found]
    columns: dict[str, list] = {n: found[n].tolist() for n in names}
    if positions is not None:
        columns = {"position": positions.tolist(), **columns}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def png(path: str) -> Path:
    """A path that can be written to, before any work is done for it."""
    found = Path(path)
    if found.suffix.lower() != ".png":
        raise UserError(f"--png {path}: give a name that ends in .png")
    if not found.parent.is_dir():
        raise UserError(f"--png {path}: there is no folder {found.parent}; make it first")
    return found
