"""WebDataset tars as others write them, and a plain loop that reads them: no code of ours."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 8


def pixels(count: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """(count, side, side, 3) uint8, every image different."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=kind)
    return file.getvalue()


def tar(path: Path, members: Mapping[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as to:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = (
                len(data),
                1.5,
            )  # a fraction, which PAX puts into a header of its own
            to.addfile(member, io.BytesIO(data))
    return path


def laion(root: Path, count: int = 700, in_a_tar: int = 100) -> np.ndarray:
    """Tars of (png, json, txt) in `root`; sample i has the label i % 7. The images."""
    root.mkdir(parents=True, exist_ok=True)
    images = pixels(count)
    for first in range(0, count, in_a_tar):
        members: dict[str, bytes] = {}
        for i in range(first, min(first + in_a_tar, count)):
            told = json.dumps({"class": i % 7, "caption": "it"}).encode()
            members |= {f"{i:06d}.png": encoded(images[i], "PNG"), f"{i:06d}.json": told}
            members[f"{i:06d}.txt"] = b"it"
        tar(root / f"{first // in_a_tar:05d}.tar", members)
    return images


def read(paths: list[Path]) -> Iterator[dict[str, object]]:
    """Each sample by a loop over members: key, x (C, H, W), y of its json."""
    for path in paths:
        with tarfile.open(path) as file:
            found: dict[str, dict[str, bytes]] = {}
            for member in file:
                key, _, extension = member.name.partition(".")
                content = file.extractfile(member)
                assert content is not None
                found.setdefault(key, {})[extension] = content.read()
        for key, members in found.items():
            with Image.open(io.BytesIO(members["png"])) as image:
                x = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
            yield {"key": key, "x": x, "y": json.loads(members["json"])["class"]}
