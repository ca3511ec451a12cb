"""Make an average of any length, after training, from the power-function averages that a run stored (EDM2).

A run that keeps two, train.ema_width=[0.05,0.1], stores both in every snapshot and checkpoint. Their weighted sum that
is nearest to the power function of relative width --std is written, with what is left between the two profiles as
`error`: more snapshots make it smaller (Karras et al. 2024, arXiv 2312.02696, algorithm 3).

--out FILE.safetensors gets the weights alone. Any other --out becomes a snapshot's folder, which tools.sample,
tools.score and selfguide.load take as they take any other. Of several widths the first is the model, and each other one
a weak model that guidance leads it away from (autoguidance, Karras et al. 2024, arXiv 2406.02507).

examples:
  python -m tools.checkpoint ema runs/in1k_dit/3f2a --std 0.07 --out ema-0.07
  python -m tools.checkpoint ema 3f2a --std 0.07 0.2 --out two
  python -m tools.sample two --weak average-power-0.2 --g 2
  python -m tools.checkpoint ema 3f2a --std 0.15 --images 512000 --out ema-0.15.safetensors
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from selfguide.snapshot import CONFIG
from selfguide.spec.averages import WIDEST, AverageSpec
from selfguide.spec.config import Config
from selfguide.spec.files import read_config, to_yaml
from selfguide.spec.find import find
from selfguide.spec.posthoc import Profile, Reconstruction, reconstruct
from selfguide.spec.run import RunFolder
from selfguide.spec.weak import CONDITION, weak_models
from selfguide.training.stored import Stored, deleted, open_checkpoint
from selfguide.weights import save_tensors
from shards import cli, storage
from shards.errors import DamagedError, UserError
from tools import flags
from tools.checkpoint.draft import drafted

# from here on what is left between the profiles is worth a word; EDM2's own reconstructions lie far below
_FAR = 0.05


@dataclass(frozen=True)
class Source:
    """A stored average: where it is, and the profile that it follows."""

    folder: Path
    spec: AverageSpec
    profile: Profile
    # of a checkpoint; None in a snapshot
    stored: Stored | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Its weights and buffers by name."""
        if self.stored is not None:
            return self.stored.weights(self.spec)
        try:
            with safe_open(self.folder / self.spec.file, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise deleted(self.folder, "snapshot") from error


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("of RUN", str, None, "id, name or folder of a run"),
        ("--std X+", float, flags.REQUIRED, f"relative widths, above 0 and at most {WIDEST:.4f}"),
        ("--images N", int, None, "at N images seen (default: the newest that is stored)"),
        ("--out PATH", flags.here, flags.REQUIRED, "a new folder, or a new .safetensors"),
        flags.RUNS,
        flags.JSON,
    )


@dataclass(frozen=True)
class Made:
    """An average that was made, and the stored ones with their weights in it."""

    std: float
    error: float
    used: tuple[tuple[Source, float], ...]
    tensors: Mapping[str, Tensor]

    @staticmethod
    def of(known: Sequence[Source], std: float) -> Made:
        newest = max(source.profile.images for source in known)
        found = reconstruct([source.profile for source in known], Profile(newest, std))
        used = tuple((source, w) for source, w in zip(known, found.weights, strict=True) if w)
        return Made(std, found.error, used, combine(known, found))

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        parts = [{"from": s.folder.name, "average": s.spec.key, "weight": w} for s, w in self.used]
        return {"std": self.std, "error": self.error, "sources": parts}


def run(options: argparse.Namespace) -> int:
    out = Path(options.out)
    alone = out.suffix == ".safetensors"
    widths = list(dict.fromkeys(options.std))
    _check(out, widths)
    found = find(options.of, Path(options.runs))
    known, since = sources(found, options.images)
    images = max(source.profile.images for source in known) + since
    if not alone:
        _check_snapshot(found, images)
    made = [Made.of(known, std) for std in widths]
    with drafted(out) as draft:
        if alone:
            about = {"format": "pt", "images": str(images), "std": str(widths[0])}
            save_tensors(draft, made[0].tensors, about)
        else:
            _write_snapshot(draft, found.snapshot(images), made)
    if options.json:
        every = [each.plain() for each in made]
        print(json.dumps({"out": str(out), "images": images, **every[0], "averages": every}))
        return 0
    for each in made:
        print(
            f"{out}: std {each.std:g} at {images:,} images, from {len(each.used)} stored averages"
        )
        print(f"its profile is {each.error:.2%} from that of the power function")
    if max(each.error for each in made) > _FAR:
        print(
            "that is far: widths between and above the stored ones are nearer, and so are runs with a lower "
            "train.snapshot_every"
        )
    return 0


def _check(out: Path, widths: Sequence[float]) -> None:
    """
    Raises:
        UserError: there is such a file, no such average, or no room for several.
    """
    if out.exists():
        raise UserError(f"--out {out}: it exists already; name another")
    for std in widths:
        if not 0 < std <= WIDEST:
            raise UserError(f"--std {std}: take more than 0, at most {WIDEST:.4f}")
    if out.suffix == ".safetensors" and len(widths) > 1:
        listed = " ".join(f"{std:g}" for std in widths)
        raise UserError(
            f"--std {listed}: a .safetensors holds one average; give a folder, --out {out.with_suffix('')}"
        )


