"""`engine=`: who takes the optimiser step, DeepSpeed ZeRO or bare/DDP torch as its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from selfguide.spec.config.laws import AtLeast, NotIdentity


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Backend, precision and execution of a training step."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    # torch.compile, block by block
    compile: bool = False
    # activations inside blocks are computed again in backward: less memory, a third more work, the same bits
    recompute: Annotated[bool, NotIdentity()] = False
    # for UNets on GPUs
    channels_last: bool = False
    # of one collective, in seconds
    timeout_s: Annotated[int, AtLeast(1), NotIdentity()] = 600
