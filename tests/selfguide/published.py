"""Official DiT, SiT and U-ViT, re-derived plainly: state dicts with the names their authors published, and forwards
that read nothing but those. Written from the papers (Peebles & Xie 2023, Ma et al. 2024, Bao et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def has_spread(tensor: Tensor, std: float) -> bool:
    """Whether mean and std are those of so many draws of mean 0 and `std`, to 4.5 standard errors."""
    count, error = tensor.numel(), 4.5
    values = tensor.detach().double()
    centred = abs(values.mean().item()) < error * std / count**0.5
    return centred and abs(values.std().item() / std - 1) < error / (2 * count) ** 0.5


def grid(edge: int, width: int) -> Tensor:
    """DiT's fixed positions (1, edge * edge, width): half for the column, half for the row, sines before cosines."""
    rates = 1 / 10_000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    table = np.empty((edge * edge, width))
    for row in range(edge):
        for column in range(edge):
            turns = [np.sin(column * rates), np.cos(column * rates)]
            turns += [np.sin(row * rates), np.cos(row * rates)]
            table[row * edge + column] = np.concatenate(turns)
    return torch.tensor(table, dtype=torch.float32)[None]


def waves(t: Tensor, width: int) -> Tensor:
    """(B, width): cosines, then sines."""
    half = width // 2
    # rates rounded as published: at t = 999 the last bit of one turns an angle by 6e-5
    angles = t[:, None] * torch.exp(-math.log(1e4) * torch.arange(half) / half)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def dit_weights(
    *, size: int, channels: int, patch: int, width: int, depth: int, rows: int, sigma: bool
) -> Weights:
    """Random, so that nothing is zero that an untrained DiT has as zero; `rows` of the label table, null last."""
    out = patch * patch * channels * (1 + sigma)
    shapes = {
        "x_embedder.proj": (width, channels, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (out, width),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    made = _random(shapes)
    made["pos_embed"] = grid(size // patch, width)
    made["y_embedder.embedding_table.weight"] = 0.5 * torch.randn(rows, width)
    return made


def dit(w: Weights, x: Tensor, t: Tensor, y: Tensor, *, patch: int, heads: int) -> Tensor:
    """(B, C or 2C, H, W) at the time `t` that the net is fed, for rows `y` of its label table."""
    tokens = _patches(w, "x_embedder.proj", x, patch) + w["pos_embed"]
    c = _linear(w, "t_embedder.mlp.2", F.silu(_linear(w, "t_embedder.mlp.0", waves(t, 256))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    for i in range(_count(w, "blocks")):
        name = f"blocks.{i}"
        modulation_input = _linear(w, f"{name}.adaLN_modulation.1", c)[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation_input.chunk(6, dim=2)
        seen = _plain_norm(tokens) * (1 + scale_a) + shift_a
        tokens = tokens + gate_a * _attend(w, f"{name}.attn", seen, heads)
        seen = _plain_norm(tokens) * (1 + scale_m) + shift_m
        hidden = F.gelu(_linear(w, f"{name}.mlp.fc1", seen), approximate="tanh")
        tokens = tokens + gate_m * _linear(w, f"{name}.mlp.fc2", hidden)
    shift, scale = _linear(w, "final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=2)
    out = _linear(w, "final_layer.linear", _plain_norm(tokens) * (1 + scale) + shift)
    return _image(out, x.shape[2] // patch, patch)


def uvit_weights(
    *, size: int, channels: int, patch: int, width: int, depth: int, rows: int, conv: bool
) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj": (width, channels, patch, patch),
        "norm": (width,),
        "decoder_pred": (patch * patch * channels, width),
    }
    names = [f"in_blocks.{i}" for i in range(depth // 2)] + ["mid_block"]
    outs = [f"out_blocks.{i}" for i in range(depth // 2)]
    for name in names + outs:
        shapes |= {
            f"{name}.norm1": (width,),
            f"{name}.attn.qkv": (3 * width, width),
            f"{name}.attn.proj": (width, width),
            f"{name}.norm2": (width,),
            f"{name}.mlp.fc1": (4 * width, width),
            f"{name}.mlp.fc2": (width, 4 * width),
        }
    shapes |= {f"{name}.skip_linear": (width, 2 * width) for name in outs}
    if conv:
        shapes["final_layer"] = (channels, channels, 3, 3)
    made = {n: t for n, t in _random(shapes).items() if not n.endswith("qkv.bias")}
    made["pos_embed"] = 0.5 * torch.randn(1, 1 + (rows > 0) + (size // patch) ** 2, width)
    if rows:
        made["label_emb.weight"] = 0.5 * torch.randn(rows, width)
    return made


def uvit(w: Weights, x: Tensor, t: Tensor, y: Tensor | None, *, patch: int, heads: int) -> Tensor:
    width, half = w["norm.weight"].numel(), _count(w, "in_blocks")
    tokens = torch.cat((waves(t, width)[:, None], _patches(w, "patch_embed.proj", x, patch)), dim=1)
    if y is not None:
        tokens = torch.cat((w["label_emb.weight"][y][:, None], tokens), dim=1)
    extras = tokens.shape[1] - (x.shape[2] // patch) ** 2
    tokens = tokens + w["pos_embed"]
    skips = []
    for i in range(half):
        tokens = _uvit_block(w, f"in_blocks.{i}", tokens, heads)
        skips.append(tokens)
    tokens = _uvit_block(w, "mid_block", tokens, heads)
    for i in range(half):
        both = torch.cat((tokens, skips[half - 1 - i]), dim=2)
        tokens = _linear(w, f"out_blocks.{i}.skip_linear", both)
        tokens = _uvit_block(w, f"out_blocks.{i}", tokens, heads)
    out = _linear(w, "decoder_pred", _norm(w, "norm", tokens))[:, extras:]
    image = _image(out, x.shape[2] // patch, patch)
    if "final_layer.weight" not in w:
        return image
    return F.conv2d(image, w["final_layer.weight"], w["final_layer.bias"], padding=1)


def _uvit_block(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    x = x + _attend(w, f"{name}.attn", _norm(w, f"{name}.norm1", x), heads)
    hidden = F.gelu(_linear(w, f"{name}.mlp.fc1", _norm(w, f"{name}.norm2", x)))
    return x + _linear(w, f"{name}.mlp.fc2", hidden)


def _random(shapes: dict[str, tuple[int, ...]]) -> Weights:
    made = {}
    for name, shape in shapes.items():
        spread = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 1.0
        made[f"{name}.weight"] = spread * torch.randn(shape)
        made[f"{name}.bias"] = 0.1 * torch.randn(shape[0])
    return made


def _count(w: Weights, stem: str) -> int:
    numbers: Iterator[int] = (int(n.split(".")[1]) for n in w if n.startswith(f"{stem}."))
    return max(numbers) + 1


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def _plain_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return _plain_norm(x, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attend(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    width = x.shape[-1] // heads
    q, k, v = _linear(w, f"{name}.qkv", x).chunk(3, dim=-1)
    parts = []
    for h in range(heads):
        mine = slice(h * width, (h + 1) * width)
        scores = q[..., mine] @ k[..., mine].transpose(1, 2) / math.sqrt(width)
        parts.append(scores.softmax(-1) @ v[..., mine])
    return _linear(w, f"{name}.proj", torch.cat(parts, dim=-1))


def _patches(w: Weights, name: str, x: Tensor, patch: int) -> Tensor:
    """(B, L, D): each patch's pixels times the kernel, row by row."""
    cut = F.unfold(x, patch, stride=patch).transpose(1, 2)  # (B, L, C p p)
    return cut @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]


def _image(out: Tensor, edge: int, patch: int) -> Tensor:
    """(B, L, p p C) -> (B, C, H, W): a patch's numbers are its rows, in them its columns, in them channels."""
    channels = out.shape[2] // patch**2
    image = out.new_empty(len(out), channels, edge * patch, edge * patch)
    for token in range(edge * edge):
        top, left = token // edge * patch, token % edge * patch
        block = out[:, token].reshape(-1, patch, patch, channels).permute(0, 3, 1, 2)
        image[:, :, top : top + patch, left : left + patch] = block
    return image
