"""The DeepSpeed engine: ZeRO stages 0 to 3 over our own fused optimiser, started without DeepSpeed's launcher.

Rajbhandari et al. 2020, "ZeRO". Schedules, averages and checkpoints stay ours: DeepSpeed owns the partition of the
optimiser and the reduction of gradients, nothing else. Its step reads its own overflow flag and norm on the host; in
stage 0, which has neither, both are taken here and stay on the device.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.distributed import RankInfo
from selfguide.networks.student import Outputs, Student
from selfguide.spec.config import EngineConfig, TrainConfig
from selfguide.training.engine.layout import Layout
from selfguide.training.engine.optimiser import FlatOptimiser, fused_adam
from selfguide.training.engine.partitions import Intervals, Partitions, Slices
from selfguide.training.engine.protocol import Engine, Moments, Step, keep_buffers_fp32
from selfguide.training.engine.torch import judged
from shards.errors import UserError

# DeepSpeed's issue 8224: gradients are silently wrong where a submodule is used twice in a step
_WRONG_GRADIENTS = ((0, 18, 3), (0, 19, 3))
# stands among the numbers of modules that use a parameter, which DeepSpeed counts from 0
_SAMPLING = -1


def check_version(version: str) -> None:
    """Refuses a DeepSpeed that is known to train wrongly.

    Raises:
        UserError: `version` is one of them.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if _WRONG_GRADIENTS[0] <= found <= _WRONG_GRADIENTS[1]:
        raise UserError(
            f"DeepSpeed {version} makes wrong gradients of modules that are used twice in a step (deepspeedai/DeepSpeed"
            " issue 8224): pip install 'deepspeed>=0.19.8', or train with engine=torch"
        )


def _start_deepspeed(rank_info: RankInfo, timeout_s: int) -> None:
    """Brings DeepSpeed up on the process group that is already there."""
    if rank_info.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_TIMEOUT", str(max(1, timeout_s // 60)))
    # torch renamed the collectives that DeepSpeed still calls
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed.*|deepspeed.*"
    )
    import deepspeed

    check_version(deepspeed.__version__)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if rank_info.device.type == "cpu":
        # On CPU DeepSpeed would compile a shared-memory collective at start: 30 s, and no start at all without a
        # C++ compiler. Its own table of what can be built is the only way to say no; a test watches this name.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    backend = "nccl" if rank_info.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


