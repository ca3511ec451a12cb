"""Fixtures that bring up real Slurm clusters, each in a folder of its own, and always end them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm import crew
from slurm.devcluster import Cluster, down, up
from tests.cluster.bed import Bed, gone, learned, until
from tests.cluster.corpus import explained
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


@pytest.fixture(scope="session")
def bed_of_session(
    devcluster: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bed:
    return Bed.of(devcluster, digits, tmp_path_factory.mktemp("bed"))


@pytest.fixture(scope="session")
def unharmed(bed_of_session: Bed) -> dict[str, Any]:
    """What the run of all cells learns where nothing happens to it."""
    run = bed_of_session.submit("unharmed")
    view = bed_of_session.finishes(run)
    assert view.tries == 1
    gone(bed_of_session, run)
    explained(run)
    return learned(run)


@pytest.fixture
def bed(bed_of_session: Bed, tmp_path: Path) -> Iterator[Bed]:
    """The cluster with nothing on it, and nothing left of the test afterwards."""
    faults = tmp_path / "faults"
    faults.mkdir()
    yield replace(bed_of_session, runs=tmp_path / "runs", faults=faults)
    bed_of_session.ask("scancel", "--me")
    until(lambda: not bed_of_session.ask("squeue", "--noheader"), "all jobs are gone")
