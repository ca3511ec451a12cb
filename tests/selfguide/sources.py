"""Backbones as their authors' codes compute them and first draw their weights, written out plainly.

A forward here reads weights by the names that ours have, and nothing else of ours: which blocks there are, in what
order, with which groups, eps, heads and scales, stands in a `Recipe` that was taken from the papers and their codes.
Weights of linear maps are (outputs, inputs), of tables (rows, width).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(dict[str, Tensor]):
    """Tensors by name, which remembers the names that were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


# --- UNets


@dataclass(frozen=True)
class Recipe:
    """A UNet's hyper-parameters as its code has them."""

    mult: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]  # downsamplings
    joins: Literal["none", "early", "late", "concat", "add"] = "none"
    heads: int = 1
    head_width: int = 0
    groups: int = 32
    out_groups: int = 32
    eps: float = 1e-5
    convolves: bool = False  # a 3x3 convolution changes the grid, else a residual block
    projects: bool = False  # a residual block that changes the grid has a 1x1 convolution beside it
    adaptive: bool = False  # scale and shift behind the second norm, else a shift before it
    once: bool = False  # the decoder attends in the last block of a grid only
    keeps: float = 1.0  # what every residual sum is multiplied by
    undropped: float = 1.0  # what dropout leaves on average, before the second convolution
    ends: bool = (
        False  # sines first, with exponents i / (half - 1), else cosines first and i / half
    )
    context: bool = False  # tokens of the condition for attention to read
    imagen: bool = False  # one key and value for all heads, a null pair, tokens of the time


