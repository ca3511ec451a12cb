"""Commands over the packages: shards, the digit net, the comparison, benchmarks."""

import contextlib
import sys
from pathlib import Path

# `python -m` puts the working directory first: packages there that are called like ours must not be taken for them,
# unless this one lies there too, as in a checkout and in an attempt's code copy
_ROOT = str(Path(__file__).resolve().parents[1])
# one that was removed has no name, and nothing in it
with contextlib.suppress(FileNotFoundError):
    if sys.argv[:1] == ["-m"] and sys.path[:1] == [str(Path.cwd())] != [_ROOT]:
        del sys.path[0]
