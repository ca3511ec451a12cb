"""A lock has one holder, and none can be stale."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards.lock import lock

HOLDER = """
import sys, time
from shards.lock import lock
with lock(sys.argv[1], create=False) as held:
    print(held, flush=True)
    time.sleep(600)
"""


def test_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        with lock(tmp_path, create=False, seconds=0) as held:
            assert not held
    finally:
        holder.kill()
        holder.wait()
    with lock(tmp_path, create=False) as held:
        assert held


def test_lock_of_what_is_removed_while_waiting_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def remove(_: float) -> None:
        if path.exists():
            path.unlink()
            holder.__exit__(None, None, None)

    holder = lock(path)
    assert holder.__enter__()
    with lock(path, seconds=60, pause=remove) as held:
        assert not held
    with pytest.raises(FileNotFoundError), lock(path, create=False):
        pass


@pytest.mark.parametrize(
    "number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS]
)
def test_lock_on_a_mount_without_locks_is_an_error_unless_none_is_required(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(OSError, match=os.strerror(number)) as raised, lock(tmp_path / "a"):
        pass
    # or nobody could say of what
    assert raised.value.filename == str(tmp_path / "a")
    with lock(tmp_path / "a", required=False) as held:
        assert not held
