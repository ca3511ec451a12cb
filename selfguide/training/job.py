"""One rank of one attempt: builds what the loop works with, resumes, trains, and always leaves its group."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import shards
from selfguide.data.autoencoders import Normaliser
from selfguide.diffusion.objectives import build_objective
from selfguide.distributed import Place, join, leave, said_by_any
from selfguide.guidance.build import build_source
from selfguide.models.execution import prepare
from selfguide.networks.student import Student, build_student
from selfguide.spec.annotations import check_annotations, check_promises
from selfguide.spec.averages import averages_of
from selfguide.spec.config import Config, OnlineGuidance
from selfguide.spec.files import read_config
from selfguide.spec.initial_weights import SCRATCH
from selfguide.spec.run import Lease, RunFolder
from selfguide.training import checkpoint
from selfguide.training.ema import Averages
from selfguide.training.engine.build import build_engine, micro_batch
from selfguide.training.engine.layout import length
from selfguide.training.engine.protocol import DTYPES, Engine, keep_buffers_wide
from selfguide.training.initialise import initialise
from selfguide.training.loop import Training, switch_images, train
from selfguide.training.state import State
from selfguide.training.teacher import Teacher
from selfguide.training.telemetry import Telemetry
from shards.errors import UserError
from shards.format.manifest import Manifest
from shards.read.mixing import identity, label_rates, load_alike
from shards.read.options import ReadOptions


def main(attempt: Path, rank: int, local_rank: int, world: int) -> None:
    """Trains the run that `attempt` belongs to, from its newest checkpoint if there is one."""
    config = read_config(attempt / "config.yaml")
    run = RunFolder(attempt.parent.parent)
    lease = Lease(run, int(attempt.name))
    place = Place(rank, local_rank, world)
    if place.device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    telemetry = Telemetry(run, lease.number, place, config.train.images)
    _check_device(config, place)
    telemetry.say("joining ranks", 0)
    join(place, attempt / "rendezvous.json", config.engine.timeout_s)
    work(config, place, lease, telemetry)
    leave()  # not after an error: it may wait for ranks that are gone, and the exit record would never come


def _check_device(config: Config, place: Place) -> None:
    """A node whose GPUs do not answer must not join the others on its CPU."""
    wanted = config.cluster.kind == "slurm" and config.cluster.request_gpus
    if wanted and place.device.type != "cuda":
        raise UserError(
            f"rank {place.rank} on {socket.gethostname()} sees no GPU; mend or exclude that node, or set "
            "cluster.request_gpus=false to train on CPUs"
        )


def work(config: Config, place: Place, lease: Lease, telemetry: Telemetry) -> None:
    """Everything between joining the ranks and leaving them."""
    sources = _load_manifests(config, lease.run)
    manifest = sources[0]  # of several, fields and header are alike
    _check_annotations(config, manifest, lease.run, place)
    if place.rank == 0:
        lease.begin()  # before the look: an older attempt must not publish behind it
    found = checkpoint.newest(lease.run.checkpoints)
    student = build_student(config, config.seed)
    # a checkpoint holds all that init gave, so a resumed run needs those weights no more
    origin = SCRATCH if found else initialise(student, config, _promised_weights(lease.run))
    state = build_state(config, place, student, label_rates(sources, config.data.shares), origin)
    if found is not None:
        checkpoint.load(found, state, place)
    telemetry.say("starting", state.images)
    if place.rank == 0 and origin["source"] != "scratch":
        labels = "saw labels" if origin["saw_labels"] else "never saw a label"
        print(f"begins from {origin['path']} ({origin['sha256'][:12]}), which {labels}", flush=True)
    if place.rank == 0:
        weights = next(state.engine.module.parameters())
        print(
            f"engine {state.engine.name}, {weights.dtype} weights on {weights.device}, {place.world} ranks, "
            f"{state.engine.layout.total:,} parameters, "
            f"{length(state.engine.ranges):,} of them stepped here",
            flush=True,
        )
    stream = shards.open(
        config.data.roots,
        global_batch=config.train.batch,
        micro_batch=micro_batch(config, place.world),
        rank=place.rank,
        world=place.world,
        seed=config.seed,
        position=state.images,
        options=ReadOptions.of(config.data, weights=config.data.shares),
        loaded=sources,  # not what the folder may hold by now
    )
    header = manifest.header
    read = identity(sources, config.data.shares)
    data = {"manifest": read, "root": config.data.root, "header": header}
    try:
        normaliser = Normaliser.of(header)
        objective = build_objective(config.path)
        train(Training(config, place, state, stream, objective, normaliser, data, telemetry, lease))
    finally:
        stream.close()
    telemetry.say("done", state.images)


def _load_manifests(config: Config, run: RunFolder) -> list[Manifest]:
    """The manifests of the shards, which must be those that the run was named after."""
    data = config.data
    _, found = load_alike(data.roots, data.shares)
    promised, read = run.describe()["identity"]["data"]["manifest"], identity(found, data.shares)
    if read != promised:
        mixed = f" mixed with {', '.join(data.mix)}" if data.mix else ""
        raise UserError(
            f"data.root={data.root}{mixed} holds manifest {read[:12]}, and this run was begun on "
            f"{promised[:12]}; put those shards back, or submit a new run"
        )
    return found


def _check_annotations(config: Config, manifest: Manifest, run: RunFolder, place: Place) -> None:
    """The sidecars must be those that the run was named after; one rank of each node reads them to their end."""
    promised = run.describe()["identity"].get("guidance", {})
    problem = None
    try:
        check_promises(
            check_annotations(config, manifest.hash), promised, bytes_too=place.local == 0
        )
    except UserError as error:
        problem = str(error)
    problem = said_by_any(problem)
    if problem is not None:
        raise UserError(problem)


def _promised_weights(run: RunFolder) -> str | None:
    """sha256 of the weights that the run was submitted to begin from; None from scratch."""
    return run.describe()["identity"].get("init", {}).get("sha256")


def build_state(
    config: Config,
    place: Place,
    student: Student,
    histogram: list[float],
    origin: Mapping[str, Any],
) -> State:
    """Engine, averages, guidance source and teacher around `student` at image 0; the same on every rank."""
    engine = build_engine(config, student, place)
    averages = Averages(engine, averages_of(config.train), config.train.ema_ramp)
    source = build_source(config, histogram, switch_images(config))
    return State(engine, averages, source, _teacher(config, place, engine, averages), origin)


def _teacher(config: Config, place: Place, engine: Engine, averages: Averages) -> Teacher | None:
    if not isinstance(config.guidance, OnlineGuidance):
        return None
    student = build_student(config, config.seed).to(place.device, DTYPES[config.engine.dtype])
    keep_buffers_wide(student)
    teacher = Teacher(student)
    prepare(teacher.module.backbone, config.engine, place.device)
    teacher.refresh(averages.weights(), engine.module)
    return teacher
