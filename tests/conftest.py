"""Fixtures for every test: real gloo ranks as processes, ended whatever happens, and the digits as shards."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import environment

environment.settle()

# what a rank spends its first seconds on
HEAVY = ["pytest", "hypothesis", "deepspeed", "selfguide.training.job"]

# the first example of a test pays for imports; how long one takes is no law of the code
settings.register_profile("laws", deadline=None)
settings.load_profile("laws")


@pytest.fixture(autouse=True)
def messages_as_before() -> Iterator[None]:
    """A command that runs in a test's process has its messages shown; the next test's are as they were."""
    ours = [logging.getLogger(name) for name in ("", "selfguide", "shards", "launcher")]
    levels, handlers = [each.level for each in ours], list(ours[0].handlers)
    yield
    for each, level in zip(ours, levels, strict=True):
        each.setLevel(level)
    for handler in [each for each in ours[0].handlers if each not in handlers]:
        ours[0].removeHandler(handler)


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """ranks(world, function, *arguments) -> [function(rank_info, *arguments) of each rank].

    They are forked from one process that has imported what takes seconds.
    """
    from tools.ranks import run_ranks

    multiprocessing.get_context("forkserver").set_forkserver_preload(HEAVY)
    return partial(run_ranks, start="forkserver")


@pytest.fixture
def agree(record_property: Callable[[str, object], None]) -> Callable[[Any, Any, float], None]:
    """agree(found, expected, within): the largest difference, over the largest value expected, is within a bound.

    It is kept with the test's result, from where `python -m tests.differences` reads it into docs/differences.md.
    """
    largest = 0.0

    def compare(found: Any, expected: Any, within: float) -> None:
        nonlocal largest
        import torch

        a, b = (torch.as_tensor(x).detach().double() for x in (found, expected))
        assert a.shape == b.shape
        error = float((a - b).abs().max() / b.abs().max())
        largest = max(largest, error)
        record_property("error", largest)
        assert error <= within, f"{error:.2g} is more than {within:g}"

    return compare


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real digits as shards, written once by the command a user runs."""
    from tools.shards import __main__ as command

    root = tmp_path_factory.mktemp("data") / "digits"
    assert command.main(["make", "digits", "--out", str(root)]) == 0
    return root
