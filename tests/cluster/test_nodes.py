"""Nodes that are not well, on a real Slurm: refused before training, named, and done without; the run goes on.

What is wrong with a node is played by code beside the trainer (`Bed.inside`), on the rank that finds it out.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.drill.faults import (
    impatient,
    kill_daemon,
    kill_rank,
    restart_node,
    slow,
)
from launcher.reconcile import decide, nodes
from launcher.reconcile.health import Evidence
from selfguide.spec.run import RunFolder
from slurm import processes
from tests.cluster.bed import BATCH, Bed, attempts, same_end, trains

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

# put on a rank before it looks at its node or measures
_PREFLIGHT = "from launcher.attempt import preflight\n"
_PROBES = "from selfguide.training import probes\n"
SICK = {
    "disk": _PREFLIGHT + "preflight.free_bytes = lambda folder: 1000",
    "memory": _PREFLIGHT + "preflight.available_memory = lambda: 1000",
    "gemm": _PROBES + "probes.multiply = lambda left, right: left @ right * float('nan')",
    "gemm speed": _PROBES
    + "import time\nprobes.multiply = lambda left, right: (time.sleep(0.3), left @ right)[1]",
    "clock": _PROBES + "import time\nprobes.now = lambda: time.time() + 120",
    "shards": _PROBES + "probes._unreadable = lambda config, sources: 'OSError: no such mount'",
}


def evidence(bed: Bed) -> list[Evidence]:
    return nodes.read_all(bed.runs)


def table(bed: Bed, *words: str) -> dict[str, dict[str, object]]:
    done = bed.command("launcher.nodes", "--runs", str(bed.runs), "--json", *words)
    assert done.returncode == 0, done.stderr
    return {row["node"]: row for row in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=pytest.mark.quick if check == "disk" else ()) for check in SICK],
)
def test_f5_a_sick_node_is_refused_before_training_and_named(bed: Bed, check: str) -> None:
    bed.inside(1, SICK[check])
    refused(bed, bed.submit("f5"), 1, check)


def test_f3_a_node_whose_name_does_not_resolve_is_refused_and_nobody_falls_back_to_localhost(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    unknown = "raise socket.gaierror(-2, 'Name or service not known')"
    code = f"import socket\ndef unknown(name): {unknown}\nsocket.gethostbyname = unknown"
    bed.inside(0, code)
    run = bed.submit("f3")
    same_end(bed, run, unharmed)
    refused(bed, run, 0, "address")
    assert not (run.attempt(1) / "rendezvous.json").exists()


def refused(bed: Bed, run: RunFolder, rank: int, check: str) -> None:
    """The first attempt ended by this check of a rank's node, and the second one began without the node."""
    if not bed.view(run).finished:
        # nothing was learned that could differ
        trains(bed, run, 2, BATCH)
        assert bed.command("launcher.cancel", str(run.root)).returncode == 0
    first, last = bed.view(run).attempts
    why = decide.cause(first)
    assert (why.kind, why.rank) == ("node", str(rank))
    ended = {rank: (record["class"], record["code"]) for rank, record in first.exits.items()}
    assert ended.pop(str(rank)) == ("node", 88)
    # the other was ended for it
    assert {kind for kind, _ in ended.values()} <= {"signal", "error"}
    assert first.progress.get("section") != "train" and first.resumed_from is None
    (against,) = evidence(bed)
    assert (against.kind, against.type, against.rank) == ("preflight", check, str(rank))
    assert against.node == first.nodes[str(rank)]
    # measured once is enough
    assert table(bed)[against.node]["excluded"] and against.node not in last.nodes.values()
    assert list(last.excluded) == [against.node]


def stands(bed: Bed, run: RunFolder, rank: int) -> str:
    """The node of a rank of the newest attempt."""
    at = bed.view(run).newest
    assert at is not None
    return at.nodes[str(rank)]


def test_f4_a_node_that_fails_twice_is_done_without_by_a_successor_that_was_queued_before(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("f4")
    trains(bed, run)
    bad = stands(bed, run, 1)
    kill_rank(bed, 1)
    trains(bed, run, 2, 44 * BATCH)
    # Slurm takes the same nodes as long as nobody says otherwise
    assert stands(bed, run, 1) == bad
    kill_rank(bed, 1)
    view = same_end(bed, run, unharmed, tries=3)
    assert attempts(view)[:2] == ["killed", "killed"]
    found = evidence(bed)
    assert [(each.node, each.kind, each.attempt) for each in found] == [
        (bad, "killed", 1),
        (bad, "killed", 2),
    ]
    row = table(bed)[bad]
    assert row["excluded"] and row["evidence"] == {"killed": 2} and str(row["until"]) > "0"
    assert bad not in view.attempts[2].nodes.values()
    assert list(view.attempts[2].excluded) == [bad]
    # of four nodes one at most, whatever comes
    others = [name for name in table(bed) if name != bad]
    for number, name in enumerate([*others, *others]):
        more = Evidence(node=name, time=time.time(), kind="hang", run="x/y", attempt=number)
        nodes.add(bed.runs, more)
    assert [row["excluded"] for row in table(bed).values()].count(True) == 1


def test_b4_a_drained_node_keeps_its_attempt_and_gets_no_other(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("b4")
    trains(bed, run)
    node = stands(bed, run, 1)
    bed.ask("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=to be mended")
    try:
        trains(bed, run, 1, 50 * BATCH)
        row = table(bed)[node]
        assert str(row["state"]).startswith("dr") and row["reason"] == "to be mended"
        assert not row["excluded"]
        kill_rank(bed, 0)
        view = same_end(bed, run, unharmed)
        assert node not in view.attempts[1].nodes.values()
    finally:
        bed.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")


def test_b1_a_stray_is_ended_by_preflight_when_its_node_returns(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    """Of a node that Slurm lost, a rank that hangs lives on: Slurm forgets it, and the next attempt there finds it."""
    # else the monitor of its node ends it
    run = bed.submit("b1-stray", "cluster.hang_step_s=null")
    trains(bed, run)
    slow(bed, 0.3, always=True)
    stray, lost = bed.ranks(run)[1], stands(bed, run, 1)
    step = _step(stray)
    others = [name for name in bed.cluster.nodes if name not in bed.nodes(run)]
    drained = f"NodeName={','.join(others)}"
    try:
        with impatient(bed):
            os.kill(stray, signal.SIGSTOP)
            kill_daemon(bed.cluster, lost)
            trains(bed, run, 2, BATCH)
        # which would end the rank when the node is back
        os.kill(step, signal.SIGKILL)
        restart_node(bed, lost)
        assert Path(f"/proc/{stray}").exists()
        bed.ask("scontrol", "update", drained, "State=DRAIN", "Reason=test")
        kill_rank(bed, 0)
        trains(bed, run, 3, BATCH)
        assert lost in bed.nodes(run)
        assert not Path(f"/proc/{stray}").exists()
        bed.ask("scontrol", "update", drained, "State=RESUME")
        view = same_end(bed, run, unharmed, tries=3)
        assert attempts(view)[0] == "node"
        assert [each.node for each in evidence(bed) if each.kind == "node"] == [lost]
    finally:
        for name in others:
            with contextlib.suppress(RuntimeError):  # it was not drained, or is back
                bed.ask("scontrol", "update", f"NodeName={name}", "State=RESUME")


def _step(pid: int) -> int:
    """The slurmstepd above a rank."""
    found = processes.look(pid)
    while found is not None and found.name != "slurmstepd":
        found = processes.look(found.parent)
    assert found is not None
    return found.pid
