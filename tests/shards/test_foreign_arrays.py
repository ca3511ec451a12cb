"""Arrays in tars of others are what webdataset's own pipeline gives of them; no pickle of theirs is opened."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import webdataset
from webdataset.tenbin import encode_buffer

import shards
from shards.errors import BadInputError, UserError
from shards.format import foreign_arrays as foreign
from shards.format import manifest as manifests
from shards.read.options import ReadOptions
from shards.read.reader import Reader
from shards.verify import verify
from tests.shards import inputs
from tools.shards.__main__ import main

LATENTS = ("--image", "npy", "--encoder", "sd_vae", "--scale", "0.18215")


def _bytes(x: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    if kind in ("ten", "tb"):
        return bytes(encode_buffer([x]))
    if kind == "npy":
        np.save(file, x)
    else:
        np.savez(file, x=x)
    return file.getvalue()


def _tar(root: Path, x: np.ndarray, kind: str = "npy", **more: bytes) -> Path:
    root.mkdir(exist_ok=True)
    members = {}
    for i, one in enumerate(x):
        members |= {f"{i:04d}.{kind}": _bytes(one, kind), f"{i:04d}.cls": b"%d" % (i % 3)}
    return inputs.archive(root / "a.tar", members | more)


def _x(dtype: str = "f2", count: int = 40) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((count, 4, 3, 5)) * 9).astype(dtype)


@pytest.mark.parametrize("kind", foreign.EXTENSIONS)
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_they_are_read_as_webdataset_reads_them(tmp_path: Path, kind: str, dtype: str) -> None:
    tar = _tar(tmp_path / "in", _x(dtype), kind)
    assert main(["index", str(tmp_path / "in"), *LATENTS, "--image", kind]) == 0
    manifest, found = manifests.load(tmp_path / "in"), shards.read_all(tmp_path / "in")
    theirs = [*webdataset.WebDataset(str(tar), shardshuffle=False).decode().to_tuple(kind, "cls")]
    for x, y, (sample, label) in zip(found["x"], found["y"], theirs, strict=True):
        plain = sample["x"] if kind == "npz" else sample[0] if kind in ("ten", "tb") else sample
        assert x.dtype == plain.dtype and np.array_equal(x, plain) and y == label
    assert manifest.header["kind"] == "latent" and manifest.header["scale"] == 0.18215
    assert manifest.model_shape == (4, 3, 5) and verify(tmp_path / "in").problems == ()
    wide = _x(dtype).astype(np.float64)
    np.testing.assert_allclose(manifest.channel_mean, wide.mean((0, 2, 3)), rtol=1e-12)
    decoders = 2 if (kind, dtype) == ("npy", "f2") else 0  # each imports torch
    with closing(Reader(tmp_path / "in", manifest, ReadOptions(decoders=decoders))) as reader:
        rows = np.array([7, 39, 0, 7])
        assert np.array_equal(reader.gather(rows)["x"], found["x"][rows])


def test_pixels_need_no_encoder_and_other_numbers_do(tmp_path: Path) -> None:
    _tar(tmp_path / "in", _x("u1"))
    assert main(["index", str(tmp_path / "in"), "--image", "npy"]) == 0
    assert manifests.load(tmp_path / "in").header["shift"] == 127.5


def test_what_the_numbers_mean_is_part_of_what_they_are(tmp_path: Path) -> None:
    _tar(tmp_path / "in", _x())
    plans = set()
    for scale in ("1", "2"):
        out = tmp_path / scale
        command = ["index", str(tmp_path / "in"), *LATENTS, "--scale", scale, "--out", str(out)]
        assert main(command) == 0
        plans.add(manifests.load(out).plan)
    assert len(plans) == 2


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (_x("f2"), ("--image", "npy"), "samples are <f2, and pixels are uint8.*--encoder NAME"),
        (_x("f2"), (*LATENTS, "--size", "8"), "--size and --channels are for pictures"),
        (_x("f2"), ("--encoder", "sd_vae"), "name the arrays that hold latents"),
        (_x("f2"), ("--image", "npy", "--scale", "2"), "--scale and --shift are for latents"),
        (_x("f2"), ("--image", "pth"), "image='pth': a pickle may run any code"),
        (_x("f2")[:, 0], LATENTS, r"holds \(3, 5\) float16: numbers \(C, H, W\) are wanted"),
        (np.full((2, 1, 2, 2), np.inf), LATENTS, "values that are not finite"),
    ],
)
def test_what_is_none_is_named(
    tmp_path: Path,
    x: np.ndarray,
    options: tuple[str, ...],
    message: str,
) -> None:
    _tar(tmp_path / "in", x)
    with pytest.raises(UserError, match=message):
        main(["index", str(tmp_path / "in"), *options])


def test_samples_of_two_shapes_and_damaged_ones_are_named(tmp_path: Path) -> None:
    _tar(tmp_path / "in", _x(), **{"a.npy": _bytes(np.zeros((1, 2, 2)), "npy"), "a.cls": b"0"})
    with pytest.raises(UserError, match=r"2 shapes, such as \(4, 3, 5\).*bring them to one$"):
        main(["index", str(tmp_path / "in"), *LATENTS])
    _tar(tmp_path / "in", _x(), **{"a.npy": b"no array", "a.cls": b"0"})
    assert main(["index", str(tmp_path / "in"), *LATENTS, "--max-skipped", "1"]) == 0
    told = json.loads((tmp_path / "in" / "skipped.jsonl").read_text())
    assert told["key"] == "a" and "damaged .npy" in told["reason"]


def test_an_object_array_is_not_unpickled() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BadInputError, match=r"damaged \.npy: Object arrays cannot be loaded"):
        foreign.array_of("npy", file.getvalue())
    with pytest.raises(UserError, match="a pickle may run any code"):
        foreign.kind_of("latent.PT")


def test_pictures_are_read_without_torch() -> None:
    code = (
        "import sys, shards.read.samples, shards.write.indexing; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
