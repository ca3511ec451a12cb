"""Annotations without labels: features, groups, boxes and masks of every sample of a set of shards, as sidecars.

    python -m tools.annotate features data/digits --snapshot RUN --layer 3 --pooling flat --out notes/features
    python -m tools.annotate kmeans data/digits --features notes/features --groups 10 --out notes/kmeans
    python -m launcher.submit experiment=digits_dit guidance=sidecar guidance.ids=notes/kmeans guidance.groups=10

A sidecar is a folder: rows.npy, memory-mapped, one row per sample, and a record of where it came from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from shards import cli
from tools import flags, verbs

VERBS = {
    "features": "one vector a sample, from a snapshot, a net of timm or the pixels",
    "kmeans": "groups by k-means",
    "temi": "groups by TEMI's heads on features",
    "bound": "the most groups worth separating, by TEMI; with --over the fewest",
    "lost": "boxes around objects (LOST)",
    "stego": "masks of groups (STEGO)",
    "truth": "what people annotated in VOC and COCO",
    "adopt": "what was found in images, for the latents encoded from them",
    "adapt": "a ViT's weights, adapted to these images by DINO's loss",
    "clip": "labels by text (CLIP)",
}


def main(argv: Sequence[str] | None = None) -> int:
    options = verbs.parse("tools.annotate", __doc__, VERBS, argv, _common)
    facts, text = options.run(options)
    print(json.dumps(facts) if options.json else text)
    return 0


def _common(parser: argparse.ArgumentParser) -> None:
    root = ("root SHARDS", str, None, "folder or s3:// prefix of shards")
    flags.add(parser, root, ("--json", bool, False, "one JSON object on stdout"))


if __name__ == "__main__":
    cli.run(main)
