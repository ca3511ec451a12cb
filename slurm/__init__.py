"""A real Slurm cluster on one machine, for development and tests. See `slurm.devcluster`."""

import sys
from pathlib import Path

# `python -m` puts the working directory first: packages there that are called like ours must not be taken for them,
# unless this one lies there too, as in a checkout and in an attempt's code copy
_HERE, _ROOT = str(Path.cwd()), Path(__file__).resolve().parents[1]
if sys.argv[:1] == ["-m"] and sys.path[:1] == [_HERE] and Path.cwd() != _ROOT:
    del sys.path[0]
