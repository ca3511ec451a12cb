"""What holds for every backend, and for jobs of several of them at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher import backends
from selfguide.spec.config import ClusterConfig


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of a squeue that knows job 5 of /a as running and 6 of /a as pending, wherever it is asked."""
    bin, calls = tmp_path / "bin", tmp_path / "calls"
    bin.mkdir()
    lines = "5|RUNNING|x|/a\\n6|PENDING|y|/a\\n"
    (bin / "squeue").write_text(f"#!/bin/sh\necho \"$SLURM_CONF\" >> {calls}\nprintf '{lines}'\n")
    (bin / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", "/of/this/shell")
    return calls


def test_states_of_mixed_records_keep_their_order_and_ask_each_slurm_once(
    tmp_path: Path, calls: Path
) -> None:
    here = {"kind": "local", "id": "1", "host": "elsewhere"}
    first = {"kind": "slurm", "conf": "/etc/a.conf", "comment": "/a"}
    second = {"kind": "slurm", "conf": None, "comment": "/a"}
    removed = {"kind": "devcluster", "conf": str(tmp_path / "gone.conf"), "comment": "/a"}
    records = [
        {**first, "id": "6"},
        here,
        {**removed, "id": "5"},
        {**first, "id": "5"},
        {**second, "id": "7"},
        {**first, "id": "5", "comment": "/b"},
    ]
    expected = ["queued", "unknown", "gone", "running", "gone", "gone"]
    assert backends.states(records) == expected
    assert calls.read_text().splitlines() == ["/etc/a.conf", ""]


def test_stray_jobs_are_those_of_the_comment_and_can_be_asked_after(calls: Path) -> None:
    found = backends.strays("/a", {"kind": "slurm", "conf": "/etc/a.conf"})
    assert [(each["id"], each["name"]) for each in found] == [("5", "x"), ("6", "y")]
    assert backends.states(found) == ["running", "queued"]
    assert backends.strays("/a", {"kind": "local"}) == []


def test_local_backend_has_no_script_and_notes_gpus_that_do_not_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = backends.of(ClusterConfig(kind="local"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert backend.notes(1) == [] and len(backend.notes(2)) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert backend.notes(2) == []
