"""`tools.shards make --only FILE --per-class RULE`, CIFAR's coarse labels, and Downsampled ImageNet's batches."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import read_all
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.pictures import Picture
from shards.sources import arrays
from shards.sources.chosen import choose
from shards.sources.folders import image_folder
from shards.sources.published_lists import LISTS
from tools.shards.__main__ import main

CLASSES = ("cat", "dog", "emu")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of four pictures each, all different."""
    root = tmp_path / "pictures"
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for each in range(4):
            level = 20 * (4 * number + each)
            Image.new("RGB", (4, 4), (level, level, level)).save(root / name / f"{name}{each}.png")
    return root


def listed(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def keys(root: Path, only: str | None, per_class: str | None = None) -> list[str]:
    found = choose(image_folder(str(root), Picture()), only, per_class)
    return [key.decode() for key in found.keys.tolist()]


def test_classes_that_a_list_names_are_kept_and_numbered_by_its_lines(
    pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    only = listed(tmp_path, "emu", "", "cat")
    assert (
        main(
            [
                "make",
                "folder",
                str(pictures),
                "--out",
                str(out),
                "--only",
                only,
                "--layout",
                "blocks",
            ]
        )
        == 0
    )
    manifest, held = manifests.load(str(out)), read_all(str(out))
    assert manifest.class_names == ("emu", "cat") and manifest.classes == 2
    # an emu is brighter than any cat
    assert sorted(held["y"].tolist()) == [0] * 4 + [1] * 4
    assert {
        int(label) for x, label in zip(held["x"], held["y"], strict=True) if x.max() >= 160
    } == {0}
    said = json.dumps(manifest.source)
    assert "list.txt" in said and "sha256" in said


@pytest.mark.parametrize("form", ["{0}/{1}.png", "{0}/{1}", "{1}.png", "{1}"])
def test_keys_that_a_list_names_are_kept_in_its_order(
    pictures: Path, tmp_path: Path, form: str
) -> None:
    only = listed(tmp_path, form.format("emu", "emu2"), form.format("cat", "cat0"))
    found = keys(pictures, only)
    assert [Path(key).stem for key in found] == ["emu2", "cat0"]


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["cat/cat0.png", "cat/cat9.png"], "cat9"),
        (["cat", "cow"], "cow"),
        (["cat0", "cat0"], "more than once"),
        ([], "empty"),
    ],
)
def test_a_list_that_names_what_is_not_there_is_refused(
    pictures: Path, tmp_path: Path, lines: list[str], names: str
) -> None:
    with pytest.raises(UserError, match=names):
        keys(pictures, listed(tmp_path, *lines))


def test_a_list_of_a_published_name_must_be_that_list(tmp_path: Path, pictures: Path) -> None:
    for name, published in LISTS.items():
        (tmp_path / name).write_text("cat\n")
        with pytest.raises(UserError, match=rf"1 lines .* has {published.lines:,}.*: get it from"):
            keys(pictures, str(tmp_path / name))
    other = tmp_path / "imagenet100.txt"
    other.write_text("".join(f"n{number:08d}\n" for number in range(100)))
    with pytest.raises(UserError, match=r"has 100 and sha256 79f3f1552ccc: .*, or rename yours"):
        keys(pictures, str(other))


def test_a_folder_before_names_says_nothing_of_inputs_that_lie_in_one(
    tmp_path: Path, pictures: Path
) -> None:
    found = keys(pictures / "cat", listed(tmp_path, "train2014/cat1.png", "cat0"))
    assert found == ["cat1.png", "cat0.png"]
    with pytest.raises(UserError, match=r"'cow/cat1.png', which is no input"):
        keys(pictures, listed(tmp_path, "cow/cat1.png"))
    with pytest.raises(UserError, match=r"the input of 'a/cat0.png' more than once"):
        keys(pictures / "cat", listed(tmp_path, "cat0", "a/cat0.png"))


def test_a_list_that_is_not_there_is_refused_before_anything_is_written(
    pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="nolist"):
        main(
            ["make", "folder", str(pictures), "--out", str(out), "--only", str(tmp_path / "nolist")]
        )
    assert not out.exists()


