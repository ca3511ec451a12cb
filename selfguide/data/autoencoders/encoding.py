"""A data set of images as the latents that an autoencoder makes of them: a source for the writer of shards.

Of a variational autoencoder either both moments of an image are stored, to be sampled at every step (as Bao et al. 2023
train on latents), or one sample of them, which every epoch then sees again, or their mean. Latents keep the order of
their images, which were shuffled when they were written: ordinal i of one data set is ordinal i of the other, and a
block of latents reads one block of images. What a block becomes depends on its images, the encoding and the kind of
hardware, not on who else works: the network sees the same images together, and noise is keyed by the ordinal.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.data.autoencoders.autoencoder import TOP, Autoencoder
from selfguide.data.autoencoders.load import load_autoencoder
from selfguide.data.normaliser import Normaliser, posterior_mean, sample_posterior
from selfguide.spec.suggest import nearest
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.read.block_bytes import Arrays
from shards.read.reader import Reader
from shards.sources.source import Column

ENCODERS = ("sd_vae", "va_vae", "tiny", "small")
CONTENTS = ("moments", "sample", "mean")
DTYPES = ("float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What is made of the images."""

    encoder: str
    weights: str | None = None
    statistics: str | None = None  # of va_vae's latents
    content: str = "moments"
    flips: bool = False  # both mirror images, each encoded by itself
    dtype: str = "float16"
    batch: int = 32  # images that the network sees at once: convolutions may round by it
    seed: int = 0  # of samples

    def __post_init__(self) -> None:
        known = {"encoder": ENCODERS, "content": CONTENTS, "dtype": DTYPES}
        for name, values in known.items():
            given = getattr(self, name)
            if given not in values:
                raise UserError(
                    f"{name}={given!r} is unknown{nearest(given, values)}; known: {', '.join(values)}"
                )
        if self.batch < 1 or self.seed < 0:
            raise UserError(
                f"batch={self.batch}, seed={self.seed}: give at least 1 image, and a seed from 0"
            )

    def load(self, device: torch.device | str = "cpu") -> Autoencoder:
        return load_autoencoder(
            self.encoder, self.weights, statistics=self.statistics, device=device
        )

    @property
    def decided(self) -> dict[str, Any]:
        """What of it decides bytes, as JSON; a seed only where something is drawn."""
        settings = {n: getattr(self, n) for n in ("encoder", "content", "flips", "dtype", "batch")}
        return {**settings, "posterior_seed": self.seed} if self.content == "sample" else settings


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSource:
    """Latents of the images at `root`, made when they are asked for: a `shards.sources.source.Source`; made by `of`.

    It pickles without autoencoder and reader, which each process opens when it first needs them. Keys and labels
    are the images' own, and come with them, a block at a time.
    """

    root: str
    manifest: manifests.Manifest  # of the images
    encoding: Encoding
    header: Header  # of the latents
    sha256: str | None  # of the weights
    shape: tuple[int, ...]
    device: str = (
        "auto"  # a GPU where there is one; of several, each process of a pool takes its own
    )

    @staticmethod
    def of(root: str, encoding: Encoding, device: str = "auto") -> EncodedSource:
        """The latents of the images at `root`, a folder or s3:// prefix of shards; `device` is where they are made.

        Raises:
            UserError: no images at `root`, images that the autoencoder cannot encode, or no weights.
        """
        manifest = manifests.load(root)
        _check_images(root, manifest)
        here = _device(device).type == "cpu"
        codec = encoding.load()
        channels, height, width = manifest.model_shape
        codec.check(channels, height, width)
        moments = encoding.content == "moments"
        stored = (codec.channels * (1 + moments), height // codec.factor, width // codec.factor)
        made = EncodedSource(
            root=root,
            manifest=manifest,
            encoding=encoding,
            header=replace(
                codec.header(), content="moments" if moments else "sample", flips=encoding.flips
            ),
            sha256=codec.sha256,
            shape=(2, *stored) if encoding.flips else stored,
            device=device,
        )
        if here:
            made.__dict__["_codec"] = codec  # this process need not load it again
        return made

    @property
    def name(self) -> str:
        return f"{self.manifest.source['name']}-{self.encoding.encoder}"

    @property
    def keys(self) -> Column:
        return _Column(
            self, "key", np.dtype(self.manifest.fields[self.manifest.column("id")].dtype)
        )

    @property
    def labels(self) -> Column | None:
        return _Column(self, "y", np.dtype(np.int64)) if self.classes else None

    @property
    def classes(self) -> int:
        return self.manifest.classes

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.encoding.dtype)

    @property
    def fingerprint(self) -> str:
        images = {"images": self.manifest.hash, "encoder_sha256": self.sha256}
        return manifests.digest({**images, **self.encoding.decided})

    @property
    def notes(self) -> dict[str, Any]:
        """Where the latents come from, for the manifest."""
        images = {
            "name": self.manifest.source["name"],
            "manifest": self.manifest.hash,
            "rule": self.manifest.source.get("rule"),  # how inputs were decoded and cropped
        }
        used = ("torch",) if self.encoding.encoder in ("tiny", "small") else ("torch", "diffusers")
        versions = {name: importlib.metadata.version(name) for name in used}
        return {"images": images, "encoding": self.encoding.decided, "versions": versions}

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        """Latents (len(rows), *shape) as they are stored.

        Raises:
            UserError: a latent that is not finite or too large for the dtype; other weights than at first.
        """
        stored = self.stored(rows)["x"]
        found = np.empty((len(rows), *self.shape), self.dtype)
        with _repeatable():
            for start in range(0, len(rows), self.encoding.batch):
                part = slice(start, start + self.encoding.batch)
                found[part] = self._encode(stored[part], rows[part])
        return found

    def stored(self, rows: NDArray[np.int64]) -> Arrays:
        """Images, keys and labels as they lie in their shards; what was asked for last is at hand."""
        return self._last.at(rows)

    def close(self) -> None:
        """Ends the reader's threads, if there are any."""
        if "_last" in self.__dict__:
            self._last.reader.close()

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def _last(self) -> _Last:
        return _Last(Reader(self.root, self.manifest))

    @cached_property
    def _codec(self) -> Autoencoder:
        codec = self.encoding.load(_device(self.device))
        if codec.sha256 != self.sha256:
            raise UserError(
                f"the weights of {codec.name} changed while they were used: start again"
            )
        return codec

    def _encode(self, stored: NDArray[np.generic], rows: NDArray[np.int64]) -> NDArray[np.generic]:
        top = Normaliser.of(self.manifest.header).top
        levels = (torch.from_numpy(stored).float() * (TOP / top)).round().to(torch.uint8)
        forms = [levels, levels.flip(-1)] if self.encoding.flips else [levels]
        made = [self._latents(form, rows + k * self.manifest.count) for k, form in enumerate(forms)]
        values = (torch.stack(made, 1) if self.encoding.flips else made[0]).float().cpu().numpy()
        self._check(values, rows)
        return values.astype(self.dtype)

    def _latents(self, levels: Tensor, places: NDArray[np.int64]) -> Tensor:
        """What is stored of images (B, C, H, W); `places` (B,) key the noise, another for each mirror image."""
        codec = self._codec
        moments = codec.encode(levels)
        if self.encoding.content == "moments":
            return moments
        if self.encoding.content == "mean":
            return posterior_mean(moments)
        return sample_posterior(
            moments, self.encoding.seed, torch.from_numpy(places).to(codec.device)
        )

    def _check(self, values: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
        most = np.abs(values).reshape(len(values), -1).max(axis=1)  # NaN where one is
        bad = np.flatnonzero(~(most <= np.finfo(self.dtype).max))
        if not bad.size:
            return
        key, value = self.keys[rows[bad[0]]].decode(), most[bad[0]]
        limit = f"reach {value:.3g}, and {self.dtype} holds {np.finfo(self.dtype).max:g} at most: take --dtype float32"
        wrong = f"are not finite: the weights of {self.encoding.encoder} do not suit these images"
        raise UserError(f"latents of {key!r} {limit if np.isfinite(value) else wrong}")


class _Last:
    """Samples by their rows, those of the last call kept: a block's images, keys and labels are one read."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._rows, self._found = np.empty(0, dtype=np.int64), Arrays()

    def at(self, rows: NDArray[np.int64]) -> Arrays:
        if not np.array_equal(rows, self._rows):
            self._rows, self._found = rows, self.reader.gather(rows)
        return self._found


@dataclass(frozen=True)
class _Column:
    """Keys or labels of the images, read where they are asked for."""

    source: EncodedSource
    name: str
    dtype: np.dtype

    def __len__(self) -> int:
        return self.source.manifest.count

    def __getitem__(self, rows: Any) -> Any:
        found = self.source.stored(np.atleast_1d(rows))[self.name]
        values = np.char.encode(found.astype(str), "utf-8") if self.name == "key" else found
        return values.astype(self.dtype).reshape(np.shape(rows))[()]


def _check_images(root: str, manifest: manifests.Manifest) -> None:
    header, stored = Header.of(manifest.header), manifest.fields[manifest.column("x")]
    if header.kind != "image":
        raise UserError(
            f"{root} holds latents of {header.encoder} already: name the data set of their images"
        )
    if header.flips:
        raise UserError(
            f"{root} holds both mirror images of each image: name one that holds images once; flips encodes both"
        )
    if np.dtype(stored.dtype) != np.uint8:
        raise UserError(
            f"{root} holds images of {np.dtype(stored.dtype).name}: encoders take levels of brightness, uint8"
        )
    _ = Normaliser.of(header).top  # raises where nobody knows the levels


@contextmanager
def _repeatable() -> Iterator[None]:
    """The same bits whoever computes them: one thread on a CPU, and of cuDNN neither TF32, which keeps fewer bits than
    float16 stores, nor what adds up in any order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def _device(name: str) -> torch.device:
    """
    Raises:
        UserError: no such device here.
    """
    count = gpus(name)
    if count:
        # processes that one parent started are named in turn, and take GPUs so
        last = multiprocessing.current_process().name.rpartition("-")[2].rpartition(":")[2]
        return torch.device("cuda", (int(last) if last.isdigit() else 0) % count)
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        raise UserError(
            f"device={name!r} is not here: give auto, cpu, cuda, or cuda:N below {torch.cuda.device_count()}"
        ) from None
    return device


def gpus(device: str) -> int:
    """How many GPUs there are to choose from."""
    return torch.cuda.device_count() if device in ("auto", "cuda") else 0