def unet(
    w: Weights, r: Recipe, x: Tensor, time: Tensor, groups: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:  # fmt: skip
    """(B, C, H, W) of images in fp64, the times that the net is fed (B,), one-hots (B, K) and masks (B, M, H, W)."""
    waves = _waves(time, w["time.hidden.weight"].shape[1], r.ends).to(x.dtype)
    early = waves
    if r.joins == "early":
        assert groups is not None
        told = groups * math.sqrt(groups.shape[1])
        early = waves + told @ w["told.rows"] + w["told.bias"]
    c = _linear(w, "time.out", F.silu(_linear(w, "time.hidden", early)))
    if r.joins in ("add", "concat"):
        told = groups @ w["told.hidden.rows"] + w["told.hidden.bias"]
        told = _linear(w, "told.out", F.silu(told))
        c = torch.cat((c, told), dim=1) if r.joins == "concat" else c + told
    if r.joins == "late":
        c = c + groups @ w["told.rows"]
    c, context = F.silu(c), _context(w, r, waves, groups)
    stages = (f"stages.{i}" for i in count())

    def block(x: Tensor, attends: bool) -> Tensor:
        name = next(stages)
        x = _residual(w, r, f"{name}.first", x, c)
        return _attention(w, r, f"{name}.attention", x, context) if attends else x

    def change(x: Tensor, way: str) -> Tensor:
        name = next(stages)
        if not r.convolves:
            return _residual(w, r, f"{name}.first", x, c, way)
        return _conv(w, f"{name}.conv", _grid(x, "up") if way == "up" else x, 1 + (way == "down"))

    x = _conv(w, next(stages), x if mask is None else torch.cat((x, mask), dim=1))
    skips = [x]
    for level in range(len(r.mult)):
        if level:
            x = change(x, "down")
            skips.append(x)
        for _ in range(r.blocks):
            x = block(x, 2**level in r.attention)
            skips.append(x)
    middle = next(stages)
    x = _residual(w, r, f"{middle}.first", x, c)
    x = _attention(w, r, f"{middle}.attention", x, context)
    x = _residual(w, r, f"{middle}.second", x, c)
    for level in reversed(range(len(r.mult))):
        for number in range(r.blocks + 1):
            attends = 2**level in r.attention and (number == r.blocks or not r.once)
            x = block(torch.cat((x, skips.pop()), dim=1), attends)
        if level:
            x = change(x, "up")
    assert not skips
    return _conv(w, "out", F.silu(_group_norm(w, "norm", x, r.out_groups, r.eps)))


def _context(w: Weights, r: Recipe, waves: Tensor, groups: Tensor | None) -> Tensor | None:
    made = []
    if r.imagen:
        made.append(_linear(w, "context.time.2", F.silu(_linear(w, "context.time.0", waves))))
    if r.context:
        made.append(groups @ w["context.tokens.rows"] + w["context.tokens.bias"])
    if not made:
        return None
    return _layer_norm(w, "context.norm", torch.cat(made, dim=1).view(len(waves), -1, 32))


def _residual(w: Weights, r: Recipe, name: str, x: Tensor, c: Tensor, way: str = "") -> Tensor:
    h = _grid(F.silu(_group_norm(w, f"{name}.norm1", x, r.groups, r.eps)), way)
    h, embedded = _conv(w, f"{name}.conv1", h), _linear(w, f"{name}.embedding", c)[:, :, None, None]
    if r.adaptive:
        scale, shift = embedded.chunk(2, dim=1)
        h = _group_norm(w, f"{name}.norm2", h, r.groups, r.eps) * (1 + scale) + shift
    else:
        h = _group_norm(w, f"{name}.norm2", h + embedded, r.groups, r.eps)
    h, x = _conv(w, f"{name}.conv2", F.silu(h) * r.undropped), _grid(x, way)
    if x.shape[1] != h.shape[1] or (way and r.projects):
        x = _conv(w, f"{name}.shortcut", x)
    return (x + h) * r.keeps


def _attention(w: Weights, r: Recipe, name: str, x: Tensor, context: Tensor | None) -> Tensor:
    width = x.shape[1]
    heads = width // r.head_width if r.head_width else r.heads
    head = width // heads
    if r.imagen:
        grid = _scaled_norm(w, f"{name}.norm", x.flatten(2).transpose(1, 2))
        q, (k, v) = grid @ w[f"{name}.q.weight"].T, (grid @ w[f"{name}.kv.weight"].T).chunk(2, 2)
        pairs = [part.expand(len(x), 1, -1) for part in w[f"{name}.null"]]
        read = _linear(w, f"{name}.context.1", _layer_norm(w, f"{name}.context.0", context))
        pairs = [torch.cat(two, dim=1) for two in zip(read.chunk(2, dim=2), pairs, strict=True)]
        k, v = torch.cat((pairs[0], k), dim=1), torch.cat((pairs[1], v), dim=1)
        k, v = k.repeat(1, 1, heads), v.repeat(1, 1, heads)
    else:
        grid = _group_norm(w, f"{name}.norm", x, r.groups, r.eps).flatten(2).transpose(1, 2)
        q, k, v = _linear(w, f"{name}.qkv", grid).chunk(3, dim=2)
        if context is not None:
            read_k, read_v = _linear(w, f"{name}.context", context).chunk(2, dim=2)
            k, v = torch.cat((read_k, k), dim=1), torch.cat((read_v, v), dim=1)
    mixed = _mixed(q, k, v, head)
    if r.imagen:
        out = _scaled_norm(w, f"{name}.project.1", mixed @ w[f"{name}.project.0.weight"].T)
    else:
        out = _linear(w, f"{name}.project", mixed)
    return (x + out.transpose(1, 2).reshape(x.shape)) * r.keeps


# --- transformers


@dataclass(frozen=True)
class Transformer:
    """DiT's hyper-parameters, or LightningDiT's, as their codes have them."""

    patch: int
    heads: int
    lightning: bool = False  # RMSNorm, SwiGLU, 2-d rotary positions
    qk_norm: bool = False


def dit(w: Weights, r: Transformer, x: Tensor, time: Tensor, y: Tensor) -> Tensor:
    """(B, C_out, H, W) of images in fp64, the times that the net is fed (B,) and classes (B,)."""
    edge, width = x.shape[2] // r.patch, w["time.out.bias"].numel()
    cut = F.unfold(x, r.patch, stride=r.patch).transpose(1, 2)  # (B, L, C p p)
    tokens = cut @ w["patchify.weight"].flatten(1).T + w["patchify.bias"]
    tokens = tokens + _positions(edge, width)
    c = _linear(w, "time.hidden", _waves(time, 256, False).to(x.dtype))
    c = F.silu(_linear(w, "time.out", F.silu(c)) + w["condition.labels.weight"][y])
    for i in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            part[:, None] for part in _linear(w, f"{name}.modulation", c).chunk(6, dim=1)
        )
        h = _seen(w, r, f"{name}.norm1", tokens) * (1 + scale1) + shift1
        q, k, v = _linear(w, f"{name}.attention.qkv", h).chunk(3, dim=2)
        parts = []
        for at in range(r.heads):
            mine = slice(at * width // r.heads, (at + 1) * width // r.heads)
            one, other = q[..., mine], k[..., mine]
            if r.qk_norm and r.lightning:
                one = _root_norm(one) * w[f"{name}.attention.q_norm.weight"]
                other = _root_norm(other) * w[f"{name}.attention.k_norm.weight"]
            elif r.qk_norm:
                one = _layer_norm(w, f"{name}.attention.q_norm", one)
                other = _layer_norm(w, f"{name}.attention.k_norm", other)
            if r.lightning:
                one, other = _turned(one, edge), _turned(other, edge)
            parts.append(_mixed(one, other, v[..., mine], one.shape[2]))
        tokens = tokens + gate1 * _linear(w, f"{name}.attention.project", torch.cat(parts, dim=2))
        h = _seen(w, r, f"{name}.norm2", tokens) * (1 + scale2) + shift2
        if r.lightning:
            gate, value = _linear(w, f"{name}.mlp.up", h).chunk(2, dim=2)
            h = F.silu(gate) * value
        else:
            h = _tanh_gelu(_linear(w, f"{name}.mlp.up", h))
        tokens = tokens + gate2 * _linear(w, f"{name}.mlp.down", h)
    shift, scale = (part[:, None] for part in _linear(w, "final_modulation", c).chunk(2, dim=1))
    out = _linear(w, "final", _seen(w, r, "final_norm", tokens) * (1 + scale) + shift)
    channels = out.shape[2] // r.patch**2
    image = out.view(len(x), edge, edge, r.patch, r.patch, channels)
    return torch.einsum("bhwpqc->bchpwq", image).reshape(len(x), channels, *x.shape[2:])


def _seen(w: Weights, r: Transformer, name: str, x: Tensor) -> Tensor:
    """A block's norm: RMSNorm with a scale, or LayerNorm without one."""
    return _root_norm(x) * w[f"{name}.weight"] if r.lightning else _centred_norm(x, 1e-6)


def _positions(edge: int, width: int) -> Tensor:
    """(edge * edge, width) fp64: sines and cosines of the column, then of the row."""
    rates = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    places = torch.cartesian_prod(torch.arange(edge), torch.arange(edge)).double()
    angles = [places[:, axis, None] * rates for axis in (1, 0)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)


def _turned(x: Tensor, edge: int) -> Tensor:
    """(B, L, d): neighbouring pairs as complex numbers, half of them turned by the row, half by the column."""
    quarter = x.shape[2] // 4
    rates = 10_000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    places = torch.cartesian_prod(torch.arange(edge), torch.arange(edge)).double()
    angles = torch.cat([places[:, axis, None] * rates for axis in (0, 1)], dim=1)
    pairs = torch.view_as_complex(x.unflatten(2, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)


# --- parts


def _waves(time: Tensor, width: int, ends: bool) -> Tensor:
    """(B, width) in fp32, as the codes have it: an index of 999 turns the last bit of a rate into 6e-5."""
    half = width // 2
    rates = torch.exp(-math.log(1e4) * torch.arange(half) / (half - 1 if ends else half))
    angles = time.float()[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()) if ends else (angles.cos(), angles.sin()), dim=1)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _conv(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], stride=stride, padding=weight.shape[2] // 2)


def _grid(x: Tensor, way: str) -> Tensor:
    if way == "up":
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    if way == "down":
        return torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    return x


def _group_norm(w: Weights, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
    normed = _centred_norm(x.reshape(len(x), groups, -1), eps).view_as(x)
    return normed * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def _layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return _scaled_norm(w, name, x) + w[f"{name}.bias"]


def _scaled_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """A LayerNorm without bias, at torch's eps."""
    return _centred_norm(x, 1e-5) * w[f"{name}.weight"]


def _centred_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _root_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _mixed(q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
    """Attention over (B, T, C), head by head."""
    made = []
    for a, b, c in zip(q.split(head, 2), k.split(head, 2), v.split(head, 2), strict=True):
        made.append((a @ b.mT / math.sqrt(head)).softmax(2) @ c)
    return torch.cat(made, dim=2)


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# --- first weights


def first_weights(source: str, w: Mapping[str, Tensor]) -> Iterator[tuple[str, str, float, float]]:
    """(name, kind of module, mean, standard deviation) of every tensor as `source` first draws it."""
    for name, tensor in w.items():
        kind, mean, std = "", 0.0, 0.0
        for pattern, what, rule in RULES[source] + RULES[BASE[source]]:
            if re.search(pattern, name):
                kind, (mean, std) = what, _drawn(rule, name, tensor, w)
                break
        assert kind, name
        yield name, kind, mean, std


def _drawn(
    rule: str | float, name: str, tensor: Tensor, w: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Mean and standard deviation of a rule: a number is the deviation itself."""
    if isinstance(rule, float):
        return 0.0, rule
    if rule == "ones":
        return 1.0, 0.0
    shape = tensor.shape
    if name.endswith(".bias"):  # of torch's layers, in [-1, 1] / sqrt(inputs), as their weights
        stem = name.removesuffix(".bias")
        shape = w[f"{stem}.weight"].shape if f"{stem}.weight" in w else w[f"{stem}.rows"].T.shape
    if name.endswith(".rows"):
        shape = tensor.T.shape
    inputs, outputs = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    if name == "patchify.weight":  # as a linear map of the patch
        outputs = shape[0]
    torchs, xaviers = 1 / math.sqrt(3 * inputs), math.sqrt(2 / (inputs + outputs))
    gain, _, law = rule.rpartition(" ")
    return 0.0, (float(gain) if gain else 1.0) * (torchs if law == "torch" else xaviers)


_NORMS: list[tuple[str, str, str | float]] = [
    (r"norm\d?\.weight$|(context\.0|project\.1)\.weight$", "scale of a norm", "ones"),
    (r"norm\d?\.bias$|context\.0\.bias$", "bias of a norm", 0.0),
]
BASE = {
    "ddae": "torch", "adm": "torch", "sgdm": "torch", "imagen": "torch", "edm": "xavier", "dit": "xavier",
}  # fmt: skip
# by source, in order: what a name has to match, the kind of module, the law of its first weights
RULES: dict[str, list[tuple[str, str, str | float]]] = {
    "torch": [
        *_NORMS,
        (r"\.bias$", "bias", "torch"),
        (r"\.rows$", "map of the condition", "torch"),
        (r"", "linear map or convolution", "torch"),
    ],
    "xavier": [
        *_NORMS,
        (r"\.bias$", "bias", 0.0),
        (r"\.rows$", "map of the condition", "xavier"),
        (r"", "linear map or convolution", "xavier"),
    ],
    "ddae": [],
    "sgdm": [(r"^out\.|conv2\.|project\.", "last map of a residual path", 0.0)],
    "adm": [
        (r"^out\.|conv2\.|project\.", "last map of a residual path", 0.0),
        (r"^told\.rows$", "map of the condition", 1.0),
    ],
    "imagen": [
        (r"^out\.|conv2\.", "last map of a residual path", 0.0),
        (r"null$", "null key and value", 1.0),
    ],
    "edm": [
        (r"^out\.weight|conv2\.weight|project\.weight", "last map of a residual path", "1e-5 xavier"),
        (r"qkv\.weight", "queries, keys and values", f"{math.sqrt(0.2)} xavier"),
    ],
    "dit": [
        (r"modulation\.|^final\.", "modulation and last map", 0.0),
        (r"^time\..*weight$", "MLP of the time", 0.02),
        (r"^condition\.", "class table with its null row", 0.02),
    ],
}  # fmt: skip
