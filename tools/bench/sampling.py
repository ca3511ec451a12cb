"""What guidance costs: conditional and unconditional half of the denoiser in one batch of 2B, or in turn.

`selfguide.diffusion.denoiser.LITTLE` follows these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.paths import RectifiedFlow
from selfguide.models import build
from selfguide.models.backbone import Backbone
from tools.bench.harness import Row, Variant, measure

TITLE = "guidance: one guided evaluation, halves in one batch against in turn (ratio to in turn)"
# the digits' net sees little work an image, DiT-S/2 on 32 x 32 latents much
CASES = (
    ("dit_digits", 1),
    ("dit_digits", 16),
    ("dit_digits", 64),
    ("dit_digits", 500),
    ("dit_s_2", 1),
    ("dit_s_2", 4),
)


def suite(repeats: int) -> list[Row]:
    rows = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, images in CASES:
        net = build(name, classes=10).to(device).eval()
        in_turn, together = _evaluation(net, images, False), _evaluation(net, images, True)
        # a unit long enough for the clock
        units = 20 if name == "dit_digits" and images < 100 else 1
        variants = [
            Variant("in turn", _times(in_turn, units)),
            Variant("one batch", _times(together, units)),
        ]
        found = measure(variants, repeats=repeats, units=units, fence=_done)
        rows += [replace(row, name=f"{name}, {images} images: {row.name}") for row in found]
    return rows


def _evaluation(net: Backbone, images: int, batched: bool) -> Callable[[], object]:
    device = next(net.parameters()).device
    condition = Condition.of(id=torch.zeros(images, dtype=torch.int64, device=device))
    denoiser = Denoiser(net, RectifiedFlow(), condition, 1.5, batched=batched)
    x = torch.randn(images, net.net.channels, net.net.size, net.net.size, device=device)

    @torch.no_grad()
    def run() -> object:
        return denoiser.velocity(x, 0.5)

    return run


def _times(run: Callable[[], object], count: int) -> Callable[[], object]:
    return lambda: [run() for _ in range(count)]


def _done() -> None:
    """Kernels of a GPU run behind the clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
