"""Fixtures that bring up real Slurm clusters, each in a folder of its own, and always end them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import crew
from slurm.devcluster import Cluster, down, up
from tests.s3.conftest import server  # noqa: F401 - a fixture of these tests, too


def _require() -> None:
    """Skips where a cluster cannot be; under CI that is a failure, or nobody would ever notice."""
    reason = ""
    if absent := crew.missing():
        reason = f"not installed: {', '.join(absent)} (run slurm/install.sh as root)"
    elif os.geteuid() != 0:
        reason = "the names of the nodes in /etc/hosts need root"
    if reason and os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"CI must run the cluster tests. {reason}")
    if reason:
        pytest.skip(reason)


def _folder() -> Path:
    # Not pytest's tmp_path: the paths of the sockets inside must stay under 108 bytes.
    return Path(tempfile.mkdtemp(prefix="sgc"))


@pytest.fixture(scope="session")
def devcluster() -> Iterator[Cluster]:
    """Four nodes with two stand-in GPUs each, shared by all tests of the session."""
    _require()
    state = _folder()
    try:
        yield up(state)
    finally:
        down(state)


@pytest.fixture
def state() -> Iterator[Path]:
    """An empty folder for a cluster of the test's own; whatever is in it ends with the test."""
    _require()
    folder = _folder()
    try:
        yield folder
    finally:
        if folder.exists() and (not any(folder.iterdir()) or (folder / "cluster.json").exists()):
            down(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
