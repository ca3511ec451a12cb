"""A trained model as Python code uses it: tensors in, tensors out, and pictures on request. `selfguide.load` makes it.

Samples equal those of `python -m tools.sample`, bit for bit, for the same seed, device and batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from selfguide import snapshot as snapshots
from selfguide.data.autoencoders import Autoencoder, from_images, load_autoencoder, to_images
from selfguide.diffusion.conditions import Condition
from selfguide.discovery.features import SnapshotFeatures
from selfguide.models.backbone import pool
from selfguide.sampling import queries, weak
from selfguide.sampling.condition_sampler import Prior, condition_sampler
from selfguide.sampling.generate import generate_each
from selfguide.sampling.group_names import Naming, naming_of, without_banned
from selfguide.snapshot import Snapshot
from selfguide.spec.config import SamplerConfig, build
from selfguide.spec.config.laws import as_typed
from selfguide.spec.config.sampler import check_sampler, settings_read
from selfguide.spec.find import find_snapshot
from selfguide.spec.weak import CONDITION, weak_models
from shards.errors import UserError
from shards.format.classes import NUMBER
from shards.format.header import Header

Asked = int | str | Sequence[int | str]


def load(
    run: str | os.PathLike[str],
    *,
    images: int | None = None,
    average: int = 0,
    runs: str | os.PathLike[str] = "runs",
    device: str | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
) -> TrainedModel:
    """See `selfguide.load`."""
    folder = find_snapshot(os.fspath(run), Path(runs), images, average, prefix="")
    try:
        snapshot = snapshots.load(folder, average)
    except FileNotFoundError as error:
        raise UserError(
            f"{error}: it was not published to its end, or was damaged since"
        ) from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        snapshot.student.to(device)
    # torch's, of a device that is unknown or not there, or has no room
    except RuntimeError as error:
        raise UserError(
            f"device={device}: {error}; give cpu, or cuda where there is a GPU"
        ) from error
    model = TrainedModel(snapshot, naming_of(folder, snapshot), autoencoder)
    if autoencoder is not None and model.header.kind == "image":
        raise UserError(
            f"autoencoder={autoencoder}: this model was trained on images: leave it out"
        )
    return model


class TrainedModel:
    """A published snapshot with the names of its groups and labels, and the autoencoder of its latents.

    Model space is what the network sees: fp32 (N, C, H, W), images in [-1, 1] or normalised latents. Images are uint8
    (N, 1 or 3, H, W) of levels 0..255.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        naming: Naming | None = None,
        autoencoder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.snapshot = snapshot
        self.naming = naming or Naming(groups=0)
        self._weights = autoencoder

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample in model space."""
        net = self.snapshot.student.backbone.net
        return net.channels, net.size, net.size

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels that the data have, by number."""
        return self.snapshot.class_names

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that `features` reads."""
        return tuple(layer.name for layer in self.snapshot.student.backbone.net.layers)

    @torch.no_grad()
    def sample(
        self,
        count: int = 16,
        *,
        label: Asked | None = None,
        group: Asked | None = None,
        row: int | Sequence[int] | None = None,
        unconditional: bool = False,
        prior: Prior = "empirical",
        seed: int = 0,
        batch: int = 64,
        **settings: Any,
    ) -> Tensor:
        """Samples in model space (count, C, H, W), on the CPU; image i is a function of seed + i.

        Args:
            label, group, row: what they are conditioned on: human labels or groups, by number or name, or the
                conditions of training images. Of several, as many images of each, or one more of the first of them,
                in their order. By default groups, or labels, are drawn by `prior`.
            unconditional: without a condition.
            batch: images at a time.
            settings: fields of `selfguide.spec.config.SamplerConfig`, such as `g`, `steps`, `name` or `interval`, in
                place of the run's own.

        Raises:
            UserError: an unknown label, group or setting, or one that this snapshot has no use for.
        """
        count, batch, seed = (_plain(each) for each in (count, batch, seed))
        if not all(isinstance(each, int) and each >= 1 for each in (count, batch)):
            raise UserError(f"count={count} and batch={batch} must be whole and 1 or more")
        if not isinstance(seed, int) or not -(2**63) <= seed <= 2**63 - count:
            raise UserError(f"seed={seed}: take a whole number of 64 bits, for {count} images")
        if prior not in get_args(Prior):
            raise UserError(f"prior={prior!r}: take one of {', '.join(get_args(Prior))}")
        sampler = changed_sampler(self.snapshot, {n: _plain(each) for n, each in settings.items()})
        seeds = seed + torch.arange(count)
        condition = self._condition(seeds, label, group, row, unconditional, prior)
        drawn = generate_each(self.snapshot, sampler, condition, seeds, batch=batch)
        return torch.cat([x for x, _ in drawn])

    def _condition(
        self,
        seeds: Tensor,
        label: Asked | None,
        group: Asked | None,
        row: int | Sequence[int] | None,
        unconditional: bool,
        prior: Prior,
    ) -> Condition:
        snapshot, naming = self.snapshot, self.naming
        named = {"label": label, "group": group, "row": row, "unconditional": unconditional or None}
        given = [name for name, value in named.items() if value is not None]
        if len(given) > 1 or (given and prior != "empirical"):
            raise UserError(
                f"{' and '.join(given)} with prior={prior!r}: give one of label, group, row, unconditional and prior"
            )
        if unconditional:
            return queries.without_condition(snapshot, len(seeds))
        if row is not None:
            ordinals = _listed("row", row, len(seeds))
            if not all(type(each) is int for each in ordinals):
                raise UserError(f"row={row!r}: give numbers of training images")
            return queries.rows(snapshot, _each(torch.tensor(ordinals), len(seeds)))
        if label is not None:
            asked = _listed("label", label, len(seeds))
            ids = queries.labels(snapshot, [_text(each) for each in asked])
        elif group is not None:
            asked = _listed("group", group, len(seeds))
            ids = torch.tensor([naming.number(str(each)) for each in asked])
        else:
            return condition_sampler(without_banned(snapshot, naming), prior)(seeds)
        naming.refuse_banned(ids.tolist())
        return queries.of_groups(snapshot, _each(ids, len(seeds)))

    @torch.no_grad()
    def features(
        self,
        x: Tensor,
        layer: int | str | None = None,
        noise_time: float = 0.2,
        *,
        pooling: str | None = None,
        seed: int = 0,
    ) -> Tensor:
        """What a layer sees in samples or images, noised to one noise-time, without a condition.

        Args:
            x: (B, C, H, W) in model space; of uint8, images, which are encoded first. The noise of x[i] is a function
                of (seed, i).
            layer: its number from 1, or one of `layers`; the middle one by default.
            noise_time: 0 is data, 1 is noise; by default where SGFM (Hu et al. 2023, arXiv 2312.08825) reads.
            pooling: cls, mean, flat or attention.

        Returns:
            fp32 on the CPU: tokens (B, T, D), those that are no patch first; with `pooling` one vector each, (B, F).

        Raises:
            UserError: an unknown layer or pooling, or images of another shape than the model's.
        """
        net = SnapshotFeatures(
            self.snapshot,
            self.header,
            layer=_plain(layer),
            noise_time=_plain(noise_time),
            pooling=pooling,
            seed=seed,
        )
        x0 = self._samples(x) if torch.is_tensor(x) and x.is_floating_point() else self.encode(x)
        tokens = net.tokens(x0, torch.arange(len(x0)))
        if pooling is not None:
            tokens = pool(tokens, net.pooling, net.layer.extras, cls=net.cls)
        return tokens.float().cpu()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images, uint8 (N, 1 or 3, H, W), as the network sees them, fp32 (N, C, H, W).

        Raises:
            UserError: what is no such tensor, or images of another size or number of channels than the model's.
        """
        if not torch.is_tensor(images) or images.dtype != torch.uint8 or images.ndim != 4:
            raise UserError(f"images are {_kind(images)}: give a tensor, uint8 (N, 1 or 3, H, W)")
        found = from_images(self.header, images, self.autoencoder)
        return self._samples(found, f"images {tuple(images.shape[1:])} become")

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Samples in model space (N, C, H, W) as images, uint8 (N, 1 or 3, H, W) on the CPU.

        Raises:
            UserError: what is no such tensor, of another shape than the model's, or not finite.
        """
        if not torch.isfinite(self._samples(x)).all():
            raise UserError("samples that are not finite are no images: this model has diverged")
        return to_images(self.header, x, self.autoencoder)

    def images(self, x: Tensor) -> list[Image.Image]:
        """One picture for each sample in model space; uint8 are images already.

        Raises:
            UserError: neither of them.
        """
        images = torch.is_tensor(x) and x.dtype == torch.uint8 and x.ndim == 4
        return [*_pictures(x.cpu() if images else self.decode(x))]

    def _samples(self, x: Tensor, what: str = "samples are") -> Tensor:
        """`x`, which is floats (N, C, H, W) of the model's shape.

        Raises:
            UserError: it is something else.
        """
        if not torch.is_tensor(x) or not x.is_floating_point() or x.shape[1:] != self.shape:
            raise UserError(
                f"{what} {_kind(x)}: this model's are a tensor of floats (N, {', '.join(map(str, self.shape))})"
            )
        if not len(x):
            raise UserError(f"{what} {_kind(x)}: give one or more")
        return x

    @property
    def header(self) -> Header:
        """Of the data that it was trained on: what stored values mean."""
        return Header.of(self.snapshot.data["header"])

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """What made the latents that it was trained on; None for images.

        Raises:
            UserError: its weights are not found, or are others.
        """
        header = self.header
        if header.kind == "image":
            return None
        weights = None if self._weights is None else os.fspath(self._weights)
        return load_autoencoder(str(header.encoder), weights, device=self.snapshot.device)


def changed_sampler(snapshot: Snapshot, changes: Mapping[str, Any]) -> SamplerConfig:
    """The run's own sampler with `changes` of its fields.

    Raises:
        UserError: an unknown field, a value out of range, or a weight where nothing can be guided.
    """
    own = asdict(snapshot.config.sampler)
    if changes.get("name", own["name"]) != own["name"]:
        # what only the old sampler read goes with it
        kept = own.keys() - settings_read(snapshot.config.sampler).keys()
        own = {name: own[name] for name in kept}
    sampler = build(SamplerConfig, own | dict(changes), "sampler")
    check_sampler(sampler, snapshot.config.path)
    for name in ("weak", "interval", "guided_channels"):
        if name in changes and "g" not in changes and sampler.g == 1:
            raise UserError(
                f"sampler.{name}={as_typed(changes[name])} says how to guide, and this snapshot's own sampler.g=1 is "
                "no guidance; give sampler.g=1.5 as well, or leave it out"
            )
    if "steps" in changes and sampler.name == "dopri5":
        raise UserError(
            f"sampler.steps={sampler.steps} is a number that dopri5 chooses itself, by sampler.rtol and sampler.atol; "
            "leave it out, or change the sampler"
        )
    by_condition = any(each.kind == CONDITION for each in weak_models(sampler.weak))
    if "g" in changes and sampler.g != 1 and by_condition and not snapshot.conditioned:
        raise UserError(
            f"sampler.g={sampler.g:g}: this snapshot is unconditional, so no condition can be dropped; drop it, or "
            "give sampler.weak another model"
        )
    if sampler.g != 1:
        weak.check(snapshot, sampler)
    return sampler


def _kind(x: Any) -> str:
    """What was given in place of a tensor that is wanted, or its type and shape."""
    if not torch.is_tensor(x):
        return f"a {type(x).__name__}"
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"


def _plain(value: Any) -> Any:
    """A number of NumPy's or a tensor's as Python's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _listed(name: str, asked: Any, count: int) -> list[Any]:
    """One or several, as a list of Python's own values.

    Raises:
        UserError: none, or more than there are images to show them.
    """
    one = (
        isinstance(asked, str) or not isinstance(asked, Iterable) or getattr(asked, "ndim", 1) == 0
    )
    found = [_plain(each) for each in ([asked] if one else asked)]
    if not 0 < len(found) <= count:
        raise UserError(f"{name} names {len(found)}, and count={count}: name 1 to {count}")
    return found


def _text(label: int | str) -> str:
    """A label as a command line has it; a number is never a name."""
    return label if isinstance(label, str) else f"{NUMBER}{label}"


def _each(ids: Tensor, count: int) -> Tensor:
    """(count,): as many of each of `ids`, in their order; where they do not divide, one more of the first of them."""
    numbers = torch.arange(len(ids))
    return ids.repeat_interleave(count // len(ids) + (numbers < count % len(ids)).long())


def _pictures(images: Tensor) -> Iterator[Image.Image]:
    for image in images:
        plain = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        yield Image.fromarray(plain.numpy())
