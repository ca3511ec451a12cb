"""Pictures: a folder to shards, reading them, and the first batch, against what webdataset takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import shards
from shards.format.header import PIXELS
from shards.format.pictures import Picture
from shards.sources.folders import image_folder
from shards.write import writer
from shards.write.scan import scan
from tools.bench.harness import Variant, measure
from tools.bench.shards_data import BATCH, Figure, times

INPUT, SIZE = 136, 64  # pixels a side of what is made into shards, and of what it becomes
FIRST = 0.3  # seconds in which a first batch should be there
KINDS = {"jpg": 128, "png": 64}  # pixels a side of what is read
_CLASSES = 9


def pictures(folder: Path, count: int, side: int, suffix: str) -> Path:
    """`count` pictures in class folders, each a smooth ground and some discs; every one different."""
    for number in range(count):
        generator = np.random.default_rng(number)
        levels = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(6):
            left, top = generator.integers(0, side - 8, 2).tolist()
            width, height = generator.integers(6, side // 2, 2).tolist()
            colour = tuple(generator.integers(0, 256, 3).tolist())
            draw.ellipse((left, top, left + width, top + height), fill=colour)
        place = folder / f"class-{number % _CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:06d}.{suffix}")
    return folder


def making(folder: Path, count: int, turns: int, goal: float) -> list[Figure]:
    """Whole commands of two processes, as a user waits for them, Python's start and imports included."""
    inputs = pictures(folder / "pictures", count, INPUT, "png")
    target = folder / "made"
    ours = ["-m", "tools.shards", "make", "folder", str(inputs), "--size", str(SIZE)]
    ours += ["--workers", "2", "--out", str(target)]
    script = ["-m", "tools.bench.rivals.with_webdataset", str(inputs), str(target), str(SIZE), "2"]
    variants = [
        Variant(n, partial(_command, c, target)) for n, c in (("ours", ours), ("script", script))
    ]
    rows = {row.name: row for row in measure(variants, repeats=turns, warmup=1, units=count)}
    name = f"{count:,} PNGs to {SIZE} px by two processes of a ShardWriter script"
    return [times(name, rows["ours"], rows["script"]).judged(goal)]


def _command(words: list[str], target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run([sys.executable, *words], check=True, capture_output=True)


def reading(folder: Path, count: int, turns: int, goals: dict[str, float]) -> list[Figure]:
    """An epoch of decoded batches, shuffled, by one process; ours opened anew, and every sample hashed."""
    figures = []
    for suffix, side in KINDS.items():
        root = folder / f"ours-{suffix}"
        listing = image_folder(str(pictures(folder / suffix, count, side, suffix)), Picture())
        writer.write(root, scan(root, listing)[0], header=PIXELS, layout="samples")
        tars = sorted(str(path) for path in (root / "shards").glob("*.tar"))
        wanted = _sum(partial(_our_batches, root, count))
        readers: dict[str, Callable[[], Iterator[Any]]] = {
            "ours": partial(_our_batches, root, count),
            "webdataset": partial(_their_batches, tars, suffix),
        }
        variants = [Variant(n, partial(_checked, r, wanted)) for n, r in readers.items()]
        rows = {row.name: row for row in measure(variants, repeats=turns, warmup=1, units=count)}
        name = f"webdataset reading {suffix} of {side} px"
        figures.append(times(name, rows["ours"], rows["webdataset"]).judged(goals[suffix]))
    return [*figures, first_batch(folder / "ours-jpg", turns)]


def first_batch(root: Path, turns: int) -> Figure:
    """From opening, after imports, with two decoding processes that must start."""
    seconds = []
    for _ in range(turns):
        started = time.perf_counter()
        with _opened(root, decoders=2) as stream:
            next(stream)
            seconds.append(time.perf_counter() - started)
    median = float(np.median(seconds))
    return Figure(
        name="first batch of pictures, two decoders, over 0.3 s",
        unit="ms",
        ours=median * 1e3,
        other=FIRST * 1e3,
        ratio=median / FIRST,
    ).judged(1.0, most=True)


def _opened(root: Path, **options: Any) -> Any:
    return shards.open(
        root, global_batch=BATCH, micro_batch=BATCH, rank=0, world=1, seed=0, **options
    )


def _our_batches(root: Path, count: int) -> Iterator[Any]:
    with _opened(root) as stream:
        for start in range(0, count, BATCH):
            yield next(stream)["x"][: count - start]


def _their_batches(tars: list[str], suffix: str) -> Iterator[Any]:
    import webdataset

    data = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0)
    for x, _ in data.shuffle(5000).decode("rgb8").to_tuple(suffix, "cls").batched(BATCH):
        yield np.stack(x) if isinstance(x, list) else x


def _sum(batches: Callable[[], Iterator[Any]]) -> int:
    return sum(int(x.sum(dtype=np.int64)) for x in batches())


def _checked(batches: Callable[[], Iterator[Any]], wanted: int) -> None:
    if (found := _sum(batches)) != wanted:
        raise RuntimeError(f"pixels add up to {found}, ours to {wanted}: nothing to compare")
