"""Tensors by name: read without running what a file says, and checked before they become anybody's weights."""

from __future__ import annotations

import argparse
import re
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfguide.spec.pickled import CONTAINERS, unpacked, unwrapped
from shards import storage
from shards.errors import UserError


def read_weights(
    path: Path, where: str, *, containers: Sequence[str] = CONTAINERS, strangers: bool = False
) -> dict[str, Tensor]:
    """Tensors of a safetensors file or a torch checkpoint, on the CPU, floating ones in fp32.

    Args:
        containers: what holds the weights in a checkpoint, best first.
        strangers: whether objects of others' classes may lie beside the tensors, such as a configuration. They are
            passed over: their classes are never imported, and nothing of what the file says of them is run.

    Raises:
        UserError: it is neither, or holds more than tensors; begins with `where`.
    """
    try:
        found = load_file(path) if path.suffix == ".safetensors" else _unpickle(path, strangers)
    except Exception as error:
        # bytes that are no weights end torch's reader in any exception there is, and its message advises to run what
        # the file says, which nobody should do on our word
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise UserError(
            f"{where} cannot be read as tensors only ({reason}); it must be a safetensors file, or a torch file of "
            "tensors and plain values: fetch it again, or save its state dict alone"
        ) from error
    tensors = unwrapped(unpacked(found, Tensor, containers))
    if not tensors:
        raise UserError(f"{where} holds no state dict; give a checkpoint's file")
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


class _Stranger:
    """Stands for any object of a class that is not ours to import: takes what made it, and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Stranger:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        """What it held is passed over."""


def _no_items(*_: Any) -> OrderedDict[Any, Any]:
    """Stands for a mapping that is built from a factory, into which items may still be put."""
    return OrderedDict()


def _unpickle(path: Path, strangers: bool) -> Any:
    # DiT's and SiT's training keeps its command line beside the weights, which is plain data
    known: list[Any] = [argparse.Namespace]
    if strangers:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known += [
            (_no_items if name == "collections.defaultdict" else _Stranger, name)
            for name in named
            if name != "argparse.Namespace"
        ]
    with torch.serialization.safe_globals(known):
        return torch.load(path, map_location="cpu", weights_only=True)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Writes `tensors`, which may share memory, as a safetensors file with `about` in its header.

    Raises:
        NoRoomError: the disk is full, or may not be written.
    """
    held = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    try:
        save_file(held, path, None if about is None else dict(about))
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in held.values())
        storage.refuse_no_room(path, size, _as_os_error(error))
        raise


def publish_tensors(
    path: Path, tensors: Mapping[str, Tensor], fence: storage.Fence
) -> dict[str, Any]:
    """Publishes `tensors` as a safetensors file by the right of `fence`; a file that is there is replaced.

    No two tensors may share memory. Returns what the manifest of its folder says of the file.

    Raises:
        FencedError: a newer attempt has ended that right.
        NoRoomError: the disk is full, or may not be written.
    """
    # hidden and named as storage's own, so that `storage.sweep` deletes what a kill leaves
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(held, draft)
        part = storage.describe(draft.parent, draft.name)
        storage.publish_file(path, draft, replace=True, fence=fence)
    except (OSError, SafetensorError) as error:
        size = sum(t.nbytes for t in held.values())
        storage.refuse_no_room(path, size, _as_os_error(error))
        raise
    finally:
        draft.unlink(missing_ok=True)
    return part | {"name": path.name}


def _as_os_error(error: Exception) -> OSError:
    """What the file system said; safetensors' writer, which is in Rust, has it in its text only."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]) if found else 0, str(error))


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Returns when every number is finite; `where` begins the error, and says whose they are.

    Raises:
        UserError: the first tensor with a NaN or an infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{where}: {name} has {bad} of {tensor.numel()} values that are NaN or infinite; take other weights"
            )


def put(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Loads `tensors` into `module`, which must have the same names and shapes.

    Raises:
        UserError: the first name or shape that differs, or a value that is not finite.
    """
    own = module.state_dict()
    for name in own:
        if name not in tensors:
            raise UserError(f"{where} lacks {name}, which its config asks for; take other weights")
    for name, tensor in tensors.items():
        if name not in own:
            raise UserError(
                f"{where} holds {name}, which its config has no place for; take other weights"
            )
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{where}: {name} is {tuple(tensor.shape)}, and its config makes it {tuple(own[name].shape)}; "
                "take other weights"
            )
    check_finite(tensors, where)
    module.load_state_dict(dict(tensors))


def copy_token_rows(
    own: Tensor, own_extras: list[str], given: Tensor, given_extras: list[str]
) -> Tensor:
    """`own` (extras + L, D) with the rows of `given` wherever both have that token; patches are last in both."""
    placed = own.clone()
    placed[len(own_extras) :] = given[len(given_extras) :]
    for row, token in enumerate(own_extras):
        if token in given_extras:
            placed[row] = given[given_extras.index(token)]
    return placed
