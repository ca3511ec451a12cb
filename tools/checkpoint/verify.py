"""Verify checkpoints: read every file, compare its hash with the manifest, and name what is damaged.

Exit code 1 says that something is. A folder without a manifest was never finished; a resumed run passes it over.

examples:
  python -m tools.checkpoint verify runs/in1k_dit/3f2a
  python -m tools.checkpoint verify runs/in1k_dit/3f2a/checkpoints/img-000512000 --json
  python -m tools.checkpoint verify s3://bucket/checkpoints/in1k_dit/3f2a41c09d5e
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass

from shards import cli, storage
from shards.errors import DamagedError
from shards.storage import Url
from tools.checkpoint import target


@dataclass(frozen=True)
class Verdict:
    """What became of a checkpoint: whole, damaged, unfinished, or deleted meanwhile by a run that goes on.

    `damaged` names files and reasons.
    """

    checkpoint: str
    state: str
    bytes: int
    damaged: tuple[tuple[str, str], ...] = ()


def add(parser: argparse.ArgumentParser) -> None:
    target.add(parser, "only the checkpoint at N images seen (default: all)", target.STORED)


def run(options: argparse.Namespace) -> int:
    folders = target.anywhere(options)
    found = [verify(folder) for folder in cli.track(folders, len(folders), "checkpoints")]
    well = all(each.state != "damaged" for each in found)
    if options.json:
        print(json.dumps({"well": well, "checkpoints": [asdict(each) for each in found]}))
    else:
        for each in found:
            print(f"{each.checkpoint}  {each.state}, {each.bytes:,} bytes")
            for name, reason in each.damaged:
                print(f"  {name} {reason}")
    return 0 if well else 1


def verify(folder: Url) -> Verdict:
    """Reads a checkpoint whole."""
    name = os.fspath(folder).rpartition("/")[2]
    try:
        manifest = storage.read_manifest(folder)
    except DamagedError:
        return Verdict(name, "damaged", 0, ((storage.MANIFEST, "is torn"),))
    if manifest is None:
        return Verdict(name, target.state_without_manifest(folder), 0)
    size = sum(part["bytes"] for part in manifest["files"])
    flaws = tuple((flaw.name, flaw.reason) for flaw in storage.flaws(folder, manifest, "hashes"))
    if flaws and storage.read_manifest(folder) is None:
        return Verdict(name, "deleted", size)
    return Verdict(name, "damaged" if flaws else "whole", size, flaws)
