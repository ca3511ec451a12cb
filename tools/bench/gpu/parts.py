"""The parts of the benchmark beside training steps: ceilings, gradients, extraction, snapshots, sampling, Inception."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.distributed import RankInfo
from selfguide.models import assemble
from selfguide.models.backbone import Backbone
from selfguide.spec.sizes import row
from selfguide.training.writer_process import Memory, room
from tools.bench.gpu.steps import Trained, config_of, dtype_name
from tools.bench.gpu.timing import Extent, seconds

# of a sample that is drawn with so many network evaluations
EVALUATIONS = 50
# widths that a head is padded to
_PADDED = (80, 96, 128)


def ceilings(extent: Extent) -> Iterator[dict[str, Any]]:
    """The fastest products of matrices, those of DiT-XL's shapes, and copies within, to and from the device."""
    device, edge = extent.device, extent.edge
    # tokens of a batch of 64, by DiT-XL's width and its MLP's
    small = edge < 1024
    shapes = (
        [(edge, edge, edge)]
        if small
        else [(edge, edge, edge), (64 * 256, 1152, 4608), (64 * 256, 4608, 1152)]
    )
    for m, k, n in shapes:
        a = torch.randn(m, k, device=device, dtype=extent.dtype)
        b = torch.randn(k, n, device=device, dtype=extent.dtype)
        taken = seconds(lambda a=a, b=b: a @ b, extent)  # type: ignore[misc]
        yield {"gemm": [m, k, n], "tflops": 2 * m * k * n / taken / 1e12}
    here = torch.zeros(extent.copied, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    taken = seconds(lambda: there.copy_(here), extent)
    yield {"copy": "device to device", "gb_per_s": 2 * extent.copied / taken / 1e9}
    host = torch.empty(extent.copied, dtype=torch.uint8, pin_memory=device.type == "cuda")
    taken = seconds(lambda: host.copy_(here, non_blocking=True), extent)
    yield {"copy": "device to pinned host", "gb_per_s": extent.copied / taken / 1e9}
    taken = seconds(lambda: here.copy_(host, non_blocking=True), extent)
    yield {"copy": "pinned host to device", "gb_per_s": extent.copied / taken / 1e9}
    tiny = torch.zeros(1, device=device)
    yield {"launch": "one addition", "us": seconds(lambda: tiny.add_(1), extent) * 1e6}


def gradients(extent: Extent) -> Iterator[dict[str, Any]]:
    """Relative error of a small network's gradients on the device, against fp64 on the CPU; 1e-4 and 5e-2 pass."""
    from selfguide.evaluation.features.net import exact

    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        right = _gradient("dit_digits", torch.device("cpu"), torch.float64)
        # TF32, which convolutions take by default, is no fp32
        with exact():
            found = _gradient("dit_digits", extent.device, dtype)
        error = float((found - right).norm() / right.norm())
        yield {"dtype": str(dtype), "error": error, "bound": bound, "passes": error <= bound}


def _gradient(model: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """fp64 on the CPU: of a mean square, with no weight at its initial zero."""
    net = row(model)
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = assemble(net)
    for parameter in backbone.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=draw)
    x = torch.randn(4, net.channels, net.size, net.size, generator=draw)
    tau = torch.rand(4, generator=draw)
    backbone = backbone.to(device, dtype)
    out = backbone(x.to(device, dtype), tau.to(device), Condition.unconditional(4, device))
    out.double().square().mean().backward()
    parts = [p.grad for p in backbone.parameters() if p.grad is not None]
    return torch.cat([part.flatten().double().cpu() for part in parts])


def _net(extent: Extent) -> Backbone:
    return assemble(row(extent.model)).to(extent.device, extent.dtype).eval()


def _input(extent: Extent) -> tuple[Tensor, Tensor, Condition]:
    net, device, batch = row(extent.model), extent.device, extent.batch
    x = torch.randn(batch, net.channels, net.size, net.size, device=device, dtype=extent.dtype)
    return x, torch.rand(batch, device=device), Condition.unconditional(batch, device)


@torch.no_grad()
def extraction(extent: Extent) -> Iterator[dict[str, Any]]:
    """Features of the middle layer, by a forward to its end and by one that stops there."""
    net, given = _net(extent), _input(extent)
    layer = net.net.middle
    whole = seconds(lambda: net.with_features(*given, [layer]), extent)
    short = seconds(lambda: net.features(*given, layer), extent)
    yield {"extraction": "whole", "images_per_s": extent.batch / whole}
    yield {
        "extraction": f"to layer {layer}",
        "images_per_s": extent.batch / short,
        "of_whole": short / whole,
    }


def attention(extent: Extent) -> Iterator[dict[str, Any]]:
    """Forward and backward of one layer's attention with heads as wide as they are, and padded by zeros.

    Kernels are made for some widths only, and DiT-XL's 72 is none of them.
    """
    net: Any = row(extent.model)  # one of tokens
    heads, tokens = net.heads, net.layers[0].tokens
    head = net.width // heads
    shape = (extent.batch, heads, tokens, head)
    given = [
        torch.randn(shape, device=extent.device, dtype=extent.dtype, requires_grad=True)
        for _ in range(3)
    ]
    back = torch.randn(shape, device=extent.device, dtype=extent.dtype)
    plain = 0.0
    for width in (head, *(each for each in _PADDED if each > head)):

        def both(more: int = width - head) -> None:
            q, k, v = (F.pad(each, (0, more)) if more else each for each in given)
            out = F.scaled_dot_product_attention(q, k, v, scale=head**-0.5)
            torch.autograd.grad(out[..., :head], given, back)

        taken = seconds(both, extent)
        plain = plain or taken
        yield {"attention": width, "us": taken * 1e6, "of_plain": taken / plain}


def snapshot(extent: Extent) -> Iterator[dict[str, Any]]:
    """Masters, moments and average copied to the host, as a checkpoint begins."""
    config = config_of(extent.model, extent.batch, backend="torch", dtype=dtype_name(extent.dtype))
    trained = Trained(config, RankInfo(0, 0, 1))
    trained.step()
    moments = trained.engine.moments()
    parts = [*trained.engine.masters, *moments.first, *moments.second, *trained.averages.shards[0]]
    size = sum(each.nbytes for each in parts)
    # what a checkpoint's writer reads
    memory = Memory(extent.device)
    memory.clear(sum(room(each.nbytes) for each in parts))
    host = [memory.empty(each.shape, each.dtype) for each in parts]

    def copy() -> None:
        for to, of in zip(host, parts, strict=True):
            to.copy_(of.detach(), non_blocking=True)

    taken = seconds(copy, extent)
    memory.close()
    yield {"snapshot_bytes": size, "ms": taken * 1e3, "gb_per_s": size / taken / 1e9}


@torch.no_grad()
def sampling(extent: Extent) -> Iterator[dict[str, Any]]:
    """Euler's method without guidance; with guidance an image takes twice the evaluations."""
    from selfguide.diffusion.denoiser import Denoiser
    from selfguide.diffusion.paths import RectifiedFlow
    from selfguide.diffusion.samplers import sample

    net, (x, _, condition) = _net(extent), _input(extent)
    steps = 4
    denoiser = Denoiser(net, RectifiedFlow(), condition)
    taken = seconds(lambda: sample("euler", denoiser, x.float(), steps=steps), extent, warmup=1)
    rate = extent.batch * steps / taken
    yield {"evaluations_per_s": rate, f"images_per_s_at_{EVALUATIONS}": rate / EVALUATIONS}


@torch.no_grad()
def inception(extent: Extent) -> Iterator[dict[str, Any]]:
    """The feature net of the Frechet inception distance, with weights that are drawn: its speed is the same."""
    from selfguide.evaluation.features.inception import SIZE, Inception
    from selfguide.evaluation.features.net import exact

    net = Inception().to(extent.device).eval()
    x = torch.randn(extent.batch, 3, SIZE, SIZE, device=extent.device)
    with exact():
        taken = seconds(lambda: net(x), extent, warmup=1)
    yield {"inception": "fp32", "images_per_s": extent.batch / taken}
