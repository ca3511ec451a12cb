"""A study's runs as one sweep: followed to their end, found again, and named where they fail."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import payloads
import pytest

from launcher import sweep_folder
from shards.errors import UserError
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


def test_a_run_that_fails_is_named_and_the_others_are_trained(
    settings: list[str], runs: Path, payload: Callable[..., None]
) -> None:
    payload(train=payloads.fall)
    with pytest.raises(UserError, match="the same command goes on from there") as refused:
        train(LISTED, settings, io.StringIO())
    for each in named(LISTED, settings):
        assert f"{each.run.root}: failed" in str(refused.value)
        assert each.run.attempt_numbers() == [1]
    # the same command waits for what it begins anew
    payload(train=payloads.publish_all)
    found = train(LISTED, settings, io.StringIO())
    assert [each.run.attempt_numbers() for each in found] == [[1, 2], [1, 2]]


def test_a_run_that_cannot_be_trained_is_refused_before_any_is_queued(
    settings: list[str], runs: Path
) -> None:
    with pytest.raises(UserError, match=r"guidance=labels seed=1 train\.batch=0"):
        train([LISTED[0], (*LISTED[1], "train.batch=0")], settings, io.StringIO())
    assert not runs.exists()
