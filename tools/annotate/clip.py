"""Labels by text, CLIP's (Radford et al. 2021): each image is of the class whose name is nearest, in several prompts.

  python -m tools.annotate clip data/cifar100 --net ViT-bigG-14 --weights open_clip_pytorch_model.bin --out notes/clip
  python -m tools.annotate clip data/cifar100 --net ViT-bigG-14 --weights FILE --out notes/clip \\
      --names names.txt --prompts prompts.txt

--net is a name of open_clip's, both of whose towers --weights holds. Names are the shards' own unless --names gives
others, of a text with one a line or of other shards; groups are numbered by them. Texts that people wrote are in the
weights and in the names: the sidecar says text and saw_labels, and so do snapshots, records and the board of runs that
are conditioned on it. Labels that the shards have are compared with, never used. What is done is kept: a killed command
goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.data.autoencoders import load_autoencoder
from selfguide.discovery.agreement import agreement
from selfguide.discovery.clip import PROMPTS, TextLabels, load_towers
from selfguide.discovery.extraction import CHUNK
from selfguide.discovery.resumable import REPORT, Rows, Work
from selfguide.distributed import RankInfo
from shards import sidecar, storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.read.reader import Reader
from tools import flags
from tools.annotate.features import DEVICE
from tools.annotate.kmeans import labels_of


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("--net NAME", str, flags.REQUIRED, "open_clip's name, such as ViT-bigG-14"),
        ("--weights PATH", str, flags.REQUIRED, "file of both towers' weights"),
        ("--sha256 HEX", str, None, "what the file must have"),
        (
            "--names FILE",
            str,
            None,
            "classes, one a line, or shards that have them (the shards' own)",
        ),
        ("--prompts FILE", str, None, f"one a line, {{}} for the name ({len(PROMPTS)} of CLIP's)"),
        ("--vae-weights PATH", str, None, "of the autoencoder of stored latents"),
        flags.OUT,
        ("--batch N", int, 64, "images at once (64)"),
        DEVICE,
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    flags.check_least(options, 1, "batch")
    target = Path(options.out)
    manifest = manifests.load(options.root)
    header = Header.of(manifest.header)
    names = names_of(options, manifest)
    prompts = PROMPTS if options.prompts is None else lines(options.prompts, "prompts")
    device = options.device or str(RankInfo(0, 0, 1).device)
    towers = load_towers(options.net, Path(options.weights), sha256=options.sha256, device=device)
    codec = None
    if header.kind == "latent":
        codec = load_autoencoder(str(header.encoder), options.vae_weights, device=device)
    net = TextLabels(towers, header, names, prompts, codec)
    work = Work(target, manifest.hash, net.provenance)
    found = work.published()
    if found is None:
        sidecar.refuse_taken(target, {sidecar.ROWS})
        found = _made(options, manifest, net, work)
    said = found.provenance[REPORT]
    facts = {"out": str(found.folder), "count": found.count, "groups": found.groups, **said}
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in said.items())
    text = f"{found.count:,} samples of {found.groups} names by {options.net}, which learned from texts\n{numbers}"
    return facts, f"{text}\n{found.folder}"


def _made(
    options: argparse.Namespace, manifest: manifests.Manifest, net: TextLabels, work: Work
) -> sidecar.Sidecar:
    rows = Rows(folder=work.folder, prefix="", count=manifest.count, chunk=CHUNK, dtype=np.int32)
    reader = Reader(options.root, manifest)

    def labels(ordinals: NDArray[np.int64]) -> Tensor:
        return net(torch.from_numpy(reader.gather(ordinals)["x"]))

    rows.fill(labels, batch=options.batch, doing="labels by text")

    def report() -> tuple[tuple[str, ...], dict[str, float]]:
        ids = np.concatenate(list(rows)).astype(np.int64)
        counts = np.bincount(ids, minlength=len(net.names))
        said = {
            "utilisation": float((counts > 0).mean()),
            "largest": float(counts.max() / counts.sum()),
        }
        own = labels_of(options.root, manifest)
        return (), said if own is None else said | agreement(own, ids)

    made = work.publish(rows, kind="id", groups=len(net.names), finish=report)
    assert made is not None  # all parts were ours, or somebody else has published them
    return made


def names_of(options: argparse.Namespace, manifest: manifests.Manifest) -> tuple[str, ...]:
    """Of --names, or the shards' own.

    Raises:
        UserError: neither is there.
    """
    given = options.names
    if given is not None and not (storage.is_remote(given) or Path(given).is_dir()):
        return lines(given, "names")
    named = manifest if given is None else manifests.load(given)
    if not named.class_names:
        raise UserError(
            f"{given or options.root} does not say what its classes are called; give --names FILE, one a line"
        )
    return tuple(name.replace("_", " ") for name in named.class_names)


def lines(path: str, what: str) -> tuple[str, ...]:
    """The lines of a text that are not empty.

    Raises:
        UserError: no such text, or an empty one.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--{what} {path}: no text can be read there; give one, a line each"
        ) from error
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not found:
        raise UserError(f"--{what} {path} is empty; give one a line")
    return found
