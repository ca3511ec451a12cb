"""What a network sees in every image, one vector a sample: the ground on which groups are found.

  --snapshot RUN   a snapshot of ours: pooled tokens of one layer, of images noised to one noise-time
  --net NAME       a net of timm, such as vit_base_patch16_224.dino or resnet50.a1_in1k; weights by path, by the folder
                   that SELFGUIDE_WEIGHTS_DIR names, or from the local hub cache. --method says whose published
                   checkpoint --weights is: how it is read, what its images were like, and that it saw no labels
  --pixels         the images themselves, the baseline

Chunks that are done are kept: a killed extraction goes on where it was. On a cluster every task of srun takes its
share with --rank $SLURM_PROCID --world $SLURM_NTASKS, and the last one publishes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from selfguide.data.autoencoders import Autoencoder, load_autoencoder
from selfguide.discovery.extraction import extract
from selfguide.discovery.families import FAMILIES
from selfguide.discovery.features import FeatureNet, PixelFeatures, SnapshotFeatures, TimmFeatures
from selfguide.discovery.nets import VIEWS
from selfguide.discovery.vit import FrozenViT, Positions, load_net, load_vit
from selfguide.distributed import RankInfo
from selfguide.spec.config import POOLINGS
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from tools import flags
from tools.flags import Flag
from tools.ranks import run_ranks
from tools.sample_run import load_snapshot


def add(parser: argparse.ArgumentParser) -> None:
    add_net(parser)
    flags.add(
        parser,
        flags.OUT,
        ("--rank R", int, None, "of this task, with --world"),
        ("--world W", int, None, "tasks that extract together"),
    )


def add_net(parser: argparse.ArgumentParser) -> None:
    """For commands that extract with a network but into no sidecar; see `build_net`."""
    _add_nets(parser, parser.add_mutually_exclusive_group(required=True))


def add_source(parser: argparse.ArgumentParser) -> None:
    """For verbs that need features: `--features DIR`, or the flags that extract them; `--processes` comes with both.

    The verb itself gives `--out`; see `features_of`.
    """
    what = parser.add_mutually_exclusive_group(required=True)
    flags.add(what, ("--features DIR", str, None, "a sidecar of features, extracted before"))
    _add_nets(parser, what)


def features_of(options: argparse.Namespace) -> sidecar.Sidecar:
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


def _extract(options: argparse.Namespace, out: Path) -> sidecar.Sidecar | None:
    flags.check_least(options, 1, "processes", "batch")
    net = build_net(options)  # here too: what is wrong with it is said before a process starts
    rank, world = (
        (0, 1) if getattr(options, "rank", None) is None else (options.rank, options.world)
    )
    if options.processes == 1:
        return extract(options.root, net, out, rank=rank, world=world, batch=options.batch)
    del net
    found = run_ranks(options.processes, _share, options, out, timeout=None)
    return next(made for made in found if made is not None)


def _share(rank_info: RankInfo, options: argparse.Namespace, out: Path) -> sidecar.Sidecar | None:
    options.device = options.device or str(rank_info.device)
    net = build_net(options)
    return extract(
        options.root, net, out, rank=rank_info.rank, world=rank_info.world, batch=options.batch
    )


def build_net(options: argparse.Namespace) -> FeatureNet:
    """The network that the flags name, on its device."""
    header = Header.of(manifests.load(options.root).header)
    _refuse_unread(options)
    if options.pixels:
        return PixelFeatures(header)
    if options.net:
        net = load_net(options.net, options.weights, method=options.method, **_weights(options))
        return TimmFeatures(
            net.to(_device(options)),
            header,
            pooling=options.pooling,
            view=options.view or "timm",
            autoencoder=_codec(options, header),
        )
    snapshot, _ = load_snapshot(options.snapshot, options.runs, options.images, options.ema or 0)
    snapshot.student.to(_device(options))
    return SnapshotFeatures(
        snapshot,
        header,
        layer=options.layer,
        noise_time=0.2 if options.noise_time is None else options.noise_time,
        pooling=options.pooling,
        seed=options.noise_seed or 0,
    )


def vit_of(
    options: argparse.Namespace, header: Header, positions: Positions | None = None
) -> tuple[FrozenViT, Autoencoder | None]:
    """The ViT that --vit and the flags of `OF_NET` name, and what decodes stored latents for it, on their device."""
    vit = load_vit(options.vit, options.weights, positions=positions, **_weights(options))
    return vit.to(_device(options)), _codec(options, header)


def _weights(options: argparse.Namespace) -> dict[str, Any]:
    """Of which weights, by the names of `selfguide.discovery.nets.build`."""
    return {
        "sha256": options.sha256,
        "download": options.download,
        "saw_labels": None if options.saw_labels is None else options.saw_labels == "yes",
    }


def _codec(options: argparse.Namespace, header: Header) -> Autoencoder | None:
    """What decodes stored latents; None where there are images."""
    if header.kind != "latent":
        return None
    return load_autoencoder(str(header.encoder), options.vae_weights, device=_device(options))


def _device(options: argparse.Namespace) -> str:
    return options.device or str(RankInfo(0, 0, 1).device)


def _layer(text: str) -> int | str:
    return int(text) if text.isdigit() else text


DEVICE: Flag = ("--device", str, None, "where networks run; default a GPU where there is one")
OF_SNAPSHOT: tuple[Flag, ...] = (
    ("--layer L", _layer, None, "number, from 1, or name; default the middle"),
    ("--noise-time TAU", float, None, "0 data, 1 noise (0.2)"),
    ("--noise-seed N", int, None, "of the noise on each image (0)"),
    ("--images N", int, None, "the snapshot at N images seen (newest)"),
    ("--ema I", int, None, "which average, counted from 0 (0)"),
)
OF_NET: tuple[Flag, ...] = (
    (
        "--weights PATH",
        str,
        None,
        "file of weights; random:SEED draws them (SELFGUIDE_WEIGHTS_DIR, then the local hub cache)",
    ),
    ("--sha256 HEX", str, None, "the sha256 that the file must have (any; it is recorded)"),
    ("--download", bool, False, "fetch weights that are not here from the hub (never)"),
    ("--saw-labels", ("yes", "no"), None, "whether the net's training saw labels (by its name)"),
    (
        "--vae-weights PATH",
        str,
        None,
        "weights of the autoencoder of stored latents (SELFGUIDE_<NAME>, then the local hub cache)",
    ),
)


OF_FEATURES: tuple[Flag, ...] = (
    (
        "--method",
        tuple(FAMILIES),
        None,
        "whose published checkpoint --weights is (none: the net's own names)",
    ),
    ("--view", tuple(VIEWS), None, "whose transform brings images to the net's size (timm)"),
)


def _refuse_unread(options: argparse.Namespace) -> None:
    """A flag of another net would change nothing, and its user should know."""
    of_net, of_snapshot = (
        [typed.split()[0] for typed, *_ in own] for own in ((*OF_NET, *OF_FEATURES), OF_SNAPSHOT)
    )
    unread = {
        "--snapshot": of_net,
        "--net": of_snapshot,
        "--pixels": [*of_net, *of_snapshot, "--pooling"],
    }
    chosen = "--pixels" if options.pixels else "--net" if options.net else "--snapshot"
    for flag in unread[chosen]:
        given = getattr(options, flag.removeprefix("--").replace("-", "_"))
        if given not in (None, False):
            raise UserError(f"{flag} says nothing to {chosen}; leave it out")


def _add_nets(parser: argparse.ArgumentParser, what: argparse._MutuallyExclusiveGroup) -> None:
    flags.add(
        what,
        ("--snapshot RUN", str, None, "id, name or folder of a run, or a snapshot's folder"),
        ("--pixels", bool, False, "the images as a model sees them"),
    )
    # --vit is what it was called before it took other nets than vision transformers
    what.add_argument("--net", "--vit", metavar="NAME", help="timm's name of a net")
    pooling = "tokens to one vector ([CLS] where there is one, else mean; small nets want flat); a CNN has its own"
    flags.add(
        parser,
        ("--pooling", POOLINGS, None, pooling),
        ("--batch N", int, 256, "images at once (256)"),
        ("--processes N", int, 1, "ranks on this machine (1)"),
        DEVICE,
    )
    flags.add(parser.add_argument_group("of a snapshot"), *OF_SNAPSHOT, flags.RUNS)
    flags.add(parser.add_argument_group("of a net of timm"), *OF_NET, *OF_FEATURES)
