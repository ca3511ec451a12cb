"""Publishing is whole or not at all, once; a folder counts when its manifest holds."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shards import storage
from shards.errors import DamagedError, UserError
from tests.shards.data import names, no_links

RACER = """
import sys
from shards import storage
me, urls = sys.argv[1], sys.argv[2:]
print("ready", flush=True)
sys.stdin.readline()
for url in urls:
    try:
        storage.publish(url, me.encode() * 4096)
        print(url, flush=True)
    except FileExistsError:
        pass
"""


def test_publish_shows_all_or_nothing_and_refuses_a_second(tmp_path: Path) -> None:
    url = tmp_path / "new" / "record.json"
    storage.publish(url, b"first")
    with pytest.raises(FileExistsError):
        storage.publish(url, b"second")
    assert storage.read_bytes(url) == b"first"
    storage.publish(url, b"third", replace=True)
    assert storage.read_bytes(url) == b"third"
    assert names(url.parent) == ["record.json"]


def test_of_two_processes_that_publish_the_same_names_each_name_has_one_winner(
    tmp_path: Path,
) -> None:
    urls = [str(tmp_path / f"{i}") for i in range(50)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, me, *urls],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in "ab"
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        won = [racer.communicate(timeout=60)[0].split() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(won[0] + won[1]) == sorted(urls)
    for me, mine in zip("ab", won, strict=True):
        assert all(storage.read_bytes(url) == me.encode() * 4096 for url in mine)
    assert names(tmp_path) == sorted(Path(url).name for url in urls)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_a_rename_under_a_lock_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    storage.publish(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        storage.publish(tmp_path / "a", b"second")
    assert storage.read_bytes(tmp_path / "a") == b"first"
    assert names(tmp_path) == ["a"]


def test_a_link_that_took_effect_but_reports_failure_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def repeated(*paths: Path) -> None:  # what an NFS client sees when the first answer is lost
        link(*paths)
        link(*paths)

    monkeypatch.setattr(os, "link", repeated)
    storage.publish(tmp_path / "a", b"mine")
    assert storage.read_bytes(tmp_path / "a") == b"mine"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"4 bytes cannot be written \(No space .*make room"):
        storage.publish(tmp_path / "a", b"data")
    assert names(tmp_path) == []


def test_a_range_has_the_length_asked_for_or_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(100)))
    assert storage.read_range(path, 10, 13) == bytes([10, 11, 12])
    assert storage.read_range(path, 5, 5) == b""
    with pytest.raises(DamagedError, match=r"\[90, 110\), got 10 of 20"):
        storage.read_range(path, 90, 110)
    with pytest.raises(FileNotFoundError):
        storage.read_range(tmp_path / "b", 0, 1)
    assert b"".join(storage.read_chunks(path, 7)) == path.read_bytes()


@pytest.mark.parametrize("url", ["gs://b/x", "S3://b/x", "s3:/b/x", "https://h/x", "file:/x"])
def test_what_is_no_folder_and_not_on_s3_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for refused in (lambda: storage.publish(url, b""), lambda: storage.join(url, "a")):
        with pytest.raises(UserError, match=rf"{url} begins with .*give a folder .*or s3://BUCKET"):
            refused()
    assert storage.list(tmp_path) == []
    storage.publish(f"./{url}", b"it is called so")
    assert storage.read_bytes(tmp_path / url) == b"it is called so"


def test_join_exists_list(tmp_path: Path) -> None:
    assert storage.join("s3://bucket/x/", "a", "b") == "s3://bucket/x/a/b"
    assert storage.join(tmp_path, "a", "b") == str(tmp_path / "a" / "b")
    assert storage.list(tmp_path / "none") == []
    (tmp_path / "b").touch()
    (tmp_path / "a").mkdir()
    assert storage.list(tmp_path) == ["a", "b"]
    assert storage.exists(tmp_path / "a") and not storage.exists(tmp_path / "c")


def test_a_sweep_ends_old_temporary_files_and_nothing_else(tmp_path: Path) -> None:
    storage.publish(tmp_path / "deep" / "a", b"data")
    left = tmp_path / "deep" / ".a.0123456789ab.tmp"
    for path in (left, tmp_path / ".a.tmp", tmp_path / "a.0123456789ab.tmp"):
        path.write_bytes(b"")
    assert storage.sweep(tmp_path) == []
    assert storage.sweep(tmp_path, older=0) == [str(left)]
    assert names(tmp_path / "deep") == ["a"]
    assert names(tmp_path) == [".a.tmp", "a.0123456789ab.tmp", "deep"]
    assert storage.sweep(tmp_path / "none", older=0) == []


def _folder(path: Path, **extra: object) -> Path:
    (path / "deep").mkdir(parents=True)
    (path / "deep" / "part").write_bytes(b"12345")
    (path / "weights").write_bytes(b"abc")
    (path / ".weights.1.tmp").write_bytes(b"left by a killed publisher")
    storage.publish_folder(path, extra=extra)
    return path


def test_a_folder_is_complete_while_its_parts_are_what_the_manifest_says(tmp_path: Path) -> None:
    folder = tmp_path / "img-5"
    assert storage.read_complete(folder) is None
    _folder(folder, images=5)
    found = storage.read_complete(folder, verify="hashes")
    assert found is not None and found["images"] == 5
    assert [(f["name"], f["bytes"]) for f in found["files"]] == [("deep/part", 5), ("weights", 3)]
    with pytest.raises(FileExistsError):
        storage.publish_folder(folder, extra={})

    (folder / "weights").write_bytes(b"abd")  # same size
    assert storage.read_complete(folder) is not None
    assert storage.read_complete(folder, verify="hashes") is None
    (folder / "weights").write_bytes(b"ab")
    assert storage.read_complete(folder) is None
    (folder / "weights").unlink()
    assert storage.read_complete(folder) is None


def test_flaws_name_each_part_and_what_is_wrong_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _folder(tmp_path / "img-5")
    found = storage.read_manifest(folder)
    assert found is not None and storage.flaws(folder, found, "hashes") == []
    (folder / "weights").write_bytes(b"abd")
    assert storage.flaws(folder, found) == []
    assert [str(f) for f in storage.flaws(folder, found, "hashes")] == [
        "weights has other bytes than were written, by xxh3"
    ]
    assert storage.flaws(folder, found, "hashes", ["deep/part"]) == []
    old = {"files": [{k: v for k, v in p.items() if k != "xxh3"} for p in found["files"]]}
    assert [f.reason[-6:] for f in storage.flaws(folder, old, "hashes")] == ["sha256"]
    (folder / "deep" / "part").unlink()
    (folder / "weights").write_bytes(b"ab")
    assert storage.flaws(folder, found, "hashes") == [
        ("deep/part", "is missing"),
        ("weights", "has 2 bytes and not 3"),
    ]

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (folder / "weights").write_bytes(b"abc")
    monkeypatch.setattr(storage.complete, "hashes", broken)
    assert storage.flaws(folder, found, "hashes", ["weights"]) == [
        ("weights", "cannot be read (Input/output error)")
    ]


def test_an_empty_folder_and_a_torn_manifest_are_not_complete(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing to publish"):
        storage.publish_folder(tmp_path / "empty", extra={})
    folder = _folder(tmp_path / "img-1")
    text = (folder / storage.MANIFEST).read_text()
    for torn in (text[: len(text) // 2], "", "[]", json.dumps({"files": [{"name": "weights"}]})):
        (folder / storage.MANIFEST).write_text(torn)
        assert storage.read_complete(folder) is None


def test_newest_complete_walks_back_over_torn_folders_in_numeric_order(tmp_path: Path) -> None:
    assert storage.newest_complete(tmp_path / "none") is None
    for images in (900, 1000, 20_000):
        _folder(tmp_path / f"img-{images}")
    (tmp_path / "img-30000").mkdir()  # killed before its manifest
    (tmp_path / "img-later").mkdir()
    assert storage.newest_complete(tmp_path) == str(tmp_path / "img-20000")
    (tmp_path / "img-20000" / "weights").write_bytes(b"")
    assert storage.newest_complete(tmp_path) == str(tmp_path / "img-1000")
    (tmp_path / "img-1000" / storage.MANIFEST).write_text("{")
    assert storage.newest_complete(tmp_path) == str(tmp_path / "img-900")
    assert storage.newest_complete(tmp_path, prefix="step-") is None


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_publish_without_hard_links_makes_a_new_name_once_or_says_where_it_cannot(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", none)
    storage.publish(tmp_path / "a", b"1")
    with pytest.raises(FileExistsError):
        storage.publish(tmp_path / "a", b"2")
    assert storage.read_bytes(tmp_path / "a") == b"1"
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        storage.publish(tmp_path / "b", b"1")
    assert raised.value.filename == str(tmp_path) and names(tmp_path) == ["a"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_publish_file_gives_the_file_another_name_or_copies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    source, url = tmp_path / "made", tmp_path / "new" / "part"
    source.write_bytes(b"weights")
    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    storage.publish_file(url, source)
    with pytest.raises(FileExistsError):
        storage.publish_file(url, source)
    source.unlink()
    assert storage.read_bytes(url) == b"weights"
    assert names(url.parent) == ["part"]
    with pytest.raises(FileNotFoundError):
        storage.publish_file(tmp_path / "other", source)


def test_delete_of_a_folder_that_is_interrupted_leaves_it_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    folder = _folder(tmp_path / "img-5")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        storage.delete(folder)
    assert storage.read_complete(folder) is None
    assert names(folder) == [".weights.1.tmp", "deep", "weights"]
    storage.delete(folder)
    assert names(tmp_path) == []


def test_delete_of_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    storage.delete(tmp_path / "none")
    storage.publish(tmp_path / "a", b"")
    storage.delete(tmp_path / "a")
    assert names(tmp_path) == []


def test_local_work_imports_neither_torch_nor_an_s3_client(tmp_path: Path) -> None:
    code = (
        "import sys, shards; from shards import cli, storage, verify\n"
        "from shards.format import manifest; from shards.read import stream; from shards.write import writer\n"
        f"storage.publish({str(tmp_path / 'a')!r}, b'x'); storage.read_bytes({str(tmp_path / 'a')!r})\n"
        "print([m for m in ('torch', 'botocore', 's3fs', 'rich', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
