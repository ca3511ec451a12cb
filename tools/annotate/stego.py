"""Masks of an image's groups, by STEGO (Hamilton et al. 2022) over a frozen ViT's patch features.

Five crops of every image are compared with their nearest neighbours among all crops; a head and a probe learn on them,
and the masks of whole images are published. Features of crops lie on disk meanwhile, or with --live are computed at
every step. Shifts are those of COCO-Stuff or VOC; for other data heed what the command says of them and set --shifts. A
picture, mask.png, shows 32 images with their masks: look at it. What is done is kept: a killed command goes on.

--heads FILE takes what STEGO's authors published, such as cocostuff27_vit_base_5.ckpt, in place of a fit; --vit is the
DINO that it was trained on. --method kmeans is a stand-in without any of this, k-means over the patch features, and is
called so wherever it is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, five_crop, resize

from selfguide.discovery import resumable
from selfguide.discovery.corrected import before, plain
from selfguide.discovery.kmeans import check, kmeans
from selfguide.discovery.neighbours import neighbours
from selfguide.discovery.resumable import REPORT, Array, Make, Rows, Work, gather
from selfguide.discovery.spent import spending
from selfguide.discovery.stego import (
    PRESETS,
    Dropouts,
    Fit,
    Maps,
    Pairs,
    Resize,
    Segmenter,
    StegoConfig,
    segment,
)
from selfguide.discovery.stego_heads import read_heads
from shards import cli, sidecar, storage
from shards.errors import UserError
from tools import drawing, flags
from tools.annotate import layouts
from tools.annotate.begun import as_begun
from tools.annotate.layouts import Looked

TRAINED, MASKED = (
    224,
    320,
)  # edges of a crop in training and of an image when it is masked, as published
FITTED = 500_000  # patches that the stand-in's k-means is fitted to
SAVED = 100  # steps between saved states
STANDS_IN = "k-means over patch features, a stand-in: not STEGO"
LEARNED = "segmenter.safetensors"
# flags of settings that were corrected, and the setting of each
TYPED = {
    "step_crops": "batch",
    "steps": "steps",
    "dropouts": "dropouts",
    "resize": "resize",
    "mirror": "mirror",
}
Made = tuple[StegoConfig, Looked]


def add(parser: argparse.ArgumentParser) -> None:
    layouts.add_net(parser, str(MASKED))
    shifts = "b of an image with itself, with neighbours, with others; default the preset's"
    flags.add(
        parser,
        ("--method", ("stego", "kmeans"), "stego", "kmeans is a stand-in (stego)"),
        ("--heads FILE", str, None, "published by STEGO's authors, in place of a fit"),
    )
    flags.add(
        parser.add_argument_group("the fit"),
        ("--preset", tuple(PRESETS), "cocostuff27", "settings (cocostuff27)"),
        ("--groups K", int, None, "how many; default the preset's"),
        ("--shifts OWN KNN RANDOM", float, None, shifts),
        ("--step-crops N", int, None, "crops of a step; default the preset's"),
        ("--steps N", int, None, "of the fit; default the preset's"),
        ("--epochs N", int, None, "over all crops, in place of --steps"),
        (
            "--revive N",
            int,
            None,
            "steps after which a lost centroid begins again, 0 never; default the preset's",
        ),
        (
            "--dropouts",
            get_args(Dropouts),
            None,
            "what channels are dropped of (each, as published)",
        ),
        (
            "--resize",
            get_args(Resize),
            None,
            "how images come to the net's size (published: by the nearest pixel)",
        ),
        ("--crop N", int, TRAINED, f"a crop's edge for the net ({TRAINED})"),
        ("--live", bool, False, "keep no features of crops on disk"),
        ("--seed N", int, 0, "of all that is drawn (0)"),
    )
    parser.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="average the codes of an image and of its mirror image (yes)",
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    target = Path(options.out)
    sidecar.refuse_taken(target, {sidecar.ROWS, "mask.png", LEARNED})
    config = settings(options)
    looked = layouts.look(options, MASKED)
    if options.heads:  # here too: how many groups there are is theirs to say
        config = replace(config, groups=len(heads_of(options, looked).centroids))
    size = list(looked.size)

    def provenance(made: Made) -> dict[str, Any]:
        config, looked = made
        method: dict[str, Any] = {"method": "STEGO", **plain(config), "crop": options.crop}
        if options.method == "kmeans":
            method = {"method": STANDS_IN, "groups": config.groups}
        if options.heads:
            method = of_heads(options, config)
        return {**method, "seed": options.seed, **looked.provenance, "image": size}

    def work_of(made: Made) -> Work:
        return Work(target, looked.manifest.hash, provenance(made))

    old = before(config, typed(options)), looked.before(options)
    chosen = as_begun((config, looked), old, lambda one: work_of(one).begun, provenance)
    (config, looked), work = chosen, work_of(chosen)
    fitted = stand_in if options.method == "kmeans" else published if options.heads else learned
    mask, tensors, learned_facts, remarks = fitted(looked, config, work, options)
    rows = layouts.fill(
        work, "rows", looked.manifest.count, mask, np.uint8 if config.groups <= 256 else np.int32,
        batch=options.batch, doing="masks",
    )  # fmt: skip
    weights = {name: t.contiguous().cpu() for name, t in tensors.items()}
    made = layouts.publish(
        looked,
        work,
        rows,
        partial(draw, config.groups),
        lambda rows: learned_facts | usage(rows, config.groups),
        kind="mask",
        groups=config.groups,
        attached={LEARNED: save(weights)},
    )
    facts, named = made.provenance[REPORT], work.provenance["method"]
    text = (
        f"{made.count:,} masks of {made.groups} groups by {named}; {facts['used']:.0%} of the groups "
        f"are in use, {facts['shown']:.1f} in an image\n{made.folder / 'mask.png'} shows {layouts.PICTURED}"
    )
    said = {"out": str(made.folder), "count": made.count, "method": named}
    return said | facts | {"warnings": remarks}, "\n".join((text, *remarks))


def settings(options: argparse.Namespace) -> StegoConfig:
    """The preset and what the flags change of it.

    Raises:
        UserError: a value out of range, or a flag that the stand-in does not read.
    """
    flags.check_least(options, 2, "groups")
    flags.check_least(options, 1, "epochs", "steps", "step_crops", "crop")
    flags.check_least(options, 0, "seed", "revive")
    if options.method == "kmeans":
        _refuse(options, "--method kmeans", ("heads", "shifts", "live", *TYPED, "epochs", "revive"))
    if options.heads:
        fit = ("groups", "shifts", "step_crops", "steps", "epochs", "revive", "dropouts", "live")
        _refuse(options, "--heads, which are fitted already", fit)
    if options.epochs and options.steps:
        raise UserError("--epochs with --steps: one of them says how long the fit is")
    config = PRESETS[options.preset]
    if options.shifts is not None:
        own, knn, random = options.shifts
        config = replace(config, shifts=Pairs(own=own, knn=knn, random=random))
    chosen = {field: getattr(options, name) for name, field in TYPED.items()}
    chosen |= {name: getattr(options, name) for name in ("groups", "epochs", "revive")}
    config = replace(config, **{name: v for name, v in chosen.items() if v is not None})
    return replace(config, steps=None) if options.epochs else config


def _refuse(options: argparse.Namespace, to: str, names: Sequence[str]) -> None:
    """
    Raises:
        UserError: one of these options is given, which says nothing to another.
    """
    for name in names:
        if getattr(options, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} says nothing to {to}; leave it out")


def typed(options: argparse.Namespace) -> set[str]:
    """Corrected settings that the user has chosen."""
    chosen = {field for name, field in TYPED.items() if getattr(options, name) is not None}
    return chosen | ({"steps"} if options.epochs else set())


# ordinals -> masks; what was learned; facts; remarks
Fitted = tuple[Make, dict[str, Tensor], dict[str, Any], list[str]]


def learned(looked: Looked, config: StegoConfig, work: Work, options: argparse.Namespace) -> Fitted:
    """STEGO, from crops to masks."""
    count, device = looked.manifest.count, looked.vit.device
    if 5 * count <= config.neighbours:
        raise UserError(
            f"{count} images have {5 * count} crops, and each needs {config.neighbours} others; give more images"
        )

    def crops(ordinals: NDArray[np.int64]) -> Tensor:
        """(B, 5, D, h, w)."""
        images = looked.images(ordinals)
        cut = torch.stack(five(images, options.crop, config.resize), dim=1)  # (B, 5, C, h, w)
        return looked.vit.patches(cut.flatten(0, 1)).unflatten(0, (-1, 5))

    def live(indices: Tensor) -> Tensor:
        cut = five(looked.images(indices.numpy() // 5), options.crop, config.resize)
        picked = torch.stack([cut[int(i) % 5][b] for b, i in enumerate(indices)])
        return looked.vit.patches(picked)

    doing = "features of crops"
    maps: Maps = live
    if options.live:
        pooled = layouts.fill(
            work, "pooled", count, lambda o: crops(o).mean((3, 4)), np.float32,
            batch=options.batch, doing=doing,
        )  # fmt: skip
        means = list(pooled)
    else:
        kept = layouts.fill(
            work, "crops", count, crops, np.float16, batch=options.batch, doing=doing
        )
        means = [
            np.asarray(p[i : i + 64], np.float32).mean((3, 4))
            for p in kept
            for i in range(0, len(p), 64)
        ]
        flat = [part.reshape(-1, *part.shape[2:]) for part in kept]
        maps = lambda i: torch.from_numpy(gather(flat, i.numpy())).to(device).float()  # noqa: E731
    rows = np.concatenate(means).reshape(5 * count, -1)
    near = torch.from_numpy(neighbours(rows, config.neighbours)).long()
    fit = Fit(maps, near, looked.vit.width, config, seed=options.seed, device=device)
    with spending(work.folder):
        train(fit, work.folder / "state.pt")
    net = fit.net.eval()
    facts = {"knn_cosine": fit.watched.knn, "random_cosine": fit.watched.random}
    return (
        masks_by(net, looked, config),
        net.state_dict(),
        facts,
        fit.watched.warnings(config.shifts),
    )


def heads_of(options: argparse.Namespace, looked: Looked) -> Segmenter:
    """The published head and probe that --heads names, on the net's device."""
    made = read_heads(Path(options.heads).expanduser(), looked.vit.net, looked.vit.name)
    return made.to(looked.vit.device)


