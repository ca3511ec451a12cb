"""Nodes that are done without: by the next attempt, by a successor that was queued before, and as a user sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import nodes as command
from launcher import submit
from launcher.backends import Node
from launcher.folder import Attempt
from launcher.reconcile import launch, nodes, restart
from launcher.reconcile.health import HALF_LIFE_S, Evidence
from selfguide.spec.run import RunFolder, read_record, write_record
from shards.errors import UserError

NAMES = [f"n{number}" for number in range(1, 9)]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm of eight nodes that takes all jobs; n8 is drained. Returns the log of its scripts."""
    bin, log = tmp_path / "bin", tmp_path / "scripts"
    bin.mkdir()
    states = [
        f"{name}|{'drain|all*|bad disk' if name == 'n8' else 'idle|all*|none'}" for name in NAMES
    ]
    rows = "\n".join([*states, "n9|idle|other|none"])
    programs = {
        "sbatch": f"""case "$1" in --test-only) exit 0;; esac
cat "$1" >> {log}; echo "Submitted batch job $(grep -c '^#!/bin/bash' {log})" """,
        "srun": "exit 0",
        "squeue": "exit 0",
        "scancel": "exit 0",
        "sinfo": f"cat <<'END'\n{rows}\nEND",
    }
    for name, text in programs.items():
        (bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setattr(restart, "BACKOFF_S", 0.0)
    return log


def sent(settings: list[str], *more: str) -> RunFolder:
    words = [*settings, "cluster=slurm", "cluster.gpus_per_node=2", *more]
    return RunFolder(Path(submit.submit(submit.resolve(words))["folder"]))


def scripts(log: Path) -> list[str]:
    return [f"#!/bin/bash{text}" for text in log.read_text().split("#!/bin/bash")[1:]]


def killed(run: RunFolder, node: str, number: int = 1) -> None:
    """The second rank of this attempt, on this node, was killed."""
    at = Attempt(run.attempt(number))
    for rank, name in enumerate(["n1", node]):
        write_record(at.root / f"start-{rank}.json", {"node": name})
    gone = {"code": 1, "class": "error", "message": "gone", "peer_gone": True, "images": number}
    write_record(at.root / "exit-0.json", gone)


def against(runs: Path, node: str, *hours_ago: float, kind: str = "killed") -> None:
    for number, hours in enumerate(hours_ago):
        failure = Evidence(
            node=node, time=time.time() - 3600 * hours, kind=kind, run="x/y", attempt=number
        )
        nodes.add(runs, failure)


def test_a_node_that_failed_twice_is_excluded_from_all_jobs_that_follow(
    slurm: Path, settings: list[str], runs: Path
) -> None:
    run = sent(settings)
    assert "--exclude" not in slurm.read_text()
    against(runs, "n2", 3)
    killed(run, "n2")
    opened = launch.go_on(run)
    assert opened is not None
    assert [script.count("#SBATCH --exclude=n2\n") for script in scripts(slurm)[2:]] == [1, 1]
    asked = read_record(opened.submission)
    assert asked is not None and list(asked["excluded"]) == ["n2"]
    (kept,) = [each for each in nodes.read_all(runs) if each.run != "x/y"]
    assert (kept.node, kept.kind, kept.rank, kept.attempt) == ("n2", "killed", "1", 1)
    assert kept.run == f"{run.root.parent.name}/{run.root.name}"


def test_a_successor_that_started_on_an_excluded_node_hands_over(
    slurm: Path, settings: list[str], runs: Path
) -> None:
    run = sent(settings)
    against(runs, "n2", 3)
    killed(run, "n2")
    first = Attempt(run.attempt(1))
    logs = first.root / "successor"
    at, reason = launch.take_over(run, "2", logs, ["n2"])
    assert at is None and "n2" in reason and run.attempt_numbers() == [1]
    waits = read_record(first.successor)
    assert waits is not None and waits["id"] == "3"
    last = scripts(slurm)[-1]
    assert "#SBATCH --exclude=n2\n" in last and "#SBATCH --dependency=singleton" in last
    # the job before it leaves, and opens no attempt where it is asked again
    assert launch.take_over(run, "2", logs, ["n2"])[0] is None
    assert run.attempt_numbers() == [1]
    (logs / "3_0_log.out").touch()
    at, _ = launch.take_over(run, "3", logs, ["n3"])
    assert at is not None and at.number == 2


def test_a_job_that_needs_all_nodes_in_service_excludes_none(
    slurm: Path, settings: list[str], runs: Path
) -> None:
    against(runs, "n2", 3, 2, 1)
    sent(settings, "nodes=7")
    assert "--exclude" not in slurm.read_text()


def test_evidence_is_written_once_whoever_decides(
    slurm: Path, settings: list[str], runs: Path
) -> None:
    from launcher.reconcile.view import read

    run = sent(settings)
    killed(run, "n2")
    nodes.keep_evidence(read(run))
    nodes.keep_evidence(read(run))
    assert len(nodes.read_all(runs)) == 1


def test_evidence_that_cannot_be_written_stops_no_run(
    slurm: Path, settings: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    run = sent(settings)
    killed(run, "n2")
    monkeypatch.setattr(nodes, "write_record", refuse)
    assert launch.go_on(run) is not None and nodes.read_all(runs) == []


def rows(capsys: pytest.CaptureFixture[str], runs: Path, *words: str) -> dict[str, dict]:
    assert command.main(["--runs", str(runs), "--json", *words]) == 0
    return {row["node"]: row for row in json.loads(capsys.readouterr().out)}


def test_nodes_lists_state_evidence_and_exclusion(
    slurm: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    against(runs, "n2", 5, 1)
    against(runs, "gone1", 1)
    found = rows(capsys, runs)
    assert list(found) == ["gone1", *NAMES, "n9"]
    assert (found["n8"]["state"], found["n8"]["reason"]) == ("drain", "bad disk")
    assert found["n2"]["evidence"] == {"killed": 2} and found["n2"]["excluded"]
    assert time.time() < found["n2"]["until"] < time.time() + 2 * HALF_LIFE_S
    assert found["gone1"]["state"] == "unknown" and not found["gone1"]["excluded"]
    assert command.main(["--runs", str(runs)]) == 0
    assert "2 killed" in capsys.readouterr().out


def test_a_person_excludes_and_forgives_with_a_note(
    slurm: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    against(runs, "n2", 5, 1)
    assert not rows(capsys, runs, "--forgive", "n2", "--note", "new memory")["n2"]["excluded"]
    found = rows(capsys, runs, "--exclude", "n3", "--note", "it smells")
    assert found["n3"]["excluded"] and found["n3"]["until"] is None
    assert "it smells" in found["n3"]["why"]
    assert not rows(capsys, runs, "--forgive", "n3")["n3"]["excluded"]
    with pytest.raises(UserError, match="n22"):
        command.main(["--runs", str(runs), "--exclude", "n22"])


def test_nodes_without_any_slurm_says_so(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert command.main(["--runs", str(runs)]) == 0
    assert "no Slurm answers" in capsys.readouterr().out


def test_nodes_of_a_large_cluster_are_counted_where_nothing_stands_against_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    many = [Node(name=f"n{number}", state="idle") for number in range(1000)]
    failures = [Evidence(node="n7", time=time.time(), kind="hang", what="a hang", run="x/y")] * 2
    command._print(command.table(many, failures, time.time()))
    said = capsys.readouterr().out
    assert "n7" in said and "n8 " not in said and "999 nodes" in said


def test_a_node_beyond_the_quarter_says_why_it_is_not_excluded() -> None:
    four = [Node(name=f"n{number}", state="idle") for number in range(4)]
    failures = [
        Evidence(node=node, time=1e9, kind="hang", run="x/y", attempt=number)
        for node, count in (("n1", 2), ("n2", 3))
        for number in range(count)
    ]
    rows = {row.node: row for row in command.table(four, failures, 1e9)}
    assert [name for name, row in rows.items() if row.excluded] == ["n2"]
    assert "25%" in rows["n1"].why and rows["n3"].why == ""


def test_nodes_imports_no_torch() -> None:
    code = "import sys, launcher.nodes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
