"""From a listing or a source to a data set below --out, as the options of `tools.shards make` say; prints what came."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from shards import storage
from shards.format.header import PIXELS, Header
from shards.format.pictures import Picture
from shards.sources import chosen
from shards.sources.listing import Decode, Listing
from shards.sources.source import Source
from shards.write import writer
from shards.write.kept import keeping
from shards.write.scan import PART, SKIPPED, ScanCounts, Threshold, scan
from tools.shards import report, sweep


def write_listing(
    options: argparse.Namespace,
    listing: Listing,
    header: Header = PIXELS,
    notes: Mapping[str, Any] | None = None,
) -> int:
    """Looks at what is listed and wanted, then writes what holds; returns the exit code."""
    if listing.inside:
        print(f"all of {options.path} lies in {listing.inside}, which is read", file=sys.stderr)
    listing = chosen.choose(listing, options.only, options.per_class)
    with keeping(options.out, len(listing.keys), PART) as kept:
        source, counts = scan(
            options.out,
            listing,
            dedupe=options.dedupe,
            max_skipped=Threshold.of(options.max_skipped),
            kept=kept,
            workers=options.workers,
            rank=options.rank,
            world=options.world,
            watch=report.watch("looking at inputs"),
        )
        found = {
            **counts.deciding(),
            "rule": listing.decode.rule,
            "deduplicated": options.dedupe,
            **_decoded_as(listing.decode, counts),
            **chosen.notes(options.only, options.per_class),
            **(notes or {}),
        }
        return write_source(options, source, header, listing.class_names, found, counts)


def _decoded_as(decode: Decode, counts: ScanCounts) -> dict[str, Any]:
    """Of pictures that earlier versions decoded to other pixels, how: such a data set is another one."""
    decided = {"rotated": {"orientation": "applied"}, "of 16 bits": {"depth": "rounded"}}
    if isinstance(decode, Picture):
        decided["transparent"] = {"background": str(decode.background)}
    return {n: v for trait in counts.changed for n, v in decided.get(trait, {}).items()}


def write_source(
    options: argparse.Namespace,
    source: Source,
    header: Header,
    class_names: tuple[str, ...] = (),
    notes: Mapping[str, Any] | None = None,
    counts: ScanCounts | None = None,
) -> int:
    """Writes a source below --out and prints what came of it; returns the exit code."""
    built = report.Counted("writing shards")
    manifest, new = writer.write(
        options.out,
        source,
        header=header,
        seed=options.seed,
        shard_bytes=report.shard_bytes(options),
        class_names=class_names,
        notes=notes,
        beside=counts.beside() if counts else None,
        layout=options.kept,
        workers=options.workers,
        rank=options.rank,
        world=options.world,
        watch=built,
    )
    sweep.afterwards(options.out)
    seconds = time.monotonic() - options.started
    if options.json:
        facts = {"shards_built": built.count, "seconds": round(seconds, 3)}
        inputs = {} if counts is None else {"inputs": asdict(counts)}
        summary = report.summary(manifest)
        print(json.dumps({"root": options.out, "written": new, **facts, **inputs, **summary}))
        return 0
    print(report.written(manifest, options.out, new))
    if counts is not None:
        duplicates = "left out" if options.dedupe else "kept: --dedupe leaves them out"
        where = f" (see {storage.join(options.out, SKIPPED)})" if counts.skipped else ""
        rows = {
            "inputs": f"{counts.listed:,}",
            **({"changed": report.changed(counts)} if counts.changed else {}),
            **(
                {"passed over (see skipped.jsonl)": f"{counts.passed_over:,}"}
                if counts.passed_over
                else {}
            ),
            "bad ones" + where: f"{counts.skipped:,}",
            f"duplicates, {duplicates}": f"{counts.duplicates:,}",
            "samples": f"{manifest.count:,}",
            "classes": f"{manifest.classes:,}",
            "shards built by this call": f"{built.count:,} of {len(manifest.shards):,}",
            "seconds": f"{seconds:,.1f}",
        }
        report.print_table({n: v for n, v in rows.items() if n != "classes" or manifest.classes})
        report.say_renumbered(manifest)
    return 0
