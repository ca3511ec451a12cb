"""Both ways with webdataset 1.0.2: it reads what we write, and we read what it writes, to the same samples."""

from __future__ import annotations

import json
import os
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.autodecode import imagehandler
from webdataset.tariterators import base_plus_ext

import shards
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.members import Decode, split_name
from shards.format.pictures import Picture
from shards.read.options import ReadOptions
from shards.read.reader import Reader
from shards.verify import verify
from shards.write import indexing
from shards.write.scan import Threshold
from tests.shards import foreign, inputs
from tests.shards.data import flip
from tools.shards import report
from tools.shards.__main__ import main

LABELS = Decode(picture=Picture(), label="json:class")


def _theirs(root: Path, **options: object) -> list[dict[str, object]]:
    """As webdataset reads the tars of a folder, in the order of names."""
    urls = sorted(str(path) for path in root.rglob("*.tar"))
    return [*webdataset.WebDataset(urls, shardshuffle=False, **options).decode("rgb8")]


def _written(root: Path, count: int, **more: str) -> Path:
    """By webdataset's own writer, which encodes by itself: jpg, cls, json and others in tars of 60."""
    root.mkdir()
    images = foreign.pixels(count, side=16)
    with webdataset.ShardWriter(str(root / "%05d.tar"), maxcount=60, verbose=0) as to:
        for i, image in enumerate(images):
            to.write(
                {
                    "__key__": f"a.b/{i:05d}",
                    "jpg": image,
                    "cls": i % 5,
                    "json": {"n": i % 3, "caption": "it"},
                    "txt": "it",
                    "left.png": image // 2,
                }
            )
    return root


@pytest.mark.parametrize("decoders", [0, 2])
@pytest.mark.parametrize(
    ("told", "label"), [((), "cls"), (("--label", "json:n", "--image", "left.png"), "n")]
)
def test_what_webdataset_writes_is_read_as_it_reads_it(
    tmp_path: Path, told: tuple[str, ...], label: str, decoders: int
) -> None:
    root = _written(tmp_path / "in", 150)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.iterdir()}
    assert main(["index", str(root), *told]) == 0
    assert all(
        (root / n).read_bytes() == b and (root / n).stat().st_mtime_ns == t
        for n, (b, t) in before.items()
    )
    manifest = manifests.load(root)
    with closing(Reader(root, manifest, ReadOptions(decoders=decoders))) as reader:
        found = reader.gather(np.arange(150))
    theirs = _theirs(root)
    assert found["key"].tolist() == [sample["__key__"] for sample in theirs]
    for i, sample in enumerate(theirs):
        assert np.array_equal(found["x"][i].transpose(1, 2, 0), sample[told[3] if told else "jpg"])
        assert found["y"][i] == (sample["cls"] if label == "cls" else sample["json"]["n"])  # type: ignore[index]
    values = found["x"].astype(np.float64)
    assert np.allclose(manifest.channel_mean, values.mean(axis=(0, 2, 3)), rtol=1e-12)
    assert np.allclose(manifest.channel_std, values.std(axis=(0, 2, 3)), rtol=1e-12)
    assert manifest.label_histogram == tuple(np.bincount(found["y"]).tolist())
    assert verify(root).problems == ()


def _folder(root: Path) -> Path:
    """Keys with dots and slashes, whose first dot ends no key."""
    images = foreign.pixels(300, side=16)
    for i, image in enumerate(images):
        path = root / f"class.{i % 3}" / f"im.{i:03d}.v1.{'jpg' if i % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(foreign.encoded(image, "JPEG" if i % 2 else "PNG"))
    return root


