"""On S3 too, an attempt that was overtaken publishes nothing, whenever the newer one comes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shards import storage
from shards.errors import FencedError
from shards.storage import Fence
from shards.storage.s3 import S3

pytestmark = pytest.mark.timeout(120)


def _publish(place: str, number: int, images: int = 5) -> str:
    folder = storage.join(place, f"img-{images}")
    storage.publish(storage.join(folder, "part"), b"weights", replace=True)
    storage.publish_folder(folder, extra={"by": number}, fence=Fence(place, number))
    return folder


def test_what_a_fenced_attempt_publishes_is_complete_and_once(root: str) -> None:
    folder = _publish(root, 1)
    found = storage.read_complete(folder, verify="hashes")
    assert found is not None and found["by"] == 1
    with pytest.raises(FileExistsError):
        _publish(root, 1)


@pytest.mark.parametrize(
    "step", ["create_multipart_upload", "upload_part", "_refuse_overtaken", "_complete"]
)
def test_publish_overtaken_at_any_step_publishes_nothing(
    root: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The newer attempt comes in just before the step; the last is between the look and the appearance."""
    name = step if step.startswith("_") else "_call"
    original = getattr(S3, name)

    def overtaken(self: S3, *arguments: Any, **options: Any) -> Any:
        if name == step or arguments[1] == step:
            monkeypatch.setattr(S3, name, original)
            storage.end_attempts(root, 2)
        return original(self, *arguments, **options)

    folder = storage.join(root, "img-5")
    storage.publish(storage.join(folder, "part"), b"weights")
    monkeypatch.setattr(S3, name, overtaken)
    with pytest.raises(FencedError):
        storage.publish_folder(folder, extra={}, fence=Fence(root, 1))
    assert getattr(S3, name) is original
    assert storage.list(folder) == ["part"]
    assert storage.sweep(root, older=0) == []
    _publish(root, 2)


def test_a_publication_supersedes_a_manifest_that_does_not_hold_and_no_other(root: str) -> None:
    folder = _publish(root, 1)
    storage.publish(storage.join(folder, "part"), b"another", replace=True)
    storage.end_attempts(root, 2)
    with pytest.raises(FencedError):
        storage.publish_folder(folder, extra={"by": 1}, fence=Fence(root, 1))
    for number in (2, 3):
        if number == 3:
            with pytest.raises(FileExistsError):
                storage.publish_folder(folder, extra={"by": 3}, fence=Fence(root, 3))
        else:
            storage.publish_folder(folder, extra={"by": 2}, fence=Fence(root, 2))
        found = storage.read_complete(folder, verify="hashes")
        assert found is not None and found["by"] == 2


def test_an_overtaken_attempt_that_comes_late_does_not_stop_the_newest(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.end_attempts(root, 3)
    complete = S3._complete

    def late(self: S3, *arguments: Any) -> None:
        monkeypatch.setattr(S3, "_complete", complete)
        storage.end_attempts(root, 2)  # it ends the upload that is under way
        complete(self, *arguments)

    monkeypatch.setattr(S3, "_complete", late)
    found = storage.read_complete(_publish(root, 3))
    assert found is not None and found["by"] == 3


def test_a_publisher_that_died_leaves_an_upload_that_the_newer_attempt_ends(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(S3, "_complete", died)
        patch.setattr(S3, "_abort", lambda *_: None)
        _publish(root, 1)
    storage.end_attempts(root, 2)
    assert storage.sweep(root, older=0) == []
    assert storage.read_complete(_publish(root, 2)) is not None


@pytest.mark.parametrize("size", [0, 1000, (16 << 20) + 5])
def test_publish_file_sends_the_bytes_of_the_file(root: str, tmp_path: Path, size: int) -> None:
    source, url = tmp_path / "made", storage.join(root, "a")
    source.write_bytes(bytes(i % 251 for i in range(1000)) * (size // 1000) + b"x" * (size % 1000))
    storage.publish_file(url, source)
    assert storage.sha256(url) == storage.sha256(source)
    with pytest.raises(FileExistsError):
        storage.publish_file(url, source)


def test_delete_removes_an_object_or_all_of_a_folder_and_nothing_beside(root: str) -> None:
    folder = _publish(root, 1)
    beside = storage.join(root, "img-50")
    storage.publish(beside, b"")
    storage.publish(storage.join(folder, ".hidden"), b"")
    storage.delete(folder)
    assert not storage.exists(folder)
    for _ in range(2):
        assert storage.exists(beside) == (_ == 0)
        storage.delete(beside)
    with pytest.raises(ValueError, match="not all of it"):
        storage.delete(root.split("/", 3)[0] + "//" + root.split("/")[2])
