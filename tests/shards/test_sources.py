"""Every family of sources, from real files: what was put in comes out of the shards, under its key and label."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import shards
from shards import transfer
from shards.errors import BadInputError, DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.pictures import Picture
from shards.sources import arrays, folders, tables, tars
from shards.sources.listing import Listing
from shards.sources.made import SyntheticSource
from shards.write.scan import PART, Scanned, Threshold, scan
from tests.shards import inputs
from tests.shards.data import names
from tools.shards.__main__ import main

AS_IS = Picture()


def made(out: Path, *arguments: object) -> tuple[dict[str, np.ndarray], manifests.Manifest]:
    """What a reader gets of what the command wrote, by key."""
    assert main(["make", *map(str, arguments), "--out", str(out)]) == 0
    found = shards.read_all(out)
    order = np.argsort(found["key"])
    return {name: values[order] for name, values in found.items()}, manifests.load(out)


def chw(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2)


def test_image_folder(tmp_path: Path) -> None:
    images = inputs.pixels(10)
    root = inputs.image_folder(tmp_path / "in", images)
    (root / "a" / "notes.txt").write_text("not an image")
    (root / "c" / ".hidden.png").write_text("not shown")
    (root / "a" / "deeper").mkdir()
    (root / "a" / "deeper" / "x.PNG").write_bytes(inputs.png(images[0] // 2))
    found, manifest = made(tmp_path / "out", "folder", root)
    assert manifest.plain["class_names"] == ["a", "b", "c"] and manifest.count == 11
    assert (manifest.header["shift"], manifest.header["scale"]) == (127.5, 1 / 127.5)
    for i, image in enumerate(images):
        at = found["key"].tolist().index(f"{'bac'[i % 3]}/{i:04d}.png")
        assert np.array_equal(found["x"][at], image.transpose(2, 0, 1))
        assert found["y"][at] == (1, 0, 2)[i % 3]
    at = found["key"].tolist().index("a/deeper/x.PNG")
    assert found["y"][at] == 0 and np.array_equal(
        found["x"][at], (images[0] // 2).transpose(2, 0, 1)
    )


def test_links_are_followed_and_never_in_circles(tmp_path: Path) -> None:
    root = inputs.image_folder(tmp_path / "in", inputs.pixels(3))
    inputs.image_folder(tmp_path / "far", inputs.pixels(1), classes=("x",))
    (root / "a" / "far").symlink_to(tmp_path / "far")
    (root / "a" / "loop").symlink_to(root / "a")
    (tmp_path / "far" / "back").symlink_to(root / "a")
    found, _ = made(tmp_path / "out", "folder", root)
    assert found["key"].tolist() == ["a/0001.png", "a/far/x/0000.png", "b/0000.png", "c/0002.png"]
    assert found["y"].tolist() == [0, 0, 1, 2]


def test_a_flat_folder_has_no_labels_and_grey_is_one_channel(tmp_path: Path) -> None:
    grey = inputs.pixels(3)[..., 0]
    (tmp_path / "in").mkdir()
    for i, image in enumerate(grey):
        Image.fromarray(image).save(tmp_path / "in" / f"{i}.png")
    found, manifest = made(tmp_path / "out", "folder", tmp_path / "in", "--channels", 1)
    assert "y" not in found and "class_names" not in manifest.plain
    assert np.array_equal(found["x"], grey[:, None])


def test_cifar(tmp_path: Path) -> None:
    images, labels = inputs.pixels(20, 32), [i % 10 for i in range(20)]
    path = inputs.cifar10(tmp_path / "cifar-10-python.tar.gz", images, labels)
    found, manifest = made(tmp_path / "out", "cifar", path)
    assert found["key"].tolist() == [f"data_batch_{1 + i // 10}/{i % 10:05d}" for i in range(20)]
    assert np.array_equal(found["x"], chw(images)) and found["y"].tolist() == labels
    assert manifest.plain["class_names"][3] == "class3" and manifest.classes == 10
    test, _ = made(tmp_path / "test", "cifar", path, "--split", "test")
    assert np.array_equal(test["x"], chw(images[:3]))


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    rows = chw(inputs.pixels(4, 32)).reshape(4, -1)
    members = {
        "train": {"data": rows, "fine_labels": [99, 0, 1, 2], "coarse_labels": [0, 0, 0, 0]},
        "test": {"data": rows[:1], "fine_labels": [5], "coarse_labels": [0]},
        "meta": {"fine_label_names": [f"f{i}" for i in range(100)], "coarse_label_names": []},
    }
    packed = {f"cifar-100-python/{name}": pickle.dumps(m, 2) for name, m in members.items()}
    listing = arrays.cifar(str(inputs.archive(tmp_path / "c.tar.gz", packed)))
    assert listing.name == "cifar100-train" and listing.labels is not None
    assert listing.labels.tolist() == [99, 0, 1, 2] and listing.classes == 100


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    evil = {
        "data_batch_1": pickle.dumps({"data": Evil(tmp_path / "ran")}),
        "batches.meta": pickle.dumps({}),
    }
    path = inputs.archive(tmp_path / "evil.tar.gz", evil)
    with pytest.raises(UserError, match=r"asks for posix.system, which is no array"):
        arrays.cifar(str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_numpy_files(tmp_path: Path, layout: str, kind: str) -> None:
    images = inputs.pixels(5)
    x, path = images if layout == "nhwc" else chw(images), tmp_path / f"data.{kind}"
    if kind == "npy":
        np.save(path, x)
        found, _ = made(tmp_path / "out", "numpy", path)
    else:
        np.savez(path, arr_0=x, arr_1=np.eye(7, dtype=np.int64)[[3, 1, 0, 6, 2]])
        found, manifest = made(tmp_path / "out", "numpy", path, "--y", "arr_1")
        assert found["y"].tolist() == [3, 1, 0, 6, 2] and manifest.classes == 7
    assert np.array_equal(found["x"], chw(images))
    assert found["key"].tolist() == [f"data-{i}" for i in range(5)]


def test_latents_in_a_numpy_file(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((3, 4, 2, 2)).astype(np.float16)
    np.save(tmp_path / "z.npy", latents)
    with pytest.raises(
        UserError, match="holds float16: images are uint8; of latents say --encoder"
    ):
        main(["make", "numpy", str(tmp_path / "z.npy"), "--out", str(tmp_path / "out")])
    arguments = ("numpy", tmp_path / "z.npy", "--encoder", "mine", "--scale", 0.5)
    found, manifest = made(tmp_path / "out", *arguments)
    assert np.array_equal(found["x"], latents)
    assert (manifest.header["kind"], manifest.header["encoder"]) == ("latent", "mine")


def test_voc(tmp_path: Path) -> None:
    root = inputs.voc(tmp_path / "VOC2007", inputs.pixels(5), listed=3)
    found, _ = made(tmp_path / "out", "voc", root)
    assert found["key"].tolist() == [f"2007_{i:06d}" for i in range(3)] and "y" not in found
    for key, x in zip(found["key"], found["x"], strict=True):
        with Image.open(root / "JPEGImages" / f"{key}.jpg") as image:
            assert np.array_equal(x.transpose(1, 2, 0), np.asarray(image))
    with pytest.raises(UserError, match=r"split 'tset' is not in .*choose among trainval, val"):
        folders.voc(str(root), "tset", AS_IS)


def test_coco(tmp_path: Path) -> None:
    images = inputs.pixels(4)
    root = inputs.coco(tmp_path / "coco", images)
    found, _ = made(tmp_path / "out", "coco", root, "--split", "val2017")
    assert found["key"].tolist() == [f"{i:012d}.png" for i in range(4)]
    assert np.array_equal(found["x"], chw(images))
    with pytest.raises(UserError, match=r"instances_train2017.json; found val2017"):
        folders.coco(str(root), "train2017", AS_IS)
    (root / "val2017" / f"{2:012d}.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 inputs .*'000000000002.png': no such file"):
        made(tmp_path / "other", "coco", root, "--split", "val2017")


def test_lsun(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    images = inputs.pixels(4)
    root = tmp_path / "church_train_lmdb"
    with lmdb.open(str(root), map_size=1 << 20) as environment, environment.begin(write=True) as to:
        for i in (2, 0, 3, 1):
            to.put(f"{i}abc".encode(), inputs.png(images[i]))
    found, manifest = made(tmp_path / "out", "lsun", root)
    assert found["key"].tolist() == [f"{i}abc" for i in range(4)]
    assert np.array_equal(found["x"], chw(images))
    assert manifest.source["name"] == "church_train_lmdb"


@pytest.mark.parametrize("nested", [True, False], ids=["struct", "bytes"])
def test_parquet(tmp_path: Path, nested: bool) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = inputs.pixels(9)
    data = [inputs.png(image) for image in images]
    features = {"label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}
    (tmp_path / "in").mkdir()
    for part in range(3):
        rows = range(part * 3, part * 3 + 3)
        cells = [{"bytes": data[i], "path": f"{i}.png"} if nested else data[i] for i in rows]
        table = arrow.table(
            {"image": cells, "label": [i % 3 for i in rows], "k": [f"k{i}" for i in rows]}
        )
        told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        path = tmp_path / "in" / f"train-{part:05d}-of-00003.parquet"
        parquet.write_table(table.replace_schema_metadata(told), path, row_group_size=2)
    found, manifest = made(tmp_path / "out", "parquet", tmp_path / "in", "--key", "k")
    assert found["key"].tolist() == [f"k{i}" for i in range(9)]
    assert np.array_equal(found["x"], chw(images)) and found["y"].tolist() == [0, 1, 2] * 3
    assert manifest.plain["class_names"] == ["cat", "dog", "emu"]
    with pytest.raises(
        UserError, match="label column 'lable' does not exist: choose among image, "
    ):
        tables.parquet([str(tmp_path / "in")], AS_IS, label="lable")


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    """The layout of datasets' save_to_disk: Arrow streams, state.json, and a dict of splits above."""
    arrow = pytest.importorskip("pyarrow")
    images = inputs.pixels(6)
    base = tmp_path / "saved" / "train"
    base.mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    files = []
    for part in range(2):
        rows = range(part * 3, part * 3 + 3)
        cells = [{"bytes": inputs.png(images[i]), "path": None} for i in rows]
        table = arrow.table({"image": cells, "label": [i % 2 for i in rows]})
        files.append({"filename": f"data-{part:05d}-of-00002.arrow"})
        with arrow.ipc.new_stream(str(base / files[-1]["filename"]), table.schema) as to:
            to.write_table(table, max_chunksize=2)
    (base / "state.json").write_text(json.dumps({"_data_files": files}))
    found, _ = made(tmp_path / "out", "dataset", tmp_path / "saved", "--split", "train")
    assert found["key"].tolist() == [f"train-{i}" for i in range(6)]
    assert np.array_equal(found["x"], chw(images)) and found["y"].tolist() == [0, 1] * 3
    with pytest.raises(UserError, match=r"split=None is not in .*choose among train"):
        tables.saved_dataset(str(tmp_path / "saved"), AS_IS)