@pytest.mark.parametrize("size", [None, 8])
def test_webdataset_reads_the_pictures_that_we_write(tmp_path: Path, size: int | None) -> None:
    source, out = _folder(tmp_path / "in"), tmp_path / "out"
    told = [] if size is None else ["--size", str(size)]
    make = ["make", "folder", str(source), "--shard-mb", "0.3", *told]
    assert main([*make, "--out", str(out)]) == 0
    found, manifest = shards.read_all(out), manifests.load(out)
    theirs = _theirs(out)
    assert manifest.layout == "samples" and len(manifest.shards) > 1 == verify(out).shards - 1
    assert len(theirs) == manifest.count == 300
    for i, sample in enumerate(theirs):
        image = sample["png"] if "png" in sample else sample["jpg"]
        assert np.array_equal(found["x"][i].transpose(1, 2, 0), image)
        assert (sample["cls"], sample["id.txt"]) == (found["y"][i], found["key"][i])
        assert sample["__key__"] == f"{i:09d}"
    if size is None:  # the input's own bytes
        raw = webdataset.WebDataset(sorted(map(str, out.rglob("*.tar"))), shardshuffle=False)
        for sample in raw:
            kept = sample["png"] if "png" in sample else sample["jpg"]
            assert kept == (source / sample["id.txt"].decode()).read_bytes()
    with tarfile.open(sorted(out.rglob("*.tar"))[0]) as tar:
        told_of = {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar}
    assert told_of == {(0, 0, 0, "", "")} and verify(out).problems == ()


@pytest.mark.parametrize("told", [(), ("--size", "8"), ("--channels", "1")])
def test_both_layouts_of_one_input_are_read_equal(tmp_path: Path, told: tuple[str, ...]) -> None:
    source = _folder(tmp_path / "in")
    make = ["make", "folder", str(source), "--shard-mb", "0.3", *told]
    for layout in ("samples", "blocks"):
        assert main([*make, "--layout", layout, "--out", str(tmp_path / layout)]) == 0
    one, other = (shards.read_all(tmp_path / layout) for layout in ("samples", "blocks"))
    assert one.keys() == other.keys() == {"x", "y", "key", "ordinal"}
    assert all(np.array_equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)
    a, b = (manifests.load(tmp_path / layout) for layout in ("samples", "blocks"))
    assert (a.fields, a.header, a.label_histogram) == (b.fields, b.header, b.label_histogram)
    assert np.allclose((a.channel_mean, a.channel_std), (b.channel_mean, b.channel_std), rtol=1e-12)
    assert a.plan != b.plan


def test_pictures_are_written_the_same_by_whoever_writes_them(tmp_path: Path) -> None:
    make = ["make", "folder", str(_folder(tmp_path / "in")), "--shard-mb", "0.2", "--size", "8"]
    assert main([*make, "--out", str(tmp_path / "one")]) == 0
    assert main([*make, "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    tars = sorted((tmp_path / "one").rglob("*.tar"))
    tars[0].unlink()  # begun, not finished
    (tmp_path / "one" / "LATEST").unlink()
    before = tars[1].stat().st_mtime_ns
    assert main([*make, "--out", str(tmp_path / "one")]) == 0
    assert tars[0].exists() and tars[1].stat().st_mtime_ns == before
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "two")]) == 0


def test_arrays_have_no_pictures_to_keep(tmp_path: Path) -> None:
    from shards.write import writer
    from tests.shards.data import LATENT, source

    with pytest.raises(UserError, match="layout='samples': 'test' holds arrays"):
        writer.write(tmp_path, source(5), header=LATENT, layout="samples")


def _zoo() -> dict[str, Image.Image]:
    rgb = Image.fromarray(foreign.pixels(1, side=9)[0])
    alpha = rgb.copy()
    alpha.putalpha(100)
    palette = rgb.quantize(16)
    clear = rgb.quantize(16)
    clear.info["transparency"] = 3
    turned = rgb.copy()
    turned.getexif()[0x0112] = 6
    return {
        "rgb": rgb,
        "alpha": alpha,
        "grey": rgb.convert("L"),
        "grey alpha": rgb.convert("LA"),
        "one bit": rgb.convert("1"),
        "palette": palette,
        "clear palette": clear,
        "cmyk": rgb.convert("CMYK"),
        "turned": turned,
    }


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_our_picture_is_their_image_handler(tmp_path: Path, kind: str) -> None:
    """Why pictures have one way of being decoded here: the pixels are webdataset's."""
    compared = 0
    for name, image in _zoo().items():
        path = tmp_path / f"x.{kind}"
        try:
            told = {"exif": image.getexif()} if name == "turned" else {}
            image.save(path, format=kind.upper(), **told)
        except (OSError, ValueError, KeyError):  # a format that has no such pixels
            continue
        data = path.read_bytes()
        rgb, grey = (imagehandler(spec)(kind, data) for spec in ("rgb8", "l8"))
        assert np.array_equal(Picture()(data).transpose(1, 2, 0), rgb), name
        assert np.array_equal(Picture(channels=1)(data)[0], grey), name
        compared += 1
    assert compared >= 4


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab._/", max_size=12))
def test_names_are_split_as_webdataset_splits_them(path: str) -> None:
    key, extension = base_plus_ext(path)
    meta = path.startswith("__") and path.split("/")[0].endswith("__") and len(path) > 3
    if key is None:
        assert split_name(path) is None
    elif not meta:
        assert split_name(path) == (key, extension.lower())


