"""`python -m tools.compare ...` is `python -m tools.study compare ...`, by the name that it had first."""

from __future__ import annotations

import sys

from shards import cli
from tools.study.__main__ import main

if __name__ == "__main__":
    cli.run(lambda: main(["compare", *sys.argv[1:]]))
