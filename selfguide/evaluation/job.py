"""One evaluation: a snapshot, a protocol, one immutable record and a picture of samples."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import shards
from selfguide.data.normaliser import Normaliser
from selfguide.discovery.agreement import agreement
from selfguide.distributed import RankInfo
from selfguide.evaluation.features.digitnet import TOP, DigitNet, embed, half, load_digitnet
from selfguide.evaluation.images import Work, remove, score_images
from selfguide.evaluation.metrics.copies import copy_rate
from selfguide.evaluation.metrics.frechet import Reference, between, frechet, parted
from selfguide.evaluation.metrics.moments import BLOCKS, Moments
from selfguide.evaluation.probe import probe
from selfguide.sampling.condition_sampler import conditions_each_patch
from selfguide.sampling.generate import check_finite, generate
from selfguide.sampling.grid import write_grid
from selfguide.sampling.groups import nearest_prototypes
from selfguide.snapshot import Snapshot, load
from selfguide.spec.config import Config, build
from selfguide.spec.contamination import uses
from selfguide.spec.metrics import FEATURES
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import (
    REFERENCES,
    EvaluationRecord,
    Protocol,
    grid_path,
    parts_path,
    scored,
)
from selfguide.spec.retention import deletion
from selfguide.spec.run import RunFolder
from selfguide.spec.selections import nets_that_selected
from shards.errors import NoRoomError, UserError

log = logging.getLogger(__name__)


# of a disk that is full, or may not be written
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def main(
    request: Path, status: RankStatus, rank: int = 0, local_rank: int = 0, world: int = 1
) -> None:
    """Scores the snapshot that `request` names; rank 0 publishes evals/<key>.<attempt>.json beside its grid.

    Args:
        status: called with each batch of samples, for those who watch whether this hangs.

    Raises:
        UserError: the snapshot, or a file that it is scored with, is not what it was, or samples are no images.
        NoRoomError: the disk is full, or may not be written; what is finished is kept.
    """
    wanted = json.loads(request.read_text())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        evaluate(wanted, status, rank, local_rank, world)
    except OSError as error:
        if isinstance(error, NoRoomError) or error.errno not in _NO_ROOM:
            raise
        raise NoRoomError(
            f"{error.filename or wanted['run']} cannot be written ({os.strerror(error.errno or 0)}): make room there, "
            "or let it be written again; parts that are finished are kept, and the next try goes on behind them"
        ) from error


def evaluate(
    wanted: Mapping[str, Any],
    status: RankStatus,
    rank: int = 0,
    local_rank: int = 0,
    world: int = 1,
) -> None:
    """Scores the snapshot that a request names; rank 0 publishes its record, unless there is one with a score.

    Args:
        wanted: `run`, the folder; `images` of the snapshot; `config`, as JSON; `key` and `attempt` of the record; and
            where they apply the `sweep` that asked for it, and the nets that `selected` its point.
    """
    run, started = RunFolder(Path(wanted["run"])), time.time()
    config = build(Config, wanted["config"])
    log.info(f"evaluating {run.snapshot(wanted['images'])}")
    snapshot = _snapshot(run, wanted["images"], config.evaluation.average)
    device = RankInfo(rank, local_rank, world).device
    snapshot.student.to(device)
    protocol = Protocol.of(config, {"data": snapshot.data, "guidance": snapshot.guidance})
    work = Work(
        parts=parts_path(run, wanted["key"], snapshot.sha256),
        references=run.root.parent.parent / REFERENCES,
        rank=rank,
        world=world,
        device=device,
    )
    found = _measured(snapshot, config, protocol, status, work)
    if found is None:
        return
    if scored(run, wanted["key"]):
        # by a try whose job nobody knew of: a key has one score
        log.warning(f"{wanted['key']} was scored meanwhile; this try publishes nothing")
    else:
        _publish(run, wanted, snapshot, protocol, found, started)
    remove(work)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What an evaluation found out; a probe of layers draws no samples."""

    scores: dict[str, float]
    # network evaluations a sample took
    nfe: int | None = None
    # uint8 (n, C, H, W) of levels 0..255, the first ones, and how much larger they are shown
    images: Tensor | None = None
    zoom: int = 1
    # sha256 of files that were read, by their role
    files: dict[str, str] = field(default_factory=dict)
    # of probes
    table: dict[str, Any] | None = None


