"""Measures the parts one after another, and writes what was found after each."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import subprocess
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfguide.spec.config import EngineConfig
from selfguide.spec.config.laws import fields_of
from selfguide.spec.run import strict_json
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
    works = [work for part in chosen for work in _works(part, extent, peak)]
    # many networks take most of the time: the first is measured in its place, the others when all else has been
    for work in sorted(works, key=lambda each: each.later):
        _measure(work, device, report)


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
        begun.write_text(strict_json(self.found, indent=1))
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


def _measure(work: _Work, device: torch.device, report: Report) -> None:
    if report.late:
        report.lacks(work.name, "no time was left; --minutes gives more, --only less to do")
        return
    try:
        for row in work.rows():
            report.add(work.part, row)
    except Exception as error:  # noqa: BLE001 - the other parts are worth having
        report.lacks(work.name, f"{type(error).__name__}: {str(error).strip()[-500:]}")
    if device.type == "cuda":
        torch.cuda.empty_cache()


Rows = Callable[[], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class _Work:
    """A piece of a part, of its own so that one failure, or the end of the time, costs one of them."""

    part: str
    name: str
    rows: Rows
    # behind all that is not
    later: bool = False


def _works(part: str, extent: Extent, peak: Peak | None) -> Iterator[_Work]:
    if part == "steps":
        for model, batch, execution in steps.cases(extent):
            name, later = f"{model}, {batch} images, {execution}", model != extent.models[0]
            if execution == "graph" and extent.device.type != "cuda":
                yield _Work(part, name, _absent("there are no CUDA graphs without a GPU"), later)
                continue
            rows = lambda m=model, b=batch, e=execution: [  # noqa: E731
                steps.measured(m, b, e, extent, peak)
            ]
            yield _Work(part, name, rows, later)
    elif part == "stages":
        yield from _stages(extent)
    elif part == "routing":
        yield _Work(part, part, lambda: steps.routing(extent, peak))
    else:
        yield _Work(part, part, lambda: getattr(parts, part)(extent))


def _absent(why: str) -> Rows:
    def rows() -> Iterable[dict[str, Any]]:
        raise UserError(why)

    return rows


def _stages(extent: Extent) -> Iterator[_Work]:
    """Each stage that there is, on one rank, in a process of its own, to bare torch of its dtype in another."""
    if importlib.util.find_spec("deepspeed") is None:
        missing = "deepspeed is not installed; --wheels takes a folder with its wheel"
        yield _Work("stages", "stages", _absent(missing))
        return
    bare: dict[str, float] = {}
    kind = next(each.type for each in fields_of(EngineConfig) if each.name == "zero_stage")
    for stage in typing.get_args(kind):
        yield _Work("stages", f"ZeRO-{stage}", functools.partial(_stage, stage, bare, extent))


def _stage(stage: int, bare: dict[str, float], extent: Extent) -> Iterator[dict[str, Any]]:
    """`bare` keeps the seconds of bare torch by dtype."""
    dtype = steps.dtype_of(stage, extent)
    if dtype not in bare:
        bare[dtype] = run_ranks(1, steps.stage, None, dtype, extent)[0]
        yield {"engine": "torch", "dtype": dtype, "ms": bare[dtype] * 1e3, "ratio": 1.0}
    taken = run_ranks(1, steps.stage, stage, dtype, extent)[0]
    ratio = taken / bare[dtype]
    yield {"engine": f"ZeRO-{stage}", "dtype": dtype, "ms": taken * 1e3, "ratio": ratio}


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{name} {_shown(value)}" for name, value in row.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return f"({_line(value)})"
    return str(value)
