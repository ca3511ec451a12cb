"""The entry of a job: names that older code copies know, exit records, and messages of many ranks."""

from __future__ import annotations

import logging
import pickle
import pickletools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import attempt, watch
from launcher.attempt.exits import Exit, exit_path
from selfguide.spec.rank_status import Preempted, RankStatus
from selfguide.spec.run import Fenced, read_record, write_record
from shards.errors import DamagedError, NoRoomError, StoreError, UserError


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (attempt.train, "launcher.attempt train"),
        (attempt.evaluate, "launcher.attempt evaluate"),
        (attempt.encode, "launcher.attempt encode"),
        (watch.entry, "launcher.watch entry"),
    ],
)
def test_job_functions_are_pickled_by_the_names_of_earlier_code_copies(
    function: Callable[[str], None], name: str
) -> None:
    found = [arg for _, arg, _ in pickletools.genops(pickle.dumps(function, protocol=2)) if arg]
    assert name in found


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (UserError("x=1"), 2, "user"),
        (Fenced("late"), 1, "fenced"),
        (Preempted("SIGTERM", 640), 75, "preempted"),
        (Preempted("SIGUSR2", None), 76, "preempted"),
        (MemoryError(), 84, "memory"),
        (RuntimeError("CUDA error: out of memory"), 84, "memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("torch's own"), 84, "memory"),
        (FloatingPointError("loss is nan"), 86, "numeric"),
        (OSError(28, "No space left on device"), 87, "storage"),
        (StoreError("no answer"), 87, "storage"),
        (NoRoomError("the disk is full"), 87, "storage"),
        (DamagedError("other bytes"), 87, "storage"),
        (TimeoutError("no rendezvous"), 1, "error"),
        (ConnectionResetError("peer"), 1, "error"),
        (RuntimeError("odd"), 1, "error"),
        (SystemExit(7), 7, "error"),
        (SystemExit(0), 1, "error"),
    ],
)
def test_exit_of_an_exception_has_its_code_and_kind(
    tmp_path: Path, error: BaseException, code: int, kind: str
) -> None:
    status = RankStatus(section="train", images=704)
    try:
        raise error
    except BaseException as raised:  # noqa: BLE001 - any kind
        Exit.of(raised, status).write(exit_path(tmp_path, 3))
    found = Exit.read(tmp_path, 3)
    assert found is not None and (found.code, found.kind) == (code, kind)
    assert (found.images, found.section, found.type) == (704, "train", type(error).__name__)
    assert found.saved == getattr(error, "saved", None)
    assert found.message == f"{type(error).__name__}: {error}" and "Traceback" in found.traceback


def test_first_exit_record_of_a_rank_stays(tmp_path: Path) -> None:
    path = exit_path(tmp_path, 0)
    Exit(code=0, kind="ok").write(path)
    Exit(code=143, kind="signal", message="ended by SIGTERM").write(path)
    found = Exit.read(tmp_path)
    assert found == Exit(code=0, kind="ok") and read_record(path)["pid"]


def test_exit_without_traceback_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    write_record(exit_path(tmp_path, 0), {"code": 1, "class": "error", "message": "it fell"})
    assert Exit.read(tmp_path) == Exit(code=1, kind="error", message="it fell")
    assert Exit.read(tmp_path, 1) is None


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ("0", ["rank 0 INFO steps", "rank 0 WARNING slow"]),
        ("3", ["rank 3 WARNING slow"]),
        ("None", ["INFO steps", "WARNING slow"]),
    ],
)
def test_rank_0_logs_from_info_and_others_from_warning(rank: str, expected: list[str]) -> None:
    program = (
        "import logging\n"
        "from launcher.attempt import logs\n"
        f"logs.configure({rank})\n"
        "logging.getLogger('selfguide.training.loop').info('steps')\n"
        "logging.getLogger('selfguide.training.loop').warning('slow')\n"
        "logging.getLogger('urllib3').info('connection')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    # after the date and the time
    assert [line.split(" ", 2)[2] for line in done.stdout.splitlines()] == expected
    assert logging.getLogger("selfguide").level == logging.NOTSET  # only a job's process is set up
