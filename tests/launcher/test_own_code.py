"""A process that has imported other code than its job's copy begins once more on the copy, or refuses its node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import code_copy
from launcher.attempt import own_code

ROOT = Path(__file__).parents[2]
ASKS = """
import os
from launcher.attempt import own_code
assert own_code.ensure() is None
assert own_code.AGAIN not in os.environ
print(own_code.__file__)
"""


def test_process_that_saw_its_copy_late_begins_once_more_on_it(tmp_path: Path) -> None:
    copy = tmp_path / "code"
    paths = os.pathsep.join([str(copy), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "SUBMITIT_EXECUTOR": "slurm"}
    process = subprocess.Popen(
        [sys.executable, "-c", ASKS], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.stderr is not None
    assert str(copy) in process.stderr.readline()
    code_copy.copy(copy)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (0, str(copy / "launcher/attempt/own_code.py"))


@pytest.mark.parametrize("seen", [False, True])
def test_node_that_would_run_other_code_is_refused(
    seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the copy does not come, and where it is there and Python does not take it."""
    monkeypatch.setattr(own_code, "PATIENCE_S", 0.0)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "code"), str(ROOT)]))
    if seen:
        (tmp_path / "code").mkdir()
        monkeypatch.setenv(own_code.AGAIN, "1")
    refused = own_code.ensure()
    assert refused is not None and (refused.node, refused.check) == ("n7", "code")


def test_process_on_its_copy_or_of_no_job_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    (tmp_path / "code").symlink_to(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    assert own_code.ensure() is None
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert own_code.ensure() is None
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other/code"))
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    assert own_code.ensure() is None
