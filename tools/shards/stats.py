"""Print the manifest of a data set; nothing else is read."""

from __future__ import annotations

import argparse

from shards.format import manifest as manifests
from tools.shards import report

# names that a person reads before scrolling
CLASSES = 100


def add(parser: argparse.ArgumentParser) -> None:
    report.add_root(parser)


def run(options: argparse.Namespace) -> int:
    manifest = manifests.load(options.root)
    summary = {"root": options.root, **report.summary(manifest)}
    if report.as_json(options, summary):
        return 0
    rows = {}
    histogram = manifest.label_histogram or ()
    for name, value in summary.items():
        if name == "class_names":
            named = zip(manifest.class_names, histogram, strict=True)
            shown = [
                f"{label} {report.shown(called)} ({n:,})" for label, (called, n) in enumerate(named)
            ]
            rest = [f"and {len(shown) - CLASSES:,} more (--json)"] if len(shown) > CLASSES else []
            rows["class names"] = ", ".join(shown[:CLASSES] + rest)
            continue
        text = ", ".join(f"{v:.6g}" for v in value) if isinstance(value, list) else str(value)
        if isinstance(value, dict):
            text = ", ".join(f"{n} {v}" for n, v in value.items() if v is not None)
        rows[name.replace("_", " ")] = text
    report.print_table(rows, report.line(manifest))
    return 0
