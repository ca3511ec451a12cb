"""A sidecar gives back what was written, annotates one manifest, and holds no row that its kind does not allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import sidecar, storage
from shards.errors import DamagedError, UserError

MANIFEST = "a" * 64
FREE = {"saw_labels": False}

KINDS: dict[str, tuple[np.ndarray, int | None]] = {
    "id": (np.array([0, 2, 1, 2], np.int32), 3),
    "multi_hot": (np.array([[1, 0], [1, 1], [0, 0]], np.uint8), 2),
    "box": (np.array([[0, 0, 1, 1], [2, 3, 8, 5]], np.int32), None),
    "mask": (np.arange(24).reshape(2, 3, 4).astype(np.uint8), 24),
    "dense": (np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), None),
}


def write(folder: Path, kind: Any, rows: np.ndarray, groups: int | None, **more: Any) -> Any:
    return sidecar.write(
        folder, rows, manifest=MANIFEST, kind=kind, groups=groups, provenance=FREE, **more
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read(tmp_path: Path, kind: str) -> None:
    rows, groups = KINDS[kind]
    made = write(tmp_path / "s", kind, rows, groups)
    found = sidecar.read(tmp_path / "s", manifest=MANIFEST)
    assert found == made
    assert (found.kind, found.count, found.shape) == (kind, len(rows), rows.shape[1:])
    assert (found.groups, found.manifest, found.saw_labels) == (groups, MANIFEST, False)
    assert found.sha256 == storage.sha256(tmp_path / "s" / "rows.npy")
    read = found.rows()
    assert isinstance(read, np.memmap) and not read.flags.writeable
    assert read.dtype == rows.dtype and np.array_equal(read, rows)


def test_columns_and_attachments_come_by_name(tmp_path: Path) -> None:
    rows = KINDS["id"][0]
    tmp_path.joinpath("s").mkdir()
    np.save(tmp_path / "s" / "centroids.npy", np.eye(3))
    confidence = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    write(tmp_path / "s", "id", rows, 3, attached=("centroids.npy",), confidence=confidence)
    found = sidecar.read(tmp_path / "s")
    assert (found.more, found.attached) == (("confidence",), ("centroids.npy",))
    assert np.array_equal(found.column("confidence"), confidence)
    assert np.array_equal(np.load(found.file("centroids.npy")), np.eye(3))
    with pytest.raises(UserError, match="no column 'confidenc'; it has rows, confidence"):
        found.column("confidenc")
    with pytest.raises(UserError, match=r"no file 'rows.npy' attached; it has centroids.npy"):
        found.file("rows.npy")


def test_a_column_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column more has 3 rows of 4"):
        write(tmp_path / "s", "id", KINDS["id"][0], 3, more=np.zeros(3))


@pytest.mark.parametrize("name", [str, Path])
def test_rows_that_lie_in_the_folder_stay_as_they_are(tmp_path: Path, name: Any) -> None:
    """Saved over themselves they would be emptied while they are mapped."""
    rows = KINDS["dense"][0]
    np.save(tmp_path / "rows.npy", rows)
    before = (tmp_path / "rows.npy").stat()
    mapped = np.load(name(tmp_path / "rows.npy"), mmap_mode="r+")
    write(tmp_path, "dense", mapped, None)
    after = (tmp_path / "rows.npy").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert np.array_equal(sidecar.read(tmp_path).rows(), rows)


def test_a_part_of_a_file_is_not_taken_for_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", KINDS["dense"][0])
    part = np.load(tmp_path / "rows.npy", mmap_mode="r")[:2]
    with pytest.raises(ValueError, match="a part of"):
        write(tmp_path, "dense", part, None)
    assert not (tmp_path / storage.MANIFEST).exists()


def test_a_mapped_column_of_elsewhere_is_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", KINDS["dense"][0])
    mapped = np.load(tmp_path / "other.npy", mmap_mode="r")
    write(tmp_path / "s", "dense", mapped, None)
    assert np.array_equal(sidecar.read(tmp_path / "s").rows(), mapped)


BAD_ROWS: list[tuple[str, np.ndarray, int | None, str]] = [
    ("id", np.array([0, 3], np.int32), 3, "groups run from 0 to 3, which are not 0 to 3 - 1"),
    ("id", np.array([-1, 0], np.int32), 3, "groups run from -1 to 0"),
    ("mask", np.full((2, 2, 2), 5, np.uint8), 5, "groups run from 5 to 5"),
    ("multi_hot", np.array([[0, 1], [2, 0]], np.uint8), 2, "row of sample 1 holds more than 0"),
    ("dense", np.array([[0, 1], [np.nan, 0]], np.float32), None, "row of sample 1 is NaN"),
    ("dense", np.array([[np.inf], [0]], np.float16), None, "row of sample 0 is NaN or infinite"),
    ("box", np.array([[0, 0, 2, 2], [1, 1, 1, 4]], np.int32), None, "row of sample 1 is no box"),
    ("box", np.array([[0, -1, 2, 2]], np.int32), None, "row of sample 0 is no box"),
    ("id", np.zeros(0, np.int32), 3, "no rows to annotate"),
]


@pytest.mark.parametrize(("kind", "rows", "groups", "said"), BAD_ROWS)
def test_rows_beyond_their_kind_are_refused(
    tmp_path: Path, kind: str, rows: np.ndarray, groups: int | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        write(tmp_path / "s", kind, rows, groups)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("kind", "rows", "groups"),
    [
        ("ids", np.zeros(2, np.int32), 1),
        ("id", np.zeros(2, np.float32), 1),
        ("id", np.zeros((2, 1), np.int32), 1),
        ("box", np.zeros((2, 3), np.int32), None),
        ("dense", np.zeros((2, 3), np.float64), None),
        ("multi_hot", np.zeros((2, 3), np.uint8), 4),
    ],
)
def test_types_and_shapes_are_those_of_the_kind(
    tmp_path: Path, kind: str, rows: np.ndarray, groups: int | None
) -> None:
    with pytest.raises(ValueError):
        write(tmp_path / "s", kind, rows, groups)


def test_values_are_looked_at_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "LOOKED_AT", 24)  # two rows
    rows = np.zeros((7, 3), np.float32)
    rows[5, 1] = np.nan
    with pytest.raises(UserError, match="the row of sample 5 is NaN"):
        write(tmp_path / "s", "dense", rows, None)


def test_provenance_must_say_whether_labels_were_seen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="saw_labels"):
        sidecar.write(
            tmp_path, KINDS["id"][0], manifest=MANIFEST, kind="id", groups=3, provenance={}
        )


def test_a_sidecar_annotates_its_own_shards_only(tmp_path: Path) -> None:
    write(tmp_path / "s", "id", *KINDS["id"])
    with pytest.raises(
        UserError, match="annotates shards aaaaaaaaaaaa, and these are bbbbbbbbbbbb"
    ):
        sidecar.read(tmp_path / "s", manifest="b" * 64)


def test_what_is_no_sidecar_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no annotation"):
        sidecar.read(tmp_path / "none")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "weights").write_text("x")
    storage.publish_folder(tmp_path / "else", extra={"images": 3})
    with pytest.raises(UserError, match="holds something else"):
        sidecar.read(tmp_path / "else")


def test_damage_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "s", "id", *KINDS["id"])
    with (tmp_path / "s" / "rows.npy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedError, match="was damaged"):
        sidecar.read(tmp_path / "s")


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "s", "id", *KINDS["id"])
    before = (tmp_path / "s" / "rows.npy").read_bytes()
    with pytest.raises(UserError, match="is taken already"):
        write(tmp_path / "s", "id", np.zeros(4, np.int32), 1)
    assert (tmp_path / "s" / "rows.npy").read_bytes() == before
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds letter.txt, which is no part"):
        write(tmp_path / "t", "id", *KINDS["id"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write(tmp_path / "file", "id", *KINDS["id"])


def test_an_unfinished_sidecar_is_none_and_can_be_finished(tmp_path: Path) -> None:
    """Killed between its columns and its record."""
    (tmp_path / "s").mkdir()
    np.save(tmp_path / "s" / "rows.npy", np.zeros(2, np.int32))
    (tmp_path / "s" / ".half.tmp").write_text("")
    with pytest.raises(UserError, match="holds no annotation"):
        sidecar.read(tmp_path / "s")
    write(tmp_path / "s", "id", *KINDS["id"])
    record = json.loads((tmp_path / "s" / storage.MANIFEST).read_text())
    assert [f["name"] for f in record["files"]] == ["rows.npy"]
    assert np.array_equal(sidecar.read(tmp_path / "s").rows(), KINDS["id"][0])
