"""Where the wall time of training goes, measured on the device's own clock without ever waiting for it.

On a GPU the marks are CUDA events. They lie in the order of the kernels, so what a mark measures is what the device
did, or waited for, since the mark before it; they are read when they have long passed. On a CPU they are the clock.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# of a report, in the order in which they are shown
SECTIONS = ("data", "forward_backward", "communication", "optimiser", "checkpoint", "other")
# collectives that the host or the device's stream waits for, unless they are asked for as asynchronous
_COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "reduce", "all_to_all_single", "barrier",
)  # fmt: skip


class _HostClock:
    def now(self) -> Any:
        return time.perf_counter()

    def passed(self, moment: Any) -> bool:
        return True

    def seconds(self, start: Any, end: Any) -> float:
        return end - start


class _DeviceClock:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def passed(self, moment: Any) -> bool:
        return moment.query()

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3


class _Span(NamedTuple):
    section: str
    start: Any
    end: Any
    inside: list[tuple[Any, Any]]  # collectives within it


class WallTime:
    """Seconds by section since the last report; sections follow each other without a gap."""

    def __init__(self, device: torch.device) -> None:
        self._clock = _DeviceClock(device) if device.type == "cuda" else _HostClock()
        self._sums = dict.fromkeys(SECTIONS, 0.0)
        self._spans: deque[_Span] = deque()
        self._inside: list[tuple[Any, Any]] = []
        self._last = self._clock.now()

    def mark(self, section: str) -> None:
        """All time since the last mark belongs to `section`, less the collectives in it."""
        now = self._clock.now()
        self._spans.append(_Span(section, self._last, now, self._inside))
        self._last, self._inside = now, []
        while self._spans and self._clock.passed(self._spans[0].end):
            self._settle()

    def _settle(self) -> None:
        section, start, end, inside = self._spans.popleft()
        waited = sum(self._clock.seconds(*each) for each in inside)
        self._sums["communication"] += waited
        self._sums[section] += self._clock.seconds(start, end) - waited

    def restart(self) -> None:
        """Forgets everything until now."""
        self._spans.clear()
        self._inside = []
        self._sums = dict.fromkeys(SECTIONS, 0.0)
        self._last = self._clock.now()

    def take(self) -> dict[str, float]:
        """Seconds of each section since the last call; waits for the device, as a report does anyway."""
        self.mark("other")
        if isinstance(self._clock, _DeviceClock):
            self._last.synchronize()
        while self._spans:
            self._settle()
        found, self._sums = self._sums, dict.fromkeys(SECTIONS, 0.0)
        return found

    @contextlib.contextmanager
    def hears_collectives(self) -> Iterator[None]:
        """Counts as communication what is waited for in collectives, whoever asks for them.

        Neither DeepSpeed nor torch says how long a collective kept a step waiting, so for this while the functions of
        `torch.distributed` are ones that mark their beginning and end. Of a GPU's collectives that is what its stream
        waits for: one that runs beside the backward pass on a stream of its own is hidden, and counts nothing.
        """
        before = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}
        for name, function in before.items():
            setattr(dist, name, self._heard(function))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(dist, name, function)

    def _heard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("async_op") or not self._here():
                return function(*args, **kwargs)
            start = self._clock.now()
            result = function(*args, **kwargs)
            self._inside.append((start, self._clock.now()))
            return result

        return call

    def _here(self) -> bool:
        """Whether the stream of now is the one that is measured."""
        clock = self._clock
        return isinstance(clock, _HostClock) or torch.cuda.current_stream() == clock._stream
