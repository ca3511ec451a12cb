"""Features of every sample of a set of shards, streamed into a sidecar of dense rows by any number of ranks.

The samples are cut into chunks by ordinal; chunk c is rank c mod world's. A rank publishes each of its chunks whole in
a hidden folder beside the target, named by all that decides its content: a killed extraction goes on where it was, on
any number of ranks, and parts of other settings are never mixed in. Whoever finds all chunks there joins them.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selfguide.discovery.features import FeatureNet
from shards import cli, sidecar, storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.read.reader import Reader
from shards.sidecar import Sidecar

CHUNK = 1024  # samples of a part
ROWS = 8192  # looked at together
Rows = NDArray[np.generic]


def extract(
    root: storage.Url,
    net: FeatureNet,
    out: str | os.PathLike[str],
    *,
    rank: int = 0,
    world: int = 1,
    batch: int = 256,
    chunk: int = CHUNK,
) -> Sidecar | None:
    """The features of every sample at `root` as a sidecar in `out`; None where other ranks' chunks are still missing.

    Ranks share the folder and nothing else: no collective is called. An extraction that is published is returned.

    Raises:
        UserError: features that are not finite or all the same, a folder that holds something else.
    """
    if not 0 <= rank < world:
        raise UserError(f"rank={rank} of world={world}: ranks go from 0 to {world - 1}")
    if batch < 1 or chunk < 1:
        raise UserError(f"batch={batch}, chunk={chunk}: give at least 1 sample")
    manifest = manifests.load(root)
    work = _Work(Path(out), manifest, dict(net.provenance), chunk)
    done = work.published()
    if done is not None:
        return done
    reader = Reader(root, manifest)
    mine = [c for c in range(rank, work.chunks, world) if not work.part(c).exists()]
    shown = cli.track(mine, len(mine), "extracting features") if rank == 0 else mine
    for c in shown:
        storage.publish(
            work.part(c), _npy(_features(net, reader, work.ordinals(c), batch)), replace=True
        )
    return work.join()


@dataclass(frozen=True)
class _Work:
    """One extraction on disk."""

    target: Path
    manifest: Manifest
    provenance: Mapping[str, Any]
    chunk: int

    @property
    def chunks(self) -> int:
        return -(-self.manifest.count // self.chunk)

    @property
    def parts(self) -> Path:
        """Hidden beside the target; another content has another name."""
        decided = {"shards": self.manifest.hash, "chunk": self.chunk, **self.provenance}
        return self.target.parent / f".{self.target.name}.{manifests.digest(decided)[:16]}"

    def part(self, c: int) -> Path:
        return self.parts / f"{c:06d}.npy"

    def ordinals(self, c: int) -> NDArray[np.int64]:
        return np.arange(c * self.chunk, min((c + 1) * self.chunk, self.manifest.count))

    def published(self) -> Sidecar | None:
        """What is in the target already, if it is this extraction.

        Raises:
            UserError: it is another one, or of other shards.
        """
        if not (self.target / storage.MANIFEST).exists():
            sidecar.refuse_taken(self.target, {sidecar.ROWS})
            return None
        found = sidecar.read(self.target, manifest=self.manifest.hash)
        if found.provenance != self.provenance:
            keys = sorted(found.provenance.keys() | self.provenance.keys())
            differs = next(k for k in keys if found.provenance.get(k) != self.provenance.get(k))
            raise UserError(
                f"{self.target} holds features with {differs}={found.provenance.get(differs)}, and these have "
                f"{differs}={self.provenance.get(differs)}; name another folder, or remove it"
            )
        return found

    def join(self) -> Sidecar | None:
        """Publishes rows once every part is there; one rank at a time."""
        with _alone(self.parts) as there:
            done = (
                self.published() if not there or (self.target / storage.MANIFEST).exists() else None
            )
            if done is not None:
                shutil.rmtree(self.parts, ignore_errors=True)
                return done
            if not all(self.part(c).exists() for c in range(self.chunks)):
                return None
            parts = [np.load(self.part(c), mmap_mode="r") for c in range(self.chunks)]
            refuse_constant(parts)
            self.target.mkdir(parents=True, exist_ok=True)
            file, shape = self.target / sidecar.ROWS, (self.manifest.count, parts[0].shape[1])
            rows = np.lib.format.open_memmap(file, "w+", np.dtype(np.float32), shape)
            for c, part in enumerate(parts):
                rows[self.ordinals(c)] = part
            rows.flush()
            made = sidecar.write(
                self.target,
                rows,
                manifest=self.manifest.hash,
                kind="dense",
                provenance=self.provenance,
            )
            shutil.rmtree(self.parts)
            return made


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Holds the folder against other ranks; False where it is gone, and another rank has joined its parts."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the kernel lets go when the process dies
        yield folder.exists()
    finally:
        os.close(handle)


def _features(
    net: FeatureNet, reader: Reader, ordinals: NDArray[np.int64], batch: int
) -> NDArray[np.float32]:
    """(n, F) of these samples."""
    made = []
    for start in range(0, len(ordinals), batch):
        here = ordinals[start : start + batch]
        found = net(torch.from_numpy(reader.gather(here)["x"]), torch.from_numpy(here)).numpy()
        bad = ~np.isfinite(found).all(axis=1)
        if bad.any():
            raise UserError(
                f"the features of sample {int(here[bad.argmax()])} are NaN or infinite; take other weights, or another "
                "layer or noise-time"
            )
        made.append(found)
    return np.concatenate(made)


def _npy(rows: Rows) -> bytes:
    file = io.BytesIO()
    np.save(file, rows)
    return file.getvalue()


def checked(features: Rows) -> Rows:
    """`features` (N, F), memory-mapped or not, if groups can be found in them; read in pieces.

    Raises:
        UserError: no rows, a value that is not finite, or rows that are all the same.
    """
    if features.ndim != 2 or not features.size:
        raise UserError(f"features are {features.shape}: give (N, F), one row a sample")
    pieces = [features[s : s + ROWS] for s in range(0, len(features), ROWS)]
    for number, piece in enumerate(pieces):
        bad = ~np.isfinite(piece).all(axis=1)
        if bad.any():
            sample = number * ROWS + int(bad.argmax())
            raise UserError(
                f"the features of sample {sample} are NaN or infinite: extract them again"
            )
    refuse_constant(pieces)
    return features


def refuse_constant(pieces: Sequence[Rows]) -> None:
    """
    Raises:
        UserError: all rows are the same: nothing distinguishes one sample from another.
    """
    first = pieces[0][:1]
    if all((piece == first).all() for piece in pieces):
        raise UserError(
            f"the features of all {sum(map(len, pieces)):,} samples are the same, so no groups are in them; take "
            "another layer, noise-time, pooling or net"
        )
