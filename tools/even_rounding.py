"""Adam's fused kernels on CPUs, made to round each number alike, so that engines can be compared to the bit.

These kernels step what is left behind a tensor's last whole vector of numbers in instructions of its own, which differ
in the last bit of a second moment. Which numbers those are depends on how an engine lays out what it steps, and on the
number of ranks. Training does not mind; a comparison would call engines different that are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# a multiple of the numbers that a fused kernel takes at once: 4, 8 or, with AVX-512, 16
_LANES = 16


@contextmanager
def even_rounding() -> Iterator[None]:
    """Has every Adam of this process step the last numbers of its tensors in whole vectors, too."""
    tails = _Tails()
    hooks = (
        register_optimizer_step_pre_hook(tails.keep),
        register_optimizer_step_post_hook(tails.step),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Tails:
    """Keeps what is left behind the last whole vector of each tensor before a step, and steps it again behind zeros."""

    def __init__(self) -> None:
        # of each group: parameters, and of each master, gradient, both moments and count before the step
        self._kept: list[tuple[dict[str, Any], list[Tensor], list[list[Tensor]]]] = []

    def keep(self, optimiser: Optimizer, *_: Any) -> None:
        self._kept = []
        for group in optimiser.param_groups if isinstance(optimiser, Adam) else ():
            tailed = [p for p in group["params"] if p.grad is not None and p.numel() % _LANES]
            if tailed:
                copies = zip(*(_copies(p, optimiser.state[p]) for p in tailed), strict=True)
                self._kept.append((group, tailed, [list(each) for each in copies]))

    def step(self, optimiser: Optimizer, *_: Any) -> None:
        for group, tailed, (masters, gradients, first, second, counts) in self._kept:
            (adamw if isinstance(optimiser, AdamW) else adam)(
                masters, gradients, first, second, [], counts,
                fused=True, found_inf=getattr(optimiser, "found_inf", None), amsgrad=False, maximize=False,
                beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip
            for parameter, *stepped in zip(tailed, masters, first, second, strict=True):
                state = optimiser.state[parameter]
                wholes = parameter.detach(), state["exp_avg"], state["exp_avg_sq"]
                for whole, padded in zip(wholes, stepped, strict=True):
                    end = _end(whole)
                    end.copy_(padded[: end.numel()])


def _copies(parameter: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The end of a parameter, its gradient and its moments, (_LANES,) each, and how often it was stepped."""
    assert parameter.grad is not None
    # before its first step an optimiser has no state
    zeros = torch.zeros_like(parameter)
    first, second = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
    ends = (_padded(each) for each in (parameter.detach(), parameter.grad, first, second))
    return *ends, state.get("step", torch.zeros(())).clone()


def _padded(whole: Tensor) -> Tensor:
    end = _end(whole)
    return nn.functional.pad(end, (0, _LANES - end.numel())).clone()


def _end(whole: Tensor) -> Tensor:
    """What is left behind the last whole vector."""
    return whole.view(-1)[-(whole.numel() % _LANES) :]
