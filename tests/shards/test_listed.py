"""Everything that is listed is a sample, or counted and named; and no first sample or file decides for all."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import shards
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.classes import label_of
from shards.format.pictures import Picture
from shards.sources import folders, listing, tables, tars
from shards.sources.listing import Listing
from shards.write.scan import Threshold, scan
from tests.shards import inputs
from tests.shards.inputs import PNG, keys, put
from tools.shards.__main__ import main

AS_IS = Picture(background="white")


def passed(found: Listing) -> set[str]:
    return {p.name for p in found.passed}


def skipped(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize(
    "name", ["x.jfif", "x.jpe", "x.avif", "x.JP2", "x", "x.PNG", "x.JPG_large", "x.heic", "x.1.2"]
)
def test_a_picture_under_any_name_is_an_input(tmp_path: Path, name: str) -> None:
    root = put(tmp_path / "in", f"a/{name}", "a/y.png")
    kind = {"avif": "AVIF", "JP2": "JPEG2000"}.get(name.rpartition(".")[2])
    if kind:
        Image.fromarray(inputs.pixels(1, 16)[0]).save(root / "a" / name, kind)
    found = folders.image_folder(str(root), Picture(size=8, background="white"))
    assert keys(found) == [f"a/{n}" for n in sorted([name, "y.png"])] and not found.passed
    source, seen = scan(tmp_path / "out", found)
    assert (seen.listed, seen.kept) == (2, 2) and source.images(np.arange(2)).shape == (2, 3, 8, 8)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.sampled_from(
    ["a/0.png", "a/1", "a/notes.txt", "a/.2.png", "a/@eaDir/3.png", "b/deep/4.jpe", "b/.thumbnails/5.png", "b/6.json",
     "b/Thumbs.db", "c/.ipynb_checkpoints/7.png", "c/8.png"]
), min_size=1))  # fmt: skip
def test_every_file_is_a_sample_or_below_what_is_named(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    root = tmp_path_factory.mktemp("law")
    for name in names:
        put(root, name)
        if name.endswith((".txt", ".json", ".db")):
            (root / name).write_bytes(b"words")
    found = folders.image_folder(str(root), AS_IS)
    told = passed(found)
    covered = {n for n in names if n in told or any(n.startswith(t) for t in told if t[-1] == "/")}
    assert covered.isdisjoint(keys(found)) and covered | {*keys(found)} == names


def test_what_is_passed_over_is_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "in", "a/0.png", "a/@eaDir/t.jpg", "a/._0.png")
    out = tmp_path / "out"
    assert main(["make", "folder", str(root), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"]["passed_over"] == 2
    assert manifests.load(out).source["passed_over"] == 2
    assert {entry["passed_over"] for entry in skipped(out)} == {"a/@eaDir/", "a/._0.png"}


def _loop(place: Path) -> None:
    place.symlink_to(place.name)


def _gone(place: Path) -> None:
    place.symlink_to("nowhere.png")


def _pipe(place: Path) -> None:
    os.mkfifo(place)


def _empty(place: Path) -> None:
    place.touch()


def _text(place: Path) -> None:
    place.write_text("<html>403</html>")


@pytest.mark.parametrize("make", [_loop, _gone, _pipe, _empty, _text])
def test_an_unreadable_input_is_one_bad_one(tmp_path: Path, make: Any) -> None:
    root = put(tmp_path / "in", "a/0.png", "a/1.png", "b/2.png")
    make(root / "a" / "bad.png")
    found = folders.image_folder(str(root), AS_IS)
    with pytest.raises(UserError, match=r"1 of 4 inputs .*'a/bad.png'.*--max-skipped 1"):
        scan(tmp_path / "out", found)
    _, seen = scan(tmp_path / "out", found, max_skipped=Threshold(count=1))
    assert (seen.kept, seen.skipped) == (3, 1)
    assert [entry["key"] for entry in skipped(tmp_path / "out")] == ["a/bad.png"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ELOOP, errno.EPERM])
def test_an_input_that_fails_to_be_read_is_one_bad_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    root = put(tmp_path / "in", "a/0.png", "a/1.png")

    def failing(place: str, *mode: Any, **more: Any) -> Any:
        if place.endswith("1.png"):
            raise OSError(code, os.strerror(code), place)
        return open(place, *mode, **more)  # noqa: PTH123

    monkeypatch.setattr(listing, "open", failing, raising=False)
    found = folders.image_folder(str(root), AS_IS)
    _, seen = scan(tmp_path / "out", found, max_skipped=Threshold(count=1))
    assert (seen.kept, seen.skipped) == (1, 1)


def test_an_error_of_the_machine_is_no_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = put(tmp_path / "in", "a/0.png")

    def failing(place: str, *mode: Any, **more: Any) -> Any:
        raise OSError(errno.EMFILE, "too many", place)

    found = folders.image_folder(str(root), AS_IS)
    monkeypatch.setattr(listing, "open", failing, raising=False)
    with pytest.raises(OSError, match="too many"):
        found.store.read(0)


@pytest.mark.parametrize(
    ("shut", "code"),
    [
        ("a/shut", errno.EACCES),
        ("a/shut", errno.EIO),
        ("a/b/shut", errno.ESTALE),
        ("b/shut", errno.ELOOP),
        ("a/été shut", errno.ENOENT),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shut: str, code: int
) -> None:
    root, scandir = put(tmp_path / "in", "a/0.png", f"{shut}/1.png", "b/2.png"), os.scandir

    def refusing(place: Any) -> Any:
        if str(place).endswith("shut"):
            raise OSError(code, os.strerror(code), str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    found = folders.image_folder(str(root), AS_IS)
    assert keys(found) == sorted(["a/0.png", f"{shut}/", "b/2.png"]) and found.labels is not None
    assert found.labels.tolist() == [int(key[0] == "b") for key in keys(found)]
    with pytest.raises(UserError, match=f"'{shut}/': a folder that cannot be read"):
        scan(tmp_path / "out", found)
    _, seen = scan(tmp_path / "out", found, max_skipped=Threshold(count=1))
    assert (seen.kept, seen.skipped) == (2, 1)


@pytest.mark.parametrize(
    ("stray", "empty", "bad"),
    [
        (("stray.png",), ("c",), ("a/bad.png",)),
        (("stray.png", "2.jpg"), ("c",), ()),
        ((), ("c",), ("a/bad.png", "b/bad.png")),
        (("stray.png",), (), ("a/bad.png",)),
        (("stray",), ("c", "d"), ("b/deep/bad.JPG",)),
    ],
)
def test_a_stray_file_an_empty_class_and_bad_images_are_told_together(
    tmp_path: Path, stray: tuple[str, ...], empty: tuple[str, ...], bad: tuple[str, ...]
) -> None:
    root = put(tmp_path / "in", "a/0.png", "b/1.png", *stray)
    for name in empty:
        (root / name).mkdir()
    for name in bad:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    with pytest.raises(UserError) as refused:
        scan(tmp_path / "out", folders.image_folder(str(root), AS_IS))
    wrong = {*stray, *bad}
    assert ("hold no images, such as 'c'" in str(refused.value)) == bool(empty)
    assert f"{len(wrong)} of {2 + len(wrong)} inputs" in str(refused.value)
    assert {entry["key"] for entry in skipped(tmp_path / "out")} == wrong


@pytest.mark.parametrize(
    "names",
    [
        ("train/a/0.png", "val/a/1.png"),
        ("train/0.png", "test/1.png", "valid/2.png"),
        ("Train/a/0.png", "Validation/a/1.png"),
        ("all/train/a/0.png", "all/val/b/1.png"),
        ("train/a/0.png", "val/a/1.png", "devkit/x.png"),
    ],
)
def test_the_parent_of_splits_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = put(tmp_path / "in", *names)
    with pytest.raises(UserError, match="holds the splits") as refused:
        folders.image_folder(str(root), AS_IS)
    cure = str(refused.value).rpartition("them, ")[2]
    assert keys(folders.image_folder(cure, AS_IS))


@pytest.mark.parametrize(
    "names",
    [("train/0.png", "bus/1.png", "car/2.png"), ("test/0.png",), ("evaluate/0.png", "dev1/1.png")],
)
def test_classes_that_are_called_like_a_split_are_classes(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    found = folders.image_folder(str(put(tmp_path / "in", *names)), AS_IS)
    assert found.class_names == tuple(sorted(name.partition("/")[0] for name in names))


@given(st.integers(1, 30), st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_numbered_folders_from_0_have_their_number_as_label(
    tmp_path_factory: pytest.TempPathFactory, count: int, width: int
) -> None:
    names = [f"{i:0{width}d}" for i in range(count)]
    root = put(tmp_path_factory.mktemp("numbers"), *(f"{name}/{name}.png" for name in names))
    found = folders.image_folder(str(root), AS_IS)
    assert found.class_names == tuple(names) and found.labels is not None
    assert found.labels.tolist() == [int(name) for name in found.class_names]


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        (("1", "2", "10"), "class '1' is label 0"),
        (("0", "2", "10"), "class '2' is label 1"),
        (("007", "7000"), "class '007' is label 0"),
        (("0", "1", "2", "5"), "class '5' is label 3"),
        (("3", "30", "cat"), "class '3' is label 0"),
    ],
)
def test_numbered_folders_with_gaps_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], numbers: tuple[str, ...], told: str
) -> None:
    root = put(tmp_path / "in", *(f"{number}/{number}.png" for number in numbers[::-1]))
    assert main(["make", "folder", str(root), "--out", str(tmp_path / "out")]) == 0
    assert told in capsys.readouterr().out
    manifest = manifests.load(tmp_path / "out")
    assert manifest.class_names == numbers
    name = told.split("'")[1]
    with pytest.raises(UserError, match=f"name:{name} or number:"):
        label_of(name, manifest.class_names, manifest.classes)


# ---------------------------------------------------------------- dataset.json


def edm(root: Path, labels: object, count: int = 6) -> Path:
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(count)]
    put(root, *names)
    if labels is not None:
        (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def zipped(root: Path) -> Path:
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as to:
        for file in sorted(p for p in root.rglob("*") if p.is_file()):
            to.write(file, file.relative_to(root))
    return path


PAIRS = [[f"{i // 2:05d}/img{i:08d}.png", i % 3] for i in range(6)]


@pytest.mark.parametrize("labels", [PAIRS, dict(PAIRS), PAIRS[::-1]], ids=["list", "dict", "back"])
@pytest.mark.parametrize("packed", [False, True])
def test_dataset_json_has_the_labels(tmp_path: Path, labels: object, packed: bool) -> None:
    root = edm(tmp_path / "in", labels)
    found = folders.image_folder(str(zipped(root) if packed else root), AS_IS)
    assert keys(found) == [name for name, _ in PAIRS] and found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2] and found.classes == 3
    assert not found.class_names and not found.passed
    source, _ = scan(tmp_path / "out", found)
    assert np.array_equal(source.images(np.arange(6)), inputs.pixels(24)[:6].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_without_labels_have_none(tmp_path: Path, packed: bool) -> None:
    nulls = [[name, None] for name, _ in PAIRS]
    for name, text in (
        ("none", None),
        ("null", json.dumps({"labels": None})),
        ("nulls", json.dumps({"labels": nulls})),
    ):
        root = edm(tmp_path / name, None)
        if text:
            (root / "dataset.json").write_text(text)
        found = folders.image_folder(str(zipped(root) if packed else root), AS_IS)
        assert len(found.keys) == 6 and found.labels is None


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([["00000/img00000000.png", [0.1, 0.2]]], "whole numbers"),
        ([["00000/img00000000.png", "cat"]], "whole numbers"),
        ([["00000/img00000000.png", 1.0]], "whole numbers"),
        ([["00000/img00000000.png", 10**20]], "whole numbers"),
        ([["00000/img00000000.png", -(10**20)]], "whole numbers"),
        ([["00000/img00000000.png", 1 << 20]], "whole numbers"),
        ([["00000/img00000000.png", 1], ["00000/img00000001.png", None]], "null for all"),
        ([["00000/img00000000.png", 1], ["00000/img00000000.png", 2]], "labels 1 and 2"),
        ("words", "mend it, or move it away"),
        (5, "mend it, or move it away"),
    ],
)
def test_a_dataset_json_that_is_another_is_refused(
    tmp_path: Path, labels: object, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        folders.image_folder(str(edm(tmp_path / "in", labels)), AS_IS)


def test_what_dataset_json_and_the_files_do_not_share_is_bad(tmp_path: Path) -> None:
    root = edm(tmp_path / "in", [*PAIRS[1:], ["00009/img00000099.png", 0]])
    found = folders.image_folder(str(root), AS_IS)
    _, seen = scan(tmp_path / "out", found, max_skipped=Threshold(count=2))
    assert (seen.listed, seen.kept, seen.skipped) == (7, 5, 2)
    assert [e["reason"] for e in skipped(tmp_path / "out")] == [
        "dataset.json does not name it", "no such file"
    ]  # fmt: skip


def test_a_zip_of_classes_is_a_folder_of_classes(tmp_path: Path) -> None:
    root = put(tmp_path / "in", "cat/0.png", "dog/1.png", "dog/@eaDir/2.png")
    (root / "dog" / "notes.txt").write_text("words")
    one, two = (folders.image_folder(str(p), AS_IS) for p in (root, zipped(root)))
    assert keys(one) == keys(two) and one.class_names == two.class_names == ("cat", "dog")
    assert passed(two) == {"dog/@eaDir/2.png", "dog/notes.txt"}
    fingerprints = {scan(tmp_path / f"o{i}", x)[0].fingerprint for i, x in enumerate((one, two))}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("set/cat/0.png", "set/dog/1.png", "__MACOSX/set/cat/._0.png"), ("cat", "dog")),
        (("a/b/cat/0.png", "a/b/dog/0/1.png"), ("cat", "dog")),
        # images beside no other folder: one class, or none
        (("cat/0.png", "cat/1.png"), ("cat",)),
        (("cat/0.png", "cat/more/1.png"), ("cat",)),
        (("0.png", "1.png"), ()),
        (("cat/0.png", "dog/1/1.png"), ("cat", "dog")),
        (("train/cat/0.png", "train/dog/1.png"), ("cat", "dog")),
        (("a b/été/0.png", "a b/2/1.png"), ("2", "été")),
        (("set/2/0.png", "set/10/1.png", "set/.git/0.png"), ("2", "10")),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_or_zip_of_one_folder_is_that_folder(
    tmp_path: Path, names: tuple[str, ...], classes: tuple[str, ...], packed: bool
) -> None:
    root = put(tmp_path / "in", *names)
    (root / "notes.txt").write_text("words")
    found = folders.image_folder(str(zipped(root) if packed else root), AS_IS)
    assert found.class_names == classes and not found.refusals
    inputs = {name for name in names if "__MACOSX" not in name and ".git" not in name}
    assert {found.inside + key for key in keys(found)} == inputs and "notes.txt" in passed(found)
    _, seen = scan(tmp_path / "out", found)
    assert seen.kept == len(inputs)


def test_a_folder_beside_the_lone_one_is_never_looked_past(tmp_path: Path) -> None:
    root = put(tmp_path / "in", "set/cat/0.png", "set/dog/1.png")
    (root / "more").mkdir()
    found = folders.image_folder(str(root), AS_IS)
    assert not found.inside and found.class_names == ("more", "set") and found.refusals
    put(root, "stray.png")
    (root / "more").rmdir()
    found = folders.image_folder(str(root), AS_IS)
    assert not found.inside and {*found.flaws} == {0}


@pytest.mark.parametrize("name", ["a", "a/b"])
def test_lone_folders_without_images_hold_nothing_to_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "in" / name).mkdir(parents=True)
    found = folders.image_folder(str(tmp_path / "in"), AS_IS)
    assert not len(found.keys) and not found.flaws
    with pytest.raises(UserError, match="source 'in' is empty"):
        scan(tmp_path / "out", found)


def test_a_folder_that_is_looked_through_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "in", "set/cat/0.png", "set/dog/1.png")
    assert main(["make", "folder", str(root), "--out", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["class_names"] == ["cat", "dog"] and "set/" in said.err
    assert manifests.load(tmp_path / "out").class_names == ("cat", "dog")


@pytest.mark.parametrize("chunk", ["00000/", ""])
def test_a_zip_of_one_folder_with_dataset_json_has_its_labels(tmp_path: Path, chunk: str) -> None:
    pairs = [[f"{chunk}img{i:08d}.png", 1 - i] for i in range(2)]
    root = put(tmp_path / "in", *(f"top/{name}" for name, _ in pairs))
    (root / "top" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    found = folders.image_folder(str(zipped(root)), AS_IS)
    assert keys(found) == [name for name, _ in pairs] and found.labels is not None
    assert found.labels.tolist() == [1, 0] and not found.passed


# ---------------------------------------------------------------- tars


def tar(path: Path, *members: tuple[str, bytes] | tuple[str, str, str]) -> Path:
    """Files (name, data), and links (name, 'hard' or 'symbolic', target)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as to:
        for name, *rest in members:
            member = tarfile.TarInfo(name)
            if len(rest) == 2:
                member.type = tarfile.LNKTYPE if rest[0] == "hard" else tarfile.SYMTYPE
                member.linkname = str(rest[1])
                to.addfile(member)
            else:
                member.size = len(rest[0])
                to.addfile(member, io.BytesIO(rest[0]))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("link", "target"),
    [("hard", "d/0.png"), ("symbolic", "0.png"), ("symbolic", "../d/0.png"), ("symbolic", "./0.png"),
     ("hard", "./d/0.png"), ("symbolic", "1.png")],
)  # fmt: skip
def test_a_link_in_a_tar_is_what_it_points_to(tmp_path: Path, link: str, target: str) -> None:
    path = tar(
        tmp_path / "0.tar",
        ("d/0.png", PNG[0]),
        ("d/1.png", "hard", "d/0.png"),
        ("d/2.png", link, target),
    )
    found = tars.tars([str(path)], AS_IS)
    assert keys(found) == ["d/0", "d/1", "d/2"] and not found.passed
    assert [found.store.read(row) for row in range(3)] == [PNG[0]] * 3


