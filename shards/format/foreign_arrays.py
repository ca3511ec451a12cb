"""Arrays in tars of others, decoded by webdataset's own registry, so that they are what webdataset gives of them.

To import it imports torch, so it is imported when such a member is first decoded, in the process that decodes it. Its
decoders of pickles (`pkl`, `pyd`, and `pth`, which is one) run whatever code a tar brings along: they are left out.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import BadInputError, UserError

EXTENSIONS = ("npy", "npz", "ten", "tb")
_PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")


def kind_of(image: str | None) -> str | None:
    """The decoder that members of the extension `image` need; None where they are pictures.

    Raises:
        UserError: it would run code.
    """
    kind = (image or "").lower().rpartition(".")[2]
    if kind in _PICKLES:
        raise UserError(
            f"image={image!r}: a pickle may run any code, and is not read from tars of others: keep "
            f"{', '.join(EXTENSIONS)}"
        )
    return kind if kind in EXTENSIONS else None


def rule_of(kind: str) -> str:
    """How arrays of this kind (`kind_of`) are decoded, and by which version: a part of what names decoded data."""
    return f"array {kind} webdataset-{importlib.metadata.version('webdataset')}"


def array_of(kind: str, data: bytes) -> NDArray[np.generic]:
    """The array (C, H, W) of numbers, in little-endian order, that a member holds, alone.

    Raises:
        BadInputError: it holds something else.
    """
    from webdataset.autodecode import decoders

    try:
        value: Any = decoders[kind](data)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - of what an odd member makes decoders raise there is no list
        raise BadInputError(f"damaged .{kind}: {error or type(error).__name__}") from None
    array = [*value.values()] if isinstance(value, Mapping) else value
    if isinstance(array, list) and len(array) == 1:
        array = array[0]
    if not isinstance(array, np.ndarray):
        count = f"{len(array)} arrays" if isinstance(array, list) else "no array"
        raise BadInputError(f".{kind} holds {count}: one is wanted")
    if array.ndim != 3 or array.dtype.kind not in "uif" or not array.size:
        raise BadInputError(
            f".{kind} holds {array.shape} {array.dtype}: numbers (C, H, W) are wanted"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadInputError(f".{kind} holds values that are not finite")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
