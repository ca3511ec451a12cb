"""Cell F6 on a real Slurm: two of four nodes go, the run trains on with the others, and takes them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.reconcile import decide
from selfguide.spec.run import RunFolder
from tests.cluster.bed import BATCH, DIGITS, STEPS, Bed, adds_up, attempts, gone, read_whole, until

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

ELASTIC = [
    "nodes=4", "min_nodes=2", "cluster.fewer_nodes_after_s=3", "cluster.more_nodes_after_s=3",
    f"train.checkpoint_every={STEPS * BATCH}", "train.log_every=128",
]  # fmt: skip
# beside the trainer: notes what each step reads, slow enough for a scheduler to have its say
NOTES = """
import json, time
from pathlib import Path
from selfguide.training import loop
prepare = loop.prepare_batch
def noted(job, arrays):
    line = [job.state.images, arrays["position"].tolist(), arrays["ordinal"].tolist()]
    at = Path({folder!r}) / f"seen-{{job.lease.number}}-{{job.rank_info.rank}}.jsonl"
    with at.open("a") as file:
        file.write(json.dumps(line) + "\\n")
    time.sleep(0.15)
    return prepare(job, arrays)
loop.prepare_batch = noted
"""


def noted(bed: Bed, folder: Path) -> None:
    folder.mkdir()
    for rank in range(4):
        bed.inside(rank, NOTES.format(folder=str(folder)), always=True)


def seen(folder: Path) -> dict[int, dict[int, int]]:
    """By the images before a step: position -> ordinal of all that the ranks read for it."""
    found: dict[int, dict[int, int]] = {}
    for path in folder.glob("seen-*.jsonl"):
        for line in path.read_text().splitlines():
            images, positions, ordinals = json.loads(line)
            read = found.setdefault(images, {})
            assert not read.keys() & set(positions), f"{path.name}: read twice for one step"
            read |= dict(zip(positions, ordinals, strict=True))
    return found


def curve(run: RunFolder, name: str) -> dict[int, float]:
    """A scalar by images, over all attempts."""
    lines: list[dict[str, Any]] = [
        json.loads(line)
        for path in sorted(run.metrics.glob("train-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return {line["images"]: line[name] for line in lines}


def test_f6_a_run_goes_from_four_nodes_to_two_and_back(bed: Bed, tmp_path: Path) -> None:
    noted(bed, tmp_path / "whole")
    whole = bed.submit("whole", *ELASTIC)
    bed.finishes(whole, 240)
    gone(bed, whole)

    noted(bed, tmp_path / "f6")
    run = bed.submit("f6", *ELASTIC)
    bed.trains(run, 1, 8 * BATCH)
    lost = ",".join(bed.nodes(run)[2:])
    try:
        bed.ask("scontrol", "update", f"NodeName={lost}", "State=DRAIN", "Reason=f6")
        # the boundary, as a time limit would make it
        bed.ask("scancel", "--signal=USR2", bed.job(run))
        bed.trains(run, 2, 30 * BATCH, 180)
        view = bed.view(run)
        assert view.tries == 2 and view.newest is not None
        assert (view.newest.node_count, view.newest.world) == (2, 2)
        assert decide.summary(view).nodes == "2 of 4"
    finally:
        bed.ask("scontrol", "update", f"NodeName={lost}", "State=RESUME")
    until(lambda: run.attempt_numbers()[-1] == 3, "the run takes its nodes back")
    view = bed.finishes(run, 240)
    gone(bed, run)

    assert [at.node_count for at in view.attempts] == [4, 2, 4]
    assert attempts(view) == ["preempted", "preempted", "ok"]
    # the same images in the same steps, each once: no step was lost
    assert seen(tmp_path / "f6") == seen(tmp_path / "whole")
    assert read_whole(run) == set(range(STEPS * BATCH // DIGITS))
    for name, tolerance in (("loss", 1e-3), ("guidance_loss", 1e-2)):
        found, expected = curve(run, name), curve(whole, name)
        assert found.keys() == expected.keys() and len(found) == STEPS
        assert found == pytest.approx(expected, rel=tolerance), name
    adds_up(bed, run)
