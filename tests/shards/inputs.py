"""Small real files of every family that `tools.shards make` reads, made as their own tools would."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.sources.listing import Listing


def pixels(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    """(count, side, side, 3) uint8, every image different."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


PNG = [png(image) for image in pixels(24)]


def put(root: Path, *names: str) -> Path:
    """Writes small pictures under these names, each another one of up to 24; returns `root`."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG[i % len(PNG)])
    return root


def keys(found: Listing) -> list[str]:
    return [key.decode() for key in found.keys.tolist()]


def image_folder(
    root: Path, images: np.ndarray, classes: tuple[str, ...] = ("b", "a", "c")
) -> Path:
    """Image i goes to class i mod len(classes)."""
    for i, image in enumerate(images):
        path = root / classes[i % len(classes)] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return root


def cifar10(path: Path, images: np.ndarray, labels: list[int]) -> Path:
    """The published layout: rows of 3,072 bytes, red before green before blue, five batches and a test."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    half = len(rows) // 2
    batches: dict[str, Any] = {
        "data_batch_1": {"data": rows[:half], "labels": labels[:half]},
        "data_batch_2": {"data": rows[half:], "labels": labels[half:]},
        "test_batch": {"data": rows[:3], "labels": labels[:3]},
        "batches.meta": {"label_names": [f"class{i}" for i in range(10)]},
    }
    return archive(
        path, {f"cifar-10-batches-py/{n}": pickle.dumps(b, 2) for n, b in batches.items()}
    )


def archive(path: Path, members: dict[str, bytes]) -> Path:
    """A tar, compressed where the name ends in .gz."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def voc(root: Path, images: np.ndarray, listed: int) -> Path:
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    names = [f"2007_{i:06d}" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
    sets = root / "ImageSets" / "Main"
    (sets / "trainval.txt").write_text("\n".join(names[:listed]) + "\n")
    (sets / "val.txt").write_text("\n".join(names[listed:]) + "\n")
    (sets / "cat_trainval.txt").write_text("\n".join(f"{n} -1" for n in names) + "\n")
    return root


def coco(root: Path, images: np.ndarray, split: str = "val2017") -> Path:
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir()
    names = [f"{i:012d}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (root / split / name).write_bytes(png(image))
    listed = {"images": [{"id": i, "file_name": n} for i, n in reversed([*enumerate(names)])]}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(listed))
    return root