def of_heads(options: argparse.Namespace, config: StegoConfig) -> dict[str, Any]:
    """What a record says of published heads in place of a fit."""
    file = Path(options.heads).expanduser()
    read = {"heads": file.name, "heads_sha256": storage.sha256(str(file))}
    seen = {"groups": config.groups, "resize": config.resize, "mirror": config.mirror}
    return {"method": "STEGO", **read, **seen}


def published(
    looked: Looked, config: StegoConfig, work: Work, options: argparse.Namespace
) -> Fitted:
    """The masks of STEGO's authors' own heads."""
    net = heads_of(options, looked)
    return masks_by(net, looked, config), net.state_dict(), {}, []


def masks_by(net: Segmenter, looked: Looked, config: StegoConfig) -> Make:
    """Ordinals -> masks of whole images."""

    def mask(ordinals: NDArray[np.int64]) -> Tensor:
        images = looked.images(ordinals)
        size = (images.shape[-2], images.shape[-1])
        whole = fitting(looked, images, config.resize)
        mirrored = looked.vit.patches(whole.flip(3)) if config.mirror else None
        return net.masks(looked.vit.patches(whole), size, mirrored)

    return mask


def train(fit: Fit, file: Path) -> None:
    """To the end, from the saved state where there is one."""
    saved = resumable.load(file)
    if saved is not None:
        fit.load_state_dict(saved)
    left = fit.steps - fit.step
    for _ in cli.track(fit.run(), left, "STEGO"):
        if fit.step % SAVED == 0 or fit.step == fit.steps:
            resumable.save(file, fit.state_dict())


