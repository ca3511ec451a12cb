"""The DeepSpeed engine: ZeRO stage 1 or 2 over our own fused AdamW, started without DeepSpeed's launcher.

Rajbhandari et al. 2020, "ZeRO". Schedules, averages and checkpoints stay ours: DeepSpeed owns the partition of the
optimiser and the reduction of gradients, nothing else. Its step reads its own overflow flag and norm on the host.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.distributed import RankInfo
from selfguide.networks.student import Outputs, Student
from selfguide.spec.config import EngineConfig, TrainConfig
from selfguide.training.engine.layout import Layout, Owned, Shard
from selfguide.training.engine.protocol import Engine, Moments, Step, keep_buffers_fp32
from shards.errors import UserError

# DeepSpeed's issue 8224: gradients are silently wrong where a submodule is used twice in a step
_WRONG_GRADIENTS = ((0, 18, 3), (0, 19, 3))


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
    """ZeRO over the layout's groups; of each, a rank owns its partition without the padding."""

    def __init__(
        self,
        student: Student,
        layout: Layout,
        train: TrainConfig,
        config: EngineConfig,
        rank_info: RankInfo,
        *,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        _start_deepspeed(rank_info, config.timeout_s)
        import deepspeed

        trained = dict(student.named_parameters())
        # given as an object: the optimiser named in DeepSpeed's config would compile a C++ operator
        optimiser = torch.optim.AdamW(
            [
                {
                    "params": [trained[n] for n in layout.names_of(g)],
                    "weight_decay": g.weight_decay,
                }
                for g in layout.groups
            ],
            lr=train.learning_rate,
            betas=train.betas,
            fused=True,
        )
        self.engine, self._zero, _, _ = deepspeed.initialize(
            model=student,
            optimizer=optimiser,
            config={
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": train.clip or 0.0,
                "bf16": {"enabled": config.dtype == "bf16"},
                "zero_optimization": {
                    "stage": config.zero_stage,
                    "overlap_comm": False,  # a record of races in stages 1 and 2
                    "round_robin_gradients": False,  # the flat order must stay the layout's
                },
            },
        )
        self.name = f"DeepSpeed ZeRO-{self.zero_stage}"
        self.module = self.engine.module
        keep_buffers_fp32(self.module)
        self._check(layout)
        self._partitions: list[Tensor] = self._zero.single_partition_of_fp32_groups
        super().__init__(layout, self._own(layout), replicated=False)
        self._accumulation, self._micro = accumulation, 0

    def _check(self, layout: Layout) -> None:
        """ZeRO's groups must hold what the layout says, or averages and checkpoints would be scrambled."""
        names = {id(p): n for n, p in self.module.named_parameters()}
        held = [tuple(names[id(p)] for p in group) for group in self._zero.bit16_groups]
        padded = any(any(p) for p in self._zero.round_robin_bit16_padding)
        if held != [layout.names_of(group) for group in layout.groups] or padded:
            raise RuntimeError(
                "this DeepSpeed lays parameters out in another order; pin the version of constraints.txt"
            )

    def _own(self, layout: Layout) -> list[Owned]:
        """Of each group, this rank's partition; all are equally long, so the last may hold padding."""
        owned, rank = [], dist.get_rank()
        for group, partition in zip(layout.groups, self._partitions, strict=True):
            size = partition.numel()
            start = min(group.start + rank * size, group.stop)
            stop = min(start + size, group.stop)
            owned.append(Owned(start, stop, partition.detach()[: stop - start]))
        return owned

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
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        self._micro = (self._micro + 1) % self._accumulation
        if self._micro:
            return None
        # written by a kernel: a copy from the host would wait for the device
        applied, norm = self.engine.was_step_applied(), self.engine.get_global_grad_norm()
        device = self._partitions[0].device
        return Step(
            torch.full((), applied, dtype=torch.bool, device=device),
            norm if isinstance(norm, Tensor) else torch.full((), norm, device=device),
        )

    def refresh(self) -> None:
        self._zero.update_lp_params()

    def moments(self) -> Moments:
        states = [self._zero.optimizer.state.get(partition) for partition in self._partitions]
        held = [state for state in states if state]
        if not held:
            zeros = [tuple(torch.zeros_like(m) for m in self.masters) for _ in range(2)]
            return Moments(zeros[0], zeros[1], 0)

        def own(name: str) -> Shard:
            return tuple(s[name][: len(m)] for s, m in zip(held, self.masters, strict=True))

        return Moments(own("exp_avg"), own("exp_avg_sq"), int(held[0]["step"]))

    def load_moments(self, moments: Moments) -> None:
        def padded(values: Tensor, partition: Tensor) -> Tensor:
            full = torch.zeros_like(partition)
            full[: len(values)] = values
            return full

        loaded = zip(self._partitions, moments.first, moments.second, strict=True)
        for partition, first, second in loaded:
            self._zero.optimizer.state[partition] = {
                "step": torch.tensor(float(moments.count), device=partition.device),
                "exp_avg": padded(first, partition),
                "exp_avg_sq": padded(second, partition),
            }
