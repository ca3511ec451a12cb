"""One rank of one attempt: builds what the loop works with, resumes, trains."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import shards
from selfguide.data.normaliser import Normaliser
from selfguide.diffusion.objectives import build_objective
from selfguide.distributed import RankInfo, any_rank_error, collectives, join, on_rank_0
from selfguide.guidance.build import build_components
from selfguide.models.execution import configure_execution, tell_of_compiling
from selfguide.networks.student import Student, build_student
from selfguide.representation.build import build_representation
from selfguide.spec.accumulation import cut_batch
from selfguide.spec.annotations import check_annotations, check_promises
from selfguide.spec.averages import averages_of
from selfguide.spec.config import Config
from selfguide.spec.corrections import kept_from_before
from selfguide.spec.files import read_config
from selfguide.spec.initial_weights import SCRATCH
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.run import Lease, RunFolder
from selfguide.training import checkpoint, probes, resume, roll_back, store
from selfguide.training.components import Components
from selfguide.training.ema import Averages
from selfguide.training.engine.build import build_engine
from selfguide.training.engine.layout import length
from selfguide.training.engine.protocol import DTYPES, keep_buffers_fp32
from selfguide.training.initialise import initialise
from selfguide.training.loop import publish_snapshot_if_due
from selfguide.training.mirror import Mirror
from selfguide.training.saver import Saver
from selfguide.training.stability import Stability
from selfguide.training.state import State
from selfguide.training.teacher import Teacher
from selfguide.training.telemetry import Telemetry
from selfguide.training.work import Training
from shards.errors import UserError
from shards.format.manifest import Manifest
from shards.read.mixing import identity, label_rates, load_alike
from shards.read.options import ReadOptions
from shards.read.stream import Stream

log = logging.getLogger(__name__)


def main(attempt: Path, rank: int, local_rank: int, world: int, status: RankStatus) -> None:
    """Trains the run that `attempt` belongs to, from its newest checkpoint if there is one.

    The caller calls `leave` at the end, and not after an error: it may wait for ranks that are gone.

    Raises:
        Preempted: on all ranks alike, where `status` of one was asked to stop.
    """
    config = read_config(attempt / "config.yaml")
    run = RunFolder(attempt.parent.parent)
    lease = Lease(run, int(attempt.name))
    rank_info = RankInfo(rank, local_rank, world)
    if rank_info.device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    telemetry = Telemetry(run, lease.number, rank_info, config.train.images, status)
    _check_device(config, rank_info)
    telemetry.say("joining", 0)
    join(rank_info, attempt / "rendezvous.json", config.engine.timeout_s)
    status.collectives = collectives
    # before an engine is built: DeepSpeed keeps some functions of torch.distributed as it finds them
    with telemetry.wall.hears_collectives():
        work(config, rank_info, lease, telemetry)


def _check_device(config: Config, rank_info: RankInfo) -> None:
    """A node whose GPUs do not answer must not join the others on its CPU."""
    if config.cluster.promises_gpus and rank_info.device.type != "cuda":
        raise UserError(
            f"rank {rank_info.rank} on {socket.gethostname()} sees no GPU; mend or exclude that node, or set "
            "cluster.request_gpus=false to train on CPUs"
        )


def work(config: Config, rank_info: RankInfo, lease: Lease, telemetry: Telemetry) -> None:
    """Everything between joining the ranks and leaving them."""
    sources = _load_manifests(config, lease.run)
    if config.cluster.checks_nodes:
        probes.check(config, rank_info, lease.run.attempt(lease.number), sources)
    # of several, fields and header are alike
    _check_annotations(config, sources[0], lease.run, rank_info)
    on_rank_0(lease.begin)  # before the look: an older attempt must not publish behind it
    found = resume.find_or_fetch(lease, rank_info, config.train)
    telemetry.damaged = [each.plain() for each in found.damaged]
    state = _begun(config, rank_info, lease, sources, found)
    telemetry.resumed_from = state.images if found.folder else None
    telemetry.say("starting", state.images)
    _say_what_begins(config, rank_info, state)
    state.passed, anew = on_rank_0(lambda: roll_back.passed(lease.run, state.images))
    if anew:
        # they are of positions that were passed over
        state.audits = None

    def open_stream() -> Stream:
        return shards.open(
            config.data.roots,
            global_batch=config.train.batch,
            micro_batch=cut_batch(config, rank_info.world).micro_batch,
            rank=rank_info.rank,
            world=rank_info.world,
            seed=config.seed,
            position=state.images + state.passed,
            options=ReadOptions.of(config.data, weights=config.data.shares),
            loaded=sources,  # not what the folder may hold by now
        )

    training = Training(
        config,
        rank_info,
        state,
        open_stream(),
        build_objective(config.path),
        Normaliser.of(sources[0].header),
        _about_data(config, sources),
        telemetry,
        lease,
        _saver(config, rank_info, lease, telemetry),
        _mirror(config, rank_info, lease, telemetry),
    )
    _train(training, open_stream, resumed=found.folder is not None)


def _begun(
    config: Config,
    rank_info: RankInfo,
    lease: Lease,
    sources: Sequence[Manifest],
    found: resume.Resume,
) -> State:
    """The state that an attempt begins with: of its checkpoint, or of image 0."""
    student = build_student(config, config.seed)
    # a checkpoint holds all that init gave, so a resumed run needs those weights no more
    origin = SCRATCH if found.folder else initialise(student, config, _promised_weights(lease.run))
    rates = label_rates(sources, config.data.shares)
    state = build_state(config, rank_info, student, rates, origin)
    if found.folder is not None:
        checkpoint.load(found.folder, state, rank_info)
    return state


def _say_what_begins(config: Config, rank_info: RankInfo, state: State) -> None:
    for kept in kept_from_before(config):
        log.warning(kept)
    origin, engine = state.origin, state.engine
    if origin["source"] != "scratch":
        labels = "saw labels" if origin["saw_labels"] else "never saw a label"
        log.info(f"begins from {origin['path']} ({origin['sha256'][:12]}), which {labels}")
    weights = next(engine.module.parameters())
    log.info(
        f"engine {engine.name}, {weights.dtype} weights on {weights.device}, {rank_info.world} ranks, "
        f"{engine.layout.total:,} parameters, {length(engine.ranges):,} of them stepped here"
    )


def _about_data(config: Config, sources: Sequence[Manifest]) -> dict[str, Any]:
    """What a snapshot says of the data."""
    manifest = sources[0]
    read = identity(sources, config.data.shares)
    data = {"manifest": read, "root": config.data.root, "header": manifest.header}
    if manifest.class_names:
        # so that a snapshot knows them where its data are not at hand
        data["class_names"] = [*manifest.class_names]
    return data


def _saver(config: Config, rank_info: RankInfo, lease: Lease, telemetry: Telemetry) -> Saver | None:
    if config.train.checkpoint_writer == "here":
        return None
    return Saver(config.train, rank_info, lease, telemetry)


def _mirror(
    config: Config, rank_info: RankInfo, lease: Lease, telemetry: Telemetry
) -> Mirror | None:
    if config.train.checkpoint_store is None:
        return None
    place = store.place_of(config.train.checkpoint_store, lease.run)
    return Mirror(place, rank_info, lease, telemetry.status)


def _train(training: Training, open_stream: Callable[[], Stream], *, resumed: bool) -> None:
    """Trains to the end, and closes what was opened, however that goes."""
    config, state, telemetry = training.config, training.state, training.telemetry
    ended = False
    try:
        if config.engine.compile:
            tell_of_compiling(telemetry.status)
        telemetry.begin(config, state.teaching, state.images)
        if resumed:
            # one that was lost or damaged: the checkpoint holds all that is in it
            publish_snapshot_if_due(training)
        roll_back.train(training, open_stream)
        ended = True
    except Exception as error:
        # closing waits for a reader, which may wait for a store
        if telemetry.status.fails is not None:
            telemetry.status.fails(error)
        raise
    finally:
        telemetry.close()
        training.stream.close()
        for beside in (training.saver, training.mirror):
            if beside is not None:
                # after an error nothing is waited for that may hang
                beside.close(wait=ended)
        if training.trace is not None:
            # last, for it waits for the device: by now all is saved, and how this rank ends is recorded
            training.trace.end(state.images)
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


def _check_annotations(
    config: Config, manifest: Manifest, run: RunFolder, rank_info: RankInfo
) -> None:
    """The sidecars must be those that the run was named after; one rank of each node reads them to their end."""
    promised = run.describe()["identity"].get("guidance", {})
    problem = None
    try:
        check_promises(
            check_annotations(config, manifest.hash), promised, bytes_too=rank_info.local_rank == 0
        )
    except UserError as error:
        problem = str(error)
    problem = any_rank_error(problem)
    if problem is not None:
        raise UserError(problem)


def _promised_weights(run: RunFolder) -> str | None:
    """sha256 of the weights that the run was submitted to begin from; None from scratch."""
    return run.describe()["identity"].get("init", {}).get("sha256")


def build_state(
    config: Config,
    rank_info: RankInfo,
    student: Student,
    histogram: list[float],
    origin: Mapping[str, Any],
) -> State:
    """Engine, averages, components and teacher around `student` at image 0; the same on every rank."""
    engine = build_engine(config, student, rank_info)
    train = config.train
    averages = Averages(
        engine, averages_of(config), train.ema_ramp, train.ema_rise, train.ramps_count
    )
    components = Components((*build_components(config, histogram), *build_representation(config)))
    teacher = build_teacher(config, rank_info) if components.want_teacher else None
    state = State(engine, averages, components, teacher, origin, Stability(config.train))
    if teacher is not None:
        state.refresh_teacher(buffers=True)
    return state


def build_teacher(config: Config, rank_info: RankInfo) -> Teacher:
    """A teacher in the compute dtype on the rank's device, whose weights are yet to come."""
    student = build_student(config, config.seed).to(rank_info.device, DTYPES[config.engine.dtype])
    keep_buffers_fp32(student)
    teacher = Teacher(student)
    configure_execution(teacher.module.backbone, config.engine, rank_info.device)
    return teacher
