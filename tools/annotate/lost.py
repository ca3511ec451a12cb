"""One box an image around its object, by LOST (Simeoni et al. 2021) over a frozen ViT's keys.

The net sees images in their own size; small ones want --short 224 or more, since a box is made of whole patches. A
picture, box.png, shows 32 images with their boxes: look at it. What is done is kept: a killed command goes on.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageDraw
from torch import Tensor

from selfguide.discovery.lost import K_PATCHES, in_pixels, lost_boxes
from selfguide.discovery.resumable import REPORT, Rows, Work
from shards import sidecar
from shards.errors import UserError
from tools import flags
from tools.annotate import layouts
from tools.annotate.begun import as_begun
from tools.annotate.layouts import Looked

DEGENERATE = 0.5  # share of boxes that say nothing above which the command speaks up


def add(parser: argparse.ArgumentParser) -> None:
    layouts.add_net(parser, "its own")
    text = f"patches of the lowest degree that may join the seed ({K_PATCHES})"
    flags.add(parser, ("--k-patches N", int, K_PATCHES, text))


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    target = Path(options.out)
    sidecar.refuse_taken(target, {sidecar.ROWS, "box.png"})
    flags.check_least(options, 1, "k_patches")
    looked = layouts.look(options, None)
    size = looked.size
    seen = looked.seen(looked.images(np.arange(1))).shape[-2:]
    patch = looked.vit.patch * size[0] / seen[0]  # in pixels of the image

    def provenance(looked: Looked) -> dict[str, Any]:
        made = {"k_patches": options.k_patches, "image": list(size)}
        return {"method": "LOST", **looked.provenance, **made}

    def work_of(looked: Looked) -> Work:
        return Work(target, looked.manifest.hash, provenance(looked))

    looked = as_begun(looked, looked.before(options), lambda one: work_of(one).begun, provenance)
    work = work_of(looked)

    def boxes(ordinals: NDArray[np.int64]) -> Tensor:
        keys = looked.vit.keys(looked.seen(looked.images(ordinals)))  # (B, D, h, w)
        if not keys.isfinite().all():
            raise UserError(
                f"{options.vit} gives keys that are NaN or infinite; take other weights"
            )
        grid = (keys.shape[-2], keys.shape[-1])
        found = lost_boxes(keys.flatten(2).mT, grid, k_patches=options.k_patches)
        return in_pixels(found, patch, size)

    rows = layouts.fill(
        work, "rows", looked.manifest.count, boxes, np.int32, batch=options.batch, doing="boxes"
    )
    made = layouts.publish(looked, work, rows, draw, partial(report, patch, size), kind="box")
    facts = made.provenance[REPORT]
    text = (
        f"{made.count:,} boxes; mean area {facts['mean_area']:.1%} of the image, {facts['one_patch']:.1%} are one "
        f"patch, {facts['whole']:.1%} the whole image\n{made.folder / 'box.png'} shows {layouts.PICTURED}"
    )
    if facts["one_patch"] + facts["whole"] > DEGENERATE:
        text += (
            "\nmost boxes say nothing: take --short 224 or more for small images, or DINO's weights"
        )
    return {"out": str(made.folder), "count": made.count, **facts}, text


def draw(images: Tensor, boxes: NDArray[np.generic], file: Path) -> None:
    """Each image with its box."""
    pictures, zoom = layouts.tiles(images)
    for picture, (top, left, bottom, right) in zip(pictures, boxes, strict=True):
        edges = (left * zoom, top * zoom, right * zoom - 1, bottom * zoom - 1)
        ImageDraw.Draw(picture).rectangle(edges, outline="red", width=2)
    layouts.sheet(pictures, file)


def report(patch: float, size: tuple[int, int], rows: Rows) -> dict[str, float]:
    """Shares of boxes that say nothing, and the mean area as a share of the image."""
    boxes = torch.from_numpy(np.concatenate(list(rows))).long()
    heights, widths = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    one = (heights <= np.ceil(patch)) & (widths <= np.ceil(patch))
    whole = (heights == size[0]) & (widths == size[1])
    return {
        "one_patch": float(one.double().mean()),
        "whole": float(whole.double().mean()),
        "mean_area": float((heights * widths).double().mean()) / (size[0] * size[1]),
    }
