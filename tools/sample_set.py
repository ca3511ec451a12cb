"""What `python -m tools.sample` leaves: pictures and a grid, or one .npz in the layout of ADM's evaluator.

`samples.npz` has `arr_0`, uint8 (N, H, W, C), and of labelled samples `arr_1`, int64 (N,), as guided-diffusion's
`image_sample.py` writes them (Dhariwal & Nichol 2021). It is made in parts that any number of ranks share and a kill
does not lose. A new set never deletes an older one, which moves into `older/`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.discovery.resumable import Rows
from shards.format import manifest as manifests
from shards.lock import lock

SAID = "sample.json"
NPZ = "samples.npz"
# what `tools.confidence` says of a set, beside it
CHOSEN = "confidence.json"
# what a set consists of
PARTS = (SAID, "grid.png", "images", NPZ, CHOSEN)
GRID = 256  # images that a grid shows at most


def request(condition: Condition, seeds: Tensor, **more: Any) -> str:
    """A digest of all that decides a set of samples: conditions, seeds, and `more`, which is JSON."""
    found = hashlib.sha256()
    tensors: Mapping[str, Tensor] = {"state": condition.state, "seeds": seeds, **condition.given}
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return manifests.digest({"tensors": found.hexdigest(), **more})


def make_room(out: Path, wanted: str) -> None:
    """Moves what is in `out` of another set than `wanted` into `out/older/<n>`."""
    there = [name for name in PARTS if (out / name).exists()]
    if not there or _request(out) == wanted:
        return
    for number in itertools.count(1):
        older = out / "older" / str(number)
        try:
            older.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    for name in there:
        (out / name).rename(older / name)


def holds(out: Path, wanted: str) -> bool:
    """Whether `out` has exactly this set, to its end."""
    return (out / NPZ).is_file() and _request(out) == wanted


def _request(out: Path) -> str | None:
    """Of the set in `out`; those of earlier versions do not say."""
    said = out / SAID
    return json.loads(said.read_text()).get("request") if said.is_file() else None


def device_of(name: str, rank: int, world: int) -> str:
    """The device of a rank: of several ranks on GPUs, each has its own."""
    if name != "cuda" or world == 1:
        return name
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or str(rank)
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def rows(out: Path, wanted: str, count: int, batch: int) -> Rows:
    """The parts of a set, `batch` images each: the same images whatever the number of ranks."""
    return Rows(
        folder=out / f".samples.{wanted[:16]}", prefix="", count=count, chunk=batch, dtype=np.uint8
    )


def fill(
    parts: Rows, draw: Callable[[Tensor], Tensor], batch: int, *, rank: int, world: int
) -> None:
    """Makes what is missing of this rank's parts; `draw` gives uint8 (B, C, H, W) of samples by number (B,)."""

    def make(numbers: np.ndarray) -> Tensor:
        return draw(torch.from_numpy(numbers)).permute(0, 2, 3, 1)

    doing = f"sampling {parts.count} images"
    parts.fill(make, batch=batch, doing=doing, rank=rank, world=world)


def publish(
    out: Path, wanted: str, parts: Rows, labels: Tensor | None, finish: Callable[[Tensor], None]
) -> bool:
    """Writes `samples.npz` once all parts are there, and then removes them; False where others still work.

    `finish` is called with the first images, uint8 (n, C, H, W), once an older set has moved and before the parts go.
    """
    if not parts.complete:
        return False
    with lock(parts.folder, create=False) as held:
        if not held:
            # another rank was the last one
            return True
        make_room(out, wanted)
        first = np.concatenate([*itertools.islice(parts, -(-GRID // parts.chunk))])[:GRID]
        _write(out / NPZ, parts, labels)
        finish(torch.from_numpy(first).permute(0, 3, 1, 2))
        shutil.rmtree(parts.folder)
    return True


def _write(file: Path, parts: Rows, labels: Tensor | None) -> None:
    """A .npz written part by part, since 50,000 images of 256 pixels are 10 GB."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    first = next(iter(parts))
    shape = (parts.count, *first.shape[1:])
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as to:
            about = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(to, about)
            for part in parts:
                to.write(part.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as to:
                np.lib.format.write_array(to, labels.numpy().astype(np.int64))
    temporary.replace(file)
