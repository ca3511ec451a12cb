"""The configured engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from selfguide.distributed import RankInfo
from selfguide.models.execution import configure_execution
from selfguide.networks.student import Student
from selfguide.spec.accumulation import cut_batch
from selfguide.spec.config import Config, TrainConfig
from selfguide.training.engine.deepspeed import PartitionedEngine, ReplicatedEngine
from selfguide.training.engine.layout import GroupRule, Layout
from selfguide.training.engine.protocol import DTYPES, Engine
from selfguide.training.engine.tags import tags_of
from selfguide.training.engine.torch import TorchEngine

# last parts of the names of biases and position embeddings, which are all that Xiang et al. 2025 spare
_UNDECAYED = ("bias", "positions")
# what takes vectors or images to others
_MAPS = ("matrix", "kernel")


def build_engine(
    config: Config, student: Student, rank_info: RankInfo, layout: Layout | None = None
) -> Engine:
    """An engine over `student`, which it takes over, moves to the rank's device and prepares to run as asked.

    `layout` groups its parameters; without one they are in those of `layout_of`.

    Raises:
        UserError: engine.compile where nothing can be compiled.
    """
    student = student.to(rank_info.device)
    configure_execution(student.backbone, config.engine, rank_info.device)
    exact = {name: value.detach().clone() for name, value in _floats(student)}
    if layout is None:
        layout = layout_of(config, student)
    engine = _engine(config, student, layout, rank_info)
    if config.engine.dtype != "fp32":
        _restore(engine, exact)
    return engine


def layout_of(config: Config, student: Student) -> Layout:
    """The parameter space of a run: its parameters, in groups that the optimiser treats apart."""
    return Layout.of(student, _group_rule(student, config.train))


def _group_rule(student: Student, train: TrainConfig) -> GroupRule:
    """Groups by what weight decay and Muon do to a parameter: one, where both treat all of them alike."""
    tags = tags_of(student)

    def rule(name: str, parameter: Tensor) -> tuple[str, float, bool]:
        tag, last = tags[name], name.rpartition(".")[2]
        if train.decayed == "weights":
            decayed = last not in _UNDECAYED
        else:
            decayed = train.decayed == "all" or tag in _MAPS or not train.weight_decay
        muon = train.optimiser == "muon" and tag == "matrix"
        kind = "all" if decayed else "undecayed"
        return ("muon" if muon else kind), train.weight_decay if decayed else 0.0, muon

    return rule


def _floats(student: Student) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, that a change of dtype rounds."""
    yield from student.named_parameters()
    yield from ((n, b) for n, b in student.named_buffers() if b.is_floating_point())


def _restore(engine: Engine, exact: dict[str, Tensor]) -> None:
    """Masters and buffers as they were before the weights became bf16, from which both engines cut their masters."""
    with torch.no_grad():
        for master, values in zip(
            engine.masters, engine.cut(engine.layout.flatten(exact)), strict=True
        ):
            master.copy_(values)
        for name, buffer in engine.module.named_buffers():
            if name in exact:
                buffer.copy_(exact[name])
    engine.refresh()


def _engine(config: Config, student: Student, layout: Layout, rank_info: RankInfo) -> Engine:
    cut = cut_batch(config, rank_info.world)
    if config.engine.backend == "torch":
        dtype = DTYPES[config.engine.dtype]
        return TorchEngine(
            student, layout, config.train, dtype=dtype, accumulation=cut.accumulation
        )
    kind = PartitionedEngine if config.engine.zero_stage else ReplicatedEngine
    return kind(
        student,
        layout,
        config.train,
        config.engine,
        rank_info,
        micro_batch=cut.micro_batch,
        accumulation=cut.accumulation,
    )
