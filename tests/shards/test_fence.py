"""An attempt that was overtaken publishes nothing, whenever the newer one comes in and however the older one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shards import storage
from shards.errors import FencedError
from shards.storage import Fence
from tests.shards.data import names, no_links

# publishes folder after folder until it is overtaken; says what it published
PUBLISHER = """
import sys
from pathlib import Path
from shards import storage
from shards.errors import FencedError
place, number = Path(sys.argv[1]), int(sys.argv[2])
for images in range(100_000):
    folder = place / f"img-{number}{images:06d}"
    folder.mkdir()
    (folder / "part").write_bytes(b"weights")
    try:
        storage.publish_folder(folder, extra={}, fence=storage.Fence(str(place), number))
    except FencedError:
        print("fenced", folder.name, flush=True)
        break
    print(folder.name, flush=True)
"""

# is at work on a publication, its temporary file written, when it waits for ever
HANGING = """
import os, sys, time
from pathlib import Path
from shards import storage
def hang(*_):
    print("prepared", flush=True)
    time.sleep(600)
os.link = hang
place = Path(sys.argv[1])
storage.publish(place / "img-1" / storage.MANIFEST, b"{}", fence=storage.Fence(str(place), 1))
"""


def _publish(place: Path, number: int, images: int = 5) -> Path:
    folder = place / f"img-{images}"
    storage.publish(folder / "part", b"weights", replace=True)
    storage.publish_folder(folder, extra={"by": number}, fence=Fence(str(place), number))
    return folder


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("step", ["mkdir", "write", "fsync", "link"])
def test_publish_overtaken_at_any_step_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, hard_links: bool
) -> None:
    """The newer attempt comes in just before the step; the last is between the look and the appearance."""
    place = tmp_path / "checkpoints"
    folder = place / "img-5"
    storage.publish(folder / "part", b"weights")
    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    owner, name = {
        "mkdir": (Path, "mkdir"),
        "write": (Path, "open"),
        "fsync": (os, "fsync"),
        "link": (os, "link") if hard_links else (Path, "rename"),
    }[step]
    original = getattr(owner, name)

    def overtaken(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(owner, name, original)
        storage.end_attempts(place, 2)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, overtaken)
    with pytest.raises(FencedError):
        storage.publish(folder / storage.MANIFEST, b"{}", fence=Fence(str(place), 1))
    assert getattr(owner, name) is original
    assert names(folder) == ["part"]
    _publish(place, 2)
    assert names(place / storage.fence.LEASES) == ["0001", "0002"]


def test_publish_before_the_newer_attempt_stays_and_the_next_one_is_refused(tmp_path: Path) -> None:
    folder = _publish(tmp_path, 1)
    with pytest.raises(FileExistsError):
        _publish(tmp_path, 1)
    storage.end_attempts(tmp_path, 3)
    assert storage.read_complete(folder, verify="hashes") is not None
    for number in (1, 2):
        with pytest.raises(FencedError):
            _publish(tmp_path, number, images=6)
    storage.end_attempts(tmp_path, 2)  # late: it was overtaken itself
    found = storage.read_complete(_publish(tmp_path, 3, images=6))
    assert found is not None and found["by"] == 3


def test_publish_file_overtaken_before_the_link_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "made"
    source.write_bytes(b"weights")
    fence = Fence(str(tmp_path), 1)
    storage.publish_file(tmp_path / "first", source, fence=fence)
    storage.end_attempts(tmp_path, 2)
    with pytest.raises(FencedError):
        storage.publish_file(tmp_path / "second", source, fence=fence)
    assert names(tmp_path) == [storage.fence.LEASES, "first", "made"]


def test_a_folder_set_aside_leaves_its_place_whole_or_is_deleted(tmp_path: Path) -> None:
    fence = Fence(str(tmp_path), 1)
    for number, to in enumerate([tmp_path / "damaged" / "a", None, tmp_path / "damaged" / "a"]):
        storage.set_aside(_publish(tmp_path, 1, images=number), to, fence)
    storage.set_aside(tmp_path / "absent", None, fence)
    kept = storage.read_complete(tmp_path / "damaged" / "a", verify="hashes")
    assert kept is not None and names(tmp_path) == [storage.fence.LEASES, "damaged"]
    assert names(tmp_path / storage.fence.LEASES / "0001") == []


@pytest.mark.parametrize("step", ["mkdir", "rename"])
def test_set_aside_overtaken_at_any_step_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder, original = _publish(tmp_path, 1), getattr(Path, step)

    def overtaken(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(Path, step, original)
        storage.end_attempts(tmp_path, 2)
        return original(*arguments, **options)

    monkeypatch.setattr(Path, step, overtaken)
    with pytest.raises(FencedError):
        storage.set_aside(folder, None, Fence(str(tmp_path), 1))
    assert storage.read_complete(folder, verify="hashes") is not None


def test_a_folder_on_its_way_aside_ends_with_the_outbox_of_its_attempt(tmp_path: Path) -> None:
    folder = _publish(tmp_path, 1)
    folder.rename(tmp_path / storage.fence.LEASES / "0001" / ".img-5.0123456789ab.tmp")
    storage.end_attempts(tmp_path, 2)
    assert names(tmp_path / storage.fence.LEASES) == ["0001"]
    assert (tmp_path / storage.fence.LEASES / "0001").is_file()


def test_a_publication_supersedes_a_manifest_that_does_not_hold_and_no_other(
    tmp_path: Path,
) -> None:
    folder = _publish(tmp_path, 1)
    (folder / "other").write_bytes(b"damage that the first manifest does not name")
    with pytest.raises(FileExistsError):
        _publish(tmp_path, 1)
    (folder / "part").write_bytes(b"another")
    storage.end_attempts(tmp_path, 2)
    with pytest.raises(FencedError):
        storage.publish_folder(folder, extra={"by": 1}, fence=Fence(str(tmp_path), 1))
    storage.publish_folder(folder, extra={"by": 2}, fence=Fence(str(tmp_path), 2))
    found = storage.read_complete(folder, verify="hashes")
    assert found is not None and found["by"] == 2
    assert [part["name"] for part in found["files"]] == ["other", "part"]


def test_an_error_of_the_disk_is_not_taken_for_a_newer_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "link", fails)
    with pytest.raises(OSError, match="Input/output"):
        _publish(tmp_path, 1)


def test_end_attempts_beside_publishers_splits_their_work_in_before_and_after(
    tmp_path: Path,
) -> None:
    """What is complete when it returns is all that ever will be."""
    with _child(PUBLISHER, tmp_path, "1") as publisher:
        assert publisher.stdout is not None
        first = publisher.stdout.readline().strip()
        storage.end_attempts(tmp_path, 2)
        complete = _complete(tmp_path)
        said = [first, *publisher.communicate(timeout=60)[0].split("\n")[:-1]]
    assert publisher.returncode == 0
    assert said[-1].startswith("fenced")
    assert _complete(tmp_path) == complete == sorted(said[:-1])


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_publisher_that_died_or_hangs_keeps_nobody_waiting(
    tmp_path: Path, end: signal.Signals
) -> None:
    with _child(HANGING, tmp_path) as publisher:
        assert publisher.stdout is not None and publisher.stdout.readline() == "prepared\n"
        publisher.send_signal(end)
        storage.end_attempts(tmp_path, 2)
        assert storage.read_complete(tmp_path / "img-1") is None
        _publish(tmp_path, 2)


class _child:
    """A Python process that is gone when the test is."""

    def __init__(self, code: str, place: Path, *arguments: str) -> None:
        command = [sys.executable, "-c", code, str(place), *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> subprocess.Popen[str]:
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _complete(place: Path) -> list[str]:
    return [n for n in names(place) if storage.read_complete(place / n) is not None]
