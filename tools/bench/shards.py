"""Reading, writing and starting, against what else reads latents; every promise with its goal.

40,000 fp16 latents 4x32x32 in batches of 256, shuffled, by one process from a warm page cache. Ours opens a stream
anew in each turn, so each turn hashes every block (xxh3); the others keep what they opened and hash nothing. All
sums are compared with what was written. litdata and MosaicML streaming have environments of their own, made at the
first run; without a network their row says that they are not installed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Table

from shards import cli
from shards.errors import UserError
from tools.bench import shards_pictures
from tools.bench.harness import Variant, measure
from tools.bench.shards_data import (
    BATCH,
    Figure,
    Latents,
    our_epoch,
    our_scan,
    raw_epoch,
    their_epoch,
    their_epoch_of_blocks,
    times,
    write_ours,
    write_theirs,
)
from tools.bench.shards_rivals import RIVALS, Rival, python_of, write
from tools.bench.shards_start import starting
from tools.bench.shards_store import storing
from tools.environments import InstallError

TITLE = "shards: 40,000 latents 4x32x32 fp16, batches of 256, shuffled, xxh3 on, warm"
COUNT, QUICK = 40_000, 4096
PICTURES, FEW = 11_358, 1_200  # of pictures; the second with `quick`
STARTS = (1_281_167, 1_000_000_000)  # samples: ImageNet, and as many as anybody has
PARTS = ("reading", "writing", "pictures", "starting", "store")
GOALS = {
    "webdataset": 30.0,
    "webdataset on ours": 3.0,
    "raw": 0.25,
    "in order": 0.4,
    "rival": 1.5,
    "writer": 3.0,
    "bytes": 1.005,
    "start": 1.1,
    "store": 0.85,
    "making": 1.2,
    "jpg": 1.5,
    "png": 1.1,
}


def suite(
    turns: int, *, quick: bool = False, without: frozenset[str] = frozenset()
) -> list[Figure]:
    """Every figure; `without` leaves out some of PARTS and RIVALS, `quick` takes a tenth of the samples.

    Raises:
        UserError: an unknown word in `without`.
    """
    from selfguide.spec.suggest import nearest

    for word in sorted(without):
        if word not in (every := (*PARTS, *RIVALS)):
            raise UserError(
                f"--without {word}: give some of {', '.join(every)}{nearest(word, every)}"
            )
    console = cli.console(stderr=True)

    def say(line: str) -> None:
        console.print(f"  {line}", style="dim", highlight=False)

    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="bench-shards-") as name:
        folder = Path(name)
        say(f"writing what will be read, into {folder}")
        latents = Latents.random(QUICK if quick else COUNT)
        write_ours(latents, folder / "ours")
        figures += sizes(latents, folder / "ours")
        parts: dict[str, Callable[[], list[Figure]]] = {
            "reading": lambda: reading(latents, folder, turns, without, say),
            "writing": lambda: writing(latents, folder, turns),
            "pictures": lambda: pictures(folder, FEW if quick else PICTURES, turns),
            "starting": lambda: starting(
                folder, STARTS[: 1 if quick else 2], turns, GOALS["start"]
            ),
            "store": lambda: storing(latents, folder / "ours", folder, turns, GOALS["store"], say),
        }
        for part in [part for part in PARTS if part not in without]:
            say(f"{part} ...")
            figures += parts[part]()
    return figures


def sizes(latents: Latents, root: Path) -> list[Figure]:
    """All that lies at `root`, records and index included, over samples, labels and keys."""
    held = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    payload = latents.x.nbytes + latents.y.nbytes + latents.source().keys.nbytes
    return [
        Figure(
            name="bytes on disk over payload",
            unit="B/sample",
            ours=held / len(latents.x),
            other=payload / len(latents.x),
            ratio=held / payload,
        ).judged(GOALS["bytes"], most=True)
    ]


def reading(
    latents: Latents, folder: Path, turns: int, without: frozenset[str], say: Callable[[str], None]
) -> list[Figure]:
    """Everybody's epoch in turn; each is checked to be every sample once."""
    count, ours = len(latents.x), folder / "ours"
    tars = sorted((ours / "shards").glob("*.tar"))
    urls = write_theirs(latents, folder / "theirs")
    wholes: dict[str, Callable[[], dict[str, int]]] = {
        "ours": partial(our_epoch, ours, count),
        "in order": partial(our_scan, ours),
        "webdataset": partial(their_epoch, urls),
        "webdataset on ours": partial(their_epoch_of_blocks, [str(tar) for tar in tars]),
    }
    with ExitStack() as stack:
        for name, rival in _rivals(latents, folder, without, say):
            wholes[name] = stack.enter_context(rival).epoch

        def checked(name: str) -> None:
            latents.check(wholes[name](), name)

        variants = [Variant(name, partial(checked, name)) for name in wholes]
        variants.append(Variant("raw", partial(raw_epoch, tars)))
        say(f"reading with {', '.join(v.name for v in variants)}")
        rows = {row.name: row for row in measure(variants, repeats=turns, warmup=1, units=count)}
    base = rows["ours"]
    figures = [
        times("ours again (A/A)", base, rows["ours again (A/A)"]),
        times("webdataset on its default layout", base, rows["webdataset"]).judged(
            GOALS["webdataset"]
        ),
        times("webdataset on our tars", base, rows["webdataset on ours"]).judged(
            GOALS["webdataset on ours"]
        ),
        times("raw sequential read of the same bytes", base, rows["raw"]).judged(GOALS["raw"]),
        Figure(
            name="the same, of blocks in their order",
            unit="us/sample",
            ours=rows["in order"].median * 1e6,
            other=rows["raw"].median * 1e6,
            ratio=rows["raw"].ratio / rows["in order"].ratio,
        ).judged(GOALS["in order"]),
    ]
    here = [name for name in RIVALS if name in rows]
    fastest = min(here, key=lambda name: rows[name].median, default="")
    for name in here:
        figure = times(name, base, rows[name])
        figures.append(figure.judged(GOALS["rival"]) if name == fastest else figure)
    return figures


