"""Imports every module of the project and says what fails: a first look at a host with other versions.

python -m tools.import_check            a line per failure, exit 1 if there is one
python -m tools.import_check --json
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import platform
import traceback
from importlib.metadata import PackageNotFoundError, version

from shards import cli
from tools import flags

PACKAGES = ("slurm", "shards", "selfguide", "launcher", "configs", "tools")
ELSEWHERE = (
    "tools.bench.rivals.with_"  # programs of environments of their own, which have what they import
)
REPORTED = (
    "torch",
    "torchvision",
    "deepspeed",
    "numpy",
    "scipy",
    "submitit",
    "hydra-core",
    "webdataset",
)


def modules() -> list[str]:
    """Every module below the packages; left out are entry points that run on import, and what runs elsewhere."""
    found = []
    for name in PACKAGES:
        package = importlib.import_module(name)
        found.append(name)
        for module in pkgutil.walk_packages(package.__path__, prefix=f"{name}."):
            if not module.name.endswith("__main__") and not module.name.startswith(ELSEWHERE):
                found.append(module.name)
    return found


def failures() -> dict[str, str]:
    """Module -> last line of its traceback."""
    wrong = {}
    for name in modules():
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 - whatever a foreign version raises is the finding
            wrong[name] = traceback.format_exc().strip().splitlines()[-1]
    return wrong


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main(argv: list[str] | None = None) -> int:
    parser = flags.command(
        "tools.import_check",
        __doc__,
        flags.JSON,
    )
    options = parser.parse_args(argv)
    wrong = failures()
    versions = {"python": platform.python_version()} | {name: installed(name) for name in REPORTED}
    if options.json:
        print(json.dumps({"versions": versions, "modules": len(modules()), "failures": wrong}))
    else:
        print("  ".join(f"{name} {found}" for name, found in versions.items()))
        for name, line in wrong.items():
            print(f"{name}: {line}")
        print(f"{len(modules())} modules, {len(wrong)} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    cli.run(main)
