"""Everything that decides the bytes of a data set, checked before the first of them is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.format.manifest import Field, Layout
from shards.format.members import CLASSES, KEY, Decode
from shards.format.order import BLOCK, key, permute
from shards.format.pictures import Picture
from shards.sources.source import Column, PictureSource, Source

SAMPLE = "sample"  # the one span of a sample that has its own members
SHARD_BYTES = (
    128 << 20
)  # 16,384 latents 4x32x32 in fp16; stores serve objects of 100 MB to 1 GB best
_PROBES = 32  # samples whose size stands for all when pictures are cut into shards
_HEADERS = 3072  # bytes that the members of a sample take in a tar beside its picture, at most
_WRITE = 4  # purpose of the shuffle's key; reading uses 1 to 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides the bytes of a data set."""

    source: Source
    header: Header
    fields: tuple[Field, ...]
    seed: int
    block: int
    shard_blocks: int
    fingerprint: str
    class_names: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    # what else the manifest holds of its inputs; no part of what decides the bytes
    beside: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = "blocks"
    shuffled: bool = True  # by the seed; else in the source's order, which `seed` shuffled before

    @property
    def count(self) -> int:
        return len(self.source.keys)

    @property
    def shards(self) -> int:
        return -(-self.count // (self.block * self.shard_blocks))

    @cached_property
    def hash(self) -> str:
        decided = [manifests.VERSION, self.count, self.seed, self.block, self.shard_blocks]
        fields = [[f.name, f.dtype, [*f.shape], f.kind] for f in self.fields]
        plain = {
            "numbers": decided,
            "fields": fields,
            "header": self.header.plain(),
            "source": self.source_record,
        }
        return manifests.digest(plain | self.optional_fields)

    @property
    def source_record(self) -> dict[str, Any]:
        record = {"name": self.source.name, "count": self.count, "fingerprint": self.fingerprint}
        return {**record, **self.notes}

    @cached_property
    def optional_fields(self) -> dict[str, Any]:
        """Of the manifest: class names, an order that is the source's, and a layout of samples with their decoding.

        They are left out at their defaults, so that older data sets keep their plans.
        """
        fields: dict[str, Any] = {"class_names": [*self.class_names]} if self.class_names else {}
        if not self.shuffled:
            fields["order"] = "source"
        if self.layout != "blocks":
            assert isinstance(self.source, PictureSource)
            label = None if self.source.labels is None else "cls"
            decode = Decode(picture=Picture(channels=self.source.channels), label=label, key=KEY)
            fields |= {"layout": self.layout, "decode": decode.plain()}
        return fields

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the index: a span for each field of a block, or one for all of a sample."""
        return (SAMPLE,) if self.layout == "samples" else tuple(f.name for f in self.fields)

    def tar(self, k: int) -> str:
        return f"shards/train-{k:05d}-of-{self.shards:05d}.tar"

    def blocks(self, k: int) -> range:
        """The blocks of shard `k`."""
        every = -(-self.count // self.block)
        return range(k * self.shard_blocks, min((k + 1) * self.shard_blocks, every))

    def rows(self, block: int) -> NDArray[np.int64]:
        """The source's rows that form a block."""
        ordinals = np.arange(block * self.block, min((block + 1) * self.block, self.count))
        if not self.shuffled:
            return ordinals
        return permute(ordinals, self.count, key(self.seed, _WRITE)).astype(np.int64)


def make_plan(
    source: Source,
    header: Header,
    seed: int,
    shard_bytes: int,
    class_names: tuple[str, ...] = (),
    notes: Mapping[str, Any] | None = None,
    shuffle: bool = True,
    layout: Layout = "blocks",
    beside: Mapping[str, Any] | None = None,
) -> Plan:
    """Checks what can be checked without reading an image, and decides the cut into shards."""
    count, shape, dtype = len(source.keys), source.shape, np.dtype(source.dtype)
    if count == 0:
        raise UserError(f"source {source.name!r} is empty: name one that holds samples")
    header.model_shape(shape)
    if dtype.kind not in "uif" or not math.prod(shape):
        raise UserError(
            f"samples are {shape} {dtype}: give at least one whole or floating number each"
        )
    if shard_bytes < 1:
        raise UserError(
            f"shard_bytes={shard_bytes}: give at least 1 byte; the default is {SHARD_BYTES}"
        )
    if isinstance(source.keys, np.ndarray):  # what lies in shards was checked when it was written
        check_keys(source.keys)
        check_labels(source.keys, source.labels, source.classes)
    if class_names and len(class_names) != source.classes:
        raise UserError(
            f"{len(class_names)} class names for classes={source.classes}: give one for each"
        )
    x = Field(name="x", dtype=dtype.newbyteorder("<").str, shape=shape, kind=header.kind)
    fields = sample_fields(x, source.keys.dtype, labelled=source.labels is not None)
    sample_bytes = sum(f.sample_bytes for f in fields)
    if layout == "samples":
        if not isinstance(source, PictureSource):
            raise UserError(
                f"layout='samples': {source.name!r} holds arrays and no encoded pictures; give 'blocks'"
            )
        sample_bytes = _stored_bytes(source)
    return Plan(
        source=source,
        header=header,
        fields=fields,
        seed=seed,
        block=BLOCK,
        shard_blocks=max(1, shard_bytes // (BLOCK * sample_bytes)),
        fingerprint=source.fingerprint,
        class_names=class_names,
        notes=notes or {},
        beside=beside or {},
        shuffled=shuffle,
        layout=layout,
    )


def sample_fields(x: Field, keys: np.dtype, *, labelled: bool) -> tuple[Field, ...]:
    """The fields of every sample: its values, its label if any, its key."""
    label = [Field(name="y", dtype="<i8", shape=(), kind="label")] if labelled else []
    return (x, *label, Field(name="id", dtype=keys.str, shape=(), kind="key"))


def _stored_bytes(source: PictureSource) -> int:
    """Of a sample in its tar, by some that lie evenly in the source: how shards are cut must not need them all."""
    rows = np.unique(np.linspace(0, len(source.keys) - 1, _PROBES).astype(np.int64))
    sizes = [len(s.data) + len(s.about or b"") for s in source.pictures(rows)]
    return sum(sizes) // len(sizes) + _HEADERS


def check_keys(keys: NDArray[np.bytes_]) -> None:
    """Raises a UserError where a key occurs twice."""
    unique, counts = np.unique(keys, return_counts=True)
    if len(unique) < len(keys):
        twice = unique[counts > 1]
        raise UserError(
            f"key {twice[0].decode()!r} occurs {counts[counts > 1][0]} times "
            f"({len(twice)} such keys): give every sample its own"
        )


def check_labels(keys: Column, labels: Column | None, classes: int) -> None:
    """Raises a UserError where a label is not in [0, classes)."""
    if labels is None:
        return
    every = np.asarray(labels)
    below = np.flatnonzero(every < 0)
    if below.size:
        raise UserError(
            f"label {every[below[0]]} of sample {keys[below[0]].decode()!r} is below 0, {below.size:,} such among "
            f"{len(every):,} samples: -1 usually marks samples without a label; number classes from 0, or leave "
            "labels out"
        )
    if classes < 1:
        raise UserError(
            f"classes={classes}, but there are labels: give classes={int(every.max()) + 1}"
        )
    if classes > CLASSES:
        raise UserError(
            f"classes={classes:,}: at most {CLASSES:,} can be counted; number them from 0"
        )
    wrong = np.flatnonzero((every < 0) | (every >= classes))
    if wrong.size:
        raise UserError(
            f"label {every[wrong[0]]} of sample {keys[wrong[0]].decode()!r} is out of "
            f"range ({wrong.size} such): with classes={classes} they go from 0 to {classes - 1}"
        )
