"""The same latents in every form that `tools.bench shards` reads: arrays, our tars, webdataset's default tars."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import shards
from shards.format.header import Header
from shards.format.manifest import Manifest
from shards.read.stream import Stream
from shards.sources.source import ArraySource
from shards.write import writer
from tools.bench.harness import Row
from tools.bench.rivals.worker import touch

SHAPE = (4, 32, 32)  # of a 256-pixel image in SD-VAE's latent space
CLASSES = 1000
BATCH = 256
A_TAR = 16_384  # samples in a tar of webdataset's; ours hold as many
HEADER = Header(kind="latent", encoder="benchmark")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One promise: medians of ours and of the other in `unit`, the ratio of the two, and what it should be."""

    name: str
    unit: str
    ours: float
    other: float
    ratio: float
    goal: float | None = None  # None: reported only
    most: bool = False  # the ratio should be at most the goal, not at least
    reached: bool | None = None

    def judged(self, goal: float, *, most: bool = False) -> Figure:
        """With a goal for its ratio."""
        reached = self.ratio <= goal if most else self.ratio >= goal
        return replace(self, goal=goal, most=most, reached=reached)


def times(name: str, ours: Row, other: Row) -> Figure:
    """How many times as long as ours the other takes; from rows in seconds a sample."""
    return Figure(
        name=name,
        unit="us/sample",
        ours=ours.median * 1e6,
        other=other.median * 1e6,
        ratio=other.ratio,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Latents:
    """Standard normal latents and labels that are not sorted; `sums` is what `touch` returns of a whole epoch."""

    x: NDArray[np.float16]
    y: NDArray[np.int64]
    sums: dict[str, int]

    @staticmethod
    def random(count: int) -> Latents:
        generator = np.random.default_rng(0)
        x = generator.standard_normal((count, *SHAPE), dtype=np.float32).astype(np.float16)
        y = generator.integers(0, CLASSES, count)
        return Latents(x=x, y=y, sums=touch(iter([(x, y)])))

    def check(self, sums: dict[str, int], name: str) -> None:
        """What a reader gave is every sample once."""
        if sums != self.sums:
            raise RuntimeError(
                f"{name} delivered {sums}, written were {self.sums}: nothing to compare"
            )

    def source(self) -> ArraySource:
        return ArraySource.of("latents", self.x, labels=self.y, classes=CLASSES)


def write_ours(latents: Latents, root: Path) -> Manifest:
    """Replaces what is at `root`."""
    shutil.rmtree(root, ignore_errors=True)
    return writer.write(root, latents.source(), header=HEADER)[0]


def write_theirs(latents: Latents, folder: Path, **options: Any) -> list[str]:
    """By webdataset's ShardWriter: one sample a key, `.npy` and `.cls`; its tars. `options` are its own."""
    import webdataset

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pattern = f"{folder}/%05d.tar"
    with webdataset.ShardWriter(pattern, maxcount=A_TAR, verbose=0, **options) as out:
        for row in range(len(latents.x)):
            label = int(latents.y[row])
            out.write({"__key__": f"{row:09d}", "npy": latents.x[row], "cls": label})
    return sorted(str(path) for path in folder.glob("*.tar"))


def our_epoch(root: str | Path, count: int, threads: int = 4) -> dict[str, int]:
    """Opens a stream, so that every block is hashed anew, and reads one epoch."""
    with opened(root, threads=threads) as stream:
        return touch(_once(stream, count))


def our_scan(root: str | Path) -> dict[str, int]:
    """One pass in the order of the blocks, every one of which is hashed."""
    with shards.scan(root, micro_batch=BATCH, rank=0, world=1) as scan:
        return touch((b["x"][: b["mask"].sum()], b["y"][: b["mask"].sum()]) for b in scan)


def opened(root: str | Path, *, position: int = 0, threads: int = 4) -> Stream:
    """Ours, by one process."""
    return shards.open(
        root,
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world=1,
        seed=0,
        position=position,
        threads=threads,
    )


def _once(stream: Iterator[Any], count: int) -> Iterator[tuple[Any, Any]]:
    """Whole batches, of which the last one runs on into the next epoch and is cut."""
    for start in range(0, count, BATCH):
        batch = next(stream)
        left = count - start
        yield batch["x"][:left], batch["y"][:left]


def their_epoch(urls: list[str]) -> dict[str, int]:
    """webdataset's full pipeline on its own layout."""
    import webdataset

    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
    return touch(data.shuffle(5000).decode().to_tuple("npy", "cls").batched(BATCH))


def their_epoch_of_blocks(urls: list[str]) -> dict[str, int]:
    """webdataset's full pipeline on our tars."""
    import webdataset

    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
    samples = data.decode().to_tuple("x.npy", "y.npy").unbatched()
    return touch(samples.shuffle(5000).batched(BATCH))


def raw_epoch(tars: list[Path]) -> int:
    """Bytes of a sequential read."""
    total = 0
    for path in tars:
        with path.open("rb", buffering=0) as file:
            while data := file.read(4 << 20):
                total += len(data)
    return total