def test_a_name_of_two_inputs_needs_its_folder(pictures: Path, tmp_path: Path) -> None:
    (pictures / "dog" / "cat0.png").write_bytes((pictures / "dog" / "dog0.png").read_bytes())
    with pytest.raises(UserError, match="cat0"):
        keys(pictures, listed(tmp_path, "cat0"))
    assert len(keys(pictures, listed(tmp_path, "dog/cat0"))) == 1


def test_a_bad_input_that_is_not_chosen_is_none(pictures: Path, tmp_path: Path) -> None:
    (pictures / "dog" / "dog1.png").write_bytes(b"nothing")
    out = tmp_path / "out"
    assert (
        main(
            ["make", "folder", str(pictures), "--out", str(out), "--only", listed(tmp_path, "cat")]
        )
        == 0
    )
    assert manifests.load(str(out)).count == 4


@pytest.mark.parametrize(
    ("rule", "counts"),
    [("2", [2, 2, 2]), ("9", [4, 4, 4]), ("class//1", [0, 1, 2]), ("class//2", [0, 0, 1])],
)
def test_so_many_of_each_class_are_kept(pictures: Path, rule: str, counts: list[int]) -> None:
    found = choose(image_folder(str(pictures), Picture()), None, rule)
    assert found.labels is not None and found.classes == 3
    assert np.bincount(found.labels, minlength=3).tolist() == counts


@pytest.mark.parametrize("rule", ["0", "-1", "class//0", "c//20", "half", "class//9"])
def test_a_rule_that_is_none_or_keeps_nothing_is_refused(pictures: Path, rule: str) -> None:
    with pytest.raises(UserError, match="--per-class"):
        choose(image_folder(str(pictures), Picture()), None, rule)


def test_a_rule_without_labels_is_refused(pictures: Path) -> None:
    with pytest.raises(UserError, match="no labels"):
        choose(image_folder(str(pictures / "cat"), Picture()), None, "2")


def cifar(path: Path, hundred: bool) -> Path:
    """A published archive in small."""
    x = np.arange(6 * 3072, dtype=np.uint8).reshape(6, 3072)
    kinds = {"fine": ([5, 0, 1, 2, 3, 4], 6), "coarse": ([1, 0, 0, 1, 1, 0], 2)}
    batch = {"data": x, "labels": kinds["fine"][0]}
    meta = {"label_names": [f"fine{n}" for n in range(6)]}
    if hundred:
        batch = {"data": x} | {f"{kind}_labels": labels for kind, (labels, _) in kinds.items()}
        meta = {
            f"{kind}_label_names": [f"{kind}{n}" for n in range(count)]
            for kind, (_, count) in kinds.items()
        }
    names = (
        {"train": batch, "meta": meta} if hundred else {"data_batch_1": batch, "batches.meta": meta}
    )
    with tarfile.open(path, "w:gz") as archive:
        for name, content in names.items():
            data = pickle.dumps(content)
            info = tarfile.TarInfo(f"cifar/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_coarse_labels_of_cifar100_are_its_superclasses(tmp_path: Path) -> None:
    path = str(cifar(tmp_path / "a.tar.gz", hundred=True))
    fine, coarse = arrays.cifar(path), arrays.cifar(path, "train", "coarse")
    assert fine.labels is not None and coarse.labels is not None
    assert fine.labels.tolist() == [5, 0, 1, 2, 3, 4] and fine.classes == 6
    assert coarse.labels.tolist() == [1, 0, 0, 1, 1, 0] and coarse.class_names == (
        "coarse0",
        "coarse1",
    )


def test_coarse_labels_of_cifar10_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CIFAR-10"):
        arrays.cifar(str(cifar(tmp_path / "a.tar.gz", hundred=False)), "train", "coarse")


def batch(path: Path, count: int, side: int = 8, **other: object) -> Path:
    rng = np.random.default_rng(count)
    data = rng.integers(0, 256, (count, 3 * side * side), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({"data": data, "labels": list(range(1, count + 1))} | other))
    return path


def test_batches_of_downsampled_imagenet_are_read_in_their_order_with_labels_from_0(
    tmp_path: Path,
) -> None:
    root = tmp_path / "train"
    for number, count in ((10, 2), (2, 3), (1, 4)):
        batch(root / f"train_data_batch_{number}", count)
    found = arrays.downsampled(str(root))
    assert found.labels is not None and found.classes == 1000
    assert found.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert found.keys[4] == b"train_data_batch_2/000000"
    first = pickle.loads((root / "train_data_batch_1").read_bytes())["data"][0].reshape(3, 8, 8)
    assert np.array_equal(found.decode(found.store.read(0)), first)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({}, "no batch"),
        ({"train_data_batch_1": 8, "val_data": 8}, "both parts"),
        ({"train_data_batch_1": 8, "train_data_batch_2": 16}, "8 and 16"),
    ],
)
def test_a_folder_without_batches_of_one_part_and_size_is_refused(
    tmp_path: Path, files: dict[str, int], names: str
) -> None:
    root = tmp_path / "batches"
    root.mkdir()
    for name, side in files.items():
        batch(root / name, 2, side)
    with pytest.raises(UserError, match=names):
        arrays.downsampled(str(root))


