"""What the tests took is noted by a session of pytest, with and without workers, and shown beside the budget."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import slowest
from tests.slowest import Notes

ROOT = Path(__file__).parents[1]


def notes(folder: Path, **sessions: Notes) -> Path:
    for name, each in sessions.items():
        (folder / f"{name}.json").write_text(json.dumps(vars(each)))
    return folder


def test_the_slowest_are_those_of_all_sessions_and_the_total_is_their_time() -> None:
    first = Notes(seconds=100.0, slowness=1.0, tests={f"a{i}": float(i) for i in range(30)})
    second = Notes(seconds=300.0, slowness=1.0, tests={"b": 25.5})
    found = slowest.judge([first, second], minutes=7.0)
    assert list(found["slowest"])[:6] == ["a29", "a28", "a27", "a26", "b", "a25"]
    assert (len(found["slowest"]), found["tests"]) == (20, 31)
    assert (found["total"], found["limit"], found["within"]) == (400.0, 420.0, True)


@pytest.mark.parametrize(
    ("slowness", "limit"), [(1.0, 1200.0), (1.5, 1800.0), (2.0, 2400.0), (9.0, 2400.0)]
)
def test_the_budget_grows_as_cores_are_slower_and_at_most_twofold(
    slowness: float, limit: float
) -> None:
    found = slowest.judge([Notes(seconds=1300.0, slowness=slowness, tests={})], minutes=20.0)
    assert (found["limit"], found["within"]) == (limit, slowness > 1)


def test_above_a_budget_that_is_held_the_command_fails_and_without_notes_always(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        slowest.main([str(tmp_path)])
    assert raised.value.code == 2
    folder = notes(tmp_path, a=Notes(seconds=90.0, slowness=1.0, tests={"a": 80.0}))
    assert slowest.main([str(folder), "--minutes", "1", "--hold"]) == 1
    assert slowest.main([str(folder), "--minutes", "2", "--hold"]) == 0
    capsys.readouterr()
    assert slowest.main([str(folder), "--minutes", "1"]) == 0
    assert "ABOVE the budget of 1.0" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_a_session_notes_every_test_once(workers: tuple[str, ...], tmp_path: Path) -> None:
    file, noted = tmp_path / "test_it.py", tmp_path / "deep" / "notes.json"
    file.write_text("def test_one(): pass\ndef test_two(tmp_path): pass\n")
    words = ["-q", "-p", "tests.slowest", "--notes", str(noted), *workers, str(file)]
    command = [sys.executable, "-m", "pytest", "--rootdir", str(tmp_path), *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=120)
    (found,) = slowest.read(noted.parent)
    assert sorted(found.tests) == ["test_it.py::test_one", "test_it.py::test_two"]
    assert found.seconds >= sum(found.tests.values()) / 2 and found.slowness >= 1
