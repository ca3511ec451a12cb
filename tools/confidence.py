"""How sure TEMI's heads are of samples: the least and the most certain side by side, and the uncertain ones left out.

    python -m tools.confidence samples.npz data/cifar10 notes/cifar10-temi --vit vit_base_patch16_224.dino --view temi
    python -m tools.confidence samples.npz data/digits notes/temi --pixels --beside none/samples.npz
    python -m tools.confidence samples.npz data/digits notes/temi --pixels --least 0.9 --out sure

The network is the one whose features the heads were fitted to. A sample's confidence is the probability of its
likeliest group by the published head (Adaloglou et al. 2024, C-EDM, arXiv 2403.00570, figures 8 and 14). With --least
C the samples below C are left out, and `samples.npz` in --out holds the others; `python -m tools.score` says of these
what they were chosen by, for a score of chosen samples is another one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from selfguide.data.autoencoders import from_images
from selfguide.data.normaliser import Normaliser
from selfguide.discovery.features import FeatureNet, TimmFeatures
from selfguide.discovery.temi import Heads, TemiConfig
from selfguide.discovery.temi_fit import assign
from shards import cli, sidecar, storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from tools import drawing, flags
from tools.annotate.features import add_net, build_net
from tools.annotate.temi import HEADS
from tools.sample_files import Images, open_images
from tools.sample_set import CHOSEN, NPZ


@dataclass(frozen=True)
class Scored:
    """Samples, the group that a head gives each of them, and the probability of that group."""

    name: str
    images: Images
    ids: NDArray[np.int32]
    confidence: NDArray[np.float32]

    @property
    def order(self) -> NDArray[np.int64]:
        """Numbers of all samples, the least certain first."""
        return self.confidence.argsort(kind="stable")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    flags.check_least(options, 1, "count", "batch")
    if options.least is not None and not 0 < options.least <= 1:
        raise UserError(f"--least {options.least:g} is a probability: give more than 0, at most 1")
    found = sidecar.read(options.heads, manifest=manifests.load(options.root).hash)
    heads = heads_of(found)
    net = build_net(options)
    check_net(net, found)
    opened = [
        (name, open_images(Path(name), least=1)) for name in (options.samples, *options.beside)
    ]
    sets = [scored(name, images, net, heads, found, options) for name, images in opened]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "confidence.png", sets, options.count)
    said = [about(each) for each in sets]
    facts: dict[str, Any] = {"heads": str(found.folder), "sets": said}
    if options.least is not None:
        facts["chosen"] = choose(sets[0], options.least, found, out)
    storage.publish(out / CHOSEN, json.dumps(facts, indent=1).encode(), replace=True)
    print(json.dumps(facts) if options.json else _text(facts, out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = flags.command(
        "tools.confidence",
        __doc__,
        ("samples", str, None, "folder of lossless images, or a .npz, as tools.sample writes them"),
        ("root SHARDS", str, None, "shards that the heads were fitted to"),
        ("heads FOLDER", str, None, "the annotation that `tools.annotate temi` made of them"),
        ("--beside SAMPLES+", str, (), "other samples to draw below, such as unconditional ones"),
        ("--count N", int, 10, "least and most certain samples that are drawn of each (10)"),
        ("--least C", float, None, "leave out samples of less confidence"),
        ("--out DIR", flags.here, "confidence", "picture, scores and kept samples (confidence)"),
        flags.JSON,
    )
    add_net(parser)
    return parser


def heads_of(found: sidecar.Sidecar) -> Heads:
    """The heads that a fit of TEMI left.

    Raises:
        UserError: it is no such annotation.
    """
    if found.provenance.get("method") != "temi":
        raise UserError(
            f"{found.folder} was not made by TEMI, and so has no heads; `python -m tools.annotate temi` makes one"
        )
    weights = load_file(found.file(HEADS))
    heads = Heads(len(weights["mean"]), TemiConfig(**found.provenance["temi"]))
    heads.load_state_dict(weights)
    return heads.eval()


def check_net(net: FeatureNet, found: sidecar.Sidecar) -> None:
    """Returns where the heads were fitted to features of this network.

    Raises:
        UserError: they were fitted to others.
    """
    ours, theirs = json.loads(json.dumps(dict(net.provenance))), found.provenance["features"]
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise UserError(
                f"{found.folder} was fitted to features of {name}={theirs.get(name)}, and this network has "
                f"{name}={value}; name the network that its features are of"
            )


@torch.no_grad()
def scored(
    name: str,
    images: Images,
    net: FeatureNet,
    heads: Heads,
    found: sidecar.Sidecar,
    options: argparse.Namespace,
) -> Scored:
    """The samples under the published head."""
    header = Header.of(manifests.load(options.root).header)
    parts = np.array_split(np.arange(len(images)), math.ceil(len(images) / options.batch))
    shown = cli.track(parts, len(parts), f"{len(images):,} samples")
    rows = [features(net, header, images.at(part), part).numpy() for part in shown]
    ids, confidence = assign(heads, int(found.provenance["head"]), np.concatenate(rows))
    return Scored(name, images, ids, confidence)


def features(net: FeatureNet, header: Header, images: Tensor, numbers: NDArray[np.int64]) -> Tensor:
    """(B, F) of uint8 samples (B, 3, H, W), as they were extracted of the shards' own images.

    Raises:
        UserError: the network reads latents, and samples are images.
    """
    if isinstance(net, TimmFeatures):
        return net.vit.pooled(images, net.pooling, net.view).float().cpu()
    if header.kind != "image":
        raise UserError(
            "samples are images, and these heads were fitted to features of latents by a snapshot; fit heads to a "
            "ViT's: tools.annotate temi --vit NAME"
        )
    normaliser = Normaliser.of(header)
    channels = images[:, :1] if _grey(images) else images
    stored = normaliser.pixels(from_images(header, channels))
    return net(stored, torch.from_numpy(numbers))


def _grey(images: Tensor) -> bool:
    return bool((images == images[:, :1]).all())


def about(each: Scored) -> dict[str, Any]:
    """What is said of a set of samples; of those conditioned on a group, how many are in that of the heads."""
    said: dict[str, Any] = {
        "samples": each.name,
        "count": len(each.images),
        "groups": len(np.unique(each.ids)),
        "confidence": float(each.confidence.mean(dtype=np.float64)),
        "median": float(np.median(each.confidence)),
    }
    groups = sampled_groups(each.name)
    if groups is not None:
        said["conditioned_group"] = float((groups == each.ids).mean())
    return said


def sampled_groups(name: str) -> NDArray[np.int64] | None:
    """(N,) the groups that the samples of a .npz were conditioned on, where it holds any."""
    if Path(name).suffix != ".npz":
        return None
    with np.load(name) as held:
        return held.get("arr_1")


def choose(each: Scored, least: float, found: sidecar.Sidecar, out: Path) -> dict[str, Any]:
    """Writes the samples of that confidence or more, and returns what they were chosen by.

    Raises:
        UserError: none has it.
    """
    kept = np.flatnonzero(each.confidence >= least)
    if not len(kept):
        raise UserError(
            f"--least {least:g}: no sample has it, the highest confidence is {each.confidence.max():.3g}; give less"
        )
    arrays = {"arr_0": np.moveaxis(each.images.at(kept).numpy(), 1, -1)}
    groups = sampled_groups(each.name)
    if groups is not None:
        arrays["arr_1"] = groups[kept]
    np.savez(out / NPZ, **arrays)  # type: ignore[arg-type]
    return {
        "by": "confidence of TEMI's heads",
        "least": least,
        "kept": len(kept),
        "of": len(each.images),
        "from": each.name,
        "rows_sha256": found.sha256,
    }


def draw(file: Path, sets: Sequence[Scored], count: int) -> None:
    """Two lines for each set, its least and its most certain samples over their confidence."""
    count = min(count, *(len(each.images) for each in sets))
    size = (1.5 + 0.95 * count, 0.5 + 2.5 * len(sets))
    with drawing.figure(file, 2 * len(sets), count, size=size) as (figure, axes):
        for number, each in enumerate(sets):
            ends = (("least", each.order[:count]), ("most", each.order[-count:]))
            for line, (word, numbers) in zip(axes[2 * number :], ends, strict=False):
                for axis, sample, image in zip(line, numbers, each.images.at(numbers), strict=True):
                    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
                    axis.set(xticks=[], yticks=[])
                    axis.set_xlabel(f"{each.confidence[sample]:.3f}", fontsize=8)
                name = Path(each.name)
                label = (
                    f"{name.parent.name if name.stem == 'samples' else name.stem}\n{word} certain"
                )
                line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        figure.suptitle("confidence of TEMI's head in samples", fontsize=11)


def _text(facts: dict[str, Any], out: Path) -> str:
    rows = [
        f"{each['samples']}: {each['count']:,} samples in {each['groups']} groups, confidence "
        f"{each['confidence']:.3f}, median {each['median']:.3f}"
        + (
            f", {each['conditioned_group']:.1%} in the group of their condition"
            if "conditioned_group" in each
            else ""
        )
        for each in facts["sets"]
    ]
    if "chosen" in facts:
        chosen = facts["chosen"]
        rows.append(f"{chosen['kept']:,} of {chosen['of']:,} have {chosen['least']:g}: {out / NPZ}")
    return "\n".join([*rows, str(out / "confidence.png")])


if __name__ == "__main__":
    cli.run(main)