def sources(run: RunFolder, images: int | None) -> tuple[Sequence[Source], int]:
    """The power-function averages stored at up to `images` (None: the newest) and when their history began.

    Raises:
        UserError: there is none, or none at exactly `images`.
    """
    found: dict[int, list[Source]] = {}
    begun: dict[int, int] = {}
    snapshots = run.published()
    for each in cli.track(snapshots, len(snapshots), "snapshots"):
        if images is not None and each > images:
            # no part of the sum, and a run that trains on may delete it before it is read
            continue
        folder = run.snapshot(each)
        manifest = storage.read_complete(folder, verify="hashes")
        if manifest is None:
            if storage.read_manifest(folder) is None:
                # by retention, since it was listed
                continue
            raise DamagedError(f"{folder} is damaged; move it away to go on without it")
        keys = (_key(part["name"]) for part in manifest["files"])
        specs = [AverageSpec.of(key) for key in keys if key is not None]
        begun[each] = _since(manifest, folder)
        found[each] = [
            Source(folder, spec, Profile(each - begun[each], spec.width))
            for spec in specs
            if spec.width is not None
        ]
    for each in sorted({*run.saved()} - found.keys()):
        if images is not None and each > images:
            continue
        stored = open_checkpoint(run.checkpoint(each))
        begun[each] = stored.manifest["ema_since"]
        found[each] = [
            Source(stored.folder, spec, Profile(each - begun[each], spec.width), stored)
            for spec in stored.averages
            if spec.width is not None
        ]
    times = sorted(each for each, held in found.items() if held and each > begun[each])
    if not times and images is None:
        raise UserError(
            f"run {run.root.name} has stored no power-function average: those come from "
            "train.ema_width=[0.05,0.1], which a new run may be given"
        )
    last = times[-1] if images is None else images
    if last not in times:
        later = (each for each in {*snapshots, *run.saved()} if each > last)
        stored_at = ", ".join(map(str, sorted({*times, *later})))
        raise UserError(f"--images {last}: averages are stored at {stored_at}")
    # a new history, as at the switch of online guidance, has nothing to do with the one before
    since = begun[last]
    used = [
        source for each in times if each <= last and begun[each] == since for source in found[each]
    ]
    return used, since


def combine(known: Sequence[Source], made: Reconstruction) -> dict[str, Tensor]:
    """The weighted sum, added in fp64 and returned in fp32; buffers are those of the newest source."""
    total: dict[str, Tensor] = {}
    newest = max(source.profile.images for source in known)
    exact: dict[str, Tensor] = {}
    pairs = [(source, w) for source, w in zip(known, made.weights, strict=True) if w]
    names = None
    for source, weight in cli.track(pairs, len(pairs), "averages"):
        tensors = source.tensors()
        names = names or _trained(source, tensors)
        for name in names:
            part = tensors[name].double() * weight
            total[name] = total[name].add_(part) if name in total else part
        if source.profile.images == newest:
            exact = {name: tensors[name] for name in tensors.keys() - names}
    return {name: tensor.float() for name, tensor in total.items()} | exact


def _trained(source: Source, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of what was averaged; the others are buffers."""
    if source.stored is not None:
        return set(source.stored.layout.names)
    from selfguide.networks.student import build_student

    config = read_config(source.folder / CONFIG)
    return {n for n, p in build_student(config, config.seed).named_parameters() if p.requires_grad}


def _key(file: str) -> str | None:
    """The key of the average in a snapshot's file."""
    if not (file.startswith("ema-") and file.endswith(".safetensors")):
        return None
    return file.removeprefix("ema-").removesuffix(".safetensors")


def _since(manifest: Mapping[str, Any], folder: Path) -> int:
    """Images at which the averages of a snapshot began; earlier ones do not say, and their configs do."""
    if "ema_since" in manifest:
        return int(manifest["ema_since"])
    config = read_config(folder / CONFIG)
    if not config.guidance.learns_online:
        return 0
    switch = config.guidance.switch_images(config.train)
    return switch if manifest["images"] >= switch else 0


def _check_snapshot(run: RunFolder, images: int) -> None:
    """
    Raises:
        UserError: there is no snapshot at `images` whose folder could be made anew around other weights.
    """
    if images not in run.published():
        raise UserError(
            f"at {images} images there is a checkpoint and no snapshot: give --out FILE.safetensors, or --images of "
            f"a snapshot: {', '.join(map(str, run.published())) or 'there is none'}"
        )
    if read_config(run.snapshot(images) / CONFIG).guidance.average is not None:
        raise UserError(
            "this run's guidance has an average of its own: give --out FILE.safetensors"
        )


def _write_snapshot(out: Path, of: Path, made: Sequence[Made]) -> None:
    """Writes a snapshot like that in `of` with these as its only averages, the first one its main, to a new folder."""
    manifest = storage.read_manifest(of)
    if manifest is None:
        raise deleted(of, "snapshot")
    config: Config = read_config(of / CONFIG)
    widths = tuple(each.std for each in made)
    # others than its own can neither be scored nor be led away from, nor can a snapshot that lies elsewhere
    weak = weak_models(config.sampler.weak)
    kept = {each.average for each in weak} - {AverageSpec(width=width) for width in widths}
    elsewhere = any(each.kind == "snapshot" for each in weak)
    plain = {} if kept <= {None} and not elsewhere else {"g": 1.0, "weak": CONDITION}
    config = replace(
        config,
        train=replace(config.train, ema_halflife=(), ema_width=widths),
        evaluation=replace(config.evaluation, average=0),
        sampler=replace(config.sampler, **plain),  # type: ignore[arg-type]
    )
    out.mkdir()
    for each in made:
        save_tensors(out / AverageSpec(width=each.std).file, each.tensors)
    (out / CONFIG).write_text(to_yaml(config))
    about = {key: value for key, value in manifest.items() if key != "files"}
    first, *others = ({"std": each.std, "error": each.error} for each in made)
    about["reconstructed"] = {**first, **({"others": others} if others else {})}
    storage.publish_folder(out, extra=about)
