"""What a network sees in every image, one vector a sample: the ground on which groups are found.

  --snapshot RUN   a snapshot of ours: pooled tokens of one layer, of images noised to one noise-time
  --vit NAME       a vision transformer of timm, such as vit_base_patch16_224.dino; weights by path, by the folder that
                   SELFGUIDE_WEIGHTS_DIR names, or from the local hub cache
  --pixels         the images themselves, the baseline

Chunks that are done are kept: a killed extraction goes on where it was. On a cluster every task of srun takes its
share with --rank $SLURM_PROCID --world $SLURM_NTASKS, and the last one publishes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from selfguide.data.autoencoders import load_autoencoder
from selfguide.discovery.extraction import extract
from selfguide.discovery.features import FeatureNet, PixelFeatures, SnapshotFeatures, ViTFeatures
from selfguide.discovery.vit import load_vit
from selfguide.distributed import RankInfo
from selfguide.spec.config import POOLINGS
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.sidecar import Sidecar
from tools.ranks import run_ranks
from tools.sample import load_snapshot

HELP = "one vector a sample, from a snapshot, a ViT or the pixels"


def add(parser: argparse.ArgumentParser) -> None:
    _add_nets(parser, parser.add_mutually_exclusive_group(required=True))
    parser.add_argument("--out", required=True, metavar="DIR", help="the sidecar's folder")
    parser.add_argument("--rank", type=int, metavar="R", help="of this task, with --world")
    parser.add_argument("--world", type=int, metavar="W", help="tasks that extract together")


def add_source(parser: argparse.ArgumentParser) -> None:
    """For verbs that need features: `--features DIR`, or the flags that extract them; `--processes` comes with both.

    The verb itself gives `--out`; see `features_of`.
    """
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--features", metavar="DIR", help="a sidecar of features, extracted before")
    _add_nets(parser, what)


def features_of(options: argparse.Namespace) -> Sidecar:
    """The dense sidecar that `add_source`'s flags name, extracted into `<out>.features` first if need be.

    Raises:
        UserError: no such sidecar, one of other shards or of another kind; whatever extraction refuses.
    """
    if options.features is None:
        found = _extract(options, Path(f"{options.out}.features"))
        assert found is not None  # all ranks were ours
        return found
    found = sidecar.read(options.features, manifest=manifests.load(options.root).hash)
    if found.kind != "dense":
        raise UserError(
            f"--features {options.features} is of kind {found.kind}; give one of features"
        )
    return found


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if (options.rank is None) != (options.world is None):
        raise UserError("--rank and --world come together")
    if options.rank is not None and options.processes > 1:
        raise UserError(
            "--rank with --processes: a task takes one share, or this command starts them all"
        )
    found = _extract(options, Path(options.out))
    if found is None:
        text = f"rank {options.rank} is done; the last of {options.world} publishes {options.out}"
        return {"out": options.out, "published": False}, text
    facts = {
        "out": str(found.folder),
        "published": True,
        "count": found.count,
        "width": found.shape[0],
        "sha256": found.sha256,
        "provenance": dict(found.provenance),
    }
    said = ", ".join(
        f"{name} {value}" for name, value in found.provenance.items() if value is not None
    )
    return (
        facts,
        f"{found.count:,} samples, {found.shape[0]:,} features each\n{said}\n{found.folder}",
    )


def _extract(options: argparse.Namespace, out: Path) -> Sidecar | None:
    if options.processes < 1 or options.batch < 1:
        raise UserError(f"--processes {options.processes} --batch {options.batch}: take 1 or more")
    net = build_net(options)  # here too: what is wrong with it is said before a process starts
    rank, world = (
        (0, 1) if getattr(options, "rank", None) is None else (options.rank, options.world)
    )
    if options.processes == 1:
        return extract(options.root, net, out, rank=rank, world=world, batch=options.batch)
    del net
    found = run_ranks(options.processes, _share, options, out, timeout=None)
    return next(made for made in found if made is not None)


def _share(rank_info: RankInfo, options: argparse.Namespace, out: Path) -> Sidecar | None:
    options.device = options.device or str(rank_info.device)
    net = build_net(options)
    return extract(
        options.root, net, out, rank=rank_info.rank, world=rank_info.world, batch=options.batch
    )


def build_net(options: argparse.Namespace) -> FeatureNet:
    """The network that the flags name, on its device."""
    header = Header.of(manifests.load(options.root).header)
    device = options.device or str(RankInfo(0, 0, 1).device)
    _refuse_unread(options)
    if options.pixels:
        return PixelFeatures(header)
    if options.vit:
        vit = load_vit(
            options.vit,
            options.weights,
            sha256=options.sha256,
            download=options.download,
            saw_labels=None if options.saw_labels is None else options.saw_labels == "yes",
        )
        codec = None
        if header.kind == "latent":
            codec = load_autoencoder(str(header.encoder), options.vae_weights, device=device)
        return ViTFeatures(
            vit.to(device), header, pooling=options.pooling or "cls", autoencoder=codec
        )
    named = argparse.Namespace(
        run=options.snapshot, images=options.images, runs=options.runs, ema=options.ema or 0
    )
    snapshot = load_snapshot(named)
    snapshot.student.to(device)
    return SnapshotFeatures(
        snapshot,
        header,
        layer=options.layer,
        noise_time=0.2 if options.noise_time is None else options.noise_time,
        pooling=options.pooling,
        seed=options.noise_seed or 0,
    )


OF_SNAPSHOT = ("layer", "noise_time", "noise_seed", "images", "ema")
OF_VIT = ("weights", "sha256", "download", "saw_labels", "vae_weights")


def _refuse_unread(options: argparse.Namespace) -> None:
    """A flag of another net would change nothing, and its user should know."""
    unread = {
        "--snapshot": OF_VIT,
        "--vit": OF_SNAPSHOT,
        "--pixels": (*OF_VIT, *OF_SNAPSHOT, "pooling"),
    }
    chosen = "--pixels" if options.pixels else "--vit" if options.vit else "--snapshot"
    for name in unread[chosen]:
        if getattr(options, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} says nothing to {chosen}; leave it out")


def _add_nets(parser: argparse.ArgumentParser, what: argparse._MutuallyExclusiveGroup) -> None:
    what.add_argument(
        "--snapshot", metavar="RUN", help="id, name or folder of a run, or a snapshot's folder"
    )
    what.add_argument("--vit", metavar="NAME", help="timm's name of a vision transformer")
    what.add_argument("--pixels", action="store_true", help="the images as a model sees them")
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="tokens to one vector ([CLS] where there is one, else mean; small nets want flat)",
    )
    own = parser.add_argument_group("of a snapshot")
    own.add_argument(
        "--layer", type=_layer, metavar="L", help="number, from 1, or name; default the middle"
    )
    own.add_argument("--noise-time", type=float, metavar="TAU", help="0 data, 1 noise (0.2)")
    own.add_argument("--noise-seed", type=int, metavar="N", help="of the noise on each image (0)")
    own.add_argument(
        "--images", type=int, metavar="N", help="the snapshot at N images seen (newest)"
    )
    own.add_argument("--ema", type=int, metavar="I", help="which average, counted from 0 (0)")
    own.add_argument("--runs", default="runs", metavar="DIR", help="where runs are (runs)")
    vit = parser.add_argument_group("of a ViT")
    vit.add_argument("--weights", metavar="PATH", help="file of weights; random:SEED draws them")
    vit.add_argument("--sha256", metavar="HEX", help="what the file must have")
    vit.add_argument("--download", action="store_true", help="the hub may be asked")
    vit.add_argument(
        "--saw-labels", choices=("yes", "no"), help="whether its training did (by its name)"
    )
    vit.add_argument("--vae-weights", metavar="PATH", help="of the autoencoder of stored latents")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="images at once (256)")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="ranks on this machine (1)"
    )
    parser.add_argument("--device", help="where networks run; default a GPU where there is one")


def _layer(text: str) -> int | str:
    return int(text) if text.isdigit() else text