def _measured(
    snapshot: Snapshot, config: Config, protocol: Protocol, status: RankStatus, work: Work
) -> _Found | None:
    """The scores by the config's protocol; None on ranks but the first."""
    features = FEATURES[config.evaluation.protocol]
    if features.of_layers:
        probed = probe(
            snapshot, config.evaluation, status, work.parts, rank=work.rank, world=work.world
        )
        return None if probed is None else _Found(scores=probed.scores, table=probed.table)
    if features.of_images:
        found = score_images(snapshot, config, protocol, status, work)
        if found is None:
            return None
        zoom = max(1, 4 * 8 // found.images.shape[-1])
        return _Found(**vars(found), zoom=zoom)
    scores, nfe, images = fd_digits(snapshot, config, protocol, status)
    return _Found(scores=scores, nfe=nfe, images=images, zoom=4)


def _publish(
    run: RunFolder,
    wanted: Mapping[str, Any],
    snapshot: Snapshot,
    protocol: Protocol,
    found: _Found,
    started: float,
) -> None:
    """The record, beside a picture of samples where some were drawn."""
    key, attempt, description = wanted["key"], wanted["attempt"], run.describe()
    if found.images is not None:
        write_grid(grid_path(run, key, attempt), found.images[:64], zoom=found.zoom)
    scores, left_out = parted(found.scores)
    EvaluationRecord(
        status="done",
        run=description["id"],
        experiment=wanted["config"]["experiment"],
        seed=snapshot.config.seed,
        images=snapshot.images,
        final=snapshot.images >= description["images"],
        key=key,
        attempt=attempt,
        protocol=protocol.plain(),
        protocol_key=protocol.key,
        scores=scores,
        nfe=found.nfe,
        label_free=snapshot.guidance["label_free"],
        nets=uses(snapshot.guidance, snapshot.origin, _selected(run, wanted)) or None,
        snapshot_sha256=snapshot.sha256,
        files=found.files,
        left_out=left_out,
        sweep=wanted.get("sweep", ""),
        started=started,
        ended=time.time(),
        seconds=time.time() - started,
        host=socket.gethostname(),
        pid=os.getpid(),
        probe=found.table,
    ).publish(run)
    log.info(json.dumps(scores))


def _snapshot(run: RunFolder, images: int, average: int) -> Snapshot:
    """The snapshot at so many images, with one of its averages.

    Raises:
        UserError: it is there no more as it was published.
    """
    try:
        return load(run.snapshot(images), average)
    except FileNotFoundError as error:
        if gone := deletion(run.snapshot(images)):
            raise UserError(f"{gone}; it stays without this score") from error
        raise UserError(
            f"{error}: it was not published to its end, or was cut or changed since; where it is the run's last one, "
            f"`python -m launcher.resume {run.root.name} --runs {run.root.parent.parent}` publishes it again from its "
            "checkpoint, else it stays without a score"
        ) from error


def _selected(run: RunFolder, wanted: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """Nets by whose scores the snapshot was chosen: as the request says, and as the run does."""
    return [*wanted.get("selected", ()), *nets_that_selected(run, wanted["images"])]


def fd_digits(
    snapshot: Snapshot, config: Config, protocol: Protocol, status: RankStatus
) -> tuple[dict[str, float], int, Tensor]:
    """Frechet distance in the features of the protocol's committed digit net against all scans.

    Returns:
        The scores, the network evaluations a sample took, and the samples as uint8 (N, 1, 8, 8) with levels 0..255.

    Raises:
        UserError: the digit net is not the one that the protocol names, or samples are not finite.
    """
    sampler, evaluation = config.sampler, config.evaluation
    data = shards.read_all(snapshot.data["root"])
    real = torch.as_tensor(data["x"])
    net, sha256 = load_digitnet(protocol.metric)
    if sha256 != protocol.feature_sha256:
        raise UserError(
            f"the digit net has sha256 {sha256[:12]}, and evaluation.protocol={protocol.metric} is named after "
            f"{protocol.feature_sha256[:12]}; put its weights back, or give them a row in selfguide.spec.metrics"
        )
    normaliser = Normaliser.of(snapshot.data["header"])
    parts: list[Tensor] = []
    nfe = 0
    batches = generate(
        snapshot,
        sampler,
        seed=evaluation.seed,
        count=evaluation.samples,
        batch=evaluation.batch,
        prior=evaluation.prior,
    )
    for made, evaluations in batches:
        status.enter("evaluate")
        check_finite(made, sum(map(len, parts)))
        parts.append(normaliser.pixels(made))
        nfe = max(nfe, evaluations)
        log.info(f"{sum(map(len, parts)):,} / {evaluation.samples:,} samples")
    pixels = torch.cat(parts)
    scores = score(net, real, pixels, protocol.metric)
    if (
        snapshot.config.guidance.learns_online
        and not conditions_each_patch(snapshot)
        and "y" in data
    ):
        each = torch.arange(len(real))  # a noise for each scan
        groups = nearest_prototypes(snapshot, normaliser.encode(real), each).cpu().numpy()
        scores |= agreement(data["y"], groups) | {"groups_used": float(len(np.unique(groups)))}
    return scores, nfe, (pixels.float() * (255 / TOP)).round().to(torch.uint8)


def score(
    net: DigitNet, real: Tensor, pixels: Tensor, metric: str = "fd_digits"
) -> dict[str, float]:
    """The distance with its error, the floor that real halves reach, copies, and whether samples look like digits."""
    reference, _ = embed(net, real)
    features, probabilities = embed(net, pixels)
    all_real = Reference.of(Moments.of(reference))
    fd = frechet(all_real, Moments.of(features, all_real.mean, BLOCKS))
    even, odd = half(len(real))
    copies, real_copies = copy_rate(real.numpy(), pixels.numpy())
    top, classes = probabilities[:1000].max(1)
    return {
        metric: fd.value,
        f"{metric}_se": fd.se,
        "floor": between(Moments.of(reference[even]), Moments.of(reference[odd])),
        "copy_rate": copies,
        "copy_rate_real": real_copies,
        "confident": (top >= 0.9).float().mean().item(),
        "classes": float(len(classes.unique())),
    } | fd.blocks
