"""End what killed writers left: on S3 unfinished uploads, which are hidden and cost; in a folder, temporary files.

Only what began more than --older hours ago is ended: a writer that is still at work loses nothing. `make`, `encode` and
`copy` do the same at their end, below their own folder, for what is older than a day; several ranks may do so at
once. With --older 0 be sure that nobody writes there.

examples:
  python -m tools.shards sweep s3://bucket/latents
  python -m tools.shards sweep s3://bucket --older 1 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from shards import storage
from shards.errors import StoreError, UserError

HELP = "end unfinished uploads that killed writers left"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", help="folder or s3:// prefix; all below it")
    parser.add_argument(
        "--older", type=float, default=24.0, metavar="HOURS", help="that began so long ago (24)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    if not options.older >= 0:
        raise UserError(f"--older {options.older:g}: give hours, or 0")
    if not storage.is_remote(options.root) and not Path(options.root).is_dir():
        raise UserError(f"no folder {options.root}: name one, or an s3:// prefix")
    ended = storage.sweep(options.root, older=3600 * options.older)
    if options.json:
        print(json.dumps({"root": options.root, "ended": [*ended]}))
        return 0
    for name in ended:
        print(f"ended: {name}")
    if not ended:
        print(f"nothing below {options.root} that is older than {options.older:g} hours")
    return 0


def afterwards(root: str) -> None:
    """What writers do at their end; whether it succeeds changes nothing of what they wrote."""
    try:
        ended = storage.sweep(root)
    except (PermissionError, StoreError) as error:  # who may write need not be allowed to look
        print(f"unfinished uploads below {root} were not looked for: {error}", file=sys.stderr)
        return
    for name in ended:
        print(f"ended what a killed writer left more than a day ago: {name}", file=sys.stderr)
