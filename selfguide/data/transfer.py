"""Arrays of the host on the device, without making the host wait for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_device(array: Any, device: torch.device | str) -> Tensor:
    """`array` (NumPy's or a tensor of the CPU) on `device`, of the same type and shape; on the CPU it is not copied.

    A copy of ordinary memory to a GPU waits until all that was asked of the GPU before is done. One of page-locked
    memory is queued behind it instead, and torch keeps that memory until the copy has been made.
    """
    held = torch.as_tensor(array)
    if torch.device(device).type != "cuda":
        return held.to(device)
    return held.pin_memory().to(device, non_blocking=True)
