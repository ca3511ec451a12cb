"""One evaluation: a snapshot, a protocol, one immutable record and a picture of samples."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import shards
from selfguide.data.autoencoders import Normaliser
from selfguide.diffusion.preconditioning import build_preconditioning
from selfguide.discovery.agreement import agreement
from selfguide.evaluation.features.digitnet import TOP, DigitNet, embed, half, load_digitnet
from selfguide.evaluation.grid import write_grid
from selfguide.evaluation.metrics.copies import copy_rate
from selfguide.evaluation.metrics.frechet import Moments, between, with_error
from selfguide.guidance.online import assign, extract
from selfguide.randomness import normal
from selfguide.sampling.condition_sampler import policy
from selfguide.sampling.generate import generate
from selfguide.snapshot import Snapshot, load
from selfguide.spec.config import Config, OnlineGuidance, build
from selfguide.spec.config.sampler import protocol_settings
from selfguide.spec.records import METRICS, VERSION, Protocol, grid_path, record_path
from selfguide.spec.run import RunFolder, write_record


def main(request: Path) -> None:
    """Scores the snapshot that `request` names and publishes evals/<key>.<attempt>.json beside its grid."""
    wanted = json.loads(request.read_text())
    run, started = RunFolder(Path(wanted["run"])), time.time()
    config = build(Config, wanted["config"])
    print(f"evaluating {run.snapshot(wanted['images'])}", flush=True)
    snapshot = load(run.snapshot(wanted["images"]))
    snapshot.student.to("cuda" if torch.cuda.is_available() else "cpu")
    description = run.describe()
    final = snapshot.images >= description["images"]
    # on one machine training has ended by the time its final snapshot is scored: the cores it left are ours
    alone = final and os.environ.get("SUBMITIT_EXECUTOR") == "local"
    cores = len(os.sched_getaffinity(0)) if alone else int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(cores)
    protocol, scores, nfe, pixels = fd_digits(snapshot, config)
    key, attempt = wanted["key"], wanted["attempt"]
    shown = (pixels[:64].float() * (255 / TOP)).round().to(torch.uint8)
    write_grid(grid_path(run, key, attempt), shown)
    record = {
        "schema": VERSION,
        "status": "done",
        "run": description["id"],
        "experiment": config.experiment,
        "seed": snapshot.config.seed,
        "images": snapshot.images,
        "final": final,
        "key": key,
        "attempt": attempt,
        "protocol": asdict(protocol),
        "protocol_key": protocol.key,
        "scores": scores,
        "nfe": nfe,
        "label_free": snapshot.guidance["label_free"],
        "snapshot_sha256": snapshot.sha256,
        "started": started,
        "ended": time.time(),
        "seconds": time.time() - started,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    write_record(record_path(run, key, attempt), record)
    print(json.dumps(scores), flush=True)


def fd_digits(snapshot: Snapshot, config: Config) -> tuple[Protocol, dict[str, float], int, Tensor]:
    """Frechet distance in the committed digit net's features against all scans, and what it must be read with."""
    sampler, evaluation = config.sampler, config.evaluation
    data = shards.read_all(snapshot.data["root"])
    real = torch.as_tensor(data["x"])
    net, sha256 = load_digitnet()
    normaliser = Normaliser.of(snapshot.data["header"])
    parts, nfe = [], 0
    batches = generate(
        snapshot,
        sampler,
        seed=evaluation.seed,
        count=evaluation.samples,
        batch=evaluation.batch,
        prior=evaluation.prior,
    )
    for made, evaluations in batches:
        parts.append(normaliser.pixels(made))
        nfe = max(nfe, evaluations)
        print(f"{sum(map(len, parts)):,} / {evaluation.samples:,} samples", flush=True)
    pixels = torch.cat(parts)
    scores = score(net, real, pixels)
    guidance = snapshot.config.guidance
    if isinstance(guidance, OnlineGuidance) and guidance.level == "image" and "y" in data:
        groups = groups_of(snapshot, normaliser.encode(real))
        scores |= agreement(data["y"], groups) | {"groups_used": float(len(np.unique(groups)))}
    adaptive = sampler.name == "dopri5"
    protocol = Protocol(
        metric="fd_digits",
        version=METRICS["fd_digits"],
        feature_sha256=sha256,
        resize="none",
        quantisation=f"round to 0..{TOP}",
        reference=snapshot.data["manifest"],
        samples=evaluation.samples,
        labels=policy(snapshot, evaluation.prior),
        seed=evaluation.seed,
        sampler=sampler.name,
        steps=None if adaptive else sampler.steps,
        tolerance=(sampler.rtol, sampler.atol) if adaptive else None,
        batch=evaluation.batch if adaptive else None,
        g=sampler.g,
        interval=sampler.interval,
        ema=snapshot.ema,
        dtype="fp32",
        settings=protocol_settings(sampler),
    )
    return protocol, scores, nfe, pixels


def score(net: DigitNet, real: Tensor, pixels: Tensor) -> dict[str, float]:
    """The distance with its error, the floor that real halves reach, copies, and whether samples look like digits."""
    reference, _ = embed(net, real)
    features, probabilities = embed(net, pixels)
    fd, error = with_error(reference.numpy(), features.numpy())
    even, odd = half(len(real))
    copies, real_copies = copy_rate(real.numpy(), pixels.numpy())
    top, classes = probabilities[:1000].max(1)
    return {
        "fd_digits": fd,
        "fd_digits_se": error,
        "floor": between(Moments.of(reference[even].numpy()), Moments.of(reference[odd].numpy())),
        "copy_rate": copies,
        "copy_rate_real": real_copies,
        "confident": (top >= 0.9).float().mean().item(),
        "classes": float(len(classes.unique())),
    }


def groups_of(snapshot: Snapshot, x0: Tensor) -> np.ndarray:
    """(N,) the group that the student gives every scan, each in a noise of its own."""
    guidance = snapshot.config.guidance
    assert isinstance(guidance, OnlineGuidance)
    eps = normal(0, "extraction-noise", torch.arange(len(x0)), tuple(x0.shape[1:]))
    preconditioning = build_preconditioning(snapshot.config.path)
    x0, eps = x0.to(snapshot.device), eps.to(snapshot.device)
    features = extract(snapshot.student, preconditioning, guidance, x0, eps)
    return assign(snapshot.student, features).cpu().numpy()
