"""Some samples encoded again from their images: whether stored latents are those of these images and weights.

Hashes say that bytes are what was written; this says that what was written is right. Another grouping of images or
other hardware rounds otherwise, so latents are compared by their distance, in standard deviations of their channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfguide.data.autoencoders.encoding import EncodedSource, Encoding
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.read.reader import Reader

Rows = NDArray[np.int64]
Watch = Callable[[Iterable[Rows], int], Iterable[Rows]]  # sees batches go by, and their number

WELL = 0.02  # TF32 in place of float32 gives a tenth of it, another image about 1.4


@dataclass(frozen=True, kw_only=True)
class Reencoded:
    """How far stored latents are from those encoded again: root mean squares, in standard deviations."""

    samples: int
    mean: float
    worst: float
    worst_key: str

    @property
    def well(self) -> bool:
        return self.worst <= WELL


def reencode(
    root: str,
    source: str,
    samples: int,
    *,
    seed: int = 0,
    weights: str | None = None,
    statistics: str | None = None,
    device: str = "auto",
    watch: Watch = lambda parts, total: parts,
) -> Reencoded:
    """Encodes `samples` of the latents at `root` again, drawn by `seed`, from the images at `source`.

    Raises:
        UserError: latents that do not say how they were encoded, or other images or weights than they name.
    """
    if samples < 1:
        raise UserError(f"reencode={samples}: give at least 1 sample")
    manifest = manifests.load(root)
    made = EncodedSource.of(source, _encoding(root, manifest, weights, statistics), device)
    _belongs(root, manifest, made)
    drawn = np.random.default_rng(seed).permutation(manifest.count)[:samples]
    ordinals = np.sort(drawn.astype(np.int64))
    with closing(Reader(root, manifest)) as reader, closing(made):
        found = reader.gather(ordinals)
        batch = made.encoding.batch
        parts = [ordinals[i : i + batch] for i in range(0, len(ordinals), batch)]
        pairs = [(made.images(part), made.keys[part]) for part in watch(parts, len(parts))]
    again, keys = map(np.concatenate, zip(*pairs, strict=True))
    far = _distances(manifest, found["x"], again)
    far[found["key"] != np.char.decode(keys, "utf-8")] = np.inf
    worst = int(far.argmax())
    return Reencoded(
        samples=len(ordinals),
        mean=float(far.mean()),
        worst=float(far[worst]),
        worst_key=str(found["key"][worst]),
    )


def _distances(manifest: manifests.Manifest, x: np.ndarray, again: np.ndarray) -> np.ndarray:
    """(n,) of stored latents (n, ..., C, H, W), NaN counted as far."""
    std = np.maximum(np.array(manifest.channel_std), 1e-12)[:, None, None]
    apart = (x.astype(np.float64) - again.astype(np.float64)) / std
    far = np.sqrt(np.square(apart).reshape(len(x), -1).mean(axis=1))
    return np.where(np.isfinite(far), far, np.inf)


def _encoding(
    root: str, manifest: manifests.Manifest, weights: str | None, statistics: str | None
) -> Encoding:
    settings = manifest.source.get("encoding")
    if not isinstance(settings, dict):
        raise UserError(
            f"{root} does not say how it was encoded: `tools.shards encode` did not write it, so nothing can repeat it"
        )
    plain = {
        ("seed" if name == "posterior_seed" else name): value for name, value in settings.items()
    }
    return Encoding(**plain, weights=weights, statistics=statistics)


def _belongs(root: str, manifest: manifests.Manifest, made: EncodedSource) -> None:
    images, weights = manifest.source["images"], manifest.header["encoder_sha256"]
    for what, promised, given in (
        ("of images with manifest", images["manifest"], made.manifest.hash),
        (f"by weights of {made.encoding.encoder} with sha256", weights, made.sha256),
    ):
        if promised != given:
            raise UserError(
                f"{root} was encoded {what} {str(promised)[:12]}, and these have {str(given)[:12]}: give those"
            )
