"""Arrays that are samples already: .npy and .npz files, and the CIFAR archives."""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.sources.listing import Listing, Passed, Raw, file
from shards.sources.source import Lazy

_SIDE = 32  # of a CIFAR image
# of CIFAR-100; CIFAR-10 has one kind
CifarLabels = Literal["fine", "coarse"]
# what NumPy raises of a file that is damaged, cut off, or holds pickles
_UNREADABLE = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Inputs that are rows of an array, (N, ...)."""

    x: NDArray[np.generic]

    def read(self, row: int) -> bytes:
        return np.ascontiguousarray(self.x[row]).tobytes()


@dataclass(frozen=True, eq=False)
class MappedRows(Lazy):
    """The same of an array in a .npy file, or a member of a .npz; opened once a process."""

    path: str
    member: str | None

    @cached_property
    def rows(self) -> Rows:
        return Rows(x=read_array(self.path, self.member))

    def read(self, row: int) -> bytes:
        return self.rows.read(row)


def numpy_file(
    path: str,
    *,
    x: str | None = None,
    y: str | None = None,
    channels_first: bool | None = None,
    latents: bool = False,
) -> Listing:
    """Samples of a .npy, or of a .npz with `x` (default: its first array) and `y`, its labels if any.

    `channels_first` tells (N, C, H, W) from (N, H, W, C); without it the axis of 1 or 3 values is taken
    for channels of uint8, and the first one for other types.

    Raises:
        UserError: no such file or array, one that needs unpickling, not four axes, or images (not
            `latents`) that are not uint8.
    """
    place = file(path, "array file")
    others: list[str] = []
    if place.suffix == ".npy":
        if x or y:
            raise UserError(f"{path} is one array: --x and --y name arrays of a .npz")
        member, labels = None, None
    else:
        names = members(path)
        member = x or names[0]
        for given, asked in (("x", member), ("y", y)):
            if asked is not None and asked not in names:
                raise UserError(
                    f"{given}={asked!r} is not in {path}: choose among {', '.join(names)}"
                )
        labels = None if y is None else read_array(path, y)
        others = [name for name in names if name not in (member, y)]
    store = MappedRows(path, member)
    found = store.rows.x
    if found.ndim != 4:
        cure = f"; --x takes another array, of {', '.join(others)}" if others else ""
        raise UserError(
            f"{path} holds {found.shape}{f' as {member}' if member else ''}: samples need four axes, N and those of an "
            f"image{cure}"
        )
    if not latents and found.dtype != np.uint8:
        raise UserError(
            f"{path} holds {found.dtype}: images are uint8; of latents say --encoder NAME"
        )
    last = _channels_last(found, path) if channels_first is None else not channels_first
    if labels is not None and labels.ndim == 2:
        labels = _from_one_hot(labels, path)
    width = len(str(len(found)))
    return Listing.of(
        place.stem,
        [f"{place.stem}-{row:0{width}d}" for row in range(len(found))],
        store,
        decode=Raw(shape=found.shape[1:], dtype=found.dtype.str, channels_last=last),
        places=np.full(len(found), place.stat().st_size),
        labels=labels,
        passed=[
            Passed(
                name,
                "an array that is not read" + ("" if y else f": --y {name} takes it for labels"),
            )
            for name in others
        ],
    )


def cifar(path: str, split: str = "train", kind: CifarLabels = "fine") -> Listing:
    """CIFAR-10 or -100 as published (Krizhevsky 2009): an archive of pickles, of which only arrays are let in.

    Keys are `<batch>/<row>`; CIFAR-100 has its 100 fine labels, or its 20 coarse ones.

    Raises:
        UserError: no such archive, or not one of CIFAR's, or coarse labels of CIFAR-10.
    """
    if split not in ("train", "test"):
        raise UserError(f"split={split!r}: CIFAR has 'train' and 'test'")
    place = file(path, "CIFAR archive")
    try:
        with tarfile.open(place) as archive:
            batches = {
                Path(member.name).name: _unpickle(archive.extractfile(member).read())  # type: ignore[union-attr]
                for member in archive
                if member.isfile() and _wanted(Path(member.name).name, split)
            }
        meta = next(batches.pop(n) for n in ("batches.meta", "meta") if n in batches)
        ten = "label_names" in meta
        names = meta["label_names" if ten else f"{kind}_label_names"]
        field = "labels" if ten else f"{kind}_labels"
        ordered = sorted(batches)
        x = np.concatenate([batches[name]["data"] for name in ordered])
        labels = np.concatenate([batches[name][field] for name in ordered])
        x = x.reshape(len(x), 3, _SIDE, _SIDE)
    except (tarfile.TarError, EOFError, OSError, pickle.UnpicklingError, StopIteration) as error:
        raise UserError(
            f"{path} is no CIFAR archive for Python ({error}): download it again"
        ) from None
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is no CIFAR archive for Python (lacks {error}): download it again"
        ) from None
    if ten and kind == "coarse":
        raise UserError(
            f"{path} is CIFAR-10, which has no coarse labels: leave out --labels coarse"
        )
    keys = [f"{n}/{row:05d}" for n in ordered for row in range(len(batches[n]["data"]))]
    called = "cifar100-coarse" if kind == "coarse" else f"cifar{len(names)}"
    return Listing.of(
        f"{called}-{split}",
        keys,
        Rows(x=x),
        decode=Raw(shape=x.shape[1:], dtype=x.dtype.str),
        places=np.full(len(x), place.stat().st_size),
        labels=labels,
        class_names=[name if isinstance(name, str) else name.decode() for name in names],
    )


def downsampled(path: str) -> Listing:
    """Downsampled ImageNet as released (Chrabaszcz et al. 2017): pickled batches of square RGB images.

    Labels count from 0 here, and from 1 there. Keys are `<batch>/<row>`.

    Args:
        path: a batch, or a folder with those of one part: train_data_batch_1 to _10, or val_data.

    Raises:
        UserError: no such batch, one that is damaged or of another kind, or batches of several sizes.
    """
    place = Path(path)
    files = sorted(place.iterdir(), key=_natural) if place.is_dir() else [file(path, "batch")]
    files = [each for each in files if _BATCH.fullmatch(each.name)]
    if not files:
        raise UserError(
            f"{path} holds no batch such as train_data_batch_1 or val_data: name their folder"
        )
    if len({each.name.startswith("val") for each in files}) > 1:
        raise UserError(
            f"{path} holds both parts, train and val: name a folder of one, or val_data"
        )
    x, labels, keys = [], [], []
    for each in files:
        try:
            found = _unpickle(each.read_bytes())
            data, its_labels = np.asarray(found["data"]), np.asarray(found["labels"])
            side = round((data.shape[1] / 3) ** 0.5)
            x.append(data.astype(np.uint8, casting="safe").reshape(len(data), 3, side, side))
            labels.append(its_labels.astype(np.int64) - 1)
        except (
            EOFError,
            OSError,
            KeyError,
            ValueError,
            TypeError,
            IndexError,
            pickle.UnpicklingError,
        ) as error:
            raise UserError(
                f"{each} is no batch of Downsampled ImageNet ({type(error).__name__}: {error}): download it again"
            ) from None
        keys += [f"{each.name}/{row:06d}" for row in range(len(data))]
    sides = {each.shape[-1] for each in x}
    if len(sides) > 1:
        raise UserError(
            f"{path} holds batches of {_listed(sides)} pixels: name a folder of one size"
        )
    images = np.concatenate(x)
    return Listing.of(
        place.name,
        keys,
        Rows(x=images),
        decode=Raw(shape=images.shape[1:], dtype=images.dtype.str),
        places=np.repeat([each.stat().st_size for each in files], [len(each) for each in x]),
        labels=np.concatenate(labels),
        classes=_IMAGENET,
    )


# files of a part, whatever its size
_BATCH = re.compile(r"train_data_batch_\d+|val_data")
_IMAGENET = 1000


def _natural(place: Path) -> tuple[int, str]:
    """The batches by number."""
    return int("0" + "".join(filter(str.isdigit, place.name))), place.name


def _listed(sides: set[int]) -> str:
    return " and ".join(map(str, sorted(sides)))


def _wanted(name: str, split: str) -> bool:
    if name in ("batches.meta", "meta"):
        return True
    return (
        name in ("test_batch", "test")
        if split == "test"
        else name.startswith(("data_batch", "train"))
    )


class _Arrays(pickle.Unpickler):
    """Lets in NumPy's arrays and nothing that runs: a pickle may otherwise call anything."""

    def find_class(self, module: str, name: str) -> Any:
        made = np.empty(0).__reduce__()[0]  # NumPy 2 moved it
        allowed = {
            ("multiarray", "_reconstruct"): made,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _encode_latin1,
        }
        found = allowed.get((module.rsplit(".", 1)[-1], name))
        if found is None:
            raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which is no array")
        return found


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"its pickle encodes as {encoding}")
    return text.encode("latin1")


