"""What the manifest says of a data set; nothing else is read."""

from __future__ import annotations

import argparse
import json

from shards import cli
from shards.format import manifest as manifests
from tools.shards import report

HELP = "what the manifest says"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", help="folder or s3:// prefix")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    manifest = manifests.load(options.root)
    summary = {"root": options.root, **report.summary(manifest)}
    if options.json:
        print(json.dumps(summary))
        return 0
    from rich.table import Table

    table = Table(title=report.line(manifest), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in summary.items():
        text = ", ".join(f"{v:.6g}" for v in value) if isinstance(value, list) else str(value)
        if isinstance(value, dict):
            text = ", ".join(f"{n} {v}" for n, v in value.items() if v is not None)
        table.add_row(name.replace("_", " "), text)
    cli.console().print(table)
    return 0
