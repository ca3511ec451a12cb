"""Shards by index, as PyTorch's `DataLoader` takes a data set: `len(data)`, `data[i]`, in any order, in any worker.

Samples have the order of ordinals. No torch here: `default_collate` makes tensors of what `data[i]` holds.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import storage
from shards.format import manifest as manifests
from shards.read.fields import Fields
from shards.read.reader import Reader


class Dataset:
    """Every sample of a folder or s3:// prefix of shards, by its ordinal.

    `data[i]` has `x` (C, H, W) as it is stored, `y` int64 if there are labels, `key` str and `ordinal`, each as a key
    and as an attribute. It pickles without what it has read, and each process opens files of its own.
    """

    def __init__(
        self, root: str | os.PathLike[str], transform: Callable[[Fields], Any] | None = None
    ) -> None:
        """`transform` is called with each sample and says what `data[i]` is.

        Raises:
            UserError: there are no shards at `root`.
        """
        self.root, self.transform = os.fspath(root), transform
        self.manifest = manifests.load(self.root)
        if not storage.is_remote(self.root):
            # a process that reads it later may have another working directory
            self.root = str(Path(self.root).absolute())
        self._reader: Reader | None = None
        self._process = 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, by number; empty where they have none."""
        return self.manifest.class_names

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, index: int) -> Any:
        """
        Raises:
            IndexError: there is no such sample.
            DamagedError: its block is not what was written.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Samples that a `DataLoader` asks for together, so that each block is read once."""
        ordinals = np.array([self._ordinal(index) for index in indices], dtype=np.int64)
        found = self._read(ordinals)
        samples = [
            Fields({name: _one(values[i]) for name, values in found.items()})
            for i in range(len(ordinals))
        ]
        return [self.transform(each) for each in samples] if self.transform else samples

    def _ordinal(self, index: int) -> int:
        number, count = operator.index(index), len(self)
        if not -count <= number < count:
            raise IndexError(f"sample {number} of {count}")
        return number % count

    def _read(self, ordinals: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        # threads and mapped files of a reader do not come along when a process forks
        if self._reader is None or self._process != os.getpid():
            self._reader, self._process = Reader(self.root, self.manifest), os.getpid()
        return self._reader.gather(ordinals)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


def _one(value: Any) -> Any:
    """Of one sample: text and numbers are Python's, an array is a copy that does not keep its batch alive."""
    return value.copy() if isinstance(value, np.ndarray) else value.item()
