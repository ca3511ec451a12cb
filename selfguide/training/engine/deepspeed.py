"""The DeepSpeed engine: ZeRO stage 1 or 2 over our own fused AdamW, started without DeepSpeed's launcher.

Rajbhandari et al. 2020, "ZeRO". Schedules, averages and checkpoints stay ours: DeepSpeed owns the partition of the
optimiser and the reduction of gradients, nothing else.
"""

from __future__ import annotations

import logging
import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.distributed import Place
from selfguide.networks.student import Outputs, Student
from selfguide.spec.config import EngineConfig, TrainConfig
from selfguide.training.engine.protocol import Layout, Step, keep_buffers_wide


def _prepare(place: Place, timeout_s: int) -> None:
    """Brings DeepSpeed up on the process group that is already there."""
    if place.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_TIMEOUT", str(max(1, timeout_s // 60)))
    # torch renamed the collectives that DeepSpeed still calls
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed.*|deepspeed.*"
    )
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if place.device.type == "cpu":
        # On CPU DeepSpeed would compile a shared-memory collective at start: 30 s, and no start at all without a
        # C++ compiler. Its own table of what can be built is the only way to say no; a test watches this name.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


class DeepSpeedEngine:
    """ZeRO over one parameter group; the slice is this rank's partition without its padding."""

    def __init__(
        self,
        student: Student,
        train: TrainConfig,
        config: EngineConfig,
        place: Place,
        *,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        _prepare(place, config.timeout_s)
        import deepspeed

        self.layout = Layout.of(student)
        parameters = [p for p in student.parameters() if p.requires_grad]
        # given as an object: the optimiser named in DeepSpeed's config would compile a C++ operator
        optimiser = torch.optim.AdamW(
            parameters,
            lr=train.learning_rate,
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self.engine, self._zero, _, _ = deepspeed.initialize(
            model=student,
            optimizer=optimiser,
            config={
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": train.clip,
                "bf16": {"enabled": config.dtype == "bf16"},
                "zero_optimization": {
                    "stage": config.zero_stage,
                    "overlap_comm": False,  # a record of races in stages 1 and 2
                    "round_robin_gradients": False,  # the flat order must stay the module's
                },
            },
        )
        self.name = f"DeepSpeed ZeRO-{self.zero_stage}"
        self.module: Student = self.engine.module
        keep_buffers_wide(self.module)
        self._partition: Tensor = self._zero.single_partition_of_fp32_groups[0]
        self._accumulation, self._micro = accumulation, 0
        rank = dist.get_rank()
        size = self._partition.numel()
        self.start = min(rank * size, self.layout.total)
        self.stop = min((rank + 1) * size, self.layout.total)
        self.master = self._partition.detach()[: self.stop - self.start]
        self._check_layout()

    def _check_layout(self) -> None:
        """The slice must hold what the layout says, or averages and checkpoints would be scrambled."""
        names = {id(p): n for n, p in self.module.named_parameters()}
        held = tuple(names[id(p)] for p in self._zero.bit16_groups[0])
        padded = any(any(p) for p in self._zero.round_robin_bit16_padding)
        if held != self.layout.names or padded or len(self._zero.bit16_groups) != 1:
            raise RuntimeError(
                "this DeepSpeed lays parameters out in another order; pin the version of constraints.txt"
            )

    @property
    def zero_stage(self) -> int:
        """As the live engine reports it."""
        return int(self.engine.zero_optimization_stage())

    def forward(
        self, x: Tensor, tau: Tensor, condition: Condition, features: Tensor | None
    ) -> Outputs:
        return self.engine(x, tau, condition, features)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> Step | None:
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        self._micro = (self._micro + 1) % self._accumulation
        if self._micro:
            return None
        return Step(bool(self.engine.was_step_applied()), float(self.engine.get_global_grad_norm()))

    def refresh(self) -> None:
        self._zero.update_lp_params()

    def gather(self, shard: Tensor) -> Tensor:
        size = self._partition.numel()
        mine = torch.zeros(size, dtype=torch.float32, device=shard.device)
        mine[: len(shard)] = shard
        full = torch.empty(size * dist.get_world_size(), dtype=torch.float32, device=shard.device)
        dist.all_gather_into_tensor(full, mine)
        return full[: self.layout.total]

    def moments(self) -> tuple[Tensor, Tensor, int]:
        state = self._zero.optimizer.state.get(self._partition)
        if not state:
            empty = torch.zeros_like(self.master)
            return empty, empty.clone(), 0
        held = self.stop - self.start
        return state["exp_avg"][:held], state["exp_avg_sq"][:held], int(state["step"])

    def load_moments(self, first: Tensor, second: Tensor, count: int) -> None:
        def padded(values: Tensor) -> Tensor:
            full = torch.zeros_like(self._partition)
            full[: len(values)] = values
            return full

        step = torch.tensor(float(count), device=self._partition.device)
        self._zero.optimizer.state[self._partition] = {
            "step": step, "exp_avg": padded(first), "exp_avg_sq": padded(second)
        }  # fmt: skip
