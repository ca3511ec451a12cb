"""The groups of a run or annotation as one HTML page: what is in them, what is drawn of them, which are alike.

    python -m tools.atlas RUN                                   prototypes that a run found while it trained
    python -m tools.atlas RUN                                   or the classes of a run that was trained on labels
    python -m tools.atlas --sidecar notes/kmeans --shards data/digits
    python -m tools.atlas RUN --sidecar notes/kmeans            with samples of a run that was trained on these groups
    python -m tools.atlas RUN --figure sizes.png                how many training images each group has, and no page
    python -m tools.atlas --sidecar notes/kmeans --figure sizes.png

The page is one file without scripts or references. Groups are named and banned in `groups.yaml` of the run's folder:

    names: {3: zeros}
    banned: [7]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.data.autoencoders import Autoencoder, to_images
from selfguide.data.normaliser import Normaliser
from selfguide.discovery.agreement import agreement
from selfguide.sampling import queries
from selfguide.sampling.condition_sampler import samples_training_rows
from selfguide.sampling.group_names import Naming, naming_of
from selfguide.snapshot import Snapshot
from selfguide.spec.config import SamplerConfig
from selfguide.trained import changed_sampler
from shards import cli, sidecar, storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.read.reader import Reader
from tools import flags
from tools.annotate.kmeans import labels_of
from tools.atlas.grouping import Grouping, of_labels, of_sidecar, of_snapshot
from tools.atlas.histogram import draw as draw_sizes
from tools.atlas.histogram import sizes_of
from tools.atlas.page import render
from tools.sample_run import autoencoder_of, draw, load_snapshot


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    flags.check_least(options, 1, "groups", "count")
    flags.check_image_seed(options, options.count)
    snapshot, folder = None, None
    if options.run is not None:
        snapshot, folder = load_snapshot(options.run, options.runs, options.images, options.ema)
        flags.moved(snapshot.student, options.device)
    found = annotation(snapshot, options)
    if options.figure is not None:
        return histogram_of(snapshot, found, options)
    root, manifest = data_of(snapshot, found, options)
    naming = Naming(groups=0) if snapshot is None or folder is None else naming_of(folder, snapshot)
    codec = autoencoder_of(manifest.header, options)
    labels = labels_of(root, manifest)
    sampler = None if snapshot is None else sampler_of(snapshot, options)
    grouping = grouping_of(snapshot, found, manifest, labels, options)
    shown = grouping.order[: options.groups]
    samples = None
    if snapshot is not None and sampler is not None:
        samples = samples_of(snapshot, sampler, codec, naming, shown, options)
    nmi = None if labels is None else agreement(labels, grouping.ids)["nmi"]
    sources = [f"{snapshot.config.experiment}, {snapshot.images:,} images seen"] if snapshot else []
    sources += [f"groups of {found.folder}"] if found else []
    ordinals = [int(o) for group in shown for o in grouping.nearest[group]]
    page = render(
        title=folder.resolve().parent.parent.name if folder else Path(options.sidecar).name,
        source="; ".join(sources),
        facts=_facts(snapshot, grouping, naming, nmi),
        grouping=grouping,
        naming=naming,
        shown=shown,
        images=pictures_of(root, manifest, codec, ordinals),
        samples=samples,
    )
    storage.publish(options.out, page.encode(), replace=True)
    said = {
        "page": options.out,
        "bytes": len(page.encode()),
        "groups": len(grouping.p),
        "used": len(np.unique(grouping.ids)),
        "shown": len(shown),
        "nmi": nmi,
        "samples": samples is not None,
        "banned": sorted(naming.banned),
    }
    print(
        json.dumps(said)
        if options.json
        else f"{len(shown)} of {len(grouping.p)} groups: {options.out}"
    )
    return 0


def histogram_of(
    snapshot: Snapshot | None, found: sidecar.Sidecar | None, options: argparse.Namespace
) -> int:
    """Draws how many images each group has, and says the same in numbers."""
    sizes = sizes_of(snapshot, found)
    names = [f"{snapshot.config.experiment}, {snapshot.images:,} images seen"] if snapshot else []
    names += [f"groups of {found.folder}"] if found else []
    draw_sizes(Path(options.figure), sizes, "; ".join(names))
    text = f"{sizes.text()}: {options.figure}"
    print(json.dumps(sizes.facts() | {"figure": options.figure}) if options.json else text)
    return 0


def annotation(snapshot: Snapshot | None, options: argparse.Namespace) -> sidecar.Sidecar | None:
    """The sidecar of ids that is asked for, or the one that the run was trained on."""
    if snapshot is None:
        if options.sidecar is None:
            raise UserError("name a RUN, an annotation by --sidecar DIR, or both")
        return sidecar.read(options.sidecar)
    trained_on = snapshot.guidance.get("sidecars", {}).get("ids")
    if options.sidecar is None:
        return None if trained_on is None else sidecar.read(trained_on["folder"])
    found = sidecar.read(options.sidecar)
    if trained_on is None or trained_on["sha256"] != found.sha256:
        raise UserError(
            f"--sidecar {options.sidecar}: this run was trained on "
            f"{'other groups' if trained_on else 'no annotation'}, so its "
            "samples would be of other groups; leave out the run, or --sidecar"
        )
    return found


def data_of(
    snapshot: Snapshot | None, found: sidecar.Sidecar | None, options: argparse.Namespace
) -> tuple[str, manifests.Manifest]:
    """The shards whose images are shown."""
    root = options.shards or (snapshot.data["root"] if snapshot else None)
    if root is None:
        raise UserError("--sidecar without a run: give the annotated shards by --shards DIR")
    manifest = manifests.load(root)
    wanted = found.manifest if found else snapshot.data["manifest"] if snapshot else manifest.hash
    if manifest.hash != wanted:
        raise UserError(
            f"{root} holds manifest {manifest.hash[:12]}, and the groups are of {wanted[:12]}; give those shards by "
            "--shards DIR"
        )
    return root, manifest


def grouping_of(
    snapshot: Snapshot | None,
    found: sidecar.Sidecar | None,
    manifest: manifests.Manifest,
    labels: NDArray[np.int64] | None,
    options: argparse.Namespace,
) -> Grouping:
    """The groups of the annotation, else of the labels that the run was trained on, else of its prototypes.

    Raises:
        UserError: features are given for other groups than an annotation's; or what makes the groups raises it.
    """
    asked = options.features
    features = None if asked is None else sidecar.read(asked, manifest=manifest.hash)
    if found is not None:
        return of_sidecar(found, options.count, features)
    if features is not None:
        raise UserError("--features says where groups of a --sidecar lie; this run has prototypes")
    assert snapshot is not None
    if snapshot.guidance["source"] == "labels" and labels is not None:
        return of_labels(labels, len(snapshot.guidance["p"]), options.count)
    return of_snapshot(snapshot, options.count)


def pictures_of(
    root: str,
    manifest: manifests.Manifest,
    codec: Autoencoder | None,
    ordinals: Sequence[int],
    batch: int = 64,
) -> dict[int, Tensor]:
    """Images of shards as people see them, uint8 (C, H, W), by ordinal."""
    several, header, reader = sorted(set(ordinals)), manifest.header, Reader(root, manifest)
    made: dict[int, Tensor] = {}
    starts = range(0, len(several), batch)
    for start in cli.track(starts, len(starts), "reading images"):
        part = several[start : start + batch]
        stored = torch.as_tensor(reader.gather(np.asarray(part, dtype=np.int64))["x"])
        images = to_images(header, Normaliser.of(header).encode(stored), codec)
        made |= dict(zip(part, images, strict=True))
    return made


def sampler_of(snapshot: Snapshot, options: argparse.Namespace) -> SamplerConfig | None:
    """The run's own with --g; None of a run of which no group can be drawn.

    Raises:
        UserError: the snapshot cannot be guided so.
    """
    if not snapshot.conditioned or samples_training_rows(snapshot):
        return None
    try:
        return changed_sampler(snapshot, {} if options.g is None else {"g": options.g})
    except UserError as error:
        raise UserError(str(error).replace("sampler.g=", "--g ")) from error


def samples_of(
    snapshot: Snapshot,
    sampler: SamplerConfig,
    codec: Autoencoder | None,
    naming: Naming,
    shown: Sequence[int],
    options: argparse.Namespace,
) -> dict[int, Tensor]:
    """Images of each group that may be drawn, of the same noise for all."""
    allowed = [group for group in shown if group not in naming.banned]
    condition = queries.of_groups(snapshot, torch.tensor(allowed).repeat_interleave(options.count))
    seeds = (options.seed + torch.arange(options.count)).repeat(len(allowed))
    made, _ = draw(snapshot, sampler, condition, seeds, options.batch)
    images = to_images(snapshot.data["header"], made, codec)
    return dict(zip(allowed, images.split(options.count), strict=True))


def _facts(
    snapshot: Snapshot | None, grouping: Grouping, naming: Naming, nmi: float | None
) -> list[tuple[str, str]]:
    used, groups = len(np.unique(grouping.ids)), len(grouping.p)
    p = grouping.p[grouping.p > 0]
    facts: list[tuple[str, Any]] = [
        ("training images", f"{len(grouping.ids):,}"),
        ("groups used", f"{used:,} of {groups:,}"),
        ("perplexity", f"{np.exp(-(p * np.log(p)).sum()):.1f} of {groups:,}"),
        ("NMI with labels", "no labels" if nmi is None else f"{nmi:.3f}"),
    ]
    if snapshot is not None:
        facts.append(("saw labels", "yes" if snapshot.saw_labels else "no"))
        if snapshot.config.guidance.learns_online and not snapshot.conditioned:
            facts.append(("samples", "none: the second stage had not begun"))
    if naming.names or naming.banned:
        facts.append(("named, banned", f"{len(naming.names)}, {len(naming.banned)}"))
    return facts


def _parser() -> argparse.ArgumentParser:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = flags.command("tools.atlas", __doc__)
    flags.add(
        parser,
        ("run RUN?", str, None, flags.RUN),
        ("--images N", int, None, "the snapshot at N images seen (newest)"),
        ("--ema I", int, 0, "which average, from 0 (0)"),
        flags.RUNS,
    )
    features = "features of its images, where it has neither confidence nor distance (none)"
    flags.add(
        parser.add_argument_group("groups of an annotation"),
        ("--sidecar DIR", str, None, "an annotation of kind id"),
        ("--shards DIR", str, None, "what it annotates (the run's own)"),
        ("--features DIR", str, None, features),
    )
    flags.add(
        parser,
        ("--groups N", int, 60, "show the N largest (60)"),
        ("--count N", int, 8, "images and samples of each (8)"),
        ("--g X", float, None, "guidance weight of samples (the run's)"),
        ("--seed N", int, 0, "of the samples (0)"),
        ("--batch N", int, 64, "images at once (64)"),
        ("--device", str, device, f"where the network runs ({device})"),
        ("--autoencoder NAME", str, None, "what decodes latents (the data's own)"),
        (
            "--weights PATH",
            str,
            None,
            "weights of the autoencoder (SELFGUIDE_<NAME>, then the local hub cache)",
        ),
        flags.JSON,
    )
    flags.add(
        parser.add_mutually_exclusive_group(),
        ("--out FILE", str, "atlas.html", "the page (atlas.html)"),
        ("--figure FILE", str, None, "draw how many images each group has here, and make no page"),
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
