"""Measures one GPU: ceilings, training steps, engines, and what stands beside them; for whoever has one.

python -m tools.bench gpu --out gpu.json
python -m tools.bench gpu --wheels wheels/ --out gpu.json    DeepSpeed from a folder of wheels
python -m tools.bench gpu --only ceilings,steps --minutes 4
python -m tools.bench gpu --small --out small.json           all parts in seconds, on a CPU as well

What it finds is written after each part, and what it lacks is named there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from selfguide.spec.config import EngineConfig
from selfguide.spec.config.laws import fields_of
from selfguide.training.flops import Peak, peak_of
from shards.errors import UserError
from tools.bench.gpu import parts, steps
from tools.bench.gpu.timing import Extent, small, whole
from tools.ranks import run_ranks

# libraries whose absence leaves something out
_LIBRARIES = ("deepspeed", "triton", "torchvision", "timm", "diffusers", "hydra")
# in the order of their worth, should time run out
PARTS = ("ceilings", "gradients", "steps", "stages", "extraction", "snapshot", "sampling", "inception")  # fmt: skip
# a wheel folder beyond this is not what was meant
_LARGEST = 60 << 20


class Report:
    """What was found so far, written whole after each addition."""

    def __init__(self, path: Path, about: dict[str, Any], minutes: float) -> None:
        self._path, self.found = path, {"machine": about, "parts": {}, "problems": []}
        self._ends = time.monotonic() + 60 * minutes
        self._write()

    @property
    def late(self) -> bool:
        return time.monotonic() > self._ends

    def add(self, part: str, row: dict[str, Any]) -> None:
        self.found["parts"].setdefault(part, []).append(row)
        print(f"{part}: {_line(row)}", flush=True)
        self._write()

    def lacks(self, part: str, why: str) -> None:
        self.found["problems"].append({"part": part, "why": why})
        print(f"{part}: not measured: {why}", flush=True)
        self._write()

    def _write(self) -> None:
        begun = self._path.with_name(f".{self._path.name}")
        begun.write_text(json.dumps(self.found, indent=1))
        begun.replace(self._path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-bench.json"), metavar="FILE")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="wheels of what is not installed"
    )
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins later (9)")
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
        extent = small(device) if options.small else whole(device)
        peak = peak_of(device)
        report = Report(options.out, machine(device, peak), options.minutes)
        for part in (each for each in PARTS if each in chosen):
            _measure(part, extent, peak, report)
    print(f"written to {options.out}")
    return 0


def machine(device: torch.device, peak: Peak | None) -> dict[str, Any]:
    """What every figure is of."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "absent": [name for name in _LIBRARIES if importlib.util.find_spec(name) is None],
        "commit": _commit(),
        "peak": f"{peak.tflops:g} TFLOP/s ({peak.name})" if peak else None,
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": about.name,
            "memory_gib": about.total_memory / 2**30,
            "cuda": torch.version.cuda,
        }
    return found


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None


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


def _measure(part: str, extent: Extent, peak: Peak | None, report: Report) -> None:
    for name, work in _works(part, extent, peak):
        if report.late:
            report.lacks(name, "no time was left; --minutes gives more, --only less to do")
            continue
        try:
            for row in work():
                report.add(part, row)
        except Exception as error:  # noqa: BLE001 - the other parts are worth having
            report.lacks(name, f"{type(error).__name__}: {str(error).strip()[-500:]}")
        if extent.device.type == "cuda":
            torch.cuda.empty_cache()


Work = Callable[[], Iterator[dict[str, Any]]]


def _works(part: str, extent: Extent, peak: Peak | None) -> Iterator[tuple[str, Work]]:
    """(name, work) of a part, apart so that one failure costs one of them."""
    if part == "steps":
        for model, batch, execution in steps.cases(extent):
            name = f"{model}, {batch} images, {execution}"
            if execution == "graph" and extent.device.type != "cuda":
                yield name, _absent("there are no CUDA graphs without a GPU")
                continue
            one = lambda m=model, b=batch, e=execution: iter(  # noqa: E731
                [steps.measured(m, b, e, extent, peak)]
            )
            yield name, one
    elif part == "stages":
        yield "stages", lambda: _stages(extent)
    else:
        yield part, lambda: getattr(parts, part)(extent)


def _absent(why: str) -> Work:
    def work() -> Iterator[dict[str, Any]]:
        raise UserError(why)

    return work


def _stages(extent: Extent) -> Iterator[dict[str, Any]]:
    """Each stage that there is, on one rank, in a process of its own, to bare torch in another."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("deepspeed is not installed; --wheels takes a folder with its wheel")
    kind = next(each.type for each in fields_of(EngineConfig) if each.name == "zero_stage")
    bare = run_ranks(1, steps.stage, None, extent)[0]
    yield {"engine": "torch", "ms": bare * 1e3, "ratio": 1.0}
    for stage in typing.get_args(kind):
        try:
            taken = run_ranks(1, steps.stage, stage, extent)[0]
        except Exception as error:  # noqa: BLE001 - named, and the next stage may work
            yield {
                "engine": f"ZeRO-{stage}",
                "problem": f"{type(error).__name__}: {str(error).strip()[-500:]}",
            }
            continue
        yield {"engine": f"ZeRO-{stage}", "ms": taken * 1e3, "ratio": taken / bare}


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{name} {_shown(value)}" for name, value in row.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return f"({_line(value)})"
    return str(value)
