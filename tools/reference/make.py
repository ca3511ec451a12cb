"""The reference of the images in shards, or of the images that latents decode to.

Parts that are done are kept beside the file: a killed command goes on where it was. On a cluster every task of srun
takes its share with --rank $SLURM_PROCID --world $SLURM_NTASKS, and the first one writes the file.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from selfguide.data.autoencoders import load_autoencoder
from selfguide.distributed import RankInfo
from selfguide.evaluation.features.net import FeatureNet, load_feature_net
from selfguide.evaluation.scores import make_reference
from selfguide.spec.data_fit import part_seed
from selfguide.spec.identity import digest
from selfguide.spec.records import REFERENCE
from selfguide.spec.timm_nets import check_net, found_sha256
from selfguide.spec.weight_files import lacking, timm_weights
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.sources.arrays import members
from tools import flags
from tools.feature_flags import NET
from tools.flags import REQUIRED


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("root", str, None, "shards of images or latents"),
        *NET,
        ("--out FILE", flags.here, REQUIRED, "the .npz to write"),
        ("--count N", int, None, "N of the samples alone (all)"),
        ("--seed N", int, None, "draws these (0 of indexed tars; else the first, as shuffled)"),
        ("--decoder FILE", str, None, "weights of the autoencoder that decodes latents"),
        ("--rank R", int, 0, "of this task, with --world"),
        ("--world W", int, 1, "tasks that work together (1)"),
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    flags.check_least(options, 1, "batch", "world", "count")
    flags.check_least(options, 0, "seed")
    if not 0 <= options.rank < options.world:
        raise UserError(f"--rank {options.rank} with --world {options.world}: ranks go from 0")
    if options.seed is not None and options.count is None:
        raise UserError(
            f"--seed {options.seed} draws a part of the samples: give --count N as well"
        )
    out = Path(options.out)
    check_out(out)
    net = net_of(options)
    manifest = manifests.load(options.root)
    latents = manifest.header["kind"] == "latent"
    codec = (
        load_autoencoder(manifest.header["encoder"], options.decoder, device=net.device)
        if latents
        else None
    )
    decided = {**net.about, "batch": options.batch, "count": options.count}
    decided |= {"shards": manifest.hash, "decoder": codec.sha256 if codec else None}
    seed = options.seed
    if options.count is not None and seed is None:
        seed = part_seed(manifest)
    if seed is not None:
        decided["seed"] = seed
    work = out.parent / f".{out.name}.{digest(decided)}"
    known = make_reference(
        options.root,
        net,
        work,
        codec=codec,
        part=options.batch,
        count=options.count,
        seed=seed,
        rank=options.rank,
        world=options.world,
    )
    if known is None:
        facts = {"rank": options.rank, "world": options.world, "out": None}
        return facts, f"rank {options.rank} is done; rank 0 writes {out}"
    storage.publish(out, (work / REFERENCE).read_bytes(), replace=True)
    shutil.rmtree(work)
    count, floor = known.main.count, known.floor
    facts = {"out": str(out), "images": count, "protocol": options.protocol, "floor": floor}
    if seed is not None:
        facts["seed"] = seed
    facts |= {"sha256": storage.sha256(str(out)), "features": net.about}
    drawn = "" if seed is None else f", drawn by seed {seed},"
    text = (
        f"{out}: {count:,} images{drawn} under {options.protocol}; its halves are {floor:.4g} apart\n"
        f"evaluation={options.protocol} evaluation.reference={out} compares with it"
    )
    return facts, text


def check_out(out: Path) -> None:
    """
    Raises:
        UserError: no name of a reference, or what is there is none, such as the samples that are to be scored.
    """
    if out.suffix != ".npz" or out.is_dir():
        raise UserError(f"--out {out}: give the file a name that ends in .npz, and is no folder's")
    if out.exists() and not {"mu", "sigma"} <= {*members(str(out))}:
        raise UserError(
            f"--out {out} is there, and is no reference: name another file, or remove it"
        )


def net_of(options: argparse.Namespace) -> FeatureNet:
    """The feature net that the flags name, on its device.

    Raises:
        UserError: it is not to be had, flags of another protocol are given, or there is no such device.
    """
    if options.protocol != "fd_timm" and (options.net or options.sha256):
        raise UserError(
            f"--net {options.net} and --sha256 {options.sha256} name the net of --protocol fd_timm, and "
            f"{options.protocol} has its own: leave them out"
        )
    sha256 = options.sha256
    if options.net and sha256 is None:
        check_net(options.net, options.weights, where="--")
        sha256 = found_sha256(options.net, options.weights)
        if sha256 is None and options.weights:
            raise UserError(f"--weights {options.weights}: no such file")
        if sha256 is None:
            raise UserError(lacking(timm_weights(options.net)))
    net = load_feature_net(options.protocol, options.weights, net=options.net, sha256=sha256)
    rank, world = getattr(options, "rank", 0), getattr(options, "world", 1)
    device = (
        options.device or RankInfo(rank, rank % max(1, torch.cuda.device_count()), world).device
    )
    found: FeatureNet = flags.moved(net, device)
    return found
