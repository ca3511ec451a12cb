"""Fixtures for every test: real gloo ranks as processes, ended whatever happens, and the digits as shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import environment

environment.settle()

# the first example of a test pays for imports; how long one takes is no law of the code
settings.register_profile("laws", deadline=None)
settings.load_profile("laws")


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """ranks(world, function, *arguments) -> [function(place, *arguments) of each rank]."""
    from tools.ranks import run_ranks

    return run_ranks


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real digits as shards, written once by the command a user runs."""
    from tools.shards import __main__ as command

    root = tmp_path_factory.mktemp("data") / "digits"
    assert command.main(["make", "digits", "--out", str(root)]) == 0
    return root
