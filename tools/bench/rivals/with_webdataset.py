"""The script that writes a folder of class folders with webdataset's ShardWriter: FOLDER OUT SIZE PROCESSES.

Pictures are cut to SIZE x SIZE by one bicubic resize, shuffled, and shared out evenly.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
from pathlib import Path

import webdataset
from PIL import Image


def _cut(path: str, size: int) -> Image.Image:
    image = Image.open(path).convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _write(task: tuple[str, int, int, list[tuple[str, int]]]) -> None:
    out, number, size, inputs = task
    with webdataset.ShardWriter(f"{out}/{number}-%05d.tar", maxsize=128 << 20, verbose=0) as tars:
        for row, (path, label) in enumerate(inputs):
            tars.write({"__key__": f"{number}-{row:08d}", "png": _cut(path, size), "cls": label})


def main(folder: str, out: str, size: str, processes: str) -> None:
    classes = sorted(place for place in Path(folder).iterdir() if place.is_dir())
    inputs = [(str(path), label) for label, c in enumerate(classes) for path in sorted(c.iterdir())]
    random.Random(0).shuffle(inputs)
    Path(out).mkdir(parents=True)
    count = int(processes)
    with multiprocessing.Pool(count) as pool:
        pool.map(_write, [(out, i, int(size), inputs[i::count]) for i in range(count)])


if __name__ == "__main__":
    main(*sys.argv[1:])
