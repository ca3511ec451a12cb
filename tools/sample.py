"""`python -m tools.sample`: images from a published snapshot.

By default conditioned on groups at their frequency in training, or on rows of training images where the model takes
layouts or features; or on given groups or labels, on the condition of a training image, on the group of a query image,
or on an interpolation of two groups. Writes a grid and single lossless PNGs, and with --chain the intermediate states
from noise to image. Names and bans in the run's groups.yaml are honoured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from launcher.folder import find
from selfguide.data.autoencoders import Autoencoder, from_images, load_autoencoder, to_images
from selfguide.diffusion.conditions import Condition
from selfguide.evaluation.grid import write_grid
from selfguide.sampling import queries
from selfguide.sampling.condition_sampler import Prior, TrainingImages, by_patch
from selfguide.sampling.generate import generate_each, sample_condition
from selfguide.sampling.group_names import Naming, read_naming, without_banned
from selfguide.sampling.groups import patch_layout
from selfguide.snapshot import Snapshot, load
from selfguide.spec.averages import averages_of
from selfguide.spec.config import SamplerConfig, build
from selfguide.spec.config.sampler import check_sampler, settings_read
from selfguide.spec.conventions import noise_shift, noise_time, total_weight
from selfguide.spec.files import read_config
from selfguide.training.engine.protocol import DTYPES
from shards import cli
from shards.errors import UserError, refuse_if
from tools import flags

EPILOG = """examples:
  python -m tools.sample RUN                              64 images, groups at their frequency
  python -m tools.sample RUN --group 3 7 --g 2            rows of two groups, guidance weight 2
  python -m tools.sample RUN --g 0.4 --convention sgfm    the same weight as its paper writes it
  python -m tools.sample RUN --prior uniform              every group as often as any other
  python -m tools.sample RUN --row 17 42                  the conditions of these two training images
  python -m tools.sample RUN --group zeros                a group by its name in the run's groups.yaml
  python -m tools.sample RUN --like photo.png             the group nearest to an image
  python -m tools.sample RUN --between 3 7 --count 8      interpolates two prototypes, one noise
  python -m tools.sample RUN --chain --count 6            six images, noise to data
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    flags.check_least(options, 1, "count", "columns", "batch")
    folder = snapshot_folder(options)
    snapshot = load_snapshot(options)
    naming = naming_of(folder, snapshot)
    snapshot.student.to(options.device, DTYPES[options.dtype])
    sampler = sampler_of(snapshot, options)
    refuse_if(
        options.chain and sampler.name == "dopri5",
        "--chain with dopri5: it takes steps of its own; give --sampler euler or heun",
    )
    codec = autoencoder_of(snapshot, options)
    condition = condition_of(snapshot, naming, codec, options)
    seeds = options.seed + torch.arange(len(condition))
    if options.between:
        seeds = seeds[:1].expand(len(condition))  # one noise, so that only the condition changes
    chain = Chain(sampler.steps, options.columns) if options.chain else None
    drawn = generate_each(
        snapshot,
        sampler,
        condition,
        seeds,
        batch=options.batch,
        callback=chain.see if chain else None,
    )
    total = -(-len(condition) // options.batch)
    made = list(cli.track(drawn, total, f"sampling {len(condition)} images"))
    images = to_images(snapshot.data["header"], torch.cat([x for x, _ in made]), codec)
    out = Path(options.out)
    rows = options.group or options.label or options.row or options.like or []
    columns = options.columns if len(rows) < 2 else len(condition) // len(rows)
    columns = len(condition) if options.between else columns
    if chain is not None:
        states = chain.states()  # (N, columns, C, H, W)
        sheet = to_images(snapshot.data["header"], states.flatten(0, 1), codec)
        write_grid(out / "grid.png", sheet, columns=states.shape[1], zoom=zoom(sheet))
    else:
        write_grid(out / "grid.png", images, columns=columns, zoom=zoom(images))
    write_images(out / "images", images)
    said = {
        "grid": str(out / "grid.png"),
        "images": str(out / "images"),
        "count": len(images),
        "snapshot_images": snapshot.images,
        "snapshot_sha256": snapshot.sha256,
        "sampler": asdict(sampler),
        "nfe": max(evaluations for _, evaluations in made),
        "seed": options.seed,
        "banned": sorted(naming.banned),
    }
    (out / "sample.json").write_text(json.dumps(said, indent=1))
    if options.json:
        print(json.dumps(said))
    else:
        print(
            f"{len(images)} images from {snapshot.images:,} images seen, {sampler.name}, "
            f"{said['nfe']} evaluations, g={sampler.g:g}{_bans(naming)}\n{out / 'grid.png'}"
        )
    return 0


def naming_of(folder: Path, snapshot: Snapshot) -> Naming:
    """What the groups of this snapshot are called: `groups.yaml` lies in its run's folder."""
    p = snapshot.guidance["p"]
    if p is None:
        return Naming(groups=0)
    return read_naming(folder.resolve().parent.parent, len(p))


def _bans(naming: Naming) -> str:
    return (
        f", without banned groups {', '.join(map(str, sorted(naming.banned)))}"
        if naming.banned
        else ""
    )


def snapshot_folder(options: argparse.Namespace) -> Path:
    """The snapshot named on the command line: a run's newest, one of its image counts, or a folder."""
    folder = Path(options.run)
    if (folder / "MANIFEST.json").is_file():
        refuse_if(
            options.images is not None,
            f"--images {options.images}: {folder} is one snapshot already; drop it",
        )
    else:
        run = find(options.run, Path(options.runs))
        published = run.published()
        refuse_if(not published, f"run {run.root.name} has published no snapshot yet")
        images = published[-1] if options.images is None else options.images
        if images not in published:
            known = ", ".join(f"{n}" for n in published)
            raise UserError(f"--images {images}: this run has snapshots at {known}")
        folder = run.snapshot(images)
    return folder


def load_snapshot(options: argparse.Namespace) -> Snapshot:
    """That snapshot, with the average that was asked for."""
    folder = snapshot_folder(options)
    averages = averages_of(read_config(folder / "config.yaml").train)
    if not 0 <= options.ema < len(averages):
        kept = ", ".join(f"{i}: {average}" for i, average in enumerate(averages))
        raise UserError(f"--ema {options.ema} is not one of this snapshot's averages ({kept})")
    try:
        return load(folder, options.ema)
    except FileNotFoundError as error:
        raise UserError(
            f"{error}: it was not published to its end, or was damaged since"
        ) from error


def sampler_of(snapshot: Snapshot, options: argparse.Namespace) -> SamplerConfig:
    """The run's own sampler with what the command line changes of it."""
    asked = {name: getattr(options, f"sampler_{name}") for name in SAMPLER_HELP}
    changes = {name: value for name, value in asked.items() if value is not None}
    own = asdict(snapshot.config.sampler)
    if (
        changes.get("name", own["name"]) != own["name"]
    ):  # what only the old sampler read goes with it
        own = {
            name: own[name] for name in own.keys() - settings_read(snapshot.config.sampler).keys()
        }
    if options.convention:
        changes |= converted(options.convention, changes)
    sampler = build(SamplerConfig, own | changes, "sampler")
    check_sampler(sampler, snapshot.config.path)
    refuse_if(
        "g" in changes and sampler.g != 1 and not snapshot.guidance["told"],
        f"--g {sampler.g:g}: this snapshot is unconditional, so there is nothing to guide; drop it",
    )
    return sampler


def converted(source: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The weight, interval and shift among `changes` from a paper's numbers to ours."""
    ours: dict[str, Any] = {}
    if "g" in changes:
        ours["g"] = total_weight(source, changes["g"])
    if "interval" in changes:
        ours["interval"] = tuple(sorted(noise_time(source, end) for end in changes["interval"]))
    if "shift" in changes:
        ours["shift"] = noise_shift(source, changes["shift"])
    refuse_if(
        not ours, f"--convention {source} has nothing to convert: give --g, --interval or --shift"
    )
    return ours


def autoencoder_of(snapshot: Snapshot, options: argparse.Namespace) -> Autoencoder | None:
    """The autoencoder of this snapshot's latents; None for images."""
    header = snapshot.data["header"]
    if header["kind"] == "image":
        return None
    return load_autoencoder(
        options.autoencoder or header["encoder"], options.weights, device=options.device
    )


def condition_of(
    snapshot: Snapshot, naming: Naming, codec: Autoencoder | None, options: argparse.Namespace
) -> Condition:
    """The condition that the command line asks for, one an image."""
    named = [f"--{name}" for name in NAMED if getattr(options, name)]
    if options.prior and named:
        raise UserError(
            f"--prior {options.prior} sets how groups are sampled, and {named[0]} names the condition; drop one of them"
        )
    if options.row is not None:
        each = -(-options.count // len(options.row))
        return queries.rows(snapshot, torch.tensor(options.row).repeat_interleave(each))
    if options.between:
        first, second = (naming.number(text) for text in options.between)
        naming.refuse_banned((first, second))
        return queries.between(snapshot, first, second, options.count)
    if options.uncond:
        return queries.without_condition(snapshot, options.count)
    if options.label is not None:
        if snapshot.guidance["source"] != "labels":
            queries.groups(snapshot)  # it may know nothing at all
            raise UserError(
                "--label: this snapshot knows groups that it found itself; give --group"
            )
        ids = torch.tensor(options.label)
    elif options.group is not None:
        ids = torch.tensor([naming.number(text) for text in options.group])
    elif options.like:
        images = query_images(snapshot, codec, options.like)
        if by_patch(snapshot) and snapshot.guidance["told"]:
            each = -(-options.count // len(images))
            return patch_layout(snapshot, images.repeat_interleave(each, 0))
        ids = queries.nearest_groups(snapshot, images)
        for text, group in zip(options.like, ids.tolist(), strict=True):
            cli.console(stderr=True).print(f"{text} is nearest to group {naming.called(group)}")
    else:
        seeds = options.seed + torch.arange(options.count)
        allowed = without_banned(snapshot, naming)
        return sample_condition(allowed, seeds, options.prior or "empirical")
    naming.refuse_banned(ids.tolist())
    each = -(-options.count // len(ids))
    return queries.of_groups(snapshot, ids.repeat_interleave(each))


def query_images(snapshot: Snapshot, codec: Autoencoder | None, texts: list[str]) -> Tensor:
    """Query images in model space: files, or ordinals of the data the snapshot was trained on."""
    images = TrainingImages(snapshot) if any(text.isdigit() for text in texts) else None
    made = [
        images.x0(torch.tensor([int(text)]))
        if images and text.isdigit()
        else from_file(Path(text), snapshot, codec)
        for text in texts
    ]
    return torch.cat(made)


def from_file(path: Path, snapshot: Snapshot, codec: Autoencoder | None) -> Tensor:
    """(1, C, H, W) in model space from an image file, cropped to a square and resized."""
    refuse_if(
        not path.is_file(), f"--like {path}: no such file, and not the ordinal of a training image"
    )
    net, header = snapshot.student.backbone.net, snapshot.data["header"]
    factor = codec.factor if codec else 1
    channels = codec.image_channels if codec else net.channels
    picture = Image.open(path).convert("L" if channels == 1 else "RGB")
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    square = picture.crop((left, top, left + edge, top + edge))
    size = net.size * factor
    pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
    images = torch.from_numpy(pixels.copy()).view(1, size, size, channels).permute(0, 3, 1, 2)
    return from_images(header, images, codec)


class Chain:
    """The states after some of a sampler's steps, the last among them: about `columns`, evenly spread."""

    def __init__(self, steps: int, columns: int) -> None:
        self.wanted = set(np.linspace(steps - 1, 0, min(columns, steps)).round().astype(int))
        self.last = steps - 1
        self._batch: list[Tensor] = []
        self._batches: list[Tensor] = []

    def see(self, step: int, tau: float, state: Tensor) -> None:
        if step in self.wanted:
            self._batch.append(state.float())
        if step == self.last:
            self._batches.append(torch.stack(self._batch, dim=1))
            self._batch = []

    def states(self) -> Tensor:
        """(N, columns, C, H, W), the noisiest first."""
        return torch.cat(self._batches)


def zoom(images: Tensor) -> int:
    """Small images are shown larger: at least 64 screen pixels each."""
    return max(1, 64 // images.shape[-1])


def write_images(folder: Path, images: Tensor) -> None:
    """uint8 (N, C, H, W) as one lossless PNG each, named by its number; those of an earlier set go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]" * 6 + ".png"):
        old.unlink()
    for number, image in enumerate(images):
        plain = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(plain.numpy()).save(folder / f"{number:06d}.png")


NAMED = (
    "group",
    "label",
    "row",
    "like",
    "between",
    "uncond",
)  # conditions that are named, rather than sampled
SAMPLER_HELP = {
    "name": "euler, heun, ddim, dpm1, dpm2, dpmpp, euler_maruyama or dopri5",
    "steps": "number of steps, of a fixed-step sampler",
    "g": "total guidance weight: 1 is none, 0 unconditional",
    "interval": "noise-times in which the weight applies",
    "guided_channels": "guide only the first so many",
    "shift": "of the schedule; above 1 spends more steps at high noise",
    "rtol": "of dopri5",
    "atol": "of dopri5",
    "clip": "of ddim: clamp x0 estimates to +-X, in model space",
    "eta": "of ddim: 0 deterministic, 1 ancestral",
    "churn": "of heun: EDM's S_churn",
    "churn_sigma": "noise levels in which heun churns",
    "churn_noise": "EDM's S_noise",
    "diffusion": "of euler_maruyama: sit, repa or sbdm",
}
PAIRS = ("interval", "churn_sigma")
WHOLE = ("steps", "guided_channels")
WORDS = ("name", "diffusion")


def _parser() -> argparse.ArgumentParser:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = flags.command("tools.sample", __doc__, epilog=EPILOG)
    parser.add_argument(
        "run", metavar="RUN", help="id, name or folder of a run, or a snapshot's folder"
    )
    flags.add(
        parser,
        ("--images N", int, None, "the snapshot at N images seen (default: the newest)"),
        ("--ema I", int, 0, "index of the average, from 0 (0)"),
        ("--runs DIR", str, "runs", "folder of runs (runs)"),
    )
    flags.add(
        parser.add_argument_group("condition").add_mutually_exclusive_group(),
        ("--group K+", str, None, "these groups, as many images of each"),
        ("--label K+", int, None, "these human labels"),
        ("--row ORDINAL+", int, None, "the conditions of these training images"),
        ("--like IMAGE+", str, None, "the groups nearest to image files or ordinals"),
        ("--between A B", str, None, "interpolate from one group to another"),
        ("--uncond", bool, False, "unconditional"),
    )
    prior = "sample groups at their frequency in training, or uniformly (empirical)"
    chain = "show intermediate states of each image from noise to data"
    dtypes = "of the network; the sampler's state is fp32 (fp32)"
    flags.add(
        parser,
        ("--prior", get_args(Prior), None, prior),
        ("--count N", int, 64, "number of images (64)"),
        ("--chain", bool, False, chain),
        ("--columns N", int, 8, "columns of the grid (8)"),
        ("--seed", int, 0, "image i is a function of seed + i (0)"),
        ("--device", str, device, f"where the network runs ({device})"),
        ("--dtype", tuple(DTYPES), "fp32", dtypes),
        ("--batch N", int, 64, "batch size (64)"),
        ("--out DIR", str, "samples", "output folder (samples)"),
        flags.JSON,
    )
    flags.add(
        parser.add_argument_group("decoding latents"),
        ("--autoencoder NAME", str, None, "autoencoder (the one of the data)"),
        ("--weights PATH", str, None, "its weights"),
    )
    sampler = parser.add_argument_group("sampler (the run's own where not given)")
    for name, text in SAMPLER_HELP.items():
        flag = "--sampler" if name == "name" else f"--{name.replace('_', '-')}"
        kind: Any = str if name in WORDS else int if name in WHOLE else float
        extra: dict[str, Any] = {"nargs": 2, "metavar": ("LOW", "HIGH")} if name in PAIRS else {}
        if name not in PAIRS:
            extra["metavar"] = "NAME" if name in WORDS else "X"
        sampler.add_argument(flag, type=kind, dest=f"sampler_{name}", help=text, **extra)
    convention = (
        "read --g, --interval and --shift as this paper writes them: sgfm, dit, lightningdit, ..."
    )
    flags.add(sampler, ("--convention PAPER", str, None, convention))
    return parser


if __name__ == "__main__":
    cli.run(main)
