"""Nodes that are not well, on a real Slurm: refused before training, named, and done without; the run goes on.

What is wrong with a node is played by code beside the trainer (`Bed.inside`), on the rank that finds it out.
"""

from __future__ import annotations

import json

import pytest

from launcher.reconcile import decide, nodes
from launcher.reconcile.health import Evidence
from launcher.reconcile.view import AttemptView
from tests.cluster.bed import Bed, gone, learned

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
    "address": "import socket\ndef unknown(name): raise socket.gaierror(-2, 'Name or service not known')\n"
    "socket.gethostbyname = unknown",
}


def hosts(bed: Bed, at: AttemptView) -> set[str]:
    """The nodes of an attempt's job."""
    assert at.job is not None
    said = bed.ask("sacct", "-X", "-n", "-o", "NodeList%80", "-j", at.job.record["id"]).strip()
    return set(bed.ask("scontrol", "show", "hostnames", said).split())


def evidence(bed: Bed) -> list[Evidence]:
    return nodes.read_all(bed.runs)


def table(bed: Bed, *words: str) -> dict[str, dict[str, object]]:
    done = bed.command("launcher.nodes", "--runs", str(bed.runs), "--json", *words)
    assert done.returncode == 0, done.stderr
    return {row["node"]: row for row in json.loads(done.stdout)}


@pytest.mark.parametrize("check", SICK)
def test_f5_a_sick_node_is_refused_before_training_and_named(
    bed: Bed, unharmed: dict[str, str], check: str
) -> None:
    rank = 0 if check == "address" else 1
    bed.inside(rank, SICK[check])
    run = bed.submit("f5")
    view = bed.finishes(run)
    first, last = view.attempts
    assert learned(run) == unharmed
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
    assert table(bed)[against.node]["excluded"] and against.node not in hosts(bed, last)
    gone(bed, run)
