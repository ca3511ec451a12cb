"""Groups by TEMI: small heads on frozen features, each to give an image its neighbours' group; the best are published.

  python -m tools.annotate temi data/digits --features notes/features --groups 10 --out notes/temi
  python -m tools.annotate temi data/digits --pixels --groups 10 --out notes/temi --heads 8 --epochs 30 \\
      --step-images 64 --learning-rate 2e-3

Defaults are C-EDM's, made for 50,000 images and more. A thousand images make few steps of 512: the second line has
more and larger ones, and takes half a minute. A killed fit goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save

from selfguide.discovery import resumable
from selfguide.discovery.agreement import agreement, with_classes
from selfguide.discovery.corrected import before, plain
from selfguide.discovery.neighbours import neighbours
from selfguide.discovery.spent import cost
from selfguide.discovery.temi import TemiConfig
from selfguide.discovery.temi_fit import ALONE, fit, state_file
from selfguide.distributed import RankInfo
from shards import sidecar, storage
from shards.format import manifest as manifests
from tools import flags
from tools.annotate.begun import as_begun
from tools.annotate.features import add_source, features_of
from tools.annotate.kmeans import labels_of
from tools.ranks import run_ranks

HEADS = "heads.safetensors"
WHOLE = (
    1e9  # a teacher's memory, in fits, that never comes to less than what its momentum remembers
)


def add(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    flags.add(parser, ("--groups K", int, flags.REQUIRED, "how many to find"), flags.OUT)
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Settings of a fit beside the number of groups; `config_of` reads them."""
    own, default = parser.add_argument_group("of the fit"), TemiConfig(groups=2)
    for flag, name, text in (
        ("--heads", "heads", "heads fitted side by side, of which the best one is published"),
        ("--epochs", "epochs", "passes over all images"),
        ("--step-images", "batch", "images a step, of all processes"),
        ("--learning-rate", "learning_rate", "for 256 images a step, scaled linearly"),
        ("--beta", "beta", "below 1 evens out the sizes of groups"),
        ("--neighbours", "neighbours", "nearest images that one is paired with"),
        ("--seed", "seed", "of weights, order and pairs"),
    ):
        value = getattr(default, name)
        flags.add(own, (f"{flag} N", type(value), value, f"{text} ({value})"))
    for flag, switch, text in (
        ("--standardise", True, "take each feature to mean 0 and spread 1 first (yes)"),
        ("--decay-biases", None, "weight decay of biases, too (no)"),
        ("--warmup-from-zero", None, "whether the first step's learning rate is 0 (yes)"),
        ("--short-memory", True, "of the teacher, in fits of less than 12,500 steps (yes)"),
    ):
        own.add_argument(flag, action=argparse.BooleanOptionalAction, default=switch, help=text)


def config_of(options: argparse.Namespace, groups: int) -> TemiConfig:
    """The settings of a fit to so many groups, as the flags of `add_settings` give them."""
    flags.check_least(options, 1, "processes")
    typed = {name: getattr(options, name) for name in _typed(options)}
    if not options.short_memory:
        typed["memory"] = WHOLE
    return TemiConfig(
        groups=groups,
        heads=options.heads,
        epochs=options.epochs,
        batch=options.step_images,
        learning_rate=options.learning_rate,
        beta=options.beta,
        neighbours=options.neighbours,
        standardise=options.standardise,
        seed=options.seed,
        **typed,
    )


def _typed(options: argparse.Namespace) -> list[str]:
    """Corrected settings that the user has chosen."""
    return [n for n in ("decay_biases", "warmup_from_zero") if getattr(options, n) is not None]


