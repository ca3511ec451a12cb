"""What ranks measure of their nodes together before they train, and the end of the attempt where a node is not well."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.distributed import RankInfo, gather
from selfguide.spec import nodes
from selfguide.spec.config import Config
from selfguide.spec.nodes import Finding, NodeRefused, Probe, judge, node_name
from selfguide.spec.run import read_record, write_record
from selfguide.training.engine.protocol import DTYPES
from shards import storage
from shards.errors import DamagedError
from shards.format.manifest import Manifest

log = logging.getLogger(__name__)

# rows of square matrices, 3 times a power of 2: some milliseconds of work
_ROWS, _ROWS_ON_CPU = 6144, 384
_REPEATS = 7
# a GPU that has slept needs a while to come up to speed
_AWAKE_S = 0.2
_REDUCED_BYTES, _REDUCED_BYTES_ON_CPU = 64 << 20, 1 << 20
# of a shard, as a proof that it can be read
_FIRST_BYTES = 512
# a rank of a refused node ends the job of all; the others wait for that
_ENDED_S = 60.0


def check(config: Config, rank_info: RankInfo, attempt: Path, sources: Sequence[Manifest]) -> None:
    """Measures all nodes at once, and leaves `preflight.json` in the attempt's folder.

    Args:
        sources: what will be trained on, one manifest a root.

    Raises:
        NodeRefused: on one rank of each node that must not train. The other ranks wait until the job is ended for it,
            so that nobody blames them.
        RuntimeError: products or sums are wrong on all nodes.
    """
    began = time.monotonic()
    probe = _probe(config, rank_info, sources)
    best = attempt.parents[3] / nodes.FOLDER / probe.node / f"{_file_name(probe, config)}.json"
    # on CPUs it depends on the neighbours
    past = None if probe.device == "cpu" else (read_record(best) or {}).get("seconds")
    ahead_s = _server_ahead_s(attempt) if rank_info.rank == 0 else 0.0
    known = gather((probe.node, past, ahead_s))
    past_s = {node: seconds for node, seconds, _ in known if seconds is not None}

    def judged() -> tuple[list[Probe], list[Finding]]:
        probes = gather(probe)
        return probes, judge(probes, server_ahead_s=known[0][2], past_s=past_s)

    # all ranks have just left one collective
    probe = replace(probe, clock=now())
    probes, found = judged()
    slow = {each.node for each in found if each.refused and each.check == "gemm speed"}
    if slow:
        # a neighbour may have had its turn
        if probe.node in slow:
            _, seconds = product(rank_info.device, DTYPES[config.engine.dtype])
            probe = replace(probe, product_s=min(seconds, probe.product_s))
        probes, found = judged()
    if rank_info.rank == 0:
        _tell(attempt, probes, found, time.monotonic() - began)
    for problem in ("wrong", "missummed"):
        if all(getattr(each, problem) for each in probes):
            raise RuntimeError(f"on all nodes {getattr(probe, problem)}")
    _end_where_refused(rank_info.rank, probes, [each for each in found if each.refused])
    if probe.device != "cpu" and (past is None or probe.product_s < past):
        try:
            write_record(best, {"seconds": probe.product_s, "device": probe.device}, replace=True)
        except OSError as error:  # another user's, say
            log.warning(f"what {probe.node} does at its best is not kept: {error}")


def _probe(config: Config, rank_info: RankInfo, sources: Sequence[Manifest]) -> Probe:
    """What this rank measures by itself, and of the sum over all."""
    device, gpu = rank_info.device, rank_info.device.type == "cuda"
    free = 1.0
    if gpu:
        there, total = torch.cuda.mem_get_info(device)
        free = there / total
    wrong, product_s = product(device, DTYPES[config.engine.dtype])
    missummed, reduce_s = _reduce(rank_info)
    return Probe(
        rank=rank_info.rank,
        node=node_name(),
        device=torch.cuda.get_device_name(device) if gpu else "cpu",
        wrong=wrong,
        product_s=product_s,
        missummed=missummed,
        reduce_s=reduce_s,
        clock=0.0,
        unreadable=_unreadable(config, sources) if rank_info.local_rank == 0 else "",
        free=free,
    )


def product(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    """Returns why a product of two matrices is wrong on `device`, "" where it is right, and the seconds it takes.

    Entries are -1, 0 and 1, so that no rounding and no order of summation matters, in any floating-point format.
    """
    rows = _ROWS if device.type == "cuda" else _ROWS_ON_CPU
    number = torch.arange(rows, device=device)
    sums = (number[:, None] + number) % 3
    matrix = (sums - 1).to(dtype)
    # every third of the rows sees the same columns
    wanted = torch.where((number[:, None] - number) % 3 == 0, 2 * (rows // 3), -(rows // 3))
    times: list[float] = []
    # where the sum is split, its parts would be rounded
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    flags.allow_bf16_reduced_precision_reduction = False
    try:
        while len(times) < _REPEATS or (device.type == "cuda" and sum(times) < _AWAKE_S):
            began = now_exactly(device)
            found = multiply(matrix, matrix)
            times.append(now_exactly(device) - began)
    finally:
        flags.allow_bf16_reduced_precision_reduction = before
    best_s = min(times)
    differs = int((found != wanted).sum())
    if not differs:
        return "", best_s
    bad = int((~torch.isfinite(found)).sum())
    what = f"{differs:,} of {found.numel():,} entries of a product of matrices are wrong"
    return f"{what}, {bad:,} of them not finite" if bad else what, best_s


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """What is timed."""
    return left @ right


def now() -> float:
    """This node's clock, in seconds since 1970."""
    return time.time()


