"""What a user's shell, drained nodes and a short time limit do to the commands."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher import backends, jobs
from launcher.folder import Attempt
from tests.cluster.bed import Bed, gone

pytestmark = pytest.mark.cluster

MANUALS = Path("/usr/share/man/man1")
PREFIXES = ("SBATCH", "SQUEUE", "SCANCEL", "SALLOC", "SLURM", "SINFO", "SACCT", "SCONTROL", "SRUN")


def variables() -> list[str]:
    """Every variable that the installed manual pages of Slurm's commands name."""
    found: set[str] = set()
    for prefix in PREFIXES:
        for path in MANUALS.glob(f"{prefix.lower()}.1*"):
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            plain = re.sub(r"\\f[A-Z]", " ", text.decode(errors="replace"))
            found |= set(re.findall(rf"\b(?:{'|'.join(PREFIXES)})_[A-Z0-9_]*[A-Z0-9]\b", plain))
    return sorted(found - {"SLURM_CONF"})


def test_no_variable_of_the_shell_changes_what_the_commands_say(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = variables()
    if not names:
        pytest.skip("Slurm's manual pages are not installed")
    assert len(names) > 150
    # for longer than the loop takes
    run = bed.submit("shell", "train.images=1_280_000")
    view = bed.view(run)
    assert view.config is not None and view.newest is not None and view.newest.job is not None
    for name, value in bed.environment.items():
        monkeypatch.setenv(name, value)
    backend = backends.of(view.config.cluster)
    reached = backend._client()  # type: ignore[attr-defined]
    for name in names:
        with monkeypatch.context() as shell:
            shell.setenv(name, "nonsense")
            assert backend._client() == reached, name  # type: ignore[attr-defined]
            # by that one Slurm says that this is a job of its own, in which it sets the others
            assert name == "SLURM_JOB_ID" or name in backend.notes(1)[0]
    for name in names:
        monkeypatch.setenv(name, "nonsense")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (line,) = backend.notes(1)
    assert "SBATCH_PARTITION (cluster.partition does the same)" in line
    assert backends.state(view.newest.job.record) in ("queued", "running")
    at = Attempt(run.attempt(2))
    assert backend.check(jobs.training(view.config, at, "other")) == []
    assert backends.cancel(view.newest.job.record)
    assert bed.command("launcher.cancel", str(run.root)).returncode == 0
    # what this test asks Slurm itself is another matter
    monkeypatch.undo()
    gone(bed, run)


@contextmanager
def drained(bed: Bed, *nodes: str) -> Iterator[None]:
    """These nodes take no job."""
    bed.ask("scontrol", "update", f"NodeName={','.join(nodes)}", "State=DRAIN", "Reason=test")
    try:
        yield
    finally:
        bed.ask("scontrol", "update", f"NodeName={','.join(nodes)}", "State=RESUME")


def test_drained_nodes_are_waited_for_and_what_can_never_run_is_refused(bed: Bed) -> None:
    with drained(bed, *bed.cluster.nodes[:3]):
        done = bed.command("launcher.submit", *bed.words("drained"), "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        (note,) = told["notes"]
        assert "1 of the 4" in note and "devnode3" in note
        run = bed.runs / "digits_dit" / "drained"
        for never in ("nodes=5", "cluster.gpus_per_node=3", "cluster.mem_gb=9"):
            refused = bed.command("launcher.submit", *bed.words("never", never))
            assert refused.returncode == 2, never
        assert not (bed.runs / "digits_dit" / "never").exists()
        assert bed.command("launcher.cancel", str(run)).returncode == 0


def test_a_limit_without_time_to_save_is_refused_with_the_cure(bed: Bed) -> None:
    done = bed.command("launcher.submit", *bed.words("short", "cluster.timeout_min=1"))
    assert done.returncode == 2
    assert "cluster.timeout_min=1" in done.stderr and "at least 2" in done.stderr
    assert not (bed.runs / "digits_dit" / "short").exists()
