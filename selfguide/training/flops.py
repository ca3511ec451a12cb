"""FLOPs of a training step, and the peak that a share of it is stated of.

MFU is the share of a device's peak that the FLOPs of the model make up, at the rate of whole steps (Chowdhery et al.
2022, appendix B). FLOPs are those of the products of matrices and of convolutions, counted from the network itself: the
usual 6 x parameters x tokens counts DiT-XL/2 by 1.46, since a third of its parameters act once an image. Backward
counts as twice the forward, and what is computed again to save memory counts nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from selfguide.diffusion.conditions import Condition
from selfguide.networks.branch import Branch
from selfguide.networks.student import build_student
from selfguide.spec.config import Config
from selfguide.spec.sizes import architecture

# TFLOP/s of dense bf16 products, by words of a device's name; the longest counts. Makers' data sheets.
PEAKS = {
    "A100": 312.0, "A800": 312.0,
    "H100": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H800": 989.4, "H20": 148.0,
    "H200": 989.4, "H200 NVL": 835.0, "GH200": 989.4, "B200": 2250.0, "GB200": 2500.0,
    "L4": 121.0, "L40": 181.0, "L40S": 362.0, "A10": 125.0, "A10G": 70.0, "RTX 4090": 165.2,
    # of one of the two devices that a card of it is to torch
    "MI250X": 191.5,
    "MI300X": 1307.4,
}  # fmt: skip


@dataclass(frozen=True)
class Flops:
    """Of one image: a training step of the student, with what its teacher makes for its branches, and a teacher's
    forward up to the layer whose features the head reads.
    """

    training: int
    extraction: int


@dataclass(frozen=True)
class Peak:
    """TFLOP/s of one device, and whose they are."""

    tflops: float
    name: str


def count_flops(config: Config) -> Flops:
    """Counts the configured network's, without computing anything: its tensors have shapes only."""
    net = architecture(config)
    with torch.device("meta"), torch.no_grad():
        student = build_student(config, 0).eval()
        # two, since a mean over one image has no spread
        x, tau = torch.zeros(2, net.channels, net.size, net.size), torch.zeros(2)
        condition = Condition.unconditional(2, "meta")
        student.backbone.train()  # which may route tokens past blocks
        forward = _counted(lambda: student(x, tau, condition))
        student.eval()
        read = _counted(lambda: student.features(x, tau, condition)) if student.layer else 0
        branches = [cast(Branch, branch) for branch in student.branches.values()]
        targets = _counted(
            lambda: [b.target(student.backbone, x, tau, condition) for b in branches]
        )
    return Flops((3 * forward + targets) // 2, read // 2)


def _counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_of(device: torch.device, given: float | None = None) -> Peak | None:
    """The peak of dense bf16 products; `given` TFLOP/s go before what is known. None of CPUs and unknown devices."""
    if given is not None:
        return Peak(given, "train.peak_tflops")
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # a part of one GPU, of which its name does not say how fast it is
    part = re.search(r"\bMIG\b", name)
    found = (each for each in PEAKS if not part and re.search(rf"\b{each}\b", name))
    known = max(found, key=len, default=None)
    return Peak(PEAKS[known], f"{known}, bf16, dense") if known else None
