"""What the services for development share, with shells that sleep in the place of daemons."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shards.errors import UserError
from shards.wait import wait_until
from slurm import devcluster, processes, service
from slurm.layout import MARK, boot_id, read_record
from slurm.service import Programs, Service, StartError
from tools.s3 import server


def members(state: Path) -> list[processes.Process]:
    """The shells that wait in this folder, and what they wait for."""
    return [
        p for p in processes.table() if f"{state}/".encode() in processes.read(p.pid, "cmdline")
    ]


SLEEPERS = Service(
    name="sleepers",
    variable="SELFGUIDE_SLEEPERS",
    record="sleepers.json",
    end=lambda state: processes.end(lambda: members(state)),
    outside=lambda state: bool(members(state)),
)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """Where a service of the test's own goes; whatever runs out of it ends with the test."""
    yield tmp_path / "deep" / "sleepers"
    processes.end(lambda: members(tmp_path / "deep" / "sleepers"))


def find(state: Path) -> dict[str, Any] | None:
    record = SLEEPERS.read(state)
    return record if record is not None and processes.alive(*record["at"]) else None


def up(
    state: Path, command: str = "while :; do sleep 0.1; done", say: service.Say = lambda line: None
) -> Any:
    def start(made: list[str]) -> dict[str, Any] | None:
        (state / "log").mkdir()

        def changed(running: dict[str, tuple[int, int]]) -> None:
            SLEEPERS.write(state, {"made": made, "at": running["sleeper"]})

        SLEEPERS.write(state, {"made": made, "at": (0, 0)})
        programs = Programs(state=state, environment={"PATH": os.defpath}, changed=changed)
        programs.serve("sleeper", ["/bin/sh", "-c", f"{command}; # {state}/sleeper", f"{state}/"])
        programs.wait("it sleeps", lambda: bool(members(state)) and "exit" not in command)
        return find(state)

    return SLEEPERS.up(state, say, lambda: find(state), start)


def test_up_twice_is_once_and_down_leaves_nothing(state: Path) -> None:
    said: list[str] = []
    first = up(state)
    assert first == up(state, say=said.append) == find(state)
    assert said == [f"already up in {state}"]
    assert state.stat().st_mode & 0o077 == 0
    assert (state / SLEEPERS.record).stat().st_mode & 0o077 == 0
    SLEEPERS.down(state, said.append)
    assert not state.parent.exists() and members(state) == []
    # again: there is nothing to do
    SLEEPERS.down(state, said.append)
    assert not state.parent.exists()


def test_up_after_a_crash_begins_anew_and_keeps_what_it_once_made(state: Path) -> None:
    first = up(state)
    os.kill(first["at"][0], signal.SIGKILL)
    assert wait_until(lambda: find(state) is None, timeout_s=60)
    second = up(state)
    assert second["at"] != first["at"] and second["made"] == first["made"]
    SLEEPERS.down(state, lambda line: None)
    assert not state.parent.exists()


def test_up_of_a_program_that_fails_says_its_last_words_and_leaves_nothing(state: Path) -> None:
    with pytest.raises(StartError, match="on fire"):
        up(state, "sleep 0.2; echo the disk is on fire; exit 1")
    assert not state.parent.exists() and members(state) == []


def test_a_program_that_does_not_end_in_time_is_a_start_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "PATIENCE", 0.2)
    (tmp_path / "log").mkdir()
    programs = Programs(
        state=tmp_path, environment={"PATH": os.defpath}, changed=lambda running: None
    )
    with pytest.raises(StartError):
        programs.run("slow", ["/bin/sleep", "600"])
    with pytest.raises(StartError):
        programs.run("wrong", ["/bin/false"])


@pytest.mark.parametrize("command", ["up", "down"])
def test_a_folder_with_other_files_is_refused_and_left_alone(state: Path, command: str) -> None:
    state.mkdir(parents=True)
    (state / "thesis.tex").touch()
    with pytest.raises(UserError):
        up(state) if command == "up" else SLEEPERS.down(state, lambda line: None)
    assert [path.name for path in state.iterdir()] == ["thesis.tex"]


def test_a_record_that_is_no_json_is_refused(state: Path) -> None:
    state.mkdir(parents=True)
    (state / SLEEPERS.record).write_text("{")
    with pytest.raises(UserError):
        SLEEPERS.read(state)


def test_two_commands_at_once_wait_for_each_other_and_find_one_service(state: Path) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(up(state))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(one == found[0] for one in found)
    # a child of the sleeper's shell shows the shell's words until it has become its `sleep`
    ours = [each.pid for each in members(state) if each.parent == os.getpid()]
    assert ours == [found[0]["at"][0]]


def test_folder_is_the_given_one_then_that_of_the_environment_then_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv(SLEEPERS.variable, raising=False)
    assert SLEEPERS.folder(None) == tmp_path / "selfguide" / "sleepers"
    monkeypatch.setenv(SLEEPERS.variable, str(tmp_path / "chosen"))
    assert SLEEPERS.folder(None) == tmp_path / "chosen"
    assert SLEEPERS.folder(tmp_path / "given") == tmp_path / "given"


def test_end_asks_first_and_kills_what_does_not_listen(state: Path) -> None:
    up(state, "trap : TERM; while :; do sleep 0.05; done")
    processes.end(lambda: members(state), asks=lambda process: True, grace=0.2)
    assert members(state) == []


def test_records_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    store = {"boot": boot_id(), "store": "swift", "port": 1, "secrets": {"k": "s"}, "servers": {}}
    (tmp_path / "s3.json").write_text(json.dumps({**store, "ready": True}))
    found = server._read(tmp_path)
    assert found is not None and found.made == [] and not found.alive()
    assert server.find(tmp_path) is None
    (tmp_path / "s3.json").write_text(json.dumps({"kind": "another"}))
    with pytest.raises(UserError):
        server.find(tmp_path)
    cluster = {"format": MARK, "nodes": ["n1"], "gpus": 2, "boot": "b", "ports": [1, 2, 3]}
    cluster |= {"daemons": {"munged": [7, 9]}, "made": ["/a"], "ready": True}
    (tmp_path / "cluster.json").write_text(json.dumps(cluster))
    record = read_record(tmp_path)
    assert record is not None and devcluster.find(tmp_path) is None
    assert (record.nodes, record.ports, record.daemons, record.made) == (
        ("n1",),
        (1, 2, 3),
        {"munged": (7, 9)},
        ("/a",),
    )
    (tmp_path / "cluster.json").write_text(json.dumps({**cluster, "format": "older"}))
    with pytest.raises(UserError):
        read_record(tmp_path)