def test_tars_that_webdataset_wrote(tmp_path: Path) -> None:
    images = inputs.pixels(6)
    for tar in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{tar:05d}.tar")) as to:
            for i in range(3):
                at = tar * 3 + i
                to.write(
                    {"__key__": f"{i:05d}", "png": images[at], "cls": at % 4, "json": {"n": at}}
                )
    files = [tmp_path / "00000.tar", tmp_path / "00001.tar"]
    with pytest.raises(UserError, match=r"3 keys of .*--prefix-keys puts the tar's name before"):
        made(tmp_path / "out", "tars", *files)
    found, _ = made(tmp_path / "out", "tars", *files, "--prefix-keys")
    assert found["key"].tolist() == [f"{t:05d}/{i:05d}" for t in range(2) for i in range(3)]
    assert np.array_equal(found["x"], chw(images)) and found["y"].tolist() == [0, 1, 2, 3, 0, 1]
    other, _ = made(tmp_path / "json", "tars", *files, "--prefix-keys", "--label", "json:n")
    assert other["y"].tolist() == list(range(6))


def test_tars_of_img2dataset_have_captions_and_no_labels(tmp_path: Path) -> None:
    images = inputs.pixels(2)
    members = {}
    for i, image in enumerate(images):
        key = f"00000{i:04d}"
        members |= {f"{key}.png": inputs.png(image), f"{key}.txt": b"a cat", f"{key}.json": b"{}"}
    inputs.archive(tmp_path / "00000.tar", members)
    (tmp_path / "00000_stats.json").write_text("{}")
    found, _ = made(tmp_path / "out", "tars", tmp_path)
    assert found["key"].tolist() == ["000000000", "000000001"] and "y" not in found
    assert np.array_equal(found["x"], chw(images))


