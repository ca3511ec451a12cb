"""`python -m tools.score FOLDER|NPZ --protocol P`: anybody's samples, by the code that scores ours.

FOLDER holds PNG or other lossless images of one size; in a .npz the first array is taken, or arr_0, uint8 (N, H, W, C)
as ADM writes samples. They are compared with a reference that `python -m tools.reference make` wrote, with ADM's or
clean-fid's, or with shards of real images, whose reference is made first and kept in .references. A killed command goes
on where it was, from parts in .scores.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from selfguide.evaluation.features.net import FeatureNet
from selfguide.evaluation.metrics.frechet import parted
from selfguide.evaluation.scores import (
    Known,
    fill,
    make_reference,
    parts_in,
    read_reference,
    scores_of,
)
from selfguide.spec.identity import digest
from selfguide.spec.metrics import LEAST_SAMPLES
from shards import cli
from shards.errors import BadInputError, UserError
from shards.format import manifest as manifests
from shards.format.pictures import Picture
from shards.lock import lock
from shards.sources.arrays import members, read_array
from tools import flags
from tools.reference.make import NET, net_of

EPILOG = """examples:
  python -m tools.score samples.npz --protocol fid_adm --reference VIRTUAL_imagenet256_labeled.npz
  python -m tools.score samples/ --protocol fd_effnet --shards data/val --json
  python -m tools.score samples/ --protocol fid_clean --reference in1k.npz --weights pt_inception.pth
"""
LOSSLESS = (".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
LOSSY = (".jpg", ".jpeg")
REFERENCES = Path(".references")
# features of samples whose score is not taken yet
PARTS = Path(".scores")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    flags.check_least(options, 1, "batch")
    if bool(options.reference) == bool(options.shards):
        raise UserError(
            f"--reference {options.reference} and --shards {options.shards}: give one of them to compare with"
        )
    images = open_images(Path(options.samples))
    net = net_of(options)
    known = _known(net, options)
    work = PARTS / digest({**net.about, "batch": options.batch, "files": images.stamp})
    work.mkdir(parents=True, exist_ok=True)
    # the same command may be running
    with lock(work, create=False, required=False):
        try:
            parts, doing = (
                parts_in(work, len(images), options.batch),
                f"scoring {len(images):,} images",
            )
            fill(parts, lambda rows: net.rows(images.at(rows)), doing=doing)
            full = options.protocol == "fid_adm"
            scores, _ = parted(scores_of(options.protocol, net, parts, known, full=full))
        except UserError:
            # of files that nobody scores as they are
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    found = {
        "samples": options.samples,
        "count": len(images),
        "protocol": options.protocol,
        "scores": scores,
        "features": net.about,
        "reference": options.reference or options.shards,
        "reference_sha256": known.sha256,
    }
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(f"{name:<24}{value:.5g}" for name, value in scores.items()))
    return 0


class Images:
    """Images of one size, (C, H, W), by their number."""

    def __init__(self, files: Sequence[Path], levels: NDArray[np.generic] | None = None) -> None:
        """One in each file, or `levels`, uint8 (N, H, W, C), from a single file."""
        self._files, self._levels = files, levels
        self._shape = _picture(files[0]).shape if levels is None else ()

    def __len__(self) -> int:
        return len(self._files) if self._levels is None else len(self._levels)

    @property
    def stamp(self) -> list[tuple[str, int, int]]:
        """Path, size and time of each file: other samples have another."""
        found = ((file, file.stat()) for file in self._files)
        return [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in found]

    def at(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """uint8 (B, C, H, W).

        Raises:
            UserError: an image that cannot be read, or is of another size than the first.
        """
        if self._levels is not None:
            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(self._levels[rows], -1, 1)))
        found = []
        for row in rows:
            picture = _picture(self._files[row])
            if picture.shape != self._shape:
                raise UserError(
                    f"{self._files[row]} is {picture.shape}, and the first image {self._shape}: samples have one size"
                )
            found.append(picture)
        return torch.from_numpy(np.stack(found))


def open_images(path: Path) -> Images:
    """The samples at a path.

    Raises:
        UserError: nothing is there, or what is there are no images of levels 0..255, or too few.
    """
    images = _in_folder(path) if path.is_dir() else _in_file(path)
    if len(images) < LEAST_SAMPLES:
        raise UserError(
            f"{path} holds {len(images)} images, too few for a score with its error: give {LEAST_SAMPLES} or more"
        )
    return images


def _in_folder(path: Path) -> Images:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (*LOSSLESS, *LOSSY))
    if not files:
        raise UserError(f"{path} holds no images: give a folder of {', '.join(LOSSLESS)}")
    if lossy := next((p for p in files if p.suffix.lower() in LOSSY), None):
        raise UserError(
            f"{lossy} is a JPEG, which moves a Frechet distance by units: save samples lossless"
        )
    return Images(files)


def _in_file(path: Path) -> Images:
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    names = members(str(path))
    name = "arr_0" if "arr_0" in names else names[0]
    levels = read_array(str(path), name)
    fits = levels.ndim == 4 and levels.shape[-1] in (1, 3) and 0 not in levels.shape[1:]
    if levels.dtype != np.uint8 or not fits:
        finite = levels.dtype.kind != "f" or bool(np.isfinite(levels).all())
        nan = "" if finite else ", some of it NaN or infinite"
        raise UserError(
            f"{path}: {name} is {levels.shape} {levels.dtype}{nan}; give uint8 (N, H, W, 1 or 3) of levels 0..255"
        )
    return Images([path], levels)


def _known(net: FeatureNet, options: argparse.Namespace) -> Known:
    if options.reference:
        # a file here, before one that lies where weights are
        here = Path(options.reference).expanduser()
        return read_reference(str(here.absolute()) if here.is_file() else options.reference, net)
    decided = {**net.about, "batch": options.batch, "count": None}
    folder = REFERENCES / f"{manifests.load(options.shards).hash[:12]}-{digest(decided)}"
    known = make_reference(options.shards, net, folder, part=options.batch)
    assert known is not None  # this is the only rank
    return known


def _picture(file: Path) -> NDArray[np.uint8]:
    """(3, H, W)."""
    try:
        return Picture()(file.read_bytes())
    except BadInputError as error:
        raise UserError(f"{file}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    return flags.command(
        "tools.score",
        __doc__,
        ("samples", str, None, "a folder of images, or a .npz"),
        *NET,
        ("--reference FILE", str, None, "a .npz of mean and covariance"),
        ("--shards ROOT", str, None, "shards of real images"),
        flags.JSON,
        epilog=EPILOG,
    )


if __name__ == "__main__":
    cli.run(main)
