"""A study's runs as one sweep: followed to their end, and found again."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import payloads

from launcher import sweep_folder
from tools.study.training import named, train

# one run of each of two kinds, which no product of lists makes
LISTED = [("guidance=none", "seed=0"), ("guidance=labels", "seed=1")]


def test_runs_that_no_product_makes_are_one_sweep_and_are_not_trained_again(
    settings: list[str], runs: Path, payload: Callable[..., None]
) -> None:
    payload(train=payloads.publish_all)
    said = io.StringIO()
    found = train(LISTED, settings, said)
    assert [(each.config.guidance.source, each.config.seed) for each in found] == [
        ("none", 0),
        ("labels", 1),
    ]
    assert all(each.final.is_dir() for each in found)
    assert [len(each.run.attempt_numbers()) for each in found] == [1, 1]
    (sweep,) = sweep_folder.sweeps(runs)
    assert sorted(run.root for run in sweep.runs()) == sorted(each.run.root for each in found)
    again = train(LISTED, settings, said)
    assert [each.run for each in again] == [each.run for each in found]
    assert [len(each.run.attempt_numbers()) for each in again] == [1, 1]
    assert [each.run for each in named(LISTED, settings)] == [each.run for each in found]
