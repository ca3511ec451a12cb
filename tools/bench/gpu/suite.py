"""Measures the parts one after another, and writes what was found after each."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from selfguide.spec.config import EngineConfig
from selfguide.spec.config.laws import fields_of
from selfguide.training.flops import Peak, peak_of
from shards.errors import UserError
from tools.bench.gpu import parts, steps, timing
from tools.bench.gpu.timing import Extent
from tools.ranks import run_ranks

# libraries whose absence leaves something out
_LIBRARIES = ("deepspeed", "triton", "torchvision", "torchdiffeq")


def run(
    chosen: Sequence[str], device: torch.device, out: Path, *, small: bool, minutes: float
) -> None:
    """Measures these parts on `device` and writes them to `out`; no part begins after so many minutes."""
    extent = timing.small(device) if small else timing.whole(device)
    peak = peak_of(device)
    report = Report(out, machine(device, peak), minutes)
    for part in chosen:
        _measure(part, extent, peak, report)


class Report:
    """What was found so far, written whole after each addition."""

    def __init__(self, path: Path, about: dict[str, Any], minutes: float) -> None:
        self._path = path
        self.found: dict[str, Any] = {"machine": about, "parts": {}, "problems": []}
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
    elif part == "routing":
        yield "routing", lambda: steps.routing(extent, peak)
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
