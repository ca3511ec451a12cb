"""Several data sets read as one: which of them a position takes from, which sample, and when its epochs end.

The samples of all sources are numbered one source after the other, so that plans and announcements are arrays of
one kind of number; `Blend.locate` returns source and ordinal. Each source goes through its epochs at the pace of its
weight (`shards.format.order.Mixture`), and each epoch is audited as if its source were read alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards import storage
from shards.errors import UserError
from shards.format.header import Header
from shards.format.manifest import Manifest, digest, load
from shards.format.order import Mixture, Order, key
from shards.read.blocks import Arrays
from shards.read.options import ReadOptions
from shards.read.reader import Reader

I64 = NDArray[np.int64]
_SOURCE = 6  # purpose of a key; those of `shards.format.order` are 1 to 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Blend:
    """The orders of one data set or of several, and how positions are shared out among them."""

    orders: tuple[Order, ...]
    mixture: Mixture | None = None  # None where there is one

    def plan(self, positions: ArrayLike) -> tuple[I64, I64]:
        """The sample at each of `positions` (any shape), numbered over all sources, and its source's epoch."""
        asked = np.asarray(positions, dtype=np.int64)
        if self.mixture is None:
            return self.orders[0].ordinals(asked), asked // self.orders[0].count
        source, within = self.mixture.at(asked)
        samples, epochs = np.empty_like(asked), np.empty_like(asked)
        for i, order in enumerate(self.orders):
            mine = source == i
            samples[mine] = order.ordinals(within[mine]) + self.firsts[i]
            epochs[mine] = within[mine] // order.count
        return samples, epochs

    def locate(self, samples: I64) -> tuple[I64, I64]:
        """Source and ordinal there of each sample."""
        if self.mixture is None:
            return np.zeros_like(samples), samples
        source = np.searchsorted(self.firsts, samples, side="right") - 1
        return source, samples - self.firsts[source]

    @cached_property
    def firsts(self) -> I64:
        """The number of each source's first sample."""
        return np.cumsum([0, *(order.count for order in self.orders[:-1])], dtype=np.int64)

    def used(self, position: int) -> list[tuple[int, int]]:
        """Of each source, before `position`: how many first positions are all used, and from where on none is."""
        return [(position, position)] if self.mixture is None else self.mixture.used(position)

    def ended(self, position: int) -> list[int]:
        """Of each source, how many epochs are behind `position`."""
        used = zip(self.orders, self.used(position), strict=True)
        return [all_of // order.count for order, (all_of, _) in used]

    def under_way(self, position: int) -> list[tuple[int, int]]:
        """(source, epoch) of all that have begun before `position` and not ended, sorted."""
        used = enumerate(zip(self.orders, self.used(position), strict=True))
        return [
            (source, epoch)
            for source, (order, (all_of, none_from)) in used
            for epoch in range(all_of // order.count, -(-none_from // order.count))
        ]


class Readers:
    """The readers of several sources behind one, by samples that `Blend` has numbered; see `Reader`."""

    def __init__(self, readers: Sequence[Reader], blend: Blend) -> None:
        self._readers, self._blend = readers, blend
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self._position = position
        for reader, (all_of, _) in zip(self._readers, self._blend.used(position), strict=True):
            reader.position = all_of

    @property
    def counts(self) -> dict[str, int]:
        """As of `Reader`, of all sources together."""
        total: Counter[str] = Counter()
        for reader in self._readers:
            total.update(reader.counts)
        return dict(total)

    @property
    def together(self) -> int:
        return min(reader.together for reader in self._readers)

    @property
    def announced(self) -> int:
        return sum(reader.announced for reader in self._readers)

    def blocks_in(self, size: int, *, most: int) -> int:
        """As of `Reader`, with an even part of `size` for each source."""
        part = size // len(self._readers)
        return min(most, sum(reader.blocks_in(part, most=most) for reader in self._readers))

    def want(self, *batches: I64) -> None:
        located = [self._blend.locate(samples) for samples in batches]
        for i, reader in enumerate(self._readers):
            reader.want(*(ordinals[sources == i] for sources, ordinals in located))

    def take(self, *batches: I64) -> tuple[Arrays, NDArray[np.bool_]]:
        """As of `Reader`, and `source` (n,) int64; `ordinal` counts within it."""
        samples = np.concatenate(batches)
        sources, _ = self._blend.locate(samples)
        located = [self._blend.locate(batch) for batch in batches]
        parts = [
            (np.flatnonzero(sources == i), *reader.take(*(o[s == i] for s, o in located)))
            for i, reader in enumerate(self._readers)
        ]
        substituted, found = np.zeros(len(samples), dtype=bool), dict[str, NDArray[Any]]()
        for name, first in parts[0][1].items():
            dtype = np.result_type(
                *(arrays[name].dtype for _, arrays, _ in parts)
            )  # keys: the longest
            found[name] = np.empty((len(samples), *first.shape[1:]), dtype=dtype)
        for rows, arrays, theirs in parts:
            substituted[rows] = theirs
            for name, values in arrays.items():
                found[name][rows] = values
        return {**found, "source": sources}, substituted

    def end(self) -> None:
        for reader in self._readers:
            reader.end()

    def close(self) -> None:
        self.end()  # of all before one is waited for
        for reader in self._readers:
            reader.close()


def make_blend(
    manifests: Sequence[Manifest],
    options: ReadOptions,
    seed: int,
) -> Blend:
    """The orders of data sets that are read together; each has a seed of its own, drawn from `seed`."""
    several = len(manifests) > 1
    seeds = [int(key(seed, _SOURCE, i)[0]) if several else seed for i in range(len(manifests))]
    orders = tuple(
        Order(count=m.count, seed=own, mode=options.mode, block=m.block, window=options.window)
        for m, own in zip(manifests, seeds, strict=True)
    )
    mixture = Mixture(weights=tuple(options.weights or ()), seed=seed) if several else None
    return Blend(orders=orders, mixture=mixture)


def identity(manifests: Sequence[Manifest], weights: Sequence[float] | None) -> str:
    """One hash for all that is read: of the manifest, or of all manifests and the share each has."""
    if weights is None:
        return manifests[0].hash
    quotas = Mixture(weights=tuple(weights), seed=0).quotas
    return digest({"mixture": [m.hash for m in manifests], "quotas": quotas})


def label_rates(manifests: Sequence[Manifest], weights: Sequence[float] | None) -> list[float]:
    """How often each class is met, up to a factor; empty without labels."""
    if weights is None:
        return [*map(float, manifests[0].label_histogram or ())]
    quotas = Mixture(weights=tuple(weights), seed=0).quotas
    parts = [
        np.array(m.label_histogram or ()) * (quota / m.count)
        for m, quota in zip(manifests, quotas, strict=True)
    ]
    return [*map(float, sum(parts, start=np.zeros_like(parts[0])))]


def load_alike(
    root: storage.Url | Sequence[storage.Url],
    weights: Sequence[float] | None,
    loaded: Sequence[Manifest] | None = None,
) -> tuple[list[storage.Url], list[Manifest]]:
    """The roots and their manifests, the current ones or those `loaded`, once they are known to be of one kind.

    Raises:
        UserError: they are not; no shards there; no weight for each of several.
    """
    roots = roots_of(root, weights)
    found = [load(each) for each in roots] if loaded is None else [*loaded]
    check_alike(roots, found)
    return roots, found


def roots_of(
    root: storage.Url | Sequence[storage.Url], weights: Sequence[float] | None
) -> list[storage.Url]:
    """The roots as a list, once there is a weight for each of several.

    Raises:
        UserError: there is not.
    """
    if isinstance(root, str | os.PathLike):
        if weights is not None:
            raise UserError(
                f"weights={[*weights]} with one root={root}: give several roots, or none"
            )
        return [root]
    roots = [*root]
    if len(roots) < 2 or weights is None or len(weights) != len(roots):
        given = "none" if weights is None else [*weights]
        raise UserError(
            f"weights={given} for {len(roots)} roots: a mixture has two or more roots and one weight for each"
        )
    return roots


def check_alike(roots: Sequence[storage.Url], manifests: Sequence[Manifest]) -> None:
    """Returns when samples of all these can stand in one batch and mean the same.

    Raises:
        UserError: two differ in what a sample is, how it is normalised, or what its labels are; or are one.
    """
    for i, (root, manifest) in enumerate(zip(roots, manifests, strict=True)):
        before = [m.hash for m in manifests[:i]]
        if manifest.hash in before:
            raise UserError(
                f"{root} and {roots[before.index(manifest.hash)]} hold the same shards: name them once, with the "
                "sum of their weights"
            )
        theirs, ours = _meaning(manifests[0]), _meaning(manifest)
        for name in theirs | ours:
            if theirs.get(name) != ours.get(name):
                raise UserError(
                    f"{root} and {roots[0]} cannot be mixed: {name} is {ours.get(name)} in the one and "
                    f"{theirs.get(name)} in the other; write them alike, or read one"
                )


def _meaning(manifest: Manifest) -> dict[str, Any]:
    """What samples of two data sets must share. Keys may be of any length."""
    fields = {f.name: f"{f.dtype} {f.shape} ({f.kind})" for f in manifest.fields if f.kind != "key"}
    header = Header.of(manifest.header).plain()
    return fields | {f"header {n}": v for n, v in header.items()} | {"classes": manifest.classes}