def test_members_that_webdataset_passes_over_are_passed_over(tmp_path: Path) -> None:
    image = foreign.encoded(foreign.pixels(1)[0], "PNG")
    members = {"__meta__/x.json": b"{}", "README": b"hello", "0.png": image, "0.cls": b"3"}
    foreign.tar(
        tmp_path / "t.tar", {**members, ".hidden.png": b"no", "1.cls": b"1", "1.PNG": image}
    )
    assert main(["index", str(tmp_path)]) == 0
    found, theirs = shards.read_all(tmp_path), _theirs(tmp_path)
    assert found["key"].tolist() == [s["__key__"] for s in theirs] == ["0", "1"]
    assert found["y"].tolist() == [s["cls"] for s in theirs] == [3, 1]


# ---------------------------------------------------------------- indexing


def test_an_index_elsewhere_names_the_tars_where_they_lie(tmp_path: Path) -> None:
    images = foreign.laion(tmp_path / "a", 30, in_a_tar=10)
    more = foreign.laion(tmp_path / "b", 10, in_a_tar=10)
    tars = [str(tmp_path / "a"), str(tmp_path / "b" / "00000.tar")]
    with pytest.raises(UserError, match=r"2 folders, such as .*--out"):
        main(["index", *tars])
    with pytest.raises(UserError, match=r"key '000000' occurs 2 times \(10 such keys\).*--prefix"):
        main(["index", *tars, "--out", str(tmp_path / "out")])
    (tmp_path / "b" / "00000.tar").rename(tmp_path / "b" / "other.tar")
    tars[1] = str(tmp_path / "b" / "other.tar")
    out = str(tmp_path / "out")
    assert main(["index", *tars, "--out", out, "--prefix-keys", "--label", "json:class"]) == 0
    manifest, found = manifests.load(out), shards.read_all(out)
    assert [s.name for s in manifest.shards][3] == str(tmp_path / "b" / "other.tar")
    assert np.array_equal(found["x"].transpose(0, 2, 3, 1), np.concatenate([images, more]))
    assert found["key"][[0, 10, 39]].tolist() == ["00000/000000", "00001/000010", "other/000009"]
    assert verify(out).problems == ()
    with pytest.raises(UserError, match="an index of tars that lie elsewhere, such as /"):
        main(["copy", out, str(tmp_path / "copy")])


def test_an_index_goes_on_where_it_stopped_and_reads_what_was_replaced(tmp_path: Path) -> None:
    foreign.laion(tmp_path, 40, in_a_tar=10)
    root, tars = indexing.find([str(tmp_path)])

    class StopError(Exception):
        pass

    def stop(parts: object, total: int) -> object:
        for done, part in enumerate(parts):  # type: ignore[call-overload]
            if done == 2:
                raise StopError
            yield part

    with pytest.raises(StopError):
        indexing.index(root, tars, LABELS, watch=stop)  # type: ignore[arg-type]
    assert not (tmp_path / "LATEST").exists()
    read: list[int] = []

    def count(parts: object, total: int) -> object:
        read.append(total)
        yield from parts  # type: ignore[misc]

    manifest, seen, new = indexing.index(root, tars, LABELS, watch=count)  # type: ignore[arg-type]
    assert new and seen.kept == 40 and read == [1]  # the third was read, too, when it was stopped
    again, _, new = indexing.index(root, tars, LABELS, watch=count)  # type: ignore[arg-type]
    assert (again.hash, new, read) == (manifest.hash, False, [1, 0])
    other, _, _ = indexing.index(tmp_path / "out", tars, LABELS, workers=2)
    assert other.hash == manifest.hash
    foreign.laion(tmp_path / "new", 40, in_a_tar=10)
    flip(tmp_path / "new" / "00002.tar", 1600)  # in the first picture
    (tmp_path / "new" / "00002.tar").replace(tmp_path / "00002.tar")
    _, tars = indexing.find([str(path) for path in sorted(tmp_path.glob("0*.tar"))])
    with pytest.raises(UserError, match=r"1 of 40 samples cannot be used.*'000020' of 00002\.tar"):
        indexing.index(root, tars, LABELS, watch=count)  # type: ignore[arg-type]
    assert read[2:] == [1]
    with pytest.raises(UserError, match=r"holds another index \(40 samples.*delete .*LATEST"):
        indexing.index(root, tars, LABELS, max_skipped=Threshold(count=1))


