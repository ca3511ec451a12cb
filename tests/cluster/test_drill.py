"""The command `launcher.drill` on the development cluster: some cells, and a small storm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.bed import Bed

pytestmark = [pytest.mark.cluster, pytest.mark.faults]


def test_drill_of_two_cells_passes_and_writes_what_a_report_of_a_bug_needs(
    bed: Bed, tmp_path: Path
) -> None:
    words = ["--cells", "A1,C3", "--runs", str(tmp_path / "drill"), "--json", "cluster=devcluster"]
    done = bed.command("launcher.drill", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    cells = {each["cell"]: each for each in told["cells"]}
    assert {each["outcome"] for each in cells.values()} == {"passed"} and len(cells) == 2
    assert cells["C3"]["lost"] == 0 and cells["A1"]["cause"].startswith("killed")
    (written,) = (tmp_path / "drill").glob("*/drill.json")
    assert json.loads(written.read_text()) == told


def test_storm_of_a_seed_ends_at_the_same_bits_and_loses_no_warned_step(
    bed: Bed, tmp_path: Path
) -> None:
    words = ["storm", "--faults", "4", "--seed", "3", "--mean-s", "8", "--json"]
    words += ["--runs", str(tmp_path / "drill"), "cluster=devcluster"]
    done = bed.command("launcher.drill", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["differs"] == [] and not any(told["lost_warned"])
    assert (told["faults"], told["attempts"]) == (4, 5)
    rows = [json.loads(line) for line in Path(told["events"]).read_text().splitlines()]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("planned") == kinds.count("fault") == 4 and kinds[-1] == "finished"
    assert 0 < told["effective"] < told["bound"] <= 1
    assert told["by_hand"] < told["effective"]