def as_fit_was_begun(
    config: TemiConfig,
    features: sidecar.Sidecar,
    partial: Path,
    options: argparse.Namespace,
    done: Callable[[TemiConfig], bool] = lambda config: False,
) -> TemiConfig:
    """`config`, or as it was before its corrections where `partial` has a state of that, or where it is `done`."""

    def begun(one: TemiConfig) -> bool:
        near = _neighbours_file(features, one, partial)
        if done(one):
            return True
        return (
            near.exists()
            and state_file(partial, features.rows(), np.load(near, mmap_mode="r"), one).exists()
        )

    return as_begun(config, before(config, _typed(options)), begun, asdict)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    out = Path(options.out)
    config = config_of(options, options.groups)
    config.check(manifests.load(options.root).count)
    sidecar.refuse_taken(out, {"rows.npy", "confidence.npy", HEADS})
    partial = out.parent / f".{out.name}.partial"
    features = features_of(options)
    config = as_fit_was_begun(config, features, partial, options)
    found = annotate(features, config, out, partial, options)
    shutil.rmtree(partial)
    facts = report(found, options.root)
    # the map is for programs
    shown = {name: value for name, value in facts.items() if name != "classes"}
    return facts, "\n".join([*(f"{name:12} {value}" for name, value in shown.items())])


def annotate(
    features: sidecar.Sidecar,
    config: TemiConfig,
    out: Path,
    partial: Path,
    options: argparse.Namespace,
) -> sidecar.Sidecar:
    """Fits on `options.processes` ranks and publishes the best head's groups as an id sidecar in `out`.

    `partial` keeps what a killed fit goes on from; fits to the same features share the neighbours in it.
    """
    # looked up once for all fits to these features
    near = _neighbours_file(features, config, partial)
    resumable.array(near, lambda: neighbours(features.rows(), config.neighbours))
    share: tuple[Any, ...] = (features.folder, near, config, partial, options.device, out)
    if options.processes == 1:
        _fit_and_publish(ALONE, *share)
    else:
        run_ranks(options.processes, _fit_and_publish, *share, timeout=None)
    return sidecar.read(out)


def _neighbours_file(features: sidecar.Sidecar, config: TemiConfig, partial: Path) -> Path:
    return partial / f"neighbours-{features.sha256[:12]}-{config.neighbours}.npy"


def _fit_and_publish(
    rank_info: RankInfo,
    features: Path,
    near: Path,
    config: TemiConfig,
    partial: Path,
    device: str | None,
    out: Path,
) -> None:
    """One rank's part; the first one writes."""
    source, started = sidecar.read(features), time.monotonic()
    found = fit(
        source.rows(),
        np.load(near, mmap_mode="r"),
        config,
        rank_info=rank_info,
        device=device,
        partial=partial,
        doing=f"TEMI, {config.groups} groups",
    )
    seconds = (time.monotonic() - started) * rank_info.world
    if rank_info.rank > 0:
        return
    weights = {name: tensor.cpu() for name, tensor in found.heads.state_dict().items()}
    storage.publish(out / HEADS, save(weights), replace=True)
    provenance = {
        "method": "temi",
        "temi": plain(config),
        "teacher_momentum": config.teacher_momentum(source.count),
        "losses": found.losses,
        "head": found.head,
        "used": found.used,
        "p": (found.counts / source.count).tolist(),
        "features": {**source.provenance, "rows_sha256": source.sha256},
        "saw_labels": source.saw_labels,
    }
    sidecar.write(
        out,
        found.ids,
        manifest=source.manifest,
        kind="id",
        groups=config.groups,
        provenance=provenance,
        attached=(HEADS,),
        # of this process: what a fit took that it goes on from is not in it
        cost=cost(seconds, rank_info.world, device or rank_info.device),
        confidence=found.confidence,
    )


def report(found: sidecar.Sidecar, root: str) -> dict[str, Any]:
    """What a published fit came to. Labels, where the shards have any, are compared and nothing else."""
    assert found.groups is not None
    ids = np.asarray(found.rows())
    facts: dict[str, Any] = {
        "groups": found.groups,
        "used": found.provenance["used"],
        "largest": max(found.provenance["p"]),
        "confidence": float(np.asarray(found.column("confidence"), dtype=np.float64).mean()),
        "loss": min(found.provenance["losses"]),
        "head": found.provenance["head"],
    }
    labels = labels_of(root, manifests.load(root))
    if labels is not None:
        # with more groups than classes the first is far below 1, and the second what is read
        facts |= agreement(labels, ids) | with_classes(labels, ids)
    return {**facts, "out": str(found.folder)}
