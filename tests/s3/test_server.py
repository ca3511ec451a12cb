"""The store on this machine: up once, found by others, and gone without trace whatever happened to it."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.errors import UserError
from slurm.service import StartError
from tools.s3 import __main__ as command
from tools.s3 import rgw
from tools.s3 import server as servers
from tools.s3.server import Server, down, find, up

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def state(server: Server, tmp_path: Path) -> Iterator[Path]:
    """A folder for a second store; the first one shows that this machine can have one."""
    yield tmp_path / "deep" / "store"
    if (tmp_path / "deep" / "store" / servers.STORE.record).exists():
        down(tmp_path / "deep" / "store")


def _alive(state: Path) -> int:
    return len(servers._members(state))


def test_up_twice_is_once_and_down_leaves_nothing(
    state: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find(state) is None
    assert command.main(["env", "--state", str(state)]) == 3
    first = up(state, store=server.store)
    assert up(state, store=server.store) == first == find(state)
    assert first.endpoint != server.endpoint
    assert _alive(state) == len(servers.STORES[server.store].SERVERS)
    assert state.stat().st_mode & 0o077 == 0  # it holds the secrets
    other = next(name for name in servers.STORES if name != server.store)
    with pytest.raises(UserError, match=r"is up there; take it down first"):
        up(state, store=other)
    with pytest.raises(UserError, match="store='minio': there are swift and rgw"):
        up(state, store="minio")
    capsys.readouterr()
    assert command.main(["env", "--state", str(state)]) == 0
    lines = capsys.readouterr().out.splitlines()
    exports = dict(line.removeprefix("export ").split("=") for line in lines if "export" in line)
    assert exports == first.environment()
    assert command.main(["env", "--json", "--state", str(state)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "store": server.store, "bucket": "selfguide", **exports
    }  # fmt: skip

    assert command.main(["down", "--state", str(state)]) == 0
    assert not state.parent.exists() and _alive(state) == 0
    down(state)
    assert find(server.state) == server


def test_after_a_crash_up_begins_anew(state: Path, server: Server) -> None:
    first = up(state, store=server.store)
    os.kill(servers._members(state)[0].pid, signal.SIGKILL)
    while find(state):
        pass
    second = up(state, store=server.store)
    assert second != first and _alive(state) == len(servers.STORES[server.store].SERVERS)


def test_a_folder_with_other_things_and_one_without_attributes_are_refused(
    state: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.mkdir(parents=True)
    (state / "thesis.tex").touch()
    for call in (up, down):
        with pytest.raises(UserError, match="holds other files"):
            call(state)
    assert [p.name for p in state.iterdir()] == ["thesis.tex"]
    (state / "thesis.tex").unlink()
    if server.store != "swift":
        return  # the other one needs no attributes

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "setxattr", refuse)
    with pytest.raises(UserError, match=r"keeps no extended attributes .* ext4 or xfs"):
        up(state)
    assert not state.exists()


def test_a_start_that_fails_says_why_and_leaves_nothing(
    state: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server.store == "swift":
        user = "broken\n[app:proxy-server]\nuse = egg:none#none\n#"
        monkeypatch.setattr(servers, "USERS", (user,))
        why = "proxy ended while it started"
    else:
        monkeypatch.setattr(rgw, "_ENTITIES", {"mon.": ("mon",)})  # nobody may give it orders
        why = "osd-new: left with 1"
    with pytest.raises(StartError, match=why):
        up(state, store=server.store)
    assert not state.parent.exists() and _alive(state) == 0
