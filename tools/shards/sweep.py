"""Remove what killed writers left: unfinished uploads on S3 (hidden, but billed), temporary files in folders.

Only what was started more than --older hours ago is removed, so that running writers lose nothing. `make`, `encode` and
`copy` do the same in their own folder when they end, for what is older than a day; several ranks may do so at
once. Use --older 0 only when nobody is writing there.

examples:
  python -m tools.shards sweep s3://bucket/latents
  python -m tools.shards sweep s3://bucket --older 1 --json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shards import storage
from shards.errors import StoreError, UserError
from tools import flags
from tools.shards import report


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("root ROOT", str, None, "folder or s3:// prefix; everything below it is swept"),
        ("--older HOURS", float, 24.0, "minimum age of what is removed (default 24)"),
        flags.JSON,
    )


def run(options: argparse.Namespace) -> int:
    if not options.older >= 0:
        raise UserError(f"--older {options.older:g}: give hours, or 0")
    if not storage.is_remote(options.root) and not Path(options.root).is_dir():
        raise UserError(f"no folder {options.root}: name one, or an s3:// prefix")
    ended = storage.sweep(options.root, older=3600 * options.older)
    if report.as_json(options, {"root": options.root, "ended": [*ended]}):
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
