"""What a backbone costs: ms per image forward, and forward and backward, ours eager and compiled, to a library's.

And what self-conditioning adds to a step of training, in turn with the plain network.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.models import assemble
from selfguide.models.backbone import Backbone
from selfguide.models.execution import configure_execution
from selfguide.spec.architecture import Architecture
from selfguide.spec.config import EngineConfig
from selfguide.spec.sizes import override, row
from shards import cli
from shards.errors import UserError
from tools.awake import awake
from tools.bench.harness import Row, Variant, measure
from tools.bench.libraries import library_network

TITLE = "models: ms per image, diffusers' or timm's network of the same size against ours"

# LightningDiT is published as B and XL: its parts at DiT-S's width stand in for an S
SMALL: dict[str, Architecture] = {
    "dit_s_2": row("dit_s_2"),
    "lightningdit_s_1": override("lightningdit_b_1", width=384, depth=12, heads=6),
    "uvit_s_2": row("uvit_s_2"),
    "unet_ddpm": row("unet_ddpm"),
}
LARGER = (
    "dit_b_2", "dit_l_2", "dit_xl_2", "lightningdit_b_1", "lightningdit_xl_1",
    "uvit_m_4", "uvit_l_2", "uvit_h_2",
    "unet_ddpmpp", "unet_edm_32", "unet_edm_64", "unet_sgdm_32", "unet_sgdm_64",
)  # fmt: skip
SIZES = {"s": SMALL, "all": SMALL | {name: row(name) for name in LARGER}}


def suite(
    repeats: int, sizes: str = "s", clock: Callable[[], float] = time.perf_counter
) -> list[Row]:
    """fp32 on CPU, one image at a time; bf16 and 32 images on a GPU, where small batches time the launches."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype, batch = (torch.bfloat16, 32) if cuda else (torch.float32, 1)
    rows = []
    for name, net in SIZES[sizes].items():
        millions = net.parameters() / 1e6
        cli.console(stderr=True).print(f"  {name}, {millions:.1f} M parameters ...", style="dim")
        ours = awake(assemble(net)).to(device, dtype)
        for what, variants in chain(_variants(ours, batch), self_conditioned_steps(ours, batch)):
            named = [Variant(f"{name} {what}: {v.name}", v.run) for v in variants]
            fence = torch.cuda.synchronize if cuda else lambda: None
            rows += measure(named, repeats=repeats, fence=fence, units=batch, clock=clock)
    return rows


def _variants(ours: Backbone, batch: int) -> Iterator[tuple[str, list[Variant]]]:
    net, weight = ours.net, next(ours.parameters())
    x, tau, ids, condition = _inputs(ours, batch)
    library, theirs, their_forward = library_network(net)
    theirs = theirs.to(weight.device, weight.dtype)
    compiled = copy.deepcopy(ours)
    configure_execution(compiled, EngineConfig(compile=True), weight.device)
    forwards: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        library: (theirs, lambda: their_forward(x, tau, ids)),
        "ours": (ours, lambda: ours(x, tau, condition)),
        "ours, compiled": (compiled, lambda: compiled(x, tau, condition)),
    }
    yield "forward", [Variant(n, _forward(f)) for n, (_, f) in forwards.items()]
    yield (
        "forward+backward",
        [Variant(n, _backward(m, f)) for n, (m, f) in forwards.items()],
    )
    middle = net.middle
    yield (
        f"features of layer {middle} of {len(net.layers)}",
        [
            Variant(
                "the whole network",
                _forward(lambda: ours.with_features(x, tau, condition, [middle])[1][0]),
            ),
            Variant(
                "as far as the layer", _forward(lambda: ours.features(x, tau, condition, middle))
            ),
        ],
    )


def self_conditioned_steps(plain: Backbone, batch: int) -> Iterator[tuple[str, list[Variant]]]:
    """A step of AdamW without and with self-conditioning by the middle layer; nothing where a net has no such path."""
    weight, layer = next(plain.parameters()), plain.net.layer_of(None).name
    try:
        net = replace(plain.net, self_condition=layer)
    except UserError:
        return
    ours = awake(assemble(net)).to(weight.device, weight.dtype)
    inputs = _inputs(plain, batch)
    yield (
        f"step, self-conditioned by {layer}",
        [Variant("without", _step(plain, *inputs)), Variant("with", _step(ours, *inputs))],
    )


def _step(
    net: Backbone, x: Tensor, tau: Tensor, ids: Tensor | None, condition: Condition
) -> Callable[[], object]:
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
    backward = _backward(net, lambda: net(x, tau, condition))

    def run() -> None:
        backward()
        optimiser.step()

    return run


def _inputs(net: Backbone, batch: int) -> tuple[Tensor, Tensor, Tensor | None, Condition]:
    """Images, noise-times, and groups where the network takes any, also as a condition."""
    of, weight = net.net, next(net.parameters())
    device = weight.device
    x = torch.randn(batch, of.channels, of.size, of.size, device=device, dtype=weight.dtype)
    ids = torch.arange(batch, device=device) % of.classes if of.classes else None
    condition = Condition.unconditional(batch, device) if ids is None else Condition.of(id=ids)
    return x, torch.rand(batch, device=device), ids, condition


def _forward(forward: Callable[[], Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            forward()

    return run


def _backward(module: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], object]:
    def run() -> None:
        module.zero_grad()
        forward().square().mean().backward()

    return run
