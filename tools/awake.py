"""Networks as they are after a while of training: with gates and last layers that are no longer zero."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def awake(net: Net) -> Net:
    """Adds to every weight the same small noise each time: behind its initial zeros any number would look right."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        with torch.no_grad():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return net
