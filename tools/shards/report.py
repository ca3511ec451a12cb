"""What the verbs share: arguments, a summary of a data set, tables and progress bars."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from shards import cli
from shards.errors import UserError
from shards.format.classes import renumbered
from shards.format.manifest import Manifest
from shards.write.scan import ScanCounts
from tools import flags

T = TypeVar("T")


def add_root(parser: argparse.ArgumentParser) -> None:
    """The arguments of a verb that reads one data set."""
    flags.add(
        parser, ("root ROOT", str, None, "folder or s3:// prefix of the data set"), flags.JSON
    )


def as_json(options: argparse.Namespace, facts: Mapping[str, Any]) -> bool:
    """Prints `facts` as one JSON object if --json asks for it; returns whether it does."""
    if options.json:
        print(json.dumps(facts))
    return bool(options.json)


def add_out(parser: argparse.ArgumentParser) -> None:
    """The arguments of a verb that writes shards, on one or several ranks."""
    flags.add(
        parser,
        ("--out DIR", str, flags.REQUIRED, "folder or s3:// prefix to write to"),
        (
            "--shard-mb",
            float,
            128,
            "approximate size of a shard in MiB, and the unit of progress (default 128)",
        ),
        ("--rank", int, 0, "rank of this process (default 0)"),
        ("--world", int, 1, "number of ranks that write together (default 1)"),
        flags.JSON,
    )


def shard_bytes(options: argparse.Namespace) -> int:
    """--shard-mb in bytes; raises UserError where it is not positive."""
    # no file is larger
    if not 0 < options.shard_mb * 2**20 < 2**63:
        raise UserError(f"--shard-mb {options.shard_mb}: give a number above 0, and below {2**43}")
    return math.ceil(options.shard_mb * 2**20)


def print_table(rows: Mapping[str, str], title: str | None = None) -> None:
    """Names and values in two columns."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold", justify="left" if title else "right")
    for row in rows.items():
        table.add_row(*row)
    cli.console().print(table)


def written(manifest: Manifest, root: str, new: bool, verb: str = "wrote") -> str:
    """The line that says what a verb wrote, or that it was there already."""
    status = verb if new else "already there, nothing written:"
    return f"{status} {line(manifest)} in {root}, manifest {manifest.hash[:12]}"


def summary(manifest: Manifest) -> dict[str, object]:
    """What there is to say of a data set, by name: what `stats` prints."""
    payload = int(manifest.blocks["bytes"].sum())
    stored = sum(shard.bytes for shard in manifest.shards)
    histogram = manifest.label_histogram
    # spans of single samples hold their headers: no payload to compare with
    over = {"bytes_over_payload": round(stored / payload, 6)}
    return {
        "manifest": manifest.hash,
        "samples": manifest.count,
        "shape": [*manifest.shape],
        "dtype": np.dtype(manifest.fields[0].dtype).name,
        "layout": manifest.layout + (", indexed where they lie" if manifest.indexed else ""),
        "bytes_a_sample": manifest.sample_bytes,
        "shards": len(manifest.shards),
        "bytes": stored,
        **(over if manifest.layout == "blocks" else {}),
        "header": manifest.header,
        "decode": manifest.decode,
        "mean": [*manifest.channel_mean],
        "std": [*manifest.channel_std],
        "range": [manifest.minimum, manifest.maximum],
        "classes": manifest.classes,
        **({"class_names": [*manifest.class_names]} if manifest.class_names else {}),
        "samples_per_class": {"least": min(histogram), "most": max(histogram)}
        if histogram
        else None,
        **({"renumbered": said} if (said := renumbered(manifest.class_names)) else {}),
        "source": manifest.source,
        "seed": manifest.seed,
    }


def shown(name: str) -> str:
    """A name of one line, without what a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def say_renumbered(manifest: Manifest) -> None:
    """Prints where the number in a class's name is not its label."""
    if said := renumbered(manifest.class_names):
        print(said)


def changed(counts: ScanCounts) -> str:
    """What was done to samples, such as "1,204 transparent, 3 rotated"; empty where nothing was."""
    return ", ".join(f"{count:,} {trait}" for trait, count in counts.changed.items())


def line(manifest: Manifest) -> str:
    """A data set in one line: samples, shape, shards, size."""
    shape, stored = (
        " x ".join(map(str, manifest.shape)),
        sum(shard.bytes for shard in manifest.shards),
    )
    dtype, shards = np.dtype(manifest.fields[0].dtype).name, tars(len(manifest.shards))
    return f"{manifest.count:,} samples {shape} {dtype}, {shards}, {size(stored)}"


def tars(count: int) -> str:
    """The number of tars in words: 1 shard, 2 shards."""
    return f"{count:,} shard{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """Bytes as MB or GB, powers of ten."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def watch(doing: str) -> Callable[[Iterable[T], int], Iterable[T]]:
    """A progress bar called `doing`, as writers and verifiers take one."""
    return lambda items, total: cli.track(items, total, doing)


class Counted:
    """Shows shards go by, and counts those built here: others may have done some meanwhile."""

    def __init__(self, doing: str) -> None:
        self.count, self._doing = 0, doing

    def __call__(self, shards: Iterable[bool], total: int) -> Iterator[bool]:
        for built in watch(self._doing)(shards, total):
            self.count += built
            yield built