def _rivals(
    latents: Latents, folder: Path, without: frozenset[str], say: Callable[[str], None]
) -> Iterator[tuple[str, Rival]]:
    """Those that can be had, over data of their own; they start one after the other."""
    arrays = (folder / "x.npy", folder / "y.npy")
    np.save(arrays[0], latents.x)
    np.save(arrays[1], latents.y)
    for name in [name for name in RIVALS if name not in without]:
        try:
            python = python_of(name, say)
        except InstallError as error:
            say(f"{name}: not installed ({str(error).splitlines()[-1][:200]})")
            continue
        say(f"{name} writes its own format")
        write(name, python, arrays, folder / name)
        yield name, Rival(name, python, folder / name, BATCH)


def writing(latents: Latents, folder: Path, turns: int) -> list[Figure]:
    """Half of the samples. Ours with sha256, xxh3, moments and fsync; ShardWriter has none of them.

    The disk rests before each: else our fsync would wait for what ShardWriter left for later.
    """
    some = Latents.random(max(1, len(latents.x) // 2))
    target = folder / "written"
    variants = [
        Variant("ours", lambda: write_ours(some, target)),
        Variant("ShardWriter", lambda: write_theirs(some, target)),
        Variant("ShardWriter, mtime=0", lambda: write_theirs(some, target, mtime=0)),
    ]
    measured = measure(variants, repeats=turns, warmup=1, units=len(some.x), rest=os.sync)
    rows = {r.name: r for r in measured}
    base = rows["ours"]
    return [
        times("writing by webdataset's ShardWriter", base, rows["ShardWriter"]).judged(
            GOALS["writer"]
        ),
        times("the same with mtime=0", base, rows["ShardWriter, mtime=0"]),
    ]


def pictures(folder: Path, count: int, turns: int) -> list[Figure]:
    """Folders of pictures to shards, and shards of pictures to batches."""
    made = shards_pictures.making(folder, count, turns, GOALS["making"])
    return made + shards_pictures.reading(folder, min(count, 4096), turns, GOALS)


def table(title: str, figures: list[Figure]) -> Table:
    """A row a figure; of those without a goal, only what was measured."""
    made = Table(title=title, title_justify="left")
    for name in ("against", "unit", "ours", "other", "ratio", "goal", ""):
        made.add_column(name, justify="left" if name in ("against", "unit", "") else "right")
    for f in figures:
        goal = "" if f.goal is None else f"{'<=' if f.most else '>='} {f.goal:g}"
        verdict = {None: "", True: "reached", False: "missed"}[f.reached]
        numbers = (f"{f.ours:,.4g}", f"{f.other:,.4g}", f"{f.ratio:.3f}", goal, verdict)
        made.add_row(f.name, f.unit, *numbers)
    return made
