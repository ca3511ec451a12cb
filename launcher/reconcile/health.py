"""Which nodes are to blame for how attempts ended, and which of them get no more jobs for a while.

Pure functions over what attempts left (`Evidence`). A failure weighs by how surely it was the node's, and half as much
a day later. A node is excluded from the moment at which its failures weigh as much as two within a day do, until they
have faded; never more than a quarter of a partition is, the worst first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log2

from launcher.reconcile.attempts import Cause
from launcher.reconcile.view import AttemptView

# what a failure of each class weighs. preflight has measured that a node is not well; gpu is an error that only a
# broken one gives. What may also come from the code or from a common disk weighs less
WEIGHTS: dict[str, float] = {
    "preflight": 1.5,
    "gpu": 1.0,
    "node": 1.0,
    "killed": 1.0,
    "hang": 1.0,
    "crash": 0.75,
    "memory": 0.5,
    "storage": 0.5,
}
HALF_LIFE_S = 24 * 3600.0
# two failures of weight 1 at most a half-life apart
EXCLUDED = 1.5
# a node is taken again when what it did weighs less
FADED = 0.75
# of the nodes of a partition, at most
SHARE = 0.25

_GPU = re.compile(r"CUDA error|uncorrectable|\bECC\b|\bXid\b|NVLink|device-side assert", re.I)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One failure of a node, or what a person decided about it."""

    node: str
    # seconds since 1970
    time: float
    # of `WEIGHTS`, or of a person: forgiven, excluded; `class` in the file
    kind: str
    # experiment/id, and number of the attempt
    run: str = ""
    attempt: int = 0
    rank: str | None = None
    # in words, or the note of a person
    what: str = ""
    # of the exception or the signal, and where training was
    type: str = ""
    images: int | None = None
    section: str | None = None


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """A node that gets no jobs of ours."""

    node: str
    # seconds since 1970; None until a person forgives it
    until: float | None
    weight: float
    why: str


def blamed(
    at: AttemptView, cause: Cause, *, run: str, time: float, down: Collection[str] = ()
) -> list[Evidence]:
    """Returns what an attempt that has ended says against its nodes.

    Args:
        cause: why it ended.
        run: as the evidence names it.
        time: when it ended.
        down: nodes that Slurm cannot reach now.
    """
    base = Evidence(node="", kind="preflight", run=run, attempt=at.number, time=time)
    refused = [(rank, exit) for rank, exit in at.exits.items() if exit["class"] == "node"]
    found = [
        replace(
            base,
            node=str(exit.get("node") or at.nodes.get(rank, "")),
            rank=rank,
            what=str(exit["message"]).removeprefix("NodeRefused: "),
            type=str(exit.get("check") or ""),
        )
        for rank, exit in refused
    ]
    kind = "gpu" if cause.kind == "error" and _GPU.search(cause.message) else cause.kind
    for rank in [] if refused or kind not in WEIGHTS else _blamed_ranks(at, cause, down):
        failed = replace(base, node=at.nodes.get(rank, ""), kind=kind, rank=rank, type=cause.type)
        where = replace(failed, images=cause.images, section=cause.section)
        found.append(replace(where, what=cause.message))
    # one a node
    return list({each.node: each for each in reversed(found) if each.node}.values())


def _blamed_ranks(at: AttemptView, cause: Cause, down: Collection[str]) -> list[str]:
    if cause.kind == "killed" and not at.exits and len(set(at.nodes.values())) > 1:
        # what ends all ranks everywhere without a word is no node
        return []
    if cause.kind != "node":
        return [] if cause.rank is None else [cause.rank]
    # of a lost node: those that Slurm cannot reach, or else those that nobody has heard of again
    there = {rank for rank, node in at.nodes.items() if node in down}
    return sorted(there or (at.starts - set(at.exits)) & set(at.nodes), key=int)


def excluded(
    evidence: Iterable[Evidence], nodes: Collection[str], now: float, *, spare: int | None = None
) -> list[Exclusion]:
    """Returns the nodes that get no jobs now, the worst first.

    Args:
        evidence: of any nodes, in any order.
        nodes: of the partition.
        spare: how many may be done without, so that a job still finds as many as it takes.
    """
    found = failing(evidence, nodes, now)
    by_hand = [each for each in found if each.until is None]
    bad = [each for each in found if each.until is not None]
    most = int(SHARE * len(nodes)) if spare is None else min(int(SHARE * len(nodes)), spare)
    return [*by_hand, *bad[: max(0, most - len(by_hand))]]


def failing(evidence: Iterable[Evidence], nodes: Collection[str], now: float) -> list[Exclusion]:
    """Returns the nodes that would be excluded, however many they are, the worst first."""
    by_node: dict[str, list[Evidence]] = {node: [] for node in nodes}
    for each in _believed(evidence):
        if each.node in by_node and each.time <= now:
            by_node[each.node].append(each)
    found = [_weigh(node, its, now) for node, its in by_node.items()]
    bad = [each for each in found if each is not None]
    return sorted(bad, key=lambda each: (-each.weight, each.node))


def _believed(evidence: Iterable[Evidence]) -> list[Evidence]:
    """Evidence that a node is to blame for, by time: not what a run does wherever it is."""
    found = sorted(evidence, key=lambda each: (each.time, each.node, each.run, each.attempt))
    nodes: dict[tuple[object, ...], list[str]] = {}
    for each in found:
        nodes.setdefault(_sameness(each), []).append(each.node)
    kept, seen = [], set()
    for each in found:
        same = _sameness(each)
        if each.images is None or len(set(nodes[same])) == 1:
            # that the same run falls at the same place there again says no more
            if each.images is None or same not in seen:
                kept.append(each)
            seen.add(same)
    return kept


def _sameness(each: Evidence) -> tuple[object, ...]:
    return (each.run, each.kind, each.type, each.images, each.section)


def _weigh(node: str, evidence: Sequence[Evidence], now: float) -> Exclusion | None:
    """Whether a node is excluded by its own evidence, which is in the order of time."""
    weight = last = until = 0.0
    failures: list[Evidence] = []
    by_hand: Evidence | None = None
    for each in evidence:
        weight *= 0.5 ** ((each.time - last) / HALF_LIFE_S)
        last = each.time
        if each.kind == "forgiven":
            weight, until, failures, by_hand = 0.0, 0.0, [], None
        elif each.kind == "excluded":
            by_hand = each
        else:
            weight += WEIGHTS.get(each.kind, 0.0)
            failures.append(each)
        if weight >= EXCLUDED:
            until = max(until, last + HALF_LIFE_S * log2(weight / FADED))
    weight *= 0.5 ** ((now - last) / HALF_LIFE_S)
    if by_hand is not None:
        return Exclusion(node=node, until=None, weight=weight, why=f"by hand: {by_hand.what}")
    if now >= until:
        return None
    return Exclusion(node=node, until=until, weight=weight, why=_in_words(failures))


def _in_words(evidence: Sequence[Evidence]) -> str:
    """'2 killed, 1 preflight (disk); last: ...'."""
    numbers = ", ".join(f"{count} {kind}" for kind, count in counted(evidence).items())
    return f"{numbers}; last: {evidence[-1].what}"


def counted(evidence: Iterable[Evidence]) -> Mapping[str, int]:
    """Returns how often each class stands against a node."""
    counts: dict[str, int] = {}
    for each in evidence:
        if each.kind in WEIGHTS:
            counts[each.kind] = counts.get(each.kind, 0) + 1
    return counts
