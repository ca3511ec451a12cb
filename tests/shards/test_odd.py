"""One odd input among good ones ends nothing: it is left out by name, or read; and no bytes choose who reads them."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

import shards
from shards.errors import BadInputError, UserError
from shards.format.members import CLASSES, Decode, members_of
from shards.format.pictures import Picture
from shards.sources import folders
from shards.sources.source import ArraySource, encode_keys
from shards.verify import verify
from shards.write import indexing, writer
from shards.write.scan import Threshold, scan
from tests.shards import inputs
from tests.shards.data import LATENT

GOOD = inputs.png(inputs.pixels(1)[0])
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n"
    b"newpath 0 0 moveto 16 16 lineto stroke\nshowpage\n%%EOF\n"
)


def _swollen() -> bytes:
    """A PNG whose compressed comment is larger than Pillow lets in: a ValueError of its own."""
    kind, data = b"zTXt", b"k\0\0" + zlib.compress(b"x" * (3 << 20))
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return GOOD[:33] + chunk + GOOD[33:]


def _index(tmp_path: Path, members: dict[str, bytes], allowed: int) -> Path:
    tar = inputs.archive(tmp_path / "in" / "a.tar", members)
    root, tars = indexing.find([str(tar)])
    decode = indexing.with_label(Decode(picture=Picture()), tars)
    indexing.index(root, tars, decode, max_skipped=Threshold(count=allowed))
    return Path(root)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()


def test_what_pillow_raises_of_an_image_is_said_of_that_image(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"damaged image: Decompressed data too large"):
        Picture()(_swollen())
    members = {"0.png": GOOD, "0.cls": b"1", "1.png": _swollen(), "1.cls": b"1"}
    root = _index(tmp_path, members, 1)
    told = json.loads((root / "skipped.jsonl").read_text())
    assert told["key"] == "1" and len(shards.read_all(root)["x"]) == 1


def test_an_input_cannot_have_a_program_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import EpsImagePlugin

    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(BadInputError, match="no image: none of BMP, "):
        Picture()(EPS)
    assert not (tmp_path / "started").exists()


def test_names_that_are_not_utf8_are_spelled_out(tmp_path: Path) -> None:
    inputs.image_folder(tmp_path / "in", inputs.pixels(3))
    (tmp_path / "in" / "a" / os.fsdecode(b"k\xff.png")).write_bytes(GOOD)
    source, seen = scan(tmp_path / "out", folders.image_folder(str(tmp_path / "in"), Picture()))
    assert seen.kept == 4 and rb"a/k\xff.png" in source.keys.tolist()
    writer.write(tmp_path / "out", source, header=LATENT, layout="samples")
    assert r"a/k\xff.png" in shards.read_all(tmp_path / "out")["key"].tolist()


def test_members_that_are_not_utf8_are_spelled_out(tmp_path: Path) -> None:
    name = os.fsdecode(b"k\xff")
    root = _index(tmp_path, {f"{name}.png": GOOD, f"{name}.cls": b"3"}, 0)
    found = shards.read_all(root)
    assert found["key"].tolist() == [r"k\xff"] and found["y"].tolist() == [3]
    assert verify(root).problems == ()


@pytest.mark.parametrize("label", [b"-1", b"%d" % CLASSES, b"1" + b"0" * 20])
def test_a_label_that_is_no_class_is_left_out(tmp_path: Path, label: bytes) -> None:
    members = {"0.png": GOOD, "0.cls": b"%d" % (CLASSES - 1), "1.png": GOOD, "1.cls": label}
    with pytest.raises(UserError, match=f"1 of 2 samples .*label {int(label)}: classes go from 0"):
        _index(tmp_path, members, 0)
    assert shards.read_all(_index(tmp_path, members, 1))["y"].tolist() == [CLASSES - 1]


@pytest.mark.parametrize("key", [b"\xff", b"", b"a\0b"])
def test_a_key_of_its_own_that_is_none_is_a_bad_input(tmp_path: Path, key: bytes) -> None:
    tar = inputs.archive(tmp_path / "a.tar", {"0.png": GOOD, "0.id.txt": key})
    name, members = members_of(tar.read_bytes())
    with pytest.raises(BadInputError, match=r"its \.id\.txt is"):
        Decode(picture=Picture(), key="id.txt").key_of(name, members, "a")


def test_more_classes_than_can_be_counted_and_keys_that_are_no_text_are_named(
    tmp_path: Path,
) -> None:
    source = ArraySource.of("t", np.zeros((2, 1, 2, 2)), labels=[0, 1], classes=10**10)
    with pytest.raises(UserError, match=r"classes=10,000,000,000: at most 1,048,576"):
        writer.write(tmp_path, source, header=LATENT)
    with pytest.raises(UserError, match=r"key 'a\\udcff' is not UTF-8"):
        encode_keys(["b", "a\udcff"])
