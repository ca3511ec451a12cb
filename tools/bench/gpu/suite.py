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
# seconds that one process may take, and those that even the last one is given
_LONGEST_S, _SHORTEST_S = 240.0, 60.0
# when a piece of work has its turn
_FIRST, _MORE_BATCHES, _ENGINES, _NETWORKS, _THEIR_BATCHES = range(5)


def run(
    chosen: Sequence[str], device: torch.device, out: Path, *, small: bool, minutes: float
) -> None:
    """Measures these parts on `device` and writes them to `out`.

    No part begins after so many minutes, and what runs in a process of its own ends a minute later at the latest.
    """
    extent = timing.small(device) if small else timing.whole(device)
    peak = peak_of(device)
    report = Report(out, machine(device, peak), minutes)
    works = [work for part in chosen for work in _works(part, extent, peak, report)]
    # many networks and engines take most of the time: one batch of the first network is measured in its place, and all
    # that is short before the others
    for work in sorted(works, key=lambda each: each.turn):
        _measure(work, device, report)


class Report:
    """What was found so far, written whole after each addition."""

    def __init__(self, path: Path, about: dict[str, Any], minutes: float) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = {"machine": about, "parts": {}, "problems": []}
        self._ends = time.monotonic() + 60 * minutes
        self._write()

    @property
    def late(self) -> bool:
        return time.monotonic() > self._ends

    def patience_s(self) -> float:
        """Seconds that a process may still take."""
        return min(_LONGEST_S, max(_SHORTEST_S, self._ends + _SHORTEST_S - time.monotonic()))

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
    turn: int = _FIRST


def _works(part: str, extent: Extent, peak: Peak | None, report: Report) -> Iterator[_Work]:
    if part == "steps":
        (_, first, _), *_ = cases = [*steps.cases(extent)]
        for model, batch, execution in cases:
            name = f"{model}, {batch} images, {execution}"
            turns = (_FIRST, _MORE_BATCHES)
            if model != extent.models[0]:
                turns = (_NETWORKS, _THEIR_BATCHES)
            turn = turns[batch != first]
            if execution == "graph" and extent.device.type != "cuda":
                yield _Work(part, name, _absent("there are no CUDA graphs without a GPU"), turn)
                continue
            rows = lambda m=model, b=batch, e=execution: [  # noqa: E731
                steps.measured(m, b, e, extent, peak)
            ]
            yield _Work(part, name, rows, turn)
    elif part == "stages":
        yield from _stages(extent, report)
    elif part == "routing":
        for name, route in (("dense", None), ("routed", steps.ROUTE)):
            row = functools.partial(steps.routing, extent, peak, route)
            yield _Work(part, f"routing, {name}", lambda row=row: [row()])  # type: ignore[misc]
    else:
        yield _Work(part, part, lambda: getattr(parts, part)(extent))


def _absent(why: str) -> Rows:
    def rows() -> Iterable[dict[str, Any]]:
        raise UserError(why)

    return rows


def _stages(extent: Extent, report: Report) -> Iterator[_Work]:
    """Each stage that there is, on one rank, in a process of its own, to bare torch of its dtype in another."""
    if importlib.util.find_spec("deepspeed") is None:
        missing = "deepspeed is not installed; --wheels takes a folder with its wheel"
        yield _Work("stages", "stages", _absent(missing))
        return
    bare: dict[str, float] = {}
    kind = next(each.type for each in fields_of(EngineConfig) if each.name == "zero_stage")
    for stage in typing.get_args(kind):
        rows = functools.partial(_stage, stage, bare, extent, report)
        yield _Work("stages", f"ZeRO-{stage}", rows, _ENGINES)


def _stage(
    stage: int, bare: dict[str, float], extent: Extent, report: Report
) -> Iterator[dict[str, Any]]:
    """`bare` keeps the seconds of bare torch by dtype."""
    dtype = steps.dtype_of(stage, extent)

    def seconds(stage: int | None) -> float:
        patience_s = report.patience_s()
        return float(run_ranks(1, steps.stage, stage, dtype, extent, timeout=patience_s)[0])

    if dtype not in bare:
        bare[dtype] = seconds(None)
        yield {"engine": "torch", "dtype": dtype, "ms": bare[dtype] * 1e3, "ratio": 1.0}
    taken = seconds(stage)
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
