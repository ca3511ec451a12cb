"""Runs that nothing happens to: `launcher why` must name no cause, whatever their steps, saves and nodes are like."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.drill import faults
from selfguide.spec.run import RunFolder
from tests.cluster.bed import BATCH, Bed

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

# name -> its settings
RUNS = {
    "plain": [],
    "another-seed": ["seed=1"],
    "one-node": ["nodes=1"],
    "four-nodes": ["nodes=4"],
    "two-ranks-a-node": ["nodes=1", "cluster.gpus_per_node=2"],
    "saved-at-each-step": [f"train.checkpoint_every={BATCH}"],
    "scored": ["evaluation=fd_digits", "evaluation.samples=64"],
    "bf16": ["engine.dtype=bf16"],
    "torch": ["engine=torch"],
    "restarts-none": ["cluster.restart=none"],
}
# seconds that a step of a run takes longer
SLOW = {"another-seed": 0.2, "bf16": 0.05}


def told(bed: Bed, run: RunFolder) -> dict[str, Any]:
    done = bed.command("launcher.why", str(run.root), "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_why_of_a_healthy_run_names_no_cause(name: str, bed: Bed, tmp_path: Path) -> None:
    """Neither while it trains nor after it has finished."""
    bed = replace(bed, runs=tmp_path / "runs")
    if name in SLOW:
        faults.slow(bed, SLOW[name], always=True)
    # none that a busy machine reaches
    run = bed.submit(name, "cluster.timeout_min=60", *RUNS[name])
    assert told(bed, run)["cause"] is None
    bed.trains(run, 1, 8 * BATCH, 600.0)
    assert told(bed, run)["cause"] is None
    bed.finishes(run, 600.0)
    found = told(bed, run)
    assert (found["cause"], found["state"]) == (None, "finished")
    assert {each["attempt"] for each in found["events"]} <= {None, 1}
    assert not [each for each in found["events"] if each["kind"] in ("cause", "damaged", "hang")]