def _unpickle(data: bytes) -> Mapping[str, Any]:
    # latin1: Python 2 wrote these, and its strings hold the bytes of arrays
    found = _Arrays(io.BytesIO(data), encoding="latin1").load()
    if not isinstance(found, dict):
        raise pickle.UnpicklingError("its pickle is no dictionary")
    return found


def members(path: str) -> list[str]:
    """The names of the arrays in a .npz.

    Raises:
        UserError: it is none, or holds none.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            names = list(found.files)
    # an array alone, in a .npy, has no members to open
    except (*_UNREADABLE, AttributeError, TypeError) as error:
        # of any other file NumPy says how a pickle could be run
        why = "" if "pickle" in str(error) else f" ({error})"
        raise UserError(f"{path} is no .npz file{why}: write it with numpy.savez") from None
    if not names:
        raise UserError(f"{path} holds no array: write it with numpy.savez")
    return names


def read_array(path: str, member: str | None) -> NDArray[np.generic]:
    """An array of a .npz, or the one in a .npy, memory-mapped.

    Raises:
        UserError: it is damaged, or needs unpickling.
    """
    try:
        if member is None:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as found:
            return found[member]
    except _UNREADABLE as error:
        raise UserError(f"{path} cannot be read as arrays of numbers ({error})") from None


def _channels_last(x: NDArray[np.generic], path: str) -> bool:
    if x.dtype != np.uint8:
        return False
    first, last = x.shape[1] in (1, 3), x.shape[-1] in (1, 3)
    if first == last:
        raise UserError(
            f"{path} holds {x.shape}: say which axis is channels, --layout nchw or --layout nhwc"
        )
    return last


def _from_one_hot(labels: NDArray[np.generic], path: str) -> NDArray[np.int64]:
    if not ((labels == 0) | (labels == 1)).all() or not (labels.sum(axis=1) == 1).all():
        raise UserError(
            f"labels of {path} are {labels.shape}, but no one-hot rows: give one number each"
        )
    return labels.argmax(axis=1)
