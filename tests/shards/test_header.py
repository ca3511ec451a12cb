"""The typed header: what it refuses, what older data sets say by it, and the shape a model sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.sources.made import digits_source
from shards.sources.source import ArraySource
from shards.write import writer

# what the first writer, which knew one shift and one scale only, put into manifests
OF_BEFORE = {"kind": "image", "shift": 8.0, "scale": 0.125, "encoder": None, "encoder_sha256": None}
DIGITS_PLAN = (
    "cac2cac9574f6fd85ce1435833579771bb1cdac8e11e469643cd090bdc87a25e"  # and its plan of the digits
)


def latent(**changes: object) -> Header:
    return Header(**{"kind": "latent", "encoder": "test", **changes})


def test_a_header_of_before_is_read_and_written_as_it_was() -> None:
    header = Header.of(OF_BEFORE)
    assert header == Header(kind="image", shift=8.0, scale=0.125)
    assert header.plain() == OF_BEFORE and [*header.plain()] == [*OF_BEFORE]


def test_the_digits_of_before_are_the_same_data_set() -> None:
    source, header = digits_source()
    assert writer.make_plan(source, header, 0, writer.SHARD_BYTES).hash == DIGITS_PLAN


numbers = st.floats(1e-3, 1e3)


@given(
    st.sampled_from(["sample", "moments"]),
    st.booleans(),
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(*[st.one_of(numbers, st.tuples(*[numbers] * n))] * 2)
    ),
)
def test_a_header_survives_json(content: str, flips: bool, affine: tuple) -> None:
    shift, scale = affine
    header = latent(content=content, flips=flips, shift=shift, scale=scale, encoder_sha256="0" * 64)
    assert Header.of(json.loads(json.dumps(header.plain()))) == header
    assert Header.of(header) is header


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"content": "mean"}, "content='mean': give 'sample' or 'moments'"),
        ({"kind": "image", "content": "moments"}, "only latents have moments"),
        ({"scale": (1.0, 0.0)}, r"scale=\(1.0, 0.0\).*scale > 0"),
        ({"scale": ()}, "scale > 0"),
        ({"shift": (0.0, float("nan"))}, "finite shift"),
        ({"scale": float("inf")}, "finite shift"),
        ({"shift": (0.0, 0.0), "scale": (1.0,)}, "scale has 1 values and shift 2"),
    ],
)
def test_impossible_headers_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        latent(**wrong)


@pytest.mark.parametrize(
    ("header", "stored", "seen"),
    [
        (latent(), (4, 8, 8), (4, 8, 8)),
        (latent(content="moments"), (8, 4, 2), (4, 4, 2)),
        (latent(flips=True), (2, 4, 8, 8), (4, 8, 8)),
        (latent(flips=True, content="moments"), (2, 8, 4, 4), (4, 4, 4)),
        (latent(shift=(0.0,) * 4, content="moments"), (8, 4, 4), (4, 4, 4)),
    ],
)
def test_the_shape_a_model_sees(header: Header, stored: tuple, seen: tuple) -> None:
    assert header.model_shape(stored) == seen


@pytest.mark.parametrize(
    ("header", "stored", "message"),
    [
        (latent(flips=True), (4, 8, 8), r"flips=True promises \(2, C, H, W\)"),
        (latent(flips=True), (3, 4, 8, 8), r"flips=True promises"),
        (latent(), (2, 4, 8, 8), r"flips=False promises \(C, H, W\)"),
        (latent(content="moments"), (5, 8, 8), "5 channels; moments"),
        (
            latent(scale=(1.0,) * 8, content="moments"),
            (8, 8, 8),
            "for 8 channels; a model sees 4",
        ),
        (latent(shift=(1.0, 2.0, 3.0)), (4, 8, 8), "for 3 channels; a model sees 4"),
    ],
)
def test_samples_that_the_header_does_not_describe_are_refused(
    header: Header, stored: tuple, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        header.model_shape(stored)
    x = np.zeros((3, *stored), dtype=np.float16)
    with pytest.raises(UserError, match=message):
        writer.write(tmp_path / "out", ArraySource.of("x", x), header=header)
    assert not (tmp_path / "out").exists()


def test_flips_and_moments_are_written_with_statistics_of_each_stored_channel(
    tmp_path: Path,
) -> None:
    x = np.random.default_rng(0).standard_normal((300, 2, 6, 4, 4)).astype(np.float32)
    header = latent(flips=True, content="moments", shift=(1.0, 2.0, 3.0), scale=0.5)
    writer.write(tmp_path, ArraySource.of("x", x), header=header)
    found = manifests.load(tmp_path)
    assert found.shape == (2, 6, 4, 4) and found.model_shape == (3, 4, 4)
    assert Header.of(found.header) == header
    np.testing.assert_allclose(found.channel_mean, x.mean((0, 1, 3, 4), np.float64), rtol=1e-9)
    np.testing.assert_allclose(found.channel_std, x.std((0, 1, 3, 4), np.float64), rtol=1e-9)


def test_a_value_that_is_not_finite_is_found_in_a_mirror_image(tmp_path: Path) -> None:
    x = np.zeros((5, 2, 1, 2, 2), dtype=np.float32)
    x[3, 1, 0, 1, 1] = np.nan
    with pytest.raises(UserError, match="sample 'x-3' holds values that are not finite"):
        writer.write(tmp_path, ArraySource.of("x", x), header=latent(flips=True))
