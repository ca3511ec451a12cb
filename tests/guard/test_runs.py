"""Short runs end at the bits they ended at before, from the start and from a run folder of before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.guard.runs import HALF, RUNS, tensors_of, train, where

FIXTURES = Path(__file__).parent / "fixtures"
KNOWN = json.loads((FIXTURES / "hashes.json").read_text())


def same_as_before(name: str, run: Path) -> None:
    """Bit for bit on the kind of machine that made the fixtures; elsewhere to 1e-4 of each tensor's absolute sum."""
    was, now = KNOWN["runs"][name], tensors_of(run)
    assert was.keys() == now.keys()
    if where() == KNOWN["where"]:
        assert {n: t["sha256"] for n, t in was.items()} == {n: t["sha256"] for n, t in now.items()}
    for tensor, values in was.items():
        assert now[tensor]["sum"] == pytest.approx(values["sum"], rel=1e-4, abs=1e-6), tensor


@pytest.mark.parametrize("name", sorted(set(RUNS) - {"torch_online"}))
def test_a_run_of_twenty_steps_ends_at_the_same_bits(name: str, tmp_path: Path) -> None:
    same_as_before(name, train(name, tmp_path / "runs", FIXTURES / "digits"))


@pytest.mark.parametrize("name", HALF)
def test_a_half_trained_run_of_before_resumes_and_ends_at_the_same_bits(
    name: str, tmp_path: Path
) -> None:
    experiment = RUNS[name][0].partition("=")[2]
    shutil.copytree(FIXTURES / name, tmp_path / "runs" / experiment / name)
    run = train(name, tmp_path / "runs", FIXTURES / "digits")
    attempts = sorted(path.name for path in (run / "attempts").iterdir())
    assert attempts == ["0001", "0002"]
    same_as_before(name, run)