def test_a_batch_that_is_damaged_or_asks_for_code_is_refused(tmp_path: Path) -> None:
    for number, content in enumerate(
        (b"", pickle.dumps({"data": Path("x")}), pickle.dumps({"data": [1]}))
    ):
        path = tmp_path / f"{number}" / "val_data"
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(UserError, match="no batch of Downsampled"):
            arrays.downsampled(str(path))


def made(out: Path, *words: str) -> dict[str, tuple[np.ndarray, int]]:
    """Key -> sample and label of what `make` wrote."""
    assert main(["make", *words, "--out", str(out)]) == 0
    held = read_all(str(out))
    labels = held["y"].tolist()
    return dict(zip(held["key"].tolist(), zip(held["x"], labels, strict=True), strict=True))


def test_digits_of_classes_that_a_list_names_are_those_of_all_digits(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", "digits")
    part = made(tmp_path / "part", "digits", "--only", listed(tmp_path, "7", "3"))
    manifest = manifests.load(str(tmp_path / "part"))
    assert manifest.class_names == ("7", "3") and manifest.classes == 2
    assert set(part) == {key for key, (_, label) in whole.items() if label in (7, 3)}
    for key, (x, label) in part.items():
        assert np.array_equal(x, whole[key][0])
        assert (7, 3)[label] == whole[key][1]
    assert "list.txt" in json.dumps(manifest.source)


def test_synthetic_latents_by_class_are_those_of_all_latents(tmp_path: Path) -> None:
    words = ("synthetic", "--count", "40", "--shape", "2", "4", "4", "--classes", "10")
    whole = made(tmp_path / "whole", *words)
    part = made(tmp_path / "part", *words, "--per-class", "class//3")
    counts = np.bincount([label for _, label in part.values()], minlength=10)
    # there are four of each class
    assert counts.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    for key, (x, label) in part.items():
        assert label == whole[key][1]
        assert np.array_equal(x, whole[key][0])


def test_synthetic_latents_without_duplicates_lose_none(tmp_path: Path) -> None:
    words = ("synthetic", "--count", "20", "--shape", "1", "2", "2", "--classes", "2")
    assert len(made(tmp_path / "out", *words, "--dedupe")) == 20


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("digits", "--only", "{list}"), "'ten', which is no input of digits"),
        (("digits", "--per-class", "0"), "--per-class 0"),
        (("synthetic", "--classes", "0", "--per-class", "3"), "no labels"),
        (("digits", "--max-skipped", "some"), "max_skipped='some'"),
    ],
)
def test_a_choice_that_made_data_cannot_meet_is_refused_before_anything_is_written(
    tmp_path: Path, words: tuple[str, ...], names: str
) -> None:
    given = [word.format(list=listed(tmp_path, "ten")) for word in words]
    out = tmp_path / "out"
    with pytest.raises(UserError, match=names):
        main(["make", *given, "--out", str(out)])
    assert not out.exists()