@pytest.mark.parametrize("target", ["2.png", "nowhere.png", "/etc/passwd", "../out.png", "3.png"])
def test_a_link_out_of_a_tar_or_in_circles_is_named(tmp_path: Path, target: str) -> None:
    members = ("0.png", PNG[0]), ("2.png", "symbolic", target), ("3.png", "symbolic", "2.png")
    found = tars.tars([str(tar(tmp_path / "0.tar", *members))], AS_IS)  # type: ignore[arg-type]
    assert keys(found) == ["0"] and passed(found) == {"0.tar: 2.png", "0.tar: 3.png"}


def test_an_index_names_links_and_names_without_suffix(tmp_path: Path) -> None:
    tar(
        tmp_path / "0.tar",
        ("0.png", PNG[0]), ("1.png", "hard", "0.png"), ("plain", PNG[1]), ("._0.png", b"x"), ("__a__/b.png", PNG[2]),
    )  # fmt: skip
    (tmp_path / "1.tar.gz").write_bytes(b"x")
    assert main(["index", str(tmp_path)]) == 0
    assert manifests.load(tmp_path).source["passed_over"] == 5
    told = {entry["passed_over"] for entry in skipped(tmp_path)}
    assert told == {
        "1.tar.gz",
        *(f"0.tar: {n}" for n in ("1.png", "plain", "._0.png", "__a__/b.png")),
    }
    assert main(["index", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", ["plain", "d/plain", "d.1/plain", "LICENSE", "d.png/0"])
def test_a_name_without_a_suffix_in_a_tar_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tar(tmp_path / "in" / "0.tar", ("0.png", PNG[0]), (name, PNG[1]), ("2.png", PNG[2]))
    for verb in ("index", "make tars"):
        out = tmp_path / verb
        assert main([*verb.split(), str(tmp_path / "in"), "--out", str(out), "--json"]) == 0
        json.loads(capsys.readouterr().out)
        manifest = manifests.load(out)
        assert (manifest.count, manifest.source["passed_over"]) == (2, 1)
        (entry,) = skipped(out)
        assert entry["passed_over"].endswith(f"0.tar: {name}") and "extension" in entry["reason"]


@pytest.mark.parametrize("name", ["1.tar.gz", "1.tgz", "b/1.tar.zst", "1.tar.bz2", "1.txz"])
def test_a_compressed_tar_beside_tars_is_named(tmp_path: Path, name: str) -> None:
    tar(tmp_path / "0.tar", ("0.png", PNG[0]))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    assert passed(tars.tars([str(tmp_path)], AS_IS)) == {name}


def test_an_upper_case_tar_is_a_tar(tmp_path: Path) -> None:
    tar(tmp_path / "0.TAR", ("0.png", PNG[0]))
    assert keys(tars.tars([str(tmp_path)], AS_IS)) == ["0"]


@pytest.mark.parametrize("labelled", [(0,), (1,), (0, 1), (1, 2), (2,)])
def test_labels_of_some_samples_only_are_asked_about(
    tmp_path: Path, labelled: tuple[int, ...]
) -> None:
    for i in range(3):
        label = [(f"{i}.cls", b"1")] if i in labelled else []
        tar(tmp_path / f"{i}.tar", (f"{i}.png", PNG[i]), *label)
    words = f"{len(labelled)} of 3 samples have a .cls"
    with pytest.raises(UserError, match=words):
        tars.tars([str(tmp_path)], AS_IS)
    assert tars.tars([str(tmp_path)], AS_IS, label="none").labels is None
    asked = tars.tars([str(tmp_path)], AS_IS, label="cls")
    assert {*asked.flaws} == {0, 1, 2} - {*labelled}
    _, seen = scan(tmp_path / "out", asked, max_skipped=Threshold(count=2))
    assert (seen.kept, seen.skipped) == (len(labelled), 3 - len(labelled))
    with pytest.raises(UserError):
        main(["index", str(tmp_path), "--out", str(tmp_path / "index")])
    assert main(["index", str(tmp_path), "--out", str(tmp_path / "index"), "--label", "none"]) == 0
    assert "y" not in shards.read_all(tmp_path / "index")


@pytest.mark.parametrize("order", [("png", "jpg"), ("jpg", "png"), ("webp", "png")])
@pytest.mark.parametrize("apart", [False, True])
def test_two_pictures_a_sample_in_changing_order_are_asked_about(
    tmp_path: Path, order: tuple[str, str], apart: bool
) -> None:
    first = [(f"0.{name}", PNG[i]) for i, name in enumerate(order)]
    second = [(f"1.{name}", PNG[i + 2]) for i, name in enumerate(order[::-1])]
    for number, members in enumerate([first, second] if apart else [first + second]):
        tar(tmp_path / f"{number}.tar", *members)
    with pytest.raises(UserError, match="--image"):
        tars.tars([str(tmp_path)], AS_IS)
    with pytest.raises(UserError, match="--image"):
        main(["index", str(tmp_path)])
    found = tars.tars([str(tmp_path)], AS_IS, image="png")
    want = [data for name, data in first + second if name.endswith("png")]
    assert [found.store.read(row) for row in range(2)] == want


def test_one_picture_a_sample_may_be_of_any_kind(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", ("0.png", PNG[0]), ("1.webp", PNG[1]), ("2.jfif", PNG[2]))
    assert [*map(len, map(tars.tars([str(tmp_path)], AS_IS).store.read, range(3)))] == [
        len(data) for data in PNG[:3]
    ]


CLASSES = [
    ("json:class", lambda text: {"class": text}),
    ("json:a.b", lambda text: {"a": {"b": text}}),
    ("json:a.b.c", lambda text: {"a": {"b": {"c": text}}}),
    ("json:a.b", lambda text: {"a.b": text, "a": {"b": "other"}}),
    ("json:a.b.c", lambda text: {"a": {"b.c": text}}),
]


@pytest.mark.parametrize(("field", "told"), CLASSES)
@pytest.mark.parametrize("command", ["index", "make tars"])
def test_text_of_a_json_field_is_numbered(
    tmp_path: Path, field: str, told: Any, command: str
) -> None:
    for part, texts in enumerate([("dog", "emu"), ("cat", "dog")]):
        members = [
            (f"{part}{i}.{kind}", data)
            for i, text in enumerate(texts)
            for kind, data in (
                ("png", PNG[part * 2 + i]),
                ("json", json.dumps(told(text)).encode()),
            )
        ]
        tar(tmp_path / "in" / f"{part}.tar", *members)
    out = tmp_path / "out"
    assert main([*command.split(), str(tmp_path / "in"), "--label", field, "--out", str(out)]) == 0
    found = shards.read_all(out)
    assert dict(zip(found["key"].tolist(), found["y"].tolist(), strict=True)) == {
        "00": 1, "01": 2, "10": 0, "11": 1
    }  # fmt: skip
    assert manifests.load(out).class_names == ("cat", "dog", "emu")
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("texts", "names", "labels"),
    [
        (["dog\n", " cat"], ("cat", "dog"), [1, 0]),
        (["sea bass, raw", "été"], ("sea bass, raw", "été"), [0, 1]),
        (["3", "1\n"], (), [3, 1]),
        (["class10", "class2"], ("class2", "class10"), [1, 0]),
    ],
)
@pytest.mark.parametrize("command", ["index", "make tars"])
def test_text_of_a_cls_member_is_numbered_as_that_of_json(
    tmp_path: Path, texts: list[str], names: tuple[str, ...], labels: list[int], command: str
) -> None:
    members = [
        (f"{i}.{k}", d)
        for i, t in enumerate(texts)
        for k, d in (("png", PNG[i]), ("cls", t.encode()))
    ]
    tar(tmp_path / "in" / "0.tar", *members)
    out = tmp_path / "out"
    assert main([*command.split(), str(tmp_path / "in"), "--out", str(out)]) == 0
    found, manifest = shards.read_all(out), manifests.load(out)
    assert dict(zip(found["key"].tolist(), found["y"].tolist(), strict=True)) == dict(
        zip("01", labels, strict=True)
    )
    assert manifest.class_names == names and main(["verify", str(out)]) == 0


@pytest.mark.parametrize("text", [b"", b" \n", b"1.5", b"1e3", b"nan", b"\xff\xfe", b"-1"])
def test_a_cls_member_without_a_class_is_a_bad_sample(tmp_path: Path, text: bytes) -> None:
    tar(
        tmp_path / "0.tar", ("0.png", PNG[0]), ("0.cls", text), ("1.png", PNG[1]), ("1.cls", b"cat")
    )
    found = tars.tars([str(tmp_path)], AS_IS)
    assert {*found.flaws} == {0} and found.class_names == ("cat",)


def test_numbers_and_text_as_cls_members_are_refused(tmp_path: Path) -> None:
    tar(
        tmp_path / "0.tar", ("0.png", PNG[0]), ("0.cls", b"7"), ("1.png", PNG[1]), ("1.cls", b"cat")
    )
    with pytest.raises(UserError, match="bring them to one"):
        tars.tars([str(tmp_path)], AS_IS)
    with pytest.raises(UserError, match="bring them to one"):
        main(["index", str(tmp_path)])


def test_numbers_and_text_as_labels_are_refused(tmp_path: Path) -> None:
    tar(
        tmp_path / "0.tar",
        ("0.png", PNG[0]), ("0.json", b'{"c": 1}'), ("1.png", PNG[1]), ("1.json", b'{"c": "cat"}'),
    )  # fmt: skip
    with pytest.raises(UserError, match="bring them to one"):
        tars.tars([str(tmp_path)], AS_IS, label="json:c")
    with pytest.raises(UserError, match="bring them to one"):
        main(["index", str(tmp_path), "--label", "json:c"])


@pytest.mark.parametrize("field", ["label", "Class", "class_id", "category"])
def test_a_json_field_that_may_hold_labels_is_named_where_none_is_read(
    tmp_path: Path, field: str
) -> None:
    told = {"caption": "a cat", "width": 4, field: 1}
    tar(tmp_path / "0.tar", ("0.png", PNG[0]), ("0.json", json.dumps(told).encode()))
    found = tars.tars([str(tmp_path)], AS_IS)
    assert found.labels is None
    (passed,) = found.passed
    assert passed.name == f"json:{field}" and f"--label json:{field} " in passed.reason
    assert not tars.tars([str(tmp_path)], AS_IS, label="none").passed
    taken = tars.tars([str(tmp_path)], AS_IS, label=f"json:{field}")
    assert taken.classes == 2 and not taken.passed


@pytest.mark.parametrize(
    "text",
    [b"", b"[1]", b"no json", b"3", b'{"label": [1]}', b"\xff", b"[" * 100_000],
    ids=["empty", "list", "text", "number", "labels", "bytes", "deep"],
)
def test_a_json_member_that_can_hold_no_label_is_passed_in_silence(
    tmp_path: Path, text: bytes
) -> None:
    tar(tmp_path / "0.tar", ("0.png", PNG[0]), ("0.json", text))
    assert not tars.tars([str(tmp_path)], AS_IS).passed


# ---------------------------------------------------------------- parquet


def parquet(path: Path, **columns: object) -> None:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(columns.values())))  # type: ignore[arg-type]
    writer.write_table(arrow.table({"image": PNG[:count], **columns}), path)


