"""What one node says of itself to `launcher.doctor`: its Python, torch, GPUs, commands, folders and data."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.attempt import disks
from selfguide.spec.run import read_record, write_record
from shards import storage
from shards.errors import DamagedError, StoreError, UserError

# a first import from a cold network file system
TORCH_S = 300.0
_TORCH = """
import json, torch
found = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count() if found else 0,
    "names": sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}) if found else [],
}))
"""
# by which a run goes on from inside of its own jobs
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol")


def examine(folder: Path, rank: int, local_rank: int, world: int) -> None:
    """Writes what this process's node is like into `folder`; as one of the first two, what they see of each other."""
    if local_rank == 0:
        asked = read_record(folder / "request.json") or {}
        write_record(folder / f"node-{rank}.json", node(asked["roots"], asked["weights"]))
    if rank < 2 <= world:
        (folder / "two").mkdir(exist_ok=True)
        found = disks.together(folder / "two", rank)
        write_record(folder / f"two-{rank}.json", {"findings": [asdict(each) for each in found]})


def node(roots: Sequence[str], weights: str | None) -> dict[str, Any]:
    """Returns what this node is like, as JSON.

    Args:
        roots: of shards, folders or s3:// prefixes.
        weights: the file or folder that a run begins from.
    """
    scratch = Path(tempfile.gettempdir())
    return {
        "node": os.environ.get("SLURMD_NODENAME") or platform.node(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": packages(),
        "torch": _torch(),
        "commands": [name for name in COMMANDS if shutil.which(name)],
        "scratch": {
            "wanted": os.environ.get("TMPDIR", ""),
            "found": str(scratch),
            "free": _free(scratch),
        },
        "data": {root: _data(root) for root in roots},
        "weights": bool(weights) and not Path(str(weights)).exists(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def packages() -> dict[str, str]:
    """Returns name -> version of all that is installed for this Python."""
    found = importlib.metadata.distributions()
    names = ((each.metadata["Name"], each.version) for each in found)
    # one that is half removed has no name
    return {name.lower().replace("_", "-"): version for name, version in names if name}


def _torch() -> dict[str, Any]:
    """In a process of its own, which may crash where a driver does not fit."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=TORCH_S
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not imported within {TORCH_S:.0f} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"error": last[0]}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _data(root: str) -> str:
    """Why shards cannot be read from here; "" where they can."""
    from shards.format.manifest import load

    try:
        manifest = load(root)
        storage.read_range(storage.join(root, manifest.shards[0].name), 0, 512)
    except (UserError, StoreError, DamagedError, OSError) as error:
        return str(error)
    return ""
