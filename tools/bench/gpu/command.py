"""Measures one GPU: ceilings, training steps, engines, and what stands beside them; for whoever has one.

python -m tools.bench gpu --out gpu.json
python -m tools.bench gpu --wheels wheels/ --out gpu.json    DeepSpeed from a folder of wheels
python -m tools.bench gpu --only ceilings,steps --minutes 4
python -m tools.bench gpu --small --out small.json           all parts in seconds, on a CPU as well

What it finds is written after each part, and what it lacks is named there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from shards import storage
from shards.errors import UserError

# in the order of their worth, should time run out
PARTS = (
    "ceilings", "gradients", "steps", "stages", "routing", "attention", "extraction", "snapshot",
    "sampling", "inception",
)  # fmt: skip
# a wheel folder beyond this is not what was meant
_LARGEST = 60 << 20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=storage.expanded,
        default=Path("gpu-bench.json"),
        metavar="FILE",
        help="what was found (gpu-bench.json)",
    )
    parser.add_argument(
        "--wheels",
        type=storage.expanded,
        metavar="DIR",
        help="wheels of what is not installed (none)",
    )
    parser.add_argument(
        "--only", default=",".join(PARTS), metavar="PARTS", help=f"of {','.join(PARTS)} (all)"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="no part begins after so many (9)"
    )
    parser.add_argument("--small", action="store_true", help="small networks, and no GPU needed")
    options = parser.parse_args(argv)
    chosen = [part for part in options.only.split(",") if part]
    if unknown := sorted(set(chosen) - set(PARTS)):
        raise UserError(f"--only {','.join(unknown)}: the parts are {', '.join(PARTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        raise UserError("torch sees no GPU here; --small runs all parts on the CPU, in small")
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
        if options.wheels is not None:
            _unpack(options.wheels, Path(folder))
        try:
            from tools.bench.gpu import suite
        except ImportError as error:
            raise UserError(
                f"{error.name} is not installed; install it, or put its wheel into a folder for --wheels"
            ) from error
        parts = [part for part in PARTS if part in chosen]
        suite.run(parts, device, options.out, small=options.small, minutes=options.minutes)
    print(f"written to {options.out}")
    return 0


def _unpack(wheels: Path, folder: Path) -> None:
    """Installs every wheel of a folder beside what is installed, which goes first.

    Raises:
        UserError: there is none, they are too large, or pip cannot install them.
    """
    files = sorted(wheels.glob("*.whl"))
    size = sum(each.stat().st_size for each in files)
    if not files or size > _LARGEST:
        raise UserError(
            f"--wheels {wheels} holds {len(files)} wheels of {size >> 20} MiB; give some, of {_LARGEST >> 20} MiB "
            "at most"
        )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", str(folder), *map(str, files)], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"--wheels {wheels}: pip says {done.stderr.strip().splitlines()[-1:]}")
    sys.path.append(str(folder))
    # for the processes that measure one engine each
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (os.environ.get("PYTHONPATH"), str(folder)))
    )