def stand_in(
    looked: Looked, config: StegoConfig, work: Work, options: argparse.Namespace
) -> Fitted:
    """k-means over the patch features of as many images as make up to `FITTED` patches, drawn by the seed."""
    count = looked.manifest.count
    each = features(looked, np.arange(1))[0, 0].numel()
    chosen = np.sort(
        np.random.default_rng(options.seed).permutation(count)[: max(1, FITTED // each)]
    )
    check(len(chosen) * each, config.groups, 30, 3, True, True)
    parts = [chosen[i : i + options.batch] for i in range(0, len(chosen), options.batch)]
    work.folder.mkdir(parents=True, exist_ok=True)
    with spending(work.folder):
        rows = [
            features(looked, part).movedim(1, -1).flatten(0, 2).cpu().numpy()
            for part in cli.track(parts, len(parts), "features of patches")
        ]
        found = kmeans(np.concatenate(rows), config.groups, seed=options.seed, spherical=True)
    centroids = torch.from_numpy(found.centroids).to(looked.vit.device)

    def mask(ordinals: NDArray[np.int64]) -> Tensor:
        images = looked.images(ordinals)
        maps = looked.vit.patches(fitting(looked, images, "smooth"))
        return segment(F.normalize(maps, dim=1), centroids, (images.shape[-2], images.shape[-1]))

    facts = {"fitted_images": len(chosen), "images": count, "inertia": found.inertia}
    remarks = [f"these masks are {STANDS_IN}; fitted to {len(chosen):,} of {count:,} images"]
    return mask, {"centroids": centroids}, facts, remarks


def five(images: Tensor, edge: int, how: Resize) -> list[Tensor]:
    """Corners and centre of uint8 images (B, C, H, W), half as high and wide, each (B, C, edge, edge)."""
    half = [max(1, n // 2) for n in images.shape[-2:]]
    crops = five_crop(images, half)
    if how == "smooth":
        return [
            resize(crop, [edge, edge], InterpolationMode.BICUBIC, antialias=True) for crop in crops
        ]
    return [
        center_crop(resize(crop, [edge], InterpolationMode.NEAREST_EXACT), [edge, edge])
        for crop in crops
    ]


def features(looked: Looked, ordinals: NDArray[np.int64]) -> Tensor:
    """(B, D, h, w) of whole images."""
    return looked.vit.patches(looked.seen(looked.images(ordinals)))


def fitting(looked: Looked, images: Tensor, how: Resize) -> Tensor:
    """Images as the net is shown them to be masked: of whole patches, less those that would reach over the edge.

    Features must cover the image exactly, or masks would be shifted against it.
    """
    seen, patch = looked.seen(images), looked.vit.patch
    whole = [max(1, n // patch) * patch for n in seen.shape[-2:]]
    if how == "published":
        return resize(images, whole, InterpolationMode.NEAREST_EXACT)
    return resize(seen, whole, InterpolationMode.BICUBIC, antialias=True)


def usage(rows: Rows, groups: int) -> dict[str, float]:
    """Share of groups that any pixel has, the largest group's share of pixels, groups shown in an image on average."""
    counts, shown = np.zeros(groups, dtype=np.int64), 0
    for part in rows:
        for row in part:
            found = np.bincount(row.ravel(), minlength=groups)
            counts += found
            shown += int((found > 0).sum())
    return {
        "used": float((counts > 0).mean()),
        "largest": float(counts.max() / counts.sum()),
        "shown": shown / rows.count,
    }


def draw(groups: int, images: Tensor, masks: Array, file: Path) -> None:
    """Each image beside its mask, a colour for each group."""
    painted = torch.from_numpy(drawing.colours(groups)[masks]).permute(0, 3, 1, 2)
    pairs = torch.cat((images.expand(-1, 3, -1, -1), painted), dim=3)
    layouts.sheet(layouts.tiles(pairs)[0], file, columns=4)