@pytest.mark.parametrize("damage", ["header", "zeros", "cut at a member", "cut in a member"])
def test_a_damaged_tar_is_an_error_and_never_an_end(tmp_path: Path, damage: str) -> None:
    members = {f"{i}.png": inputs.png(image) for i, image in enumerate(inputs.pixels(4))}
    path = inputs.archive(tmp_path / "t.tar", members)
    data = bytearray(path.read_bytes())
    third = data.index(b"2.png\0")
    if damage == "header":
        data[third + 150] ^= 1  # its checksum
    elif damage == "zeros":
        data[third : third + 512] = bytes(512)
    else:
        del data[third + (700 if damage == "cut in a member" else 0) :]
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"t\.tar is (damaged or cut short|no whole tar)"):
        tars.tars([str(path)], AS_IS)


def _adm(image: Image.Image, size: int) -> np.ndarray:
    """The rule of Dhariwal and Nichol 2021 in plain steps."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    wide = (round(image.size[0] * factor), round(image.size[1] * factor))
    x = np.array(image.resize(wide, Image.Resampling.BICUBIC))
    top, left = (x.shape[0] - size) // 2, (x.shape[1] - size) // 2
    return x[top : top + size, left : left + size]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 24))
def test_size_is_the_published_crop(width: int, height: int, size: int) -> None:
    x = np.random.default_rng(width * 71 + height).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    found = Picture(size=size)(inputs.png(x))
    assert found.shape == (3, size, size) and found.dtype == np.uint8
    assert np.array_equal(found.transpose(1, 2, 0), _adm(Image.fromarray(x), size))


def test_sixteen_bits_are_no_pixels_of_eight(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 300, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(BadInputError, match="do not fit 8 bits"):
        Picture()((tmp_path / "deep.png").read_bytes())


def _listing(root: Path, count: int = 12) -> Listing:
    return folders.image_folder(str(inputs.image_folder(root, inputs.pixels(count))), AS_IS)


def test_bad_inputs_are_named_counted_and_an_error_beyond_the_threshold(tmp_path: Path) -> None:
    root = inputs.image_folder(tmp_path / "in", inputs.pixels(12))
    whole = (root / "b" / "0003.png").read_bytes()
    (root / "b" / "0003.png").write_bytes(whole[:-40])
    (root / "c" / "0005.png").write_text("<html>403</html>")
    (root / "c" / "0008.png").write_bytes(b"")
    listing, out = folders.image_folder(str(root), AS_IS), tmp_path / "out"
    with pytest.raises(UserError, match=r"3 of 12 inputs .*allows 2.*--max-skipped 3"):
        scan(out, listing, max_skipped=Threshold.of("2"))
    with pytest.raises(UserError, match="no shards at"):
        manifests.load(out)
    for allowed in ("3", "25%"):
        source, seen = scan(out, listing, max_skipped=Threshold.of(allowed))
        assert (seen.listed, seen.kept, seen.skipped) == (12, 9, 3)
    entries = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    reasons = {entry["key"]: entry["reason"] for entry in entries}
    assert reasons.keys() == {"b/0003.png", "c/0005.png", "c/0008.png"}
    assert (
        reasons["c/0005.png"].startswith("no image: none of BMP, GIF, ")
        and "damaged" in reasons["b/0003.png"]
    )
    assert len(source.keys) == 9 and not set(reasons) & {k.decode() for k in source.keys.tolist()}


def test_what_was_left_out_is_told_of_the_data_set_that_lies_there(tmp_path: Path) -> None:
    root, out = inputs.image_folder(tmp_path / "in", inputs.pixels(3)), tmp_path / "out"
    told, bad = out / "skipped.jsonl", root / "a" / "bad.png"
    bad.touch()
    make = ["make", "folder", str(root), "--out", str(out)]
    with pytest.raises(UserError, match=r"1 of 4 inputs .*; all are in .*skipped\.jsonl: mend"):
        main(make)
    assert json.loads(told.read_text())["key"] == "a/bad.png"
    bad.unlink()
    assert main(make) == 0 and told.read_text() == ""
    bad.touch()
    with pytest.raises(UserError, match="1 of 4 inputs") as refused:
        main(make)
    assert "all are in" not in str(refused.value) and told.read_text() == ""
    assert main([*make[:-1], str(tmp_path / "less"), "--max-skipped", "1"]) == 0
    for source in (tmp_path / "less", out):
        transfer.copy(source, tmp_path / f"copy of {source.name}")
        copied = tmp_path / f"copy of {source.name}" / "skipped.jsonl"
        assert copied.read_text() == (source / "skipped.jsonl").read_text()


def test_duplicates_are_kept_and_counted_or_left_out_and_recorded(tmp_path: Path) -> None:
    root = inputs.image_folder(tmp_path / "in", inputs.pixels(6))
    (root / "a" / "twin.png").write_bytes((root / "a" / "0001.png").read_bytes())
    (root / "c" / "twin.png").write_bytes((root / "a" / "0001.png").read_bytes())
    listing = folders.image_folder(str(root), AS_IS)
    source, seen = scan(tmp_path / "all", listing)
    assert (seen.kept, seen.duplicates) == (8, 2) and not (tmp_path / "all/skipped.jsonl").exists()
    source, seen = scan(tmp_path / "out", listing, dedupe=True)
    assert (seen.kept, seen.duplicates, seen.skipped) == (6, 2, 0)
    entries = [
        json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    ]
    assert [(e["key"], e["reason"]) for e in entries] == [
        ("a/twin.png", "duplicate of a/0001.png"),
        ("c/twin.png", "duplicate of a/0001.png, label 2 instead of 0"),
    ]
    assert b"a/0001.png" in source.keys.tolist() and b"a/twin.png" not in source.keys.tolist()
    _, manifest = made(tmp_path / "command", "folder", root, "--dedupe")
    told = {name: manifest.source[name] for name in ("listed", "kept", "skipped", "duplicates")}
    assert told == {"listed": 8, "kept": 6, "skipped": 0, "duplicates": 2} and manifest.count == 6


def test_the_fingerprint_is_of_keys_labels_and_content_wherever_they_lie(tmp_path: Path) -> None:
    first = scan(tmp_path / "o1", _listing(tmp_path / "one"))[0].fingerprint
    assert scan(tmp_path / "o2", _listing(tmp_path / "two"))[0].fingerprint == first

    def changed(name: str, change: Callable[[Path], object]) -> str:
        root = inputs.image_folder(tmp_path / name, inputs.pixels(12))
        change(root)
        return scan(tmp_path / f"o-{name}", folders.image_folder(str(root), AS_IS))[0].fingerprint

    others = [
        changed(
            "pixel", lambda r: (r / "a/0001.png").write_bytes(inputs.png(inputs.pixels(1, 8, 9)[0]))
        ),
        changed("key", lambda r: (r / "a/0001.png").rename(r / "a/0001b.png")),
        changed("less", lambda r: (r / "a/0001.png").unlink()),
    ]
    assert len({first, *others}) == 4


def test_labels_and_classes_alone_change_the_fingerprint(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", inputs.pixels(3))
    plain = arrays.numpy_file(str(tmp_path / "x.npy"))
    labelled = [
        replace(plain, labels=np.array(labels), classes=classes)
        for labels, classes in (([0, 1, 0], 2), ([0, 0, 1], 2), ([0, 1, 0], 3))
    ]
    found = [scan(tmp_path / "out", one)[0].fingerprint for one in (plain, *labelled)]
    assert len(set(found)) == 4


def test_another_rule_looks_again(tmp_path: Path) -> None:
    root = str(inputs.image_folder(tmp_path / "in", inputs.pixels(4)))
    for rule, shape in (
        (Picture(), (3, 8, 8)),
        (Picture(size=4), (3, 4, 4)),
        (Picture(channels=1), (1, 8, 8)),
    ):
        source, _ = scan(tmp_path / "out", folders.image_folder(root, rule))
        assert source.shape == shape and source.images(np.arange(4)).shape == (4, *shape)


def test_an_input_that_changes_between_the_looks_is_an_error(tmp_path: Path) -> None:
    source, _ = scan(tmp_path / "out", _listing(tmp_path / "in"))
    assert np.array_equal(source.images(np.array([3]))[0].shape, (3, 8, 8))
    path = tmp_path / "in" / source.keys[3].decode()
    path.write_bytes(inputs.png(inputs.pixels(1, 8, 5)[0]))
    with pytest.raises(DamagedError, match=f"{source.keys[3].decode()}' of 'in' changed since"):
        source.images(np.array([3]))
    path.unlink()
    with pytest.raises(DamagedError, match="changed since"):
        source.images(np.array([3]))


def test_a_second_look_reads_no_input_again(tmp_path: Path) -> None:
    listing = _listing(tmp_path / "in")
    first, _ = scan(tmp_path / "out", listing)
    for key in listing.keys.tolist():
        (tmp_path / "in" / key.decode()).unlink()
    second, _ = scan(tmp_path / "out", listing)
    assert second.fingerprint == first.fingerprint


def test_keys_and_labels_are_taken_once_and_stay_in_their_process(tmp_path: Path) -> None:
    """Millions of them taken anew for each sample would cost more than its picture."""
    inputs.image_folder(tmp_path / "in", inputs.pixels(20))
    listing = folders.image_folder(str(tmp_path / "in"), Picture())
    source, _ = scan(tmp_path / "out", listing)
    made = SyntheticSource(count=9, shape=(1, 2, 2), dtype=np.dtype("f4"), classes=3, seed=0)
    for one in (source, made):
        before = len(pickle.dumps(one))
        assert one.keys is one.keys and one.labels is one.labels
        assert len(pickle.dumps(one)) == before
        again = pickle.loads(pickle.dumps(one))
        assert again.keys.tolist() == one.keys.tolist() and again.fingerprint == one.fingerprint


def test_a_scan_of_several_parts_keeps_their_order(tmp_path: Path) -> None:
    x = np.arange(PART * 2 + 5, dtype=np.int64)
    images = np.zeros((len(x), 2, 2, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = x % 256, x // 256
    np.save(tmp_path / "x.npy", images)
    source, seen = scan(tmp_path / "out", arrays.numpy_file(str(tmp_path / "x.npy")))
    assert seen.kept == len(x) and len(names(tmp_path / "out" / "source")) == 3
    asked = np.array([PART * 2 + 4, 0, PART, 7])
    assert np.array_equal(source.images(asked), chw(images[asked]))


def _mixed(root: Path) -> Scanned:
    inputs.image_folder(root, inputs.pixels(3))
    (root / "a" / "large.png").write_bytes(inputs.png(inputs.pixels(1, 9)[0]))
    return scan(root.parent / "out", folders.image_folder(str(root), AS_IS))[0]


def _beside(root: Path) -> Scanned:
    inputs.image_folder(root, inputs.pixels(3))
    (root / "x.png").write_bytes(inputs.png(inputs.pixels(1)[0]))
    return scan(root.parent / "out", folders.image_folder(str(root), AS_IS))[0]


def _unpacked(root: Path) -> Scanned:
    inputs.image_folder(root, inputs.pixels(3))
    (root / "thumbnails").mkdir()
    (root / "thumbnails" / "readme").touch()
    return scan(root.parent / "out", folders.image_folder(str(root), AS_IS))[0]


def _into_itself(root: Path) -> int:
    inputs.image_folder(root, inputs.pixels(3))
    return main(["make", "folder", str(root), "--out", str(root / "a" / ".." / "out")])


def _twice(root: Path) -> Scanned:
    listing = Listing.of("twice", ["a", "b", "a"], None, decode=AS_IS, places=[1, 2, 3])  # type: ignore[arg-type]
    return scan(root.parent / "out", listing)[0]


def _outside(root: Path) -> Scanned:
    listing = Listing.of(
        "s",
        ["a", "b"],
        None,
        decode=AS_IS,
        places=[1, 2],
        labels=[0, 2],
        class_names=("p", "q"),  # type: ignore[arg-type]
    )
    return scan(root.parent / "out", listing)[0]


def _empty(root: Path) -> Scanned:
    (root / "a").mkdir(parents=True)
    return scan(root.parent / "out", folders.image_folder(str(root), AS_IS))[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_mixed, r"2 shapes, such as \(3, 8, 8\).*\(3, 9, 9\) \|u1 \('a/large.png'\).*--size"),
        (_beside, r"1 of 4 inputs .*'x.png': an image beside class folders"),
        (_unpacked, r"1 of the 4 class folders in .*in hold no images, such as 'thumbnails'"),
        (_into_itself, r"out lies in .*in, where a folder is a class"),
        (_twice, "key 'a' occurs 2 times"),
        (_outside, "label 2 of sample 'b' is out of range"),
        (_empty, "source 'in' is empty"),
        (lambda root: folders.image_folder(str(root), AS_IS), "image folder .* does not exist"),
        (lambda root: folders.voc(str(root.parent), "train", AS_IS), "lacks JPEGImages"),
        (lambda root: arrays.numpy_file(str(root / "x.npz")), r"array file .* does not exist"),
        (lambda root: arrays.cifar(str(root)), "CIFAR archive .* does not exist"),
        (lambda root: tars.tars([str(root)], AS_IS), "in holds no .tar files"),
        (
            lambda root: tars.tars(["s3://a/b"], AS_IS),
            r"s3://a/b is on S3.*`python -m tools.shards index`",
        ),
        (lambda root: Picture(size=0), "size=0"),
        (lambda root: Picture(channels=4), "channels=4"),
        (lambda root: Threshold.of("-1"), "max_skipped='-1'"),
        (lambda root: Threshold.of("101%"), "max_skipped='101%'"),
        (lambda root: Threshold.of("some"), "max_skipped='some'"),
    ],
)
def test_bad_sources_are_named(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path / "in")


def test_object_arrays_and_other_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as arrays of numbers"):
        arrays.numpy_file(str(tmp_path / "o.npy"))
    for name, text in (("no.npz", "text"), ("no", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name} is no \.npz file"):
            arrays.numpy_file(str(tmp_path / name))
    inputs.archive(tmp_path / "other.tar.gz", {"readme": b"hello"})
    with pytest.raises(UserError, match="is no CIFAR archive"):
        arrays.cifar(str(tmp_path / "other.tar.gz"))
    np.save(tmp_path / "open.npy", np.zeros((2, 3, 5, 3), dtype=np.uint8))
    with pytest.raises(UserError, match="which axis is channels, --layout nchw or --layout nhwc"):
        arrays.numpy_file(str(tmp_path / "open.npy"))
    with pytest.raises(UserError, match=r"--scale 2 is of latents: name with --encoder"):
        main(["make", "numpy", str(tmp_path / "open.npy"), "--scale", "2", "--out", "o"])


def test_without_the_packages_the_cure_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    (tmp_path / "data.mdb").touch()
    with pytest.raises(UserError, match=r"pyarrow: pip install 'selfguide\[sources\]'"):
        tables.parquet([str(tmp_path)], AS_IS)
    with pytest.raises(UserError, match=r"lmdb: pip install 'selfguide\[sources\]'"):
        folders.lsun(str(tmp_path), AS_IS)
