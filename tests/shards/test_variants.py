"""Inputs as people and other programs leave them: splits, links, archives, numbers in names, labels as text."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.errors import BadInputError, UserError
from shards.format import manifest as manifests
from shards.format import pictures
from shards.format.classes import ordered, renumbered
from shards.format.members import Decode
from shards.format.pictures import Picture
from shards.sources import arrays, folders, listing, tables
from shards.sources.splits import apart, split_of
from tests.shards import inputs
from tests.shards.inputs import keys, put
from tools.shards.__main__ import main

AS_IS = Picture(background="white")
PNG = inputs.PNG[:4]


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as made:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return path


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("val2017", "validation"),
        ("seg_test", "test"),
        ("trainA", "train"),
        ("cifar-Valid_0.tar", "validation"),
        ("images.training", "train"),
        ("trained", ""),
        ("evaluate", ""),
        ("contest", ""),
        ("Devon rex", ""),
    ],
)
def test_split_of_a_name_is_the_word_in_it(name: str, split: str) -> None:
    assert split_of(name) == split


def test_apart_takes_names_that_differ_in_their_split_alone() -> None:
    assert apart(["crash_test", "bullet_train", "cat"]) == []
    assert apart(["train_1", "train_2"]) == []
    assert apart(["test_B", "train_B", "devkit"]) == ["test_B", "train_B"]


@pytest.mark.parametrize(
    "names",
    [
        ("train2017/a/0.png", "val2017/b/1.png"),
        ("train2017/0.png", "val2017/1.png"),
        ("seg_train/a/0.png", "seg_test/a/1.png", "seg_pred/2.png"),
        ("trainA/0.png", "testA/1.png"),
        ("train_set/a/0.png", "val_set/a/1.png"),
        ("train/a/0.png", "extra/a/1.png"),
    ],
)
def test_the_parent_of_splits_with_more_in_their_names_is_refused(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    root = put(tmp_path / "in", *names)
    with pytest.raises(UserError, match="holds the splits") as refused:
        folders.image_folder(str(root), AS_IS)
    assert keys(folders.image_folder(str(refused.value).rpartition("them, ")[2], AS_IS))


@pytest.mark.parametrize(
    "names",
    [("bullet_train/0.png", "crash_test/1.png"), ("train_1/0.png", "train_2/1.png")],
)
def test_classes_with_a_split_in_their_names_are_classes(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    assert folders.image_folder(str(put(tmp_path / "in", *names)), AS_IS).classes == 2


def test_files_whose_names_hold_a_split_behind_others_are_asked_about(tmp_path: Path) -> None:
    names = [f"{tmp_path}/imagenet-{split}-000000.tar" for split in ("train", "val")]
    with pytest.raises(UserError, match="2 splits, train, validation"):
        listing.of_split(names, str(tmp_path))
    assert listing.of_split(names, str(tmp_path), "valid") == names[1:]


# ---------------------------------------------------------------- folders and links


def test_a_link_in_a_folder_gives_no_picture_a_second_class(tmp_path: Path) -> None:
    root = put(tmp_path / "in", "a/0.png", "b/1.png", "b/c/2.png")
    (root / "a" / "b").symlink_to("../b")
    (root / "alias").symlink_to("a")
    (root / "a" / "up").symlink_to("../..")
    found = folders.image_folder(str(root), AS_IS)
    assert keys(found) == ["a/0.png", "b/1.png", "b/c/2.png"] and found.class_names == ("a", "b")
    assert {p.name: p.reason for p in found.passed} == {
        "a/b/": "a link to b, which is read there",
        "alias/": "a link to a, which is read there",
        "a/up/": "a link to a folder above",
    }


def test_two_links_to_a_folder_elsewhere_are_one_folder(tmp_path: Path) -> None:
    far = put(tmp_path / "far", "0.png")
    root = put(tmp_path / "in", "c/1.png")
    for name in ("a", "b"):
        (root / name).symlink_to(far)
    found = folders.image_folder(str(root), AS_IS)
    assert keys(found) == ["a/0.png", "c/1.png"] and [p.name for p in found.passed] == ["b/"]


@pytest.mark.parametrize("name", ["@Recycle", "@eadir", "#Recycle", "System Volume Information"])
def test_a_folder_that_machines_make_is_passed_over(tmp_path: Path, name: str) -> None:
    root = put(tmp_path / "in", "a/0.png", "b/1.png", f"a/{name}/2.png", f"{name}/3.png")
    found = folders.image_folder(str(root), AS_IS)
    assert keys(found) == ["a/0.png", "b/1.png"] and len(found.passed) == 2


def test_a_picture_of_another_format_is_passed_over_with_the_formats_that_are_read(
    tmp_path: Path,
) -> None:
    root = put(tmp_path / "in", "a/0.png")
    Image.new("RGB", (4, 4)).save(root / "a" / "1.tga")
    (passed,) = folders.image_folder(str(root), AS_IS).passed
    assert passed.name == "a/1.tga" and "none of BMP, GIF, JPEG" in passed.reason


# ---------------------------------------------------------------- zips


@pytest.mark.parametrize("form", ["./{}", "/{}", "../{}", "{}", "x/../{}"])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_names_in_a_zip_are_from_its_top(tmp_path: Path, form: str, slash: str) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as made:
        for name, data in zip(("a/0.png", "b/1.png"), PNG, strict=False):
            info = zipfile.ZipInfo()
            info.filename = form.format(name).replace("/", slash)
            made.writestr(info, data)
    found = folders.image_folder(str(tmp_path / "in.zip"), AS_IS)
    assert keys(found) == ["a/0.png", "b/1.png"] and found.class_names == ("a", "b")
    assert [found.store.read(row) for row in (0, 1)] == PNG[:2] and not found.passed


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_in_a_zip_is_counted(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as made:
        for name, data in zip(("a/0.png", "b/1.png", "a/0.png", "./b/1.png"), PNG, strict=True):
            made.writestr(name, data)
    found = folders.image_folder(str(tmp_path / "in.zip"), AS_IS)
    assert [p.name for p in found.passed] == ["./b/1.png", "a/0.png"]
    assert [found.store.read(row) for row in (0, 1)] == [PNG[2], PNG[1]]


def test_a_zip_under_another_name_is_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "download", "w") as made:
        made.writestr("a/0.png", PNG[0])
        made.writestr("b/1.png", PNG[1])
    assert folders.image_folder(str(tmp_path / "download"), AS_IS).classes == 2


# ---------------------------------------------------------------- names of classes and labels


@pytest.mark.parametrize(
    "names",
    [
        ["class_1", "class_2", "class_10"],
        ["0_cat", "1_dog", "2_cow", "10_fox"],
        ["0", "1", "-1"],
        ["0", "00", "1"],
        ["v1.5", "v1.10"],
        ["n01440764", "n01443537", "n02085620"],
        ["aaa1", "a" * 3 + "9" * 5000],
    ],
)
def test_numbers_in_names_are_sorted_as_numbers(names: list[str]) -> None:
    assert ordered(names[::-1]) == names


def test_a_number_of_more_digits_than_python_reads_is_told() -> None:
    assert "is label 1" in renumbered(["0", "9" * 5000]) and renumbered(["0", "0001"]) == ""


@pytest.mark.parametrize(
    ("data", "value"),
    [(b"\xef\xbb\xbf3", 3), (b"+3\n", 3), (b"\xef\xbb\xbfcat\r\n", "cat"), (b"0x10", "0x10")],
)
def test_a_cls_member_is_a_number_or_a_name(data: bytes, value: int | str) -> None:
    assert Decode(picture=AS_IS, label="cls").label_value({"cls": data}) == value


@pytest.mark.parametrize(
    "data", [b"1_0", "٣".encode(), b"3\0", b"cat\0", b"3.0", b"1e3", b"1" * 5000]
)
def test_a_number_in_another_spelling_is_a_bad_sample(tmp_path: Path, data: bytes) -> None:
    tar(tmp_path / "0.tar", {"a.png": PNG[0], "a.cls": b"1", "b.png": PNG[1], "b.cls": data})
    out = tmp_path / "out"
    asked = ["index", str(tmp_path), "--label", "cls", "--out", str(out)]
    assert main([*asked, "--max-skipped", "1"]) == 0
    assert manifests.load(out).count == 1 and "cls" in (out / "skipped.jsonl").read_text()


def test_an_index_says_where_a_number_is_another_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.dumps({"label": "7"}).encode()
    tar(tmp_path / "0.tar", {"a.png": PNG[0], "a.json": data})
    assert main(["index", str(tmp_path), "--label", "json:label"]) == 0
    assert "class '7' is label 0" in capsys.readouterr().out


def test_an_index_of_bad_samples_alone_says_why_they_are_bad(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", {"a.png": PNG[0], "a.cls": b"-1"})
    with pytest.raises(UserError, match=r"none of 1 samples .*'a' of 0.tar: label -1"):
        main(["index", str(tmp_path), "--label", "cls", "--max-skipped", "9"])


@pytest.mark.parametrize("verb", ["index", "make tars"])
def test_keys_of_tars_with_one_name_have_a_cure_that_works(tmp_path: Path, verb: str) -> None:
    one = tar(tmp_path / "in" / "x" / "0.tar", {"a.png": PNG[0]})
    tar(tmp_path / "in" / "y" / "0.tar", {"a.png": PNG[1]})
    words = [*verb.split(), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    for given in (words, [*words, "--prefix-keys"]):
        with pytest.raises(UserError, match=r"rename tars, .* called 0.tar; then --prefix-keys"):
            main(given)
    one.rename(one.with_name("1.tar"))
    assert main([*words, "--prefix-keys"]) == 0


def test_stats_show_names_of_classes_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "in", "new\nline/0.png", "esc\x1b[31m/1.png")
    assert main(["make", "folder", str(root), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["stats", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert r"0 esc\x1b[31m (1), 1 new\nline (1)" in out and "\x1b" not in out


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(("side", "kept"), [(9_500, True), (14_000, False)])
def test_a_large_picture_is_read_without_a_warning_and_a_vast_one_is_bad(
    side: int, kept: bool
) -> None:
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    pictures._be_quiet.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if kept:
            assert Picture(size=8, background="white").look(file.getvalue()).pixels.max() == 0
        else:
            with pytest.raises(BadInputError, match="Make it smaller"):
                Picture(size=8, background="white").look(file.getvalue())
    assert not seen


# ---------------------------------------------------------------- tables


def table(path: Path, **columns: Any) -> str:
    arrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    importlib.import_module("pyarrow.parquet").write_table(
        arrow.table({"image": arrow.array(PNG), **columns}), path
    )
    return str(path)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (lambda arrow: arrow.float64(), [0.0, 1.0, 0.0, 1.0]),
        (lambda arrow: arrow.float32(), [0.5, 1, float("nan"), 1]),
        (lambda arrow: arrow.binary(), [b"a", b"b", b"a", b"b"]),
        (lambda arrow: arrow.timestamp("s"), [0, 1, 0, 1]),
        (lambda arrow: arrow.list_(arrow.int64()), [[0], [1], [0], [1]]),
        (lambda arrow: arrow.decimal128(5), [0, 1, 0, 1]),
    ],
    ids=["float64", "float32", "binary", "time", "list", "decimal"],
)
def test_labels_of_a_kind_that_has_no_classes_are_named_with_a_cure(
    tmp_path: Path, kind: Any, values: list[object]
) -> None:
    arrow = pytest.importorskip("pyarrow")
    file = table(tmp_path / "0.parquet", label=arrow.array(values, kind(arrow)))
    with pytest.raises(UserError, match=r"label column 'label' is .*0.parquet: .*--label none"):
        tables.parquet([file], AS_IS)
    assert tables.parquet([file], AS_IS, label="none").labels is None


def test_a_label_beyond_int64_is_no_other_number(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    label = arrow.array([0, 1, 2**64 - 1, 1], arrow.uint64())
    found = tables.parquet([table(tmp_path / "0.parquet", label=label)], AS_IS)
    assert found.labels is not None and found.labels.tolist() == [0, 1, 2**63 - 1, 1]


@pytest.mark.parametrize("column", ["labels", "class", "fine_label", "Label"])
def test_columns_that_may_hold_labels_are_named_where_none_is_read(
    tmp_path: Path, column: str
) -> None:
    arrow = pytest.importorskip("pyarrow")
    file = table(tmp_path / "0.parquet", **{column: arrow.array([0, 1, 0, 1])})
    (passed,) = tables.parquet([file], AS_IS).passed
    assert passed.name == column and f"--label {column} " in passed.reason
    assert not tables.parquet([file], AS_IS, label="none").passed
    taken = tables.parquet([file], AS_IS, label=column)
    assert taken.classes == 2 and not taken.passed


@pytest.mark.parametrize(
    "names", [("arr_0", "arr_1"), ("x", "labels"), ("images", "y", "z"), ("b", "a")]
)
def test_arrays_that_may_hold_labels_are_named_where_none_is_read(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    first, *others = names
    held = {first: np.zeros((3, 4, 4, 3), np.uint8)} | {name: np.arange(3) for name in others}
    np.savez(tmp_path / "a.npz", **held)
    found = arrays.numpy_file(str(tmp_path / "a.npz"))
    assert found.labels is None and [p.name for p in found.passed] == others
    for passed in found.passed:
        assert passed.reason.endswith(f": --y {passed.name} takes it for labels")
        taken = arrays.numpy_file(str(tmp_path / "a.npz"), y=passed.name)
        assert taken.classes == 3 and len(taken.passed) == len(others) - 1


def test_another_array_than_the_first_is_taken_as_printed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", y=np.arange(3), images=np.zeros((3, 4, 4, 3), np.uint8))
    with pytest.raises(
        UserError, match=r"as y: samples need four axes.*--x takes another array, of images"
    ):
        arrays.numpy_file(str(tmp_path / "a.npz"))
    assert len(arrays.numpy_file(str(tmp_path / "a.npz"), x="images", y="y").keys) == 3


@pytest.mark.parametrize("data", [b"", b"PAR1xxxxPAR1", b"PK\3\4" * 9])
def test_what_is_no_parquet_is_named_with_a_cure(tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "0.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"0.parquet is no such parquet: .*: fetch or write"):
        tables.parquet([str(tmp_path)], AS_IS)


def test_classes_that_look_alike_are_refused(tmp_path: Path) -> None:
    """An archive of macOS unpacked beside folders of Linux: one class would become two."""
    for name in ("caf\u00e9", "cafe\u0301"):
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    with pytest.raises(UserError, match=r"'cafe\\u0301' and 'caf\\xe9' look alike"):
        ordered(folder.name for folder in (tmp_path / "in").iterdir())
    out = tmp_path / "out"
    with pytest.raises(UserError, match="give both one name"):
        main(["make", "folder", str(tmp_path / "in"), "--out", str(out)])
    assert not out.exists()