class DeepSpeedEngine(Engine):
    """What all stages share: DeepSpeed's forward, and its backward, which reduces."""

    def __init__(
        self,
        student: Student,
        optimiser: torch.optim.Optimizer,
        train: TrainConfig,
        config: EngineConfig,
        rank_info: RankInfo,
        *,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        """Starts DeepSpeed. A subclass then builds the parameter space, which depends on the stage."""
        _start_deepspeed(rank_info, config.timeout_s)
        import deepspeed

        stage = config.zero_stage
        self.engine, self._zero, _, _ = deepspeed.initialize(
            model=student,
            # given as an object: the optimiser named in DeepSpeed's config would compile a C++ operator
            optimizer=optimiser,
            config={
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": (train.clip or 0.0) if stage else 0.0,
                "bf16": {"enabled": config.dtype == "bf16"},
                "zero_optimization": {
                    "stage": stage,
                    # a record of races in stages 1 and 2. Stage 3 would overlap by itself; its NaNs under torch 2.10
                    # and later (pull request 7898, in 0.18.8) were a race of two streams, which are one without
                    "overlap_comm": False,
                    "round_robin_gradients": False,  # the flat order must stay the layout's
                    # it would replace torch's F.linear in the whole process, with another rounding
                    "memory_efficient_linear": False,
                },
            },
        )
        self.name = f"DeepSpeed ZeRO-{self.zero_stage}"
        self.module = self.engine.module
        keep_buffers_fp32(self.module)
        self._accumulation, self._micro = accumulation, 0

    @property
    def zero_stage(self) -> int:
        """As the live engine reports it."""
        return int(self.engine.zero_optimization_stage())

    def forward(
        self,
        x: Tensor,
        tau: Tensor,
        condition: Condition,
        features: Tensor | None,
        before: Sequence[Tensor] = (),
        last: bool = True,
    ) -> Outputs:
        return self.engine(x, tau, condition, features, before, last)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> Step | None:
        self._micro = (self._micro + 1) % self._accumulation
        if self._micro:
            self.engine.step()
            return None
        return self._step(learning_rate)

    def _step(self, learning_rate: float) -> Step:
        """The step on the accumulation boundary."""
        raise NotImplementedError


class ReplicatedEngine(DeepSpeedEngine):
    """Stage 0: every rank steps the whole flat vector, as bare torch does; fp32 only."""

    def __init__(
        self, student: Student, layout: Layout, train: TrainConfig, *rest: Any, **batch: Any
    ) -> None:
        flat = layout.flatten_module(student)
        self._optimiser = FlatOptimiser(layout, flat, train)
        super().__init__(student, self._optimiser.adam, train, *rest, **batch)
        views = layout.split(flat)
        moved = [
            name
            for name, parameter in self.module.named_parameters()
            if name in views and parameter.data_ptr() != views[name].data_ptr()
        ]
        if moved:
            raise RuntimeError(
                "this DeepSpeed moves parameters; pin the version of constraints.txt"
            )
        Engine.__init__(self, layout, self._optimiser.owned, replicated=True)
        self._clip = train.clip

    def _step(self, learning_rate: float) -> Step:
        gradients = {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}
        gradient = self.layout.flatten(gradients)  # of all ranks already
        done = judged(gradient, self._clip)
        self._optimiser.prepare(gradient, done.applied, learning_rate)
        self.engine.step()
        return done

    def refresh(self) -> None:
        """Does nothing: the weights are views of the masters."""

    def moments(self) -> Moments:
        return self._optimiser.moments()

    def load_moments(self, moments: Moments) -> None:
        self._optimiser.load_moments(moments)


class PartitionedEngine(DeepSpeedEngine):
    """Stages 1 to 3: a rank steps what its partitions hold of the layout's groups."""

    def __init__(
        self, student: Student, layout: Layout, train: TrainConfig, *rest: Any, **batch: Any
    ) -> None:
        trained = dict(student.named_parameters())
        groups = [
            {"params": [trained[n] for n in layout.names_of(g)], "weight_decay": g.weight_decay}
            for g in layout.groups
        ]
        super().__init__(student, fused_adam(train, groups), train, *rest, **batch)
        kind: type[Partitions] = Slices if self.zero_stage == 3 else Intervals
        self._partitions = kind(self.module, self._zero, layout)
        Engine.__init__(self, layout, self._partitions.owned, replicated=False)

    def _step(self, learning_rate: float) -> Step:
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        # written by a kernel: a copy from the host would wait for the device
        applied, norm = self.engine.was_step_applied(), self.engine.get_global_grad_norm()
        device = self.masters[0].device
        return Step(
            torch.full((), applied, dtype=torch.bool, device=device),
            norm if isinstance(norm, Tensor) else torch.full((), norm, device=device),
        )

    def refresh(self) -> None:
        self._partitions.refresh()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        if self.zero_stage < 3:
            yield
            return
        import deepspeed

        # the others are whole all the time; attributes of parameters are DeepSpeed's
        every: list[Any] = [*self.module.parameters()]
        shared = [each for each in every if not each.ds_persist]
        with deepspeed.zero.GatheredParameters(shared):
            # a module that is called lets its parameters go afterwards, unless another one is said to use them
            for each in shared:
                each.ds_active_sub_modules.add(_SAMPLING)
            try:
                yield
            finally:
                for each in shared:
                    each.ds_active_sub_modules.discard(_SAMPLING)

    def moments(self) -> Moments:
        return self._partitions.moments()

    def load_moments(self, moments: Moments) -> None:
        self._partitions.load_moments(moments)
