"""The statistics of a run's samples, which uFID compares those of another run with.

SAMPLES is a run, or a snapshot's folder, whose images are drawn as its own evaluation draws them; or a folder of images
or a .npz that were drawn before, of the run that --of names. A killed command goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from selfguide.discovery.resumable import Make
from selfguide.evaluation.features.net import FeatureNet
from selfguide.evaluation.images import drawn
from selfguide.evaluation.metrics.frechet import Reference
from selfguide.evaluation.scores import fill, moments_of, parts_in
from selfguide.spec.identity import digest
from selfguide.spec.metrics import LEAST_SAMPLES
from shards import storage
from shards.errors import UserError
from shards.sources.trees import folder_tree
from tools import flags
from tools.flags import REQUIRED
from tools.reference.make import NET, check_out, net_of
from tools.sample_files import open_images
from tools.sample_run import load_scored


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("samples", str, None, "a run, a snapshot's folder, a folder of images, or a .npz"),
        *NET,
        ("--out FILE", flags.here, REQUIRED, "the .npz to write"),
        ("--of NAME", str, None, "of images: the run that they were drawn from"),
        flags.RUNS,
        ("--count N", int, None, "samples of a run (as many as its evaluation takes)"),
        ("--seed N", int, 0, "of a run: image i is a function of seed + i (0)"),
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    flags.check_least(options, 1, "batch")
    flags.check_least(options, LEAST_SAMPLES, "count")
    out = Path(options.out)
    check_out(out)
    net = net_of(options)
    about, count, make = (_of_images if _holds_images(options) else _of_run)(options, net)
    about["features"] = net.about
    work = out.parent / f".{out.name}.{digest([about, count, options.batch])}"
    parts = parts_in(work, count, options.batch)
    fill(parts, make, doing=f"{count:,} samples of {about['run']}")
    Reference.of(moments_of(parts, slice(0, net.width)), about).save(work / out.name)
    storage.publish(out, (work / out.name).read_bytes(), replace=True)
    shutil.rmtree(work)
    facts = {"out": str(out), "images": count, **about, "sha256": storage.sha256(str(out))}
    text = (
        f"{out}: {count:,} samples of {about['run']} under {options.protocol}\n"
        f"evaluation={options.protocol} 'evaluation.metrics=[ufid]' evaluation.unconditional={out} compares with it"
    )
    return facts, text


def _holds_images(options: argparse.Namespace) -> bool:
    path = Path(options.samples)
    # of runs, whose folders hold pictures, too
    of_runs = any(
        next(path.glob(name), None) for name in ("MANIFEST.json", "run.json", "*/run.json")
    )
    return path.suffix == ".npz" or (
        path.is_dir() and not of_runs and bool(folder_tree(path).images)
    )


def _of_images(options: argparse.Namespace, net: FeatureNet) -> tuple[dict[str, Any], int, Make]:
    if not options.of:
        raise UserError(
            f"{options.samples} are images, which do not say whose they are: give --of NAME, the run that they were "
            "drawn from"
        )
    images = open_images(Path(options.samples))
    about = {"run": options.of, "files": digest(images.stamp)}
    return about, len(images), lambda rows: net.rows(images.at(rows))


def _of_run(options: argparse.Namespace, net: FeatureNet) -> tuple[dict[str, Any], int, Make]:
    if options.of:
        raise UserError(f"--of {options.of}: {options.samples} is a run already; drop it")
    snapshot, folder = load_scored(options.samples, options.runs)
    count = options.count or max(snapshot.config.evaluation.samples, LEAST_SAMPLES)
    # the last block is drawn whole
    flags.check_image_seed(options, -(-count // options.batch) * options.batch)
    flags.moved(snapshot.student, net.device)
    evaluation = replace(snapshot.config.evaluation, seed=options.seed, batch=options.batch)
    draw = drawn(snapshot, replace(snapshot.config, evaluation=evaluation), net)
    about = {
        "run": folder.resolve().parent.parent.name,
        "experiment": snapshot.config.experiment,
        "snapshot": snapshot.sha256,
        "seed": options.seed,
    }

    def rows(ordinals: NDArray[Any]) -> torch.Tensor:
        return torch.as_tensor(draw(int(ordinals[0]), int(ordinals[-1]) + 1))

    return about, count, rows