@pytest.mark.parametrize("second", ["int8", "int16", "int32", "uint8", "uint64"])
def test_labels_of_several_widths_are_read(tmp_path: Path, second: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet(tmp_path / "0.parquet", label=arrow.array([0, 1], type=arrow.int64()))
    parquet(tmp_path / "1.parquet", label=arrow.array([2, 1], type=getattr(arrow, second)()))
    found = tables.parquet([str(tmp_path)], AS_IS)
    assert found.labels is not None and found.labels.tolist() == [0, 1, 2, 1]
    assert found.labels.dtype == np.int64


def arrays(arrow: Any) -> dict[str, tuple[Any, Any]]:
    """Labels 0, 1 and 2, 1 as two files have them that differ in something else than the labels."""
    names, others = ["ant", "bee"], ["cat", "bee"]
    return {
        "of another dictionary": (
            arrow.array(names).dictionary_encode(), arrow.array(others).dictionary_encode()
        ),
        "a dictionary in one alone": (arrow.array(names).dictionary_encode(), arrow.array(others)),
        "long text": (arrow.array(names, arrow.large_string()), arrow.array(others)),
        "numbers in a dictionary": (
            arrow.array([0, 1]), arrow.array([2, 1], arrow.int8()).dictionary_encode()
        ),
        "short dictionary": (
            arrow.array(names).cast(arrow.dictionary(arrow.int8(), arrow.string())),
            arrow.array(others).cast(arrow.dictionary(arrow.int64(), arrow.large_string())),
        ),
        "viewed text": (arrow.array(names, arrow.string_view()), arrow.array(others)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [
        "of another dictionary", "a dictionary in one alone", "long text", "numbers in a dictionary",
        "short dictionary", "viewed text",
    ],
)  # fmt: skip
def test_labels_that_are_stored_in_two_ways_are_read(tmp_path: Path, how: str) -> None:
    first, second = arrays(pytest.importorskip("pyarrow"))[how]
    parquet(tmp_path / "0.parquet", label=first)
    parquet(tmp_path / "1.parquet", label=second)
    found = tables.parquet([str(tmp_path)], AS_IS)
    assert found.labels is not None and found.labels.tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("strict", ["label", "image", "label image"])
@pytest.mark.parametrize("first", [True, False])
def test_columns_that_may_be_empty_beside_ones_that_may_not_are_read(
    tmp_path: Path, strict: str, first: bool
) -> None:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number in (0, 1):
        made = arrow.table({"image": PNG[2 * number : 2 * number + 2], "label": [number, 1]})
        if number == int(first):
            fields = [
                field.with_nullable(field.name not in strict.split()) for field in made.schema
            ]
            made = made.cast(arrow.schema(fields))
        writer.write_table(made, tmp_path / f"{number}.parquet")
    found = tables.parquet([str(tmp_path)], AS_IS)
    assert found.labels is not None and found.labels.tolist() == [0, 1, 1, 1]
    assert [found.store.read(row) for row in range(4)] == PNG[:4]


@pytest.mark.parametrize("which", [{0}, {1}, {2}, {0, 1}, {1, 2}], ids=str)
def test_a_label_column_of_some_files_is_asked_about(tmp_path: Path, which: set[int]) -> None:
    for i in range(3):
        parquet(
            tmp_path / f"{i}.parquet", **({"label": [0, 1]} if i in which else {"other": [0, 1]})
        )
    with pytest.raises(UserError, match=rf"'label' is in {len(which)} of 3 files.*--label none"):
        tables.parquet([str(tmp_path)], AS_IS)
    found = tables.parquet([str(tmp_path)], AS_IS, label="none")
    assert found.labels is None and len(found.keys) == 6


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/0.parquet", "validation/0.parquet"),
        ("train.parquet", "val.parquet"),
        ("train_0.parquet", "dev_0.parquet"),
        ("default/train/0.parquet", "default/test/0.parquet"),
    ],
)
def test_splits_in_one_folder_are_asked_about(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        parquet(tmp_path / name, label=[0, 1])
    with pytest.raises(UserError, match="files of 2 splits"):
        tables.parquet([str(tmp_path)], AS_IS)
    assert len(tables.parquet([str(tmp_path)], AS_IS, split="train").keys) == 2
    both = [str(tmp_path / name) for name in names]
    assert len(tables.parquet(both, AS_IS).keys) == 4
    with pytest.raises(UserError, match="split 'tset' is not in"):
        tables.parquet([str(tmp_path)], AS_IS, split="tset")


@pytest.mark.parametrize("values", [["dog", "cat"], [True, False]], ids=["text", "bool"])
def test_labels_that_are_text_are_numbered(tmp_path: Path, values: list[object]) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet(tmp_path / "0.parquet", label=values)
    parquet(tmp_path / "1.parquet", label=arrow.array(values[::-1]).dictionary_encode())
    found = tables.parquet([str(tmp_path)], AS_IS)
    assert found.labels is not None and found.labels.tolist() == [1, 0, 0, 1]
    assert found.class_names == tuple(sorted(map(str, values)))


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view"])
def test_the_only_column_of_bytes_holds_the_images(tmp_path: Path, kind: str) -> None:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = arrow.array(PNG[:2], getattr(arrow, kind)())
    writer.write_table(arrow.table({"jpg": column, "label": [0, 1]}), tmp_path / "0.parquet")
    found = tables.parquet([str(tmp_path)], AS_IS)
    assert [found.store.read(row) for row in range(2)] == PNG[:2]


def test_labels_of_several_kinds_are_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "0.parquet", label=[0, 1])
    parquet(tmp_path / "1.parquet", label=["a", "b"])
    with pytest.raises(UserError, match=r"int64 in .*0.parquet and string in .*1.parquet"):
        tables.parquet([str(tmp_path)], AS_IS)


def test_labels_below_0_are_named(tmp_path: Path) -> None:
    parquet(tmp_path / "0.parquet", label=[-1, -1])
    with pytest.raises(UserError, match="label -1 of sample '0-0' is below 0, 2 such"):
        scan(tmp_path / "out", tables.parquet([str(tmp_path)], AS_IS))


# ---------------------------------------------------------------- what shows class names


@pytest.mark.parametrize(
    "names",
    [
        ("cat", "dog"),
        ("great white shark", "it's"),
        ("café", "日本"),
        ("100%", "-dash"),
        ("a=b", "c,d"),
    ],
)
def test_stats_and_inspect_show_class_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, str]
) -> None:
    first, second = names
    root = put(tmp_path / "in", f"{first}/0.png", f"{second}/1.png", f"{second}/2.png")
    out = str(tmp_path / "out")
    assert main(["make", "folder", str(root), "--out", out]) == 0
    capsys.readouterr()
    assert main(["stats", out]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"0 {first} (1), 1 {second} (2)" in said
    assert main(["stats", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["class_names"] == list(names)
    assert main(["inspect", out, "--json", "--", f"{second}/1.png"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["y"], found["class"]) == (1, second)