def test_bad_samples_are_left_out_told_and_never_read(tmp_path: Path) -> None:
    images = [foreign.encoded(image, "PNG") for image in foreign.pixels(7)]
    spoiled = {1: images[1][:-30], 3: b"<html>403</html>"}
    members: dict[str, bytes] = {}
    for i, image in enumerate(images):
        members |= {f"{i}.png": spoiled.get(i, image), f"{i}.cls": b"-1" if i == 5 else b"2"}
    del members["6.cls"]
    foreign.tar(tmp_path / "t.tar", members)
    with pytest.raises(UserError, match=r"4 of 7 samples .*allows 3: '1' of t\.tar: damaged image"):
        main(["index", str(tmp_path), "--max-skipped", "3"])
    assert not (tmp_path / "LATEST").exists()
    assert main(["index", str(tmp_path), "--max-skipped", "60%"]) == 0
    told = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in told] == ["1", "3", "5", "6"]
    assert "label -1" in told[2]["reason"] and "no member .cls" in told[3]["reason"]
    found = shards.read_all(tmp_path)
    assert found["key"].tolist() == ["0", "2", "4"] and found["y"].tolist() == [2, 2, 2]
    assert verify(tmp_path).problems == ()
    assert manifests.load(tmp_path).source["skipped"] == 4
    before = (tmp_path / "skipped.jsonl").read_bytes()
    foreign.tar(
        tmp_path / "u.tar", {"9.png": images[0], "9.cls": b"1", "bad.png": b"", "bad.cls": b"1"}
    )
    with pytest.raises(UserError, match="holds another index"):
        main(["index", str(tmp_path), "--max-skipped", "5"])
    assert (tmp_path / "skipped.jsonl").read_bytes() == before


def _interleaved(root: Path) -> None:
    image = foreign.encoded(foreign.pixels(1)[0], "PNG")
    foreign.tar(root / "t.tar", {"0.png": image, "1.png": image, "0.cls": b"1", "1.cls": b"1"})


def _cut(root: Path) -> None:
    foreign.laion(root, 10, in_a_tar=10)
    os.truncate(root / "00000.tar", 10_240)


def _header(root: Path) -> None:
    foreign.laion(root, 10, in_a_tar=10)
    flip(root / "00000.tar", 1024 + 150)  # a checksum


def _two_in_one(root: Path) -> None:
    foreign.laion(root, 10, in_a_tar=5)
    with (root / "00000.tar").open("ab") as file:
        file.write((root / "00001.tar").read_bytes())
    (root / "00001.tar").unlink()


def _shapes(root: Path) -> None:
    images = [foreign.encoded(foreign.pixels(1, side)[0], "PNG") for side in (8, 9)]
    foreign.tar(root / "t.tar", {f"{i}.png": image for i, image in enumerate(images)})


def _nothing(root: Path) -> None:
    foreign.tar(root / "t.tar", {"README": b"hello"})


