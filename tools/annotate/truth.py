"""What people annotated in VOC and COCO as a sidecar: the baselines with human labels, boxes and masks (SGDM).

  --kind labels   the classes present in an image, several at once
  --kind box      one box: that of the largest object, by what of it is seen in the stored image
  --kind mask     the class of each pixel; pixels that nobody named take that of the nearest named one

Shards are those of `tools.shards make` with --size, whose centre crops boxes and masks are moved to; images are found
by their keys. Every sidecar says saw_labels, and so do snapshots, records and the board of runs conditioned on it.

examples:
  python -m tools.annotate truth data/voc-64 voc VOC2012 --kind labels --out notes/voc-truth-labels
  python -m tools.annotate truth data/coco20k-64 coco coco --split train2014 --kind box --out notes/coco20k-truth-boxes
  python -m tools.annotate truth data/coco-stuff-64 cocostuff27 coco --kind mask --out notes/stuff-truth-masks
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from selfguide.data.autoencoders import to_images
from selfguide.data.normaliser import Normaliser
from shards import sidecar
from shards.cli import track
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.pictures import window
from shards.read.reader import Reader
from tools import flags
from tools.annotate import lost, stego
from tools.annotate.layouts import PICTURED
from tools.annotate.people import VOID, Coco, Objects, Stuff, Voc

DATA, KINDS = ("voc", "coco", "cocostuff27"), ("labels", "box", "mask")
# what a data set has no annotation of
_LACKS = {("coco", "mask"): "cocostuff27 has masks", ("cocostuff27", "box"): "coco has boxes"}


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("data", DATA, None, f"whose annotations: {', '.join(DATA)}"),
        ("folder DIR", str, None, "VOCdevkit/VOC2012, or the folder that holds COCO's annotations"),
        ("--kind", KINDS, flags.REQUIRED, "what of them"),
        ("--split NAME", str, "train2017", "of COCO (train2017)"),
        ("--masks NAME", str, None, "folder of VOC's masks, such as SBD's (SegmentationClass)"),
        flags.OUT,
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    kind, target = options.kind, Path(options.out)
    if why := _LACKS.get((options.data, kind)):
        raise UserError(f"--kind {kind}: {options.data} has none; {why}")
    if options.masks is not None and (options.data, kind) != ("voc", "mask"):
        raise UserError(f"--masks {options.masks} is of VOC's masks alone; leave it out")
    manifest = manifests.load(options.root)
    _check_square(options.root, manifest)
    picture = {"box": "box.png", "mask": "mask.png"}.get(kind)
    sidecar.refuse_taken(target, {sidecar.ROWS, *([picture] if picture else [])})
    source, size = _source(options), manifest.shape[-1]
    chosen = np.unique(np.linspace(0, manifest.count - 1, PICTURED, dtype=np.int64))
    with closing(Reader(options.root, manifest)) as reader:
        keys = reader.gather(np.arange(manifest.count), fields=("key",))["key"].tolist()
        stored = torch.from_numpy(reader.gather(chosen, fields=("x",))["x"])
    names = [PurePosixPath(key).name.partition(".")[0] for key in keys]
    shown = list(track(names, len(names), f"{kind} of {len(names):,} images"))
    report: dict[str, float] = {}
    rows: NDArray[Any]
    groups: int | None
    if kind == "labels":
        rows, groups = labels(source, shown), len(source.classes)
        report["per_image"] = float(rows.sum(1).mean())
    elif kind == "box":
        rows, without = boxes(source, shown, size)
        groups = None
        report["without_object"] = without / len(rows)
    else:
        assert not isinstance(source, Coco)
        rows, groups = masks(source, shown, size), len(source.segments)
    target.mkdir(parents=True, exist_ok=True)
    if picture:
        header = Normaliser.of(manifest.header)
        images = to_images(header.header, header.encode(stored))
        if groups is None:
            lost.draw(images, rows[chosen], target / picture)
        else:
            stego.draw(groups, images, rows[chosen], target / picture)
    made = sidecar.write(
        target,
        rows,
        manifest=manifest.hash,
        kind="multi_hot" if kind == "labels" else kind,
        groups=groups,
        provenance={
            "method": "truth",
            "data": options.data,
            "classes": list(source.classes if kind != "mask" else source.segments),  # type: ignore[union-attr]
            "image": [size, size],
            "report": report,
            "saw_labels": True,
        },
        attached=(picture,) if picture else (),
    )
    facts = {"out": str(made.folder), "kind": made.kind, "count": made.count, "groups": groups}
    said = "".join(f", {name} {value:.3g}" for name, value in report.items())
    return {**facts, **report}, f"{made.count:,} rows of kind {made.kind}{said}\n{made.folder}"


def _source(options: argparse.Namespace) -> Voc | Coco | Stuff:
    root = Path(options.folder)
    if options.data == "voc":
        return Voc(root, options.masks or "SegmentationClass")
    return (Coco if options.data == "coco" else Stuff)(root, options.split)


def _check_square(root: str, manifest: manifests.Manifest) -> None:
    """
    Raises:
        UserError: shards of latents, or of images that are no centre crops.
    """
    if manifest.header["kind"] == "latent":
        raise UserError(
            f"{root} holds latents, and annotations lie on pixels: annotate the shards of their images, and take them "
            "over with `python -m tools.annotate adopt`"
        )
    if manifest.shape[-1] != manifest.shape[-2]:
        raise UserError(
            f"{root} holds images of {manifest.shape[-2:]}, and annotations are moved to square centre crops: make the "
            "shards with --size"
        )


def labels(source: Voc | Coco | Stuff, names: Sequence[str]) -> NDArray[np.uint8]:
    """(N, K) of 0 and 1: the classes of objects in each whole image, of COCO-Stuff those of its pixels."""
    rows = np.zeros((len(names), len(source.classes)), dtype=np.uint8)
    for row, name in zip(rows, names, strict=True):
        if isinstance(source, Stuff):
            present = np.unique(source.mask(name))
            row[present[present != VOID]] = 1
        else:
            row[[number for number, _ in source.objects(name).things]] = 1
    return rows


def boxes(
    source: Voc | Coco | Stuff, names: Sequence[str], size: int
) -> tuple[NDArray[np.int32], int]:
    """(N, 4) boxes of top, left, bottom, right in pixels of the stored image, and how many images show no object.

    Such an image has the box of all of it.
    """
    assert not isinstance(source, Stuff)
    rows = np.empty((len(names), 4), dtype=np.int32)
    without = 0
    for row, name in zip(rows, names, strict=True):
        found = largest(source.objects(name), size)
        without += found is None
        row[:] = found or (0, 0, size, size)
    return rows, without


def largest(found: Objects, size: int) -> tuple[int, int, int, int] | None:
    """The box of the object that covers most of the stored image; None where that shows none."""
    at = window(*found.size, size)
    across, down = at.width / found.size[0], at.height / found.size[1]
    best: tuple[int, int, int, int] | None = None
    most = 0
    for _, (left, top, right, bottom) in found.things:
        ends = (
            *(_pixel(top * down - at.top, size), _pixel(left * across - at.left, size)),
            *(_pixel(bottom * down - at.top, size), _pixel(right * across - at.left, size)),
        )
        area = (ends[2] - ends[0]) * (ends[3] - ends[1])
        if area > most:
            best, most = ends, area
    return best


def _pixel(edge: float, size: int) -> int:
    """The nearest edge between pixels of the stored image."""
    return min(max(round(edge), 0), size)


def masks(source: Voc | Stuff, names: Sequence[str], size: int) -> NDArray[np.uint8]:
    """(N, size, size) the class at the centre of each pixel of the stored image."""
    rows = np.empty((len(names), size, size), dtype=np.uint8)
    for row, name in zip(rows, names, strict=True):
        row[:] = named(cut(source.mask(name), size), name)
    return rows


def cut(mask: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(size, size) of a mask (H, W): where its image was cut, by the value at each pixel's centre."""
    height, width = mask.shape
    at = window(width, height, size)
    centres = np.arange(size) + 0.5
    rows = ((centres + at.top) * height / at.height).astype(np.int64)
    columns = ((centres + at.left) * width / at.width).astype(np.int64)
    return mask[np.ix_(rows, columns)]


def named(mask: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """The mask (H, W) with the class of the nearest named pixel where it is VOID.

    Raises:
        UserError: nobody named any pixel.
    """
    void = mask == VOID
    if void.all():
        raise UserError(
            f"the mask of image {name!r} names no pixel of its stored part: leave it out with tools.shards make --only"
        )
    if not void.any():
        return mask
    nearest = ndimage.distance_transform_edt(void, return_distances=False, return_indices=True)
    found: NDArray[np.uint8] = mask[tuple(nearest)]
    return found