def now_exactly(device: torch.device) -> float:
    """The monotonic clock in seconds, when all that was asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reduce(rank_info: RankInfo) -> tuple[str, float]:
    """Why a sum over all ranks is wrong here, "" where it is right, and the seconds it takes."""
    gpu = rank_info.device.type == "cuda"
    count = (_REDUCED_BYTES if gpu else _REDUCED_BYTES_ON_CPU) // 4
    seconds, total = 0.0, rank_info.rank + 1
    if rank_info.world == 1:
        return "", seconds
    wanted = rank_info.world * (rank_info.world + 1) // 2
    # connections are made by the first
    for _ in range(2):
        value = torch.full((count,), float(total), device=rank_info.device)
        began = now_exactly(rank_info.device)
        dist.all_reduce(value)
        seconds = now_exactly(rank_info.device) - began
    differs = int((value != wanted).sum())
    return f"{differs:,} of {count:,} sums over all ranks are wrong" if differs else "", seconds


def _unreadable(config: Config, sources: Sequence[Manifest]) -> str:
    """Why the first bytes of the first shards cannot be read here; "" where they can."""
    roots = [config.data.roots] if isinstance(config.data.roots, str) else config.data.roots
    for root, manifest in zip(roots, sources, strict=True):
        shard = manifest.shards[0]
        try:
            storage.read_range(storage.join(root, shard.name), 0, min(_FIRST_BYTES, shard.bytes))
        except (OSError, DamagedError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def _server_ahead_s(attempt: Path) -> float:
    """The clock of the disk with the attempt's folder, less this node's."""
    path = attempt / f".clock-{os.getpid()}"
    before = now()
    path.write_bytes(b"")
    try:
        written = path.stat().st_mtime
        # at a moment between the two, however long a slow server takes
        return written - min(max(written, before), now())
    finally:
        path.unlink()


def _file_name(probe: Probe, config: Config) -> str:
    """Of the record of the best product on this kind of device."""
    return "product-" + re.sub(r"\W+", "-", f"{probe.device} {config.engine.dtype}").lower()


def _tell(attempt: Path, probes: Sequence[Probe], found: Sequence[Finding], took_s: float) -> None:
    """Writes down what was measured, and says it in the log of rank 0."""
    ranks = [asdict(each) for each in probes]
    about = {"took_s": took_s, "findings": [asdict(each) for each in found], "ranks": ranks}
    write_record(attempt / "preflight.json", about)
    for each in found:
        word = "refused" if each.refused else "noted"
        log.warning(f"preflight: {each.node} {word}, {each.check}: {each.what}")
    times = [1e3 * each.product_s for each in probes]
    clocks = [each.clock for each in probes]
    reduce_s = max(each.reduce_s for each in probes)
    log.info(
        f"preflight of {len({each.node for each in probes})} nodes in {took_s:.2f} s: a product of matrices takes "
        f"{min(times):.3g} to {max(times):.3g} ms, a sum over all ranks {1e3 * reduce_s:.3g} ms, clocks are within "
        f"{max(clocks) - min(clocks):.3f} s"
    )


def _end_where_refused(rank: int, probes: Sequence[Probe], refused: Sequence[Finding]) -> None:
    if not refused:
        return
    for each in refused:
        first = min(probe.rank for probe in probes if probe.node == each.node)
        if rank == first:
            raise NodeRefused(each.node, each.check, each.what)
    time.sleep(_ENDED_S)
    raise RuntimeError(
        f"this rank was not ended {_ENDED_S:.0f} s after {refused[0].node} was refused"
    )
