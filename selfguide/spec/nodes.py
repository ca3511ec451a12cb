"""Nodes of a cluster: what one is called, what ranks measure of theirs before training, and which are refused for it.

Pure but for `node_name`. `selfguide.training.probes` measures; what needs no torch is in `launcher.attempt.preflight`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

# in the folder of all runs: what is known of nodes, a folder each
FOLDER = ".nodes"

# a product that takes so many times as long as elsewhere, or as before, refuses a node; on CPUs neighbours take turns
SLOW = 2.0
SLOW_ON_CPU = 4.0
# and is worth a line from here on
SLOWER = 1.3
# a clock that is off by more seconds mixes up which failure was the first
SKEW_S = 10.0
NOTED_SKEW_S = 1.0


def node_name() -> str:
    """Returns the name by which the scheduler knows this node; on one machine the machine's."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


class NodeRefused(Exception):
    """A node failed a check before training. Another one may do, and nothing else is to blame."""

    def __init__(self, node: str, check: str, what: str) -> None:
        self.node, self.check = node, check
        super().__init__(f"{node} fails the check {check!r}: {what}")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one rank measured."""

    rank: int
    node: str
    # name of the GPU, or "cpu"
    device: str
    # why its product of matrices is wrong; "" where it is right
    wrong: str
    # seconds of the product
    product_s: float
    # why what it gets as a sum over all ranks is wrong; "" where it is right
    missummed: str
    # seconds of that sum
    reduce_s: float
    # seconds since 1970, at a moment that all ranks share
    clock: float
    # why it cannot read the shards; "" where it can
    unreadable: str
    # share of the device's memory that nobody holds
    free: float = 1.0


@dataclass(frozen=True)
class Finding:
    """What is not well about a node. One that is not refused is only reported."""

    node: str
    check: str
    what: str
    refused: bool = True


def judge(
    probes: Sequence[Probe], *, server_ahead_s: float, past_s: Mapping[str, float]
) -> list[Finding]:
    """Returns what is not well, the same on every rank.

    What all nodes share is no node's fault, and is left to those who meet it later.

    Args:
        probes: one of every rank.
        server_ahead_s: the file server's clock less that of rank 0; of two nodes it tells which one is wrong.
        past_s: seconds of the product on each node at its best, for nodes where that is known.
    """
    nodes = len({probe.node for probe in probes})
    found = [
        *_alone(probes, "gemm", lambda probe: probe.wrong),
        *_alone(probes, "all-reduce", lambda probe: probe.missummed),
        # where there is one node only, it is hardly the node's
        *(_alone(probes, "shards", lambda probe: probe.unreadable) if nodes > 1 else ()),
        *_alone(probes, "gpu memory", _held),
        *_speeds(probes, past_s),
        *_clocks(probes, probes[0].clock + server_ahead_s),
    ]
    # one a node and check
    return list({(each.node, each.check): each for each in reversed(found)}.values())[::-1]


def _alone(probes: Sequence[Probe], check: str, problem: Callable[[Probe], str]) -> list[Finding]:
    """The nodes that have a problem which not all of several have."""
    nodes = {probe.node for probe in probes}
    found = [Finding(probe.node, check, problem(probe)) for probe in probes if problem(probe)]
    return [] if len(nodes) > 1 and {each.node for each in found} == nodes else found


def _held(probe: Probe) -> str:
    """Something else holds much of its GPU."""
    if probe.free >= 0.75:
        return ""
    return f"{probe.device} of rank {probe.rank} has {probe.free:.0%} of its memory free"


def _speeds(probes: Sequence[Probe], past_s: Mapping[str, float]) -> list[Finding]:
    """Products that take much longer than the median on other nodes, or than before."""
    found = []
    for probe in probes:
        alike = [each for each in probes if each is not probe and each.device == probe.device]
        # on one node its other ranks
        others = [each for each in alike if each.node != probe.node] or alike
        wanted = (
            {"the median of the others": median(each.product_s for each in others)}
            if others
            else {}
        )
        if probe.node in past_s:
            wanted["this node at its best"] = past_s[probe.node]
        for whose, seconds in wanted.items():
            times = probe.product_s / seconds
            if times >= SLOWER:
                limit = SLOW_ON_CPU if probe.device == "cpu" else SLOW
                what = (
                    f"a product of matrices takes {1e3 * probe.product_s:.3g} ms on rank {probe.rank} "
                    f"({probe.device}), {times:.1f} times as long as {whose}"
                )
                found.append(Finding(probe.node, "gemm speed", what, times >= limit))
    # the worst of a node is reported
    return sorted(found, key=lambda each: not each.refused)


def _clocks(probes: Sequence[Probe], server_clock: float) -> list[Finding]:
    """Clocks that are off the median of all nodes' and the file server's."""
    clocks = {probe.node: probe.clock for probe in reversed(probes)}
    now = median([*clocks.values(), server_clock])
    return [
        Finding(
            node, "clock", f"its clock is off by {clock - now:+.1f} s", abs(clock - now) >= SKEW_S
        )
        for node, clock in clocks.items()
        if abs(clock - now) >= NOTED_SKEW_S
    ]
