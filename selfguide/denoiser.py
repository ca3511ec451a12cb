"""The network as an ODE's right-hand side: time convention, dtype, and classifier-free guidance in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from selfguide.conditions import Condition
from selfguide.paths import Path


@dataclass
class Denoiser:
    """Guided velocity f_u + g (f_c - f_u); `g` is the total weight, 1 is none and 0 unconditional.

    Inside `interval` (noise-times, both ends in) the guided form is taken, outside it the plain conditional one,
    and its unconditional half is not computed. The state stays in its own dtype; the net gets its own.
    """

    model: nn.Module
    path: Path
    condition: Condition
    g: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    evaluations: int = field(default=0, init=False)

    def velocity(self, x: Tensor, tau: float) -> Tensor:
        """v (B, C, H, W) at noise-time `tau`; counts one network evaluation, guided or not."""
        self.evaluations += 1
        if self.g == 1.0 or not self.interval[0] <= tau <= self.interval[1]:
            return self._net(x, tau, self.condition)
        unguided = self._net(x, tau, self.condition.null())
        if self.g == 0.0:
            return unguided
        return unguided + self.g * (self._net(x, tau, self.condition) - unguided)

    def _net(self, x: Tensor, tau: float, condition: Condition) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        times = torch.full((len(x),), tau, device=x.device, dtype=torch.float32)
        return self.model(x.to(dtype), times, condition).to(x.dtype)
