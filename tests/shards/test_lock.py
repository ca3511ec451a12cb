"""One holder at a time, of files and folders, and what happens to a lock whose file goes."""

from __future__ import annotations

import errno
import fcntl
import shutil
import threading
from pathlib import Path

import pytest

from shards.lock import locked
from shards.wait import wait_until


def test_lock_that_is_held_is_not_given_within_the_patience(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with locked(path) as first, locked(path, patience_s=0.0) as second:
        assert first and not second
    with locked(path, patience_s=0.0) as again:
        assert again


def test_waiter_gets_the_lock_when_its_holder_leaves(tmp_path: Path) -> None:
    order: list[str] = []
    began = threading.Event()

    def wait() -> None:
        began.set()
        with locked(tmp_path / "lock"):
            order.append("waiter")

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=wait)
        thread.start()
        began.wait()
        order.append("holder")
    thread.join(timeout=30)
    assert order == ["holder", "waiter"]


@pytest.mark.parametrize("folder", [False, True])
def test_waiter_of_a_path_that_was_removed_does_not_hold_what_is_gone(
    tmp_path: Path, folder: bool
) -> None:
    root = tmp_path / "work"
    root.mkdir()
    path = root if folder else root / "lock"
    found: list[str] = []
    removed = threading.Event()

    def pause(seconds: float) -> None:
        removed.wait()

    def wait() -> None:
        try:
            with locked(path, folder=folder, patience_s=60, pause=pause):
                found.append("held" if path.exists() else "held nothing")
        except FileNotFoundError:
            found.append("gone")

    with locked(path, folder=folder):
        thread = threading.Thread(target=wait)
        thread.start()
        shutil.rmtree(root)
    removed.set()
    thread.join(timeout=30)
    assert found == (["gone"] if folder else ["held"])


def test_file_system_without_locks_is_refused_only_where_one_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="no locks"), locked(tmp_path / "lock"):
        pass
    with locked(tmp_path / "lock", required=False) as held:
        assert held
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_wait_until_asks_at_least_once_and_tells_whether_it_came() -> None:
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), poll_s=0.0)
    assert not wait_until(lambda: False, timeout_s=0.0)
    assert wait_until(lambda: True, timeout_s=0.0)
