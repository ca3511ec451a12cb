"""Print one sample: its shard, shape and statistics; optionally save it as a picture.

WHAT is a key, or `ordinal:N`, the row in the manifest's order, or `position:N`, the position in a run with --seed and
--mode. Latents are drawn channel by channel, with black and white at three standard deviations. With --decode
the autoencoder that encoded them makes images of them; its weights come from --weights, its environment variable
or the local hub cache (tiny has its own).

examples:
  python -m tools.shards inspect data/digits digits-0042 --png 42.png
  python -m tools.shards inspect data/digits position:123456 --seed 1 --json
  python -m tools.shards inspect data/in1k-sd ordinal:7 --png 7.png --weights sd-vae-ft-ema/
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfguide.spec.suggest import nearest
from shards import cli
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.read.blocks import Arrays
from shards.read.reader import Reader
from tools.shards import ordering, picture, report

_TOGETHER = 8  # blocks whose keys are read at a time


def add(parser: argparse.ArgumentParser) -> None:
    report.add_root(parser)
    parser.add_argument("what", metavar="WHAT", help="a key, ordinal:N or position:N")
    ordering.add_order(parser)
    picture.add(parser)


def run(options: argparse.Namespace) -> int:
    path = picture.target_path(options)
    manifest = manifests.load(options.root)
    ordinal = _ordinal(options, manifest)
    found = ordering.read(options.root, manifest, np.array([ordinal]))
    if path:
        picture.save(path, picture.render(options, manifest, found["x"]))
    x = found["x"][0].astype(np.float64)
    facts: dict[str, Any] = {
        **ordering.rows_of(found, None)[0],
        **_class_of(manifest, found),
        "block": ordinal // manifest.block,
        "row": ordinal % manifest.block,
        "shape": [*x.shape],
        "dtype": found["x"].dtype.name,
        "range": [float(x.min()), float(x.max())],
        "mean": float(x.mean()),
        "std": float(x.std()),
        "png": options.png,
    }
    if report.as_json(options, {"root": options.root, **facts}):
        return 0
    for name, value in facts.items():
        if value is not None:
            print(f"{name:8} {value:.6g}" if isinstance(value, float) else f"{name:8} {value}")
    return 0


def _class_of(manifest: Manifest, found: Arrays) -> dict[str, str]:
    """The name of the sample's label, where names are known."""
    if "y" not in found or not manifest.class_names:
        return {}
    return {"class": manifest.class_names[int(found["y"][0])]}


def _ordinal(options: argparse.Namespace, manifest: Manifest) -> int:
    kind, colon, number = options.what.partition(":")
    if not colon or kind not in ("ordinal", "position"):
        return _find(options.root, manifest, options.what)
    if not number.isdecimal():
        raise UserError(f"{options.what}: give a whole number, such as {kind}:12")
    if kind == "position":
        return int(ordering.order_of(options, manifest).ordinals(int(number)))
    if int(number) >= manifest.count:
        raise UserError(f"{options.what}: there are {manifest.count:,} samples, from 0 on")
    return int(number)


def _find(root: str, manifest: Manifest, key: str) -> int:
    """The ordinal of a key; only keys are read."""
    counts: list[str] = []
    similar: list[str] = []
    first = 0
    for keys in keys_of(root, manifest):
        at = np.flatnonzero(keys == key)
        if at.size:
            return first + int(at[0])
        if not counts:
            counts = keys.tolist()
        if key and not similar:
            # the end of a key, or a key with the end of a file's name
            stem = key.rpartition(".")[0] or key
            fits = np.char.endswith(keys, f"/{key}") | np.char.endswith(keys, f"/{stem}")
            similar = keys[fits | (keys == stem)].tolist()[:1]
        first += len(keys)
    hint = f"; did you mean '{similar[0]}'?" if similar else nearest(key, counts)
    raise UserError(
        f"no sample has the key {key!r}{hint}; keys look like {counts[0]!r}, and ordinal:N and "
        "position:N name samples by number"
    )


def keys_of(root: str, manifest: Manifest) -> Iterator[NDArray[np.str_]]:
    """The keys by ordinal, some blocks at a time; of blocks of arrays they alone are read, and checked."""
    starts = range(0, manifest.count, _TOGETHER * manifest.block)
    with closing(Reader(root, manifest)) as reader:
        for start in cli.track(starts, len(starts), "reading keys"):
            ordinals = np.arange(start, min(start + starts.step, manifest.count))
            yield reader.gather(ordinals, fields=("key",))["key"].astype(np.str_)
