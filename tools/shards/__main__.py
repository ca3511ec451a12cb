"""Write, verify and inspect data sets of WebDataset shards.

examples:
  python -m tools.shards make digits --out data/digits
  python -m tools.shards make folder imagenet/train --size 256 --workers 16 --out s3://bucket/in1k-256
  python -m tools.shards make synthetic --out data/latents --count 1024 --shape 4 32 32 --classes 1000
  python -m tools.shards verify data/digits
  python -m tools.shards stats data/digits --json
  python -m tools.shards explain data/digits --images 40960 --batch 64
  python -m tools.shards copy data/digits s3://bucket/digits
"""

from __future__ import annotations

from collections.abc import Sequence

from shards import cli
from tools import verbs

# each a module here: add(parser), run(options) -> exit code
VERBS = {
    "make": "write a data set",
    "encode": "encode images to latents",
    "index": "index existing WebDataset tars to read them in place",
    "copy": "copy a data set between folders and S3, verifying checksums",
    "verify": "verify checksums",
    "repair": "replace damaged shards from an intact copy",
    "diff": "compare two data sets",
    "stats": "print the manifest",
    "inspect": "print one sample, by key or position, and save a picture of it",
    "explain": "list the samples of a batch, by images seen",
    "simulate": "predict requests, bytes, cache hits and shuffling quality from the manifest alone",
    "sweep": "remove unfinished uploads and temporary files of killed writers",
}


def main(argv: Sequence[str] | None = None) -> int:
    options = verbs.parse("tools.shards", __doc__, VERBS, argv)
    return options.run(options)


if __name__ == "__main__":
    cli.run(main)
