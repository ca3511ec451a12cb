"""Fixtures for every test: real gloo ranks as processes, ended whatever happens, and the digits as shards."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
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


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """ranks(world, function, *arguments) -> [function(rank_info, *arguments) of each rank].

    They are forked from one process that has imported what takes seconds.
    """
    from tools.ranks import run_ranks

    multiprocessing.get_context("forkserver").set_forkserver_preload(HEAVY)
    return partial(run_ranks, start="forkserver")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real digits as shards, written once by the command a user runs."""
    from tools.shards import __main__ as command

    root = tmp_path_factory.mktemp("data") / "digits"
    assert command.main(["make", "digits", "--out", str(root)]) == 0
    return root
