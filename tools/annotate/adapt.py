"""A ViT that goes on learning from these images by DINO's loss, without labels: its features then fit them better.

  python -m tools.annotate adapt data/cifar10 --vit vit_base_patch16_224.dino --out weights/cifar10-dino.safetensors
  python -m tools.annotate features data/cifar10 --net vit_base_patch16_224.dino \\
      --weights weights/cifar10-dino.safetensors --out notes/cifar10-adapted

The student sees two large and several small crops of each image, the teacher is its average, and the teacher is what is
written (Caron et al. 2021; C-EDM's table 3 adapts for 15 epochs). The file says of which net and shards it is, and
whether the weights before saw labels. What is done is kept: a killed command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import safe_open, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfguide.data.autoencoders import to_images
from selfguide.data.normaliser import Normaliser
from selfguide.discovery import resumable
from selfguide.discovery.dino import DinoConfig, Fit, Views
from selfguide.discovery.nets import SAW_LABELS
from selfguide.discovery.resumable import Work
from selfguide.randomness import stream_seed
from shards import cli, storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.read.reader import Reader
from tools import flags
from tools.annotate.features import DEVICE, OF_NET, vit_of

MADE_OF = "made_of"  # in the file: all that decides it
SAVED = 100  # steps between saved states
# flags of the fit, and what each sets
TYPED = {
    "epochs": "epochs",
    "step_images": "batch",
    "learning_rate": "learning_rate",
    "prototypes": "prototypes",
    "small_crops": "small_crops",
}


def add(parser: argparse.ArgumentParser) -> None:
    default = DinoConfig()
    flags.add(
        parser,
        ("--vit NAME", str, flags.REQUIRED, "timm's name, such as vit_base_patch16_224.dino"),
        *(flag for flag in OF_NET if not flag[0].startswith("--vae")),
        ("--out FILE", flags.here, flags.REQUIRED, "where the weights go, a .safetensors file"),
        ("--workers N", int, 0, "processes that cut crops beside this one (0)"),
        DEVICE,
    )
    flags.add(
        parser.add_argument_group("the fit"),
        ("--epochs N", int, default.epochs, f"passes over all images ({default.epochs})"),
        ("--step-images N", int, default.batch, f"images a step ({default.batch})"),
        (
            "--learning-rate X",
            float,
            default.learning_rate,
            f"for 256 images a step, scaled linearly ({default.learning_rate:g})",
        ),
        ("--prototypes K", int, default.prototypes, f"of the head ({default.prototypes:,})"),
        (
            "--small-crops N",
            int,
            default.small_crops,
            f"beside two large ones ({default.small_crops})",
        ),
        ("--seed N", int, 0, "of crops, order and the head (0)"),
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    config = settings(options)
    manifest = manifests.load(options.root)
    header = Header.of(manifest.header)
    if header.kind != "image":
        raise UserError(
            f"{options.root} holds latents: adapt to the images that they were encoded from"
        )
    if manifest.count < config.batch:
        raise UserError(
            f"--step-images {config.batch} of {manifest.count} images; take {manifest.count} or fewer"
        )
    vit, _ = vit_of(options, header)
    if vit.net.cls_token is None:
        raise UserError(f"--vit {vit.name} has no [CLS], which DINO's loss reads; name another")
    made_of = {**vit.provenance, **asdict(config), "seed": options.seed, "method": "DINO"}
    target = Path(options.out)
    work = Work(target, manifest.hash, made_of)
    said = json.dumps({"shards": manifest.hash, **made_of}, sort_keys=True)
    if not published(target, said):
        images = Crops(options, config, vit.config["input_size"][-1], vit.patch, manifest)
        fit = Fit(
            vit.net,
            vit.normalised,
            images,
            manifest.count,
            config,
            seed=options.seed,
            device=vit.device,
        )
        train(fit, work.folder / "state.pt")
        labels = {SAW_LABELS: "yes" if vit.saw_labels else "no"}
        tensors = {n: t.contiguous().cpu() for n, t in fit.teacher.vit.state_dict().items()}
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.publish(target, save(tensors, {MADE_OF: said, **labels}))
        shutil.rmtree(work.folder, ignore_errors=True)
    facts = {"out": str(target), "sha256": storage.sha256(str(target)), "made_of": made_of}
    text = (
        f"{vit.name}, adapted to {manifest.count:,} images in {config.epochs} epochs\n"
        f"sha256 {facts['sha256']}\n{target}"
    )
    return facts, text


def settings(options: argparse.Namespace) -> DinoConfig:
    """The settings of a fit, as the flags give them.

    Raises:
        UserError: a value out of range, or a file of another kind.
    """
    flags.check_least(options, 1, "epochs", "step_images", "prototypes")
    flags.check_least(options, 0, "small_crops", "workers", "seed")
    if not options.learning_rate > 0:
        raise UserError(f"--learning-rate {options.learning_rate:g}: take more than 0")
    if not options.out.endswith(".safetensors"):
        raise UserError(f"--out {options.out}: name a .safetensors file")
    return replace(DinoConfig(), **{own: getattr(options, name) for name, own in TYPED.items()})


def published(target: Path, said: str) -> bool:
    """Whether exactly this is there already.

    Raises:
        UserError: something else is.
    """
    if not target.exists():
        return False
    with safe_open(str(target), "pt") as opened:
        if (opened.metadata() or {}).get(MADE_OF) == said:
            return True
    raise UserError(f"{target} holds other weights; name another file, or remove it")


def train(fit: Fit, file: Path) -> None:
    """To the end, from the saved state where there is one."""
    saved = resumable.load(file)
    if saved is not None:
        fit.load_state_dict(saved)
    file.parent.mkdir(parents=True, exist_ok=True)
    for _ in cli.track(fit.run(), fit.steps - fit.step, "DINO"):
        if fit.step % SAVED == 0 or fit.step == fit.steps:
            resumable.save(file, fit.state_dict())


class Crops:
    """Crops of each step, as a function of the seed and the step."""

    def __init__(
        self,
        options: argparse.Namespace,
        config: DinoConfig,
        edge: int,
        patch: int,
        manifest: manifests.Manifest,
    ) -> None:
        self.config, self.count, self.workers = config, manifest.count, options.workers
        self.items = Items(options.root, manifest, Views(edge, patch, config), config, options.seed)

    def __call__(self, step: int) -> Iterable[list[Tensor]]:
        batch = self.config.batch
        positions = range(step * batch, self.config.steps(self.count) * batch)
        return DataLoader(
            self.items, batch, sampler=positions, num_workers=self.workers, drop_last=True
        )


class Items(Dataset[list[Tensor]]):
    """The crops of the image at each position of the training; every process opens the shards itself."""

    def __init__(
        self,
        root: str,
        manifest: manifests.Manifest,
        views: Views,
        config: DinoConfig,
        seed: int,
    ) -> None:
        self.root, self.manifest, self.views = root, manifest, views
        self.config, self.seed = config, seed
        self.header = Header.of(manifest.header)
        self.reader: Reader | None = None
        self.epoch, self.order = -1, torch.empty(0)  # of that epoch

    def __getitem__(self, position: int) -> list[Tensor]:
        if self.reader is None:
            self.reader = Reader(self.root, self.manifest)
        each = self.config.epoch(self.manifest.count) * self.config.batch
        epoch, within = divmod(position, each)
        if epoch != self.epoch:
            shuffle = torch.Generator().manual_seed(stream_seed(self.seed, "dino-order", epoch))
            self.epoch, self.order = epoch, torch.randperm(self.manifest.count, generator=shuffle)
        ordinal = int(self.order[within])
        stored = torch.from_numpy(self.reader.gather(np.array([ordinal]))["x"])
        image = to_images(self.header, Normaliser.of(self.header).encode(stored))[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(self.seed, "dino-views", position))
            return self.views(image.expand(3, -1, -1))