def _packed(root: Path) -> None:
    inputs.archive(root / "t.tar.gz", {"0.png": b""})
    (root / "t.tar.gz").rename(root / "t.tar")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_interleaved, r"t\.tar: other samples lie between the members of '0'.*`make tars`"),
        (_cut, r"00000\.tar is (no whole tar|damaged or cut short at byte [\d,]+, behind)"),
        (_header, r"00000\.tar is (no whole tar|damaged or cut short at byte [\d,]+, behind)"),
        (_two_in_one, r"00000\.tar goes on behind its end at byte [\d,]+.* after 5 samples"),
        (_shapes, r"2 shapes, such as \(3, 8, 8\) \('0' of t\.tar\) and \(3, 9, 9\).*--size"),
        (_nothing, r"t\.tar and the other tars hold no sample"),
        (_packed, r"t\.tar is compressed \(gzip\).*`gzip -dc "),
        (lambda root: None, r"holds no \.tar files"),
    ],
)
def test_tars_that_cannot_be_indexed_are_named(tmp_path: Path, spoil: object, said: str) -> None:
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=said):
        main(["index", str(tmp_path)])
    assert not storage.exists(tmp_path / "LATEST")


def test_a_tar_cut_anywhere_is_named(tmp_path: Path) -> None:
    foreign.laion(tmp_path, 3)
    path = tmp_path / "00000.tar"
    whole = path.read_bytes()
    ends = len(whole.rstrip(b"\0")) // 512 * 512
    for cut in range(100, ends, 257):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"00000\.tar is (no whole tar|damaged or cut short)"):
            main(["index", str(tmp_path)])


def test_damaged_samples_side_by_side_are_one_line(tmp_path: Path) -> None:
    foreign.laion(tmp_path, 10, in_a_tar=10)
    assert main(["index", str(tmp_path)]) == 0
    starts = manifests.load(tmp_path).blocks["offset"][:, 0]
    flip(tmp_path / "00000.tar", int(starts[2]) + 600)
    os.truncate(tmp_path / "00000.tar", int(starts[5]) + 600)
    found = [problem.removeprefix("00000.tar: ") for problem in verify(tmp_path).problems]
    assert found[2:] == [
        f"sample 2, at byte {starts[2]:,}, is damaged",
        f"samples 5 to 9 (5), from byte {starts[5]:,} on, are damaged",
    ]
    assert "bytes_over_payload" not in report.summary(manifests.load(tmp_path))


def test_a_tar_that_is_named_twice_is_named(tmp_path: Path) -> None:
    foreign.laion(tmp_path, 3)
    with pytest.raises(UserError, match=r"00000\.tar is named twice"):
        main(["index", str(tmp_path / "00000.tar"), str(tmp_path)])


def test_our_own_shards_are_not_indexed_over(tmp_path: Path) -> None:
    source = str(_folder(tmp_path / "in"))
    main(["make", "folder", source, "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="holds another data set"):
        main(["index", str(tmp_path / "out" / "shards"), "--out", str(tmp_path / "out")])


def test_wrong_label_options_are_named(tmp_path: Path) -> None:
    foreign.laion(tmp_path, 3)
    with pytest.raises(UserError, match="--label json:: name the field"):
        main(["index", str(tmp_path), "--label", "json:"])
    with pytest.raises(UserError, match=r"3 of 3 samples .*no whole number at 'json:lost'"):
        main(["index", str(tmp_path), "--label", "json:lost"])


def test_the_commands_know_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = foreign.laion(tmp_path, 300)
    assert main(["index", str(tmp_path), "--label", "json:class"]) == 0
    root = str(tmp_path)
    for command in (
        ["stats", root],
        ["inspect", root, "000123", "--json"],
        ["explain", root, "--images", "64", "--json"],
        ["simulate", root, "--batch", "32", "--json"],
        ["verify", root, "--json"],
    ):
        capsys.readouterr()
        assert main(command) == 0
        said = capsys.readouterr().out
        if command[0] == "inspect":
            found = json.loads(said)
            assert (found["ordinal"], found["shard"], found["y"]) == (123, "00001.tar", 123 % 7)
            assert found["mean"] == pytest.approx(images[123].mean())
        if command[0] == "simulate":
            assert json.loads(said)["data_bytes"] == manifests.load(root).blocks["bytes"].sum()
        if command[0] == "stats":
            assert "samples, indexed where they lie" in said
    assert main(["copy", root, str(tmp_path / "copy")]) == 0
    assert main(["diff", root, str(tmp_path / "copy")]) == 0
    assert verify(tmp_path / "copy").problems == ()
