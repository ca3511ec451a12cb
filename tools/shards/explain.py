"""List the samples that a run saw just before --images; they are computed from seed and order, not logged.

If the loss of a run jumps at image N, this shows the samples of the batch that ends there.

examples:
  python -m tools.shards explain data/digits --images 40960 --batch 64 --seed 0
  python -m tools.shards explain s3://bucket/latents --images 1e6 --batch 256 --png batch.png --json
"""

from __future__ import annotations

import argparse

import numpy as np

from shards import cli
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.read.stream import LAST
from tools import flags
from tools.shards import ordering, picture, report


def add(parser: argparse.ArgumentParser) -> None:
    report.add_root(parser)
    flags.add(
        parser,
        ("--images N", float, flags.REQUIRED, "images seen, as in the logs"),
        ("--batch B", int, 16, "list positions N - B to N - 1 (default 16)"),
    )
    ordering.add_order(parser)
    picture.add(parser)


def run(options: argparse.Namespace) -> int:
    images, batch = options.images, options.batch
    if not (1 <= images <= LAST and images == int(images)):
        raise UserError(f"--images {images:g}: give a whole number of at least 1, and at most 1e18")
    if batch < 1:
        raise UserError(f"--batch {batch}: give at least 1")
    path = picture.target_path(options)
    manifest = manifests.load(options.root)
    order = ordering.order_of(options, manifest)
    positions = np.arange(max(0, int(images) - batch), int(images))
    found = ordering.read(options.root, manifest, order.ordinals(positions))
    if path:
        picture.save(path, picture.render(options, manifest, found["x"]))
    rows = ordering.rows_of(found, positions)
    first = {"epoch": int(positions[0]) // manifest.count, "manifest": manifest.hash}
    if report.as_json(options, {"root": options.root, **first, "samples": rows}):
        return 0
    from rich.table import Table

    last = int(positions[-1]) // manifest.count
    epochs = f"epoch {last}" if last == first["epoch"] else f"epochs {first['epoch']} to {last}"
    table = Table(title=f"{epochs}, seed {options.seed}, {options.mode}")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("key", "shard") else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    cli.console().print(table)
    return 0
