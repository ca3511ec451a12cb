"""Work that a kill does not lose: finished parts, each a file that appears whole, in a hidden folder of their own.

`Work` names that folder by all that decides what is in it, so parts of other settings are never mixed in. Any number
of processes may share it: a part that is there is not made again, and one process at a time publishes the target, once
all parts are there. `array`, `record`, `save` and `load` keep what needs no parts: a result, or the state of a fit.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from selfguide.discovery.spent import spending, total
from shards import cli, sidecar, storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.lock import lock

REPORT = "report"  # in a provenance: says how rows are, and decides nothing
Array = NDArray[np.generic]
Make = Callable[[NDArray[np.int64]], Tensor]  # ordinals (B,) -> their rows (B, ...)


def array(file: Path, make: Callable[[], Array]) -> Array:
    """The array in `file`, memory-mapped; where there is none, what `make` returns is published there."""
    _keep(file, make)
    return np.load(file, mmap_mode="r")


def _keep(file: Path, make: Callable[[], Array]) -> None:
    if not file.exists():
        storage.publish(file, _bytes(make()), replace=True)


def _bytes(values: Array) -> bytes:
    data = io.BytesIO()
    np.save(data, values)
    return data.getvalue()


def record(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON object in `file`; where there is none, what `make` returns is published there."""
    if not file.exists():
        storage.publish(file, json.dumps(make()).encode(), replace=True)
    return json.loads(file.read_text())


def save(file: Path, state: Mapping[str, Any]) -> None:
    """Publishes a state of tensors and plain values in `file`, in place of the last one."""
    data = io.BytesIO()
    torch.save(state, data)
    storage.publish(file, data.getvalue(), replace=True)


def load(file: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The state that `save` published last; None where there is none."""
    return torch.load(file, device, weights_only=True) if file.exists() else None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """(count, ...) rows by ordinal in parts of `chunk` rows; iterates over the parts, memory-mapped."""

    folder: Path
    prefix: str  # of the parts' names, which say with it what decided them beside the folder
    count: int
    chunk: int
    dtype: DTypeLike

    def fill(self, make: Make, *, batch: int, doing: str, rank: int = 0, world: int = 1) -> None:
        """Makes the missing parts of this rank, `batch` rows at once; part c is rank c mod world's.

        Raises:
            UserError: rows that are not finite.
        """
        missing = [c for c in range(rank, len(self), world) if not self._file(c).exists()]

        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)

        def part(c: int) -> Array:
            # before it is published: after the last one, somebody else may end the work
            with spending(self.folder, world):
                return self._part(c, make, batch)

        for c in cli.track(missing, len(missing), doing) if rank == 0 else missing:
            if not (file := self._file(c)).exists():
                made = _bytes(part(c))
                # whoever has made this part as well may join all of them, and remove their folder, at any moment
                with suppress(FileNotFoundError):
                    storage.publish(file, made, replace=True)

    @property
    def complete(self) -> bool:
        """Whether every part is there."""
        return all(self._file(c).exists() for c in range(len(self)))

    def join(self, file: Path) -> Array:
        """All rows in one file, memory-mapped; parts are open one at a time, for they may be thousands."""
        shape = (self.count, *next(iter(self)).shape[1:])
        whole = np.lib.format.open_memmap(file, "w+", np.dtype(self.dtype), shape)
        for c, part in enumerate(self):
            whole[self._ordinals(c)] = part
        whole.flush()
        return whole

    def __len__(self) -> int:
        return -(-self.count // self.chunk)

    def __iter__(self) -> Iterator[Array]:
        return (np.load(self._file(c), mmap_mode="r") for c in range(len(self)))

    def _file(self, c: int) -> Path:
        return self.folder / f"{self.prefix}{c:06d}.npy"

    def _ordinals(self, c: int) -> NDArray[np.int64]:
        return np.arange(c * self.chunk, min((c + 1) * self.chunk, self.count))

    def _part(self, c: int, make: Make, batch: int) -> Array:
        ordinals, made = self._ordinals(c), []
        for start in range(0, len(ordinals), batch):
            here = ordinals[start : start + batch]
            rows = make(here).cpu().numpy()
            bad = ~np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
            if bad.any():
                raise UserError(
                    f"the features of sample {here[bad.argmax()]} are NaN or infinite; take other weights, or of a "
                    "snapshot another layer or noise-time"
                )
            made.append(rows.astype(self.dtype, copy=False))
        return np.concatenate(made)


def gather(parts: Sequence[Array], indices: NDArray[np.int64]) -> Array:
    """(n, ...) rows at these indices of parts that lie end to end, all but the last of one length."""
    which, at = np.divmod(indices, len(parts[0]))
    found = np.empty((len(indices), *parts[0].shape[1:]), parts[0].dtype)
    for c in np.unique(which):
        found[which == c] = parts[c][at[which == c]]
    return found


@dataclass(frozen=True)
class Work:
    """Parts of an annotation on their way to a sidecar in `target`."""

    target: Path
    manifest: str  # of the shards that are annotated
    provenance: Mapping[str, Any]  # JSON: with `manifest` and `more`, all that decides the parts
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Hidden beside the target."""
        decided = {"shards": self.manifest, **self.more, **self.provenance}
        return self.target.parent / f".{self.target.name}.{manifests.digest(decided)[:16]}"

    @property
    def begun(self) -> bool:
        """Whether parts of exactly this are there."""
        return self.folder.exists()

    def published(self) -> sidecar.Sidecar | None:
        """The sidecar in the target, if there is one.

        Raises:
            UserError: it is of other shards or of another provenance.
        """
        if not (self.target / storage.MANIFEST).exists():
            return None
        found = sidecar.read(self.target, manifest=self.manifest)
        for key in sorted((found.provenance.keys() | self.provenance.keys()) - {REPORT}):
            theirs, ours = found.provenance.get(key), self.provenance.get(key)
            if theirs != ours:
                raise UserError(
                    f"{self.target} holds rows with {key}={theirs}, and these have {key}={ours}; name another folder, "
                    "or remove it"
                )
        return found

    def publish(
        self,
        rows: Rows,
        *,
        kind: sidecar.Kind,
        groups: int | None = None,
        finish: Callable[[], tuple[Sequence[str], Mapping[str, Any]]] = lambda: ((), {}),
    ) -> sidecar.Sidecar | None:
        """The sidecar of `rows` in the target once all parts are there, which go; None where some are missing.

        `finish` is called before parts are joined. It may refuse them; it returns names of files that it wrote into the
        target, and a report on the rows, which becomes a part of their provenance.

        Raises:
            UserError: the target holds something else.
        """
        with ExitStack() as stack:
            there = False
            with suppress(
                FileNotFoundError
            ):  # another process has published, and removed the parts
                there = stack.enter_context(lock(self.folder, create=False))
            made = self.published()
            if made is None and there and rows.complete:
                attached, report = finish()
                self.target.mkdir(parents=True, exist_ok=True)
                made = sidecar.write(
                    self.target,
                    rows.join(self.target / sidecar.ROWS),
                    manifest=self.manifest,
                    kind=kind,
                    groups=groups,
                    provenance={**self.provenance, **({REPORT: dict(report)} if report else {})},
                    attached=attached,
                    cost=total(self.folder),
                )
            if made is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
            return made
