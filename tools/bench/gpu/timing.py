"""Seconds of work on a device: many runs between two waits for it, so that its queue never runs dry."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Extent:
    """How much of everything there is to measure."""

    device: torch.device
    dtype: torch.dtype
    models: tuple[str, ...]
    batches: tuple[int, ...]
    # of the parts that need one network and one batch
    model: str
    batch: int
    # of the part that routes tokens, which takes five blocks
    routed: str
    # edge of the large product, and bytes that are copied
    edge: int
    copied: int
    # seconds of one measured block of runs, and blocks
    block_s: float
    blocks: int = 3


def whole(device: torch.device) -> Extent:
    """As the figures in docs/performance.md are to be: latents of 256 x 256 images."""
    return Extent(
        device,
        torch.bfloat16,
        ("dit_xl_2", "dit_b_2", "dit_l_2", "uvit_l_2"),
        (32, 64, 128, 256),
        "dit_xl_2",
        64,
        "dit_xl_2",
        edge=8192,
        copied=1 << 30,
        block_s=0.4,
    )


def small(device: torch.device) -> Extent:
    """All of it in seconds on a CPU, where the figures mean nothing."""
    return Extent(
        device, torch.float32, ("dit_digits",), (2,), "dit_digits", 2, "dit_tiny_32", edge=64, copied=1 << 16,
        block_s=0.0, blocks=2,
    )  # fmt: skip


def seconds(work: Callable[[], object], extent: Extent, *, warmup: int = 3) -> float:
    """Median seconds of one run."""
    for _ in range(warmup):
        work()
    _wait(extent.device)
    once = _block(work, 1, extent.device)
    runs = max(1, min(200, int(extent.block_s / max(once, 1e-6))))
    return statistics.median(_block(work, runs, extent.device) for _ in range(extent.blocks))


def _block(work: Callable[[], object], runs: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(runs):
        work()
    _wait(device)
    return (time.perf_counter() - start) / runs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
