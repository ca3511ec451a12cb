"""Names and shapes of the tensors in a torch checkpoint, read without torch and without running what the file says."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# what holds the weights in others' training checkpoints, best first
CONTAINERS = ("ema", "model", "state_dict")
# what bytes end in that are no such checkpoint; whoever reads the tensors says what is wrong with them
_UNREADABLE = (
    *(OSError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, ValueError, TypeError),
    *(LookupError, AttributeError, RuntimeError, ImportError),
)
# what wrappers of a net put before the name of each of its tensors
_WRAPPERS = ("module.", "_orig_mod.")


class _Tensor(tuple[int, ...]):
    """Stands for a tensor of this shape."""


def shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    """Returns name -> shape of the weights in a checkpoint of torch 1.6 or later; None for other files."""
    try:
        with zipfile.ZipFile(path) as file:
            (name,) = (each for each in file.namelist() if each.endswith("/data.pkl"))
            with file.open(name) as pickled:
                found = _Shapes(pickled).load()
    except _UNREADABLE:
        return None
    named = unwrapped(unpacked(found, _Tensor))
    return {name: tuple(shape) for name, shape in named.items()} or None


def unpacked(found: Any, kind: type[T], containers: Sequence[str] = CONTAINERS) -> dict[str, T]:
    """Returns what of a checkpoint is of this kind, by name, inside of what holds the weights."""
    if not isinstance(found, Mapping):
        return {}
    for name in containers:
        if isinstance(found.get(name), Mapping):
            return unpacked(found[name], kind, containers)
    return {str(name): value for name, value in found.items() if isinstance(value, kind)}


def unwrapped(tensors: dict[str, T]) -> dict[str, T]:
    """Returns them under the net's own names, where all have the prefix of DistributedDataParallel or of compiling."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return unwrapped({name.removeprefix(prefix): t for name, t in tensors.items()})
    return tensors


class _Shapes(pickle.Unpickler):
    """Makes shapes in place of tensors, and knows nothing else but plain values."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("argparse", "Namespace"): argparse.Namespace,
            ("torch._utils", "_rebuild_tensor_v2"): lambda _, offset, size, *more: _Tensor(size),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *more: tensor,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch":  # a kind of storage
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> None:
        """A storage, of which nothing is needed."""
