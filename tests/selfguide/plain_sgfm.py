"""SGFM's published network, losses, step and average in fp64, plainly re-derived (Hu et al. 2023, arXiv 2312.08825).

Names are those of its code. Times are its own: t = 1 is data. Nothing here reads our network, head, Sinkhorn, averages
or optimiser.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.selfguide import published

Weights = dict[str, Tensor]

SIGMA_MIN, EXTRACTION, MASK = 1e-4, 0.85, (0.8, 0.9)
EPSILON, ITERATIONS, TEMPERATURE = 0.05, 3, 0.1
BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
NORM_EPS, NORM_MOMENTUM = 1e-5, 0.1
# what is no parameter
BUFFERS = ("projection_head.1.running_mean", "projection_head.1.running_var")


# ours -> theirs, of all but the blocks; beginnings of names
_NAMES = {
    "head.hidden": "projection_head.0",
    "head.norm": "projection_head.1",
    "head.out": "projection_head.3",
    "head.prototypes": "prototypes.weight",
    "backbone.cls": "cls_token",
    "backbone.positions": "pos_embed",
    "backbone.condition.null": "null_cfg_embed",
    "backbone.condition.unconditional": "unconditional_embed",
    "backbone.patches.one.null": "null_cfg_embed",
    "backbone.patches.one.unconditional": "unconditional_embed",
    "backbone.patchify": "patch_embed.proj",
    "backbone.final_norm": "norm",
    "backbone.final": "decoder_pred",
    "backbone.smooth": "final_layer",
}
_WORDS = {"attention": "attn", "project": "proj", "up": "fc1", "down": "fc2", "skip": "skip_linear"}


def theirs(ours: Weights) -> Weights:
    """Our student's state_dict under their names, fp64; they predict x - (1 - sigma_min) eps, which is less our v."""
    blocks = {int(name.split(".")[2]) for name in ours if name.startswith("backbone.blocks.")}
    made = {}
    for name, tensor in ours.items():
        sign = -1 if name.startswith("backbone.smooth") else 1
        made[_name(name, max(blocks) // 2)] = sign * tensor.detach().double()
    return made


def _name(ours: str, half: int) -> str:
    if not ours.startswith("backbone.blocks."):
        start = next(each for each in _NAMES if ours == each or ours.startswith(f"{each}."))
        return _NAMES[start] + ours.removeprefix(start)
    _, _, number, *inner = ours.split(".")
    n, words = int(number), [_WORDS.get(word, word) for word in inner if word != "block"]
    block = f"in_blocks.{n}" if n < half else f"out_blocks.{n - half - 1}"
    return ".".join(("mid_block" if n == half else block, *words))


def forward(
    w: Weights, x: Tensor, t: Tensor, y: Tensor, *, patch: int, heads: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """u, scores, and what BatchNorm saw (2, H), of images (B, C, H, W) at data-time t (B,) with condition y (B, D).

    A condition y (B, L, D) is of patches: added to them before positions are, and their tokens are read, row by row.
    """
    width = w["norm.weight"].numel()
    half = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("in_blocks"))
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    turns = t[:, None] * rates
    time = torch.cat((turns.cos(), turns.sin()), 1)
    pixels = published._patches(w, "patch_embed.proj", x, patch)
    cls = w["cls_token"].expand(len(x), width)
    before = (cls, time, y) if y.dim() == 2 else (cls, time)
    pixels = pixels if y.dim() == 2 else pixels + y
    tokens = torch.cat((torch.stack(before, 1), pixels), 1) + w["pos_embed"]
    skips = []
    for number in range(half):
        tokens = published._uvit_block(w, f"in_blocks.{number}", tokens, heads)
        skips.append(tokens)
    tokens = published._uvit_block(w, "mid_block", tokens, heads)
    read = tokens[:, 0] if y.dim() == 2 else tokens[:, len(before) :].flatten(0, 1)
    scores, seen = project(w, read.detach(), training=training)
    for number in range(half):
        both = torch.cat((tokens, skips.pop()), 2)
        tokens = published._linear(w, f"out_blocks.{number}.skip_linear", both)
        tokens = published._uvit_block(w, f"out_blocks.{number}", tokens, heads)
    out = published._linear(w, "decoder_pred", published._norm(w, "norm", tokens))[:, len(before) :]
    image = published._image(out, x.shape[2] // patch, patch)
    u = F.conv2d(image, w["final_layer.weight"], w["final_layer.bias"], padding=1)
    return u, scores, seen


def project(w: Weights, features: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
    """Scores (B, K): products of unit embeddings with prototypes as they are; and the statistics of the batch."""
    h = published._linear(w, "projection_head.0", features)
    mean, var = h.mean(0), (h - h.mean(0)).square().mean(0)
    seen = torch.stack((mean, var * len(h) / max(len(h) - 1, 1))).detach()
    if not training:
        mean, var = w[BUFFERS[0]], w[BUFFERS[1]]
    h = (h - mean) / (var + NORM_EPS).sqrt()
    h = h * w["projection_head.1.weight"] + w["projection_head.1.bias"]
    z = published._linear(w, "projection_head.3", h.clamp(min=0))
    z = z / z.square().sum(1, keepdim=True).sqrt()
    return z @ w["prototypes.weight"].T, seen


def codes(scores: Tensor) -> Tensor:
    """Sinkhorn's assignments (B, K), row sums 1."""
    q = (scores / EPSILON).exp().T
    q = q / q.sum()
    for _ in range(ITERATIONS):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def noised(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, 1, 1, 1)
    return t * x0 + (1 - (1 - SIGMA_MIN) * t) * eps


class Trainer:
    """Its training step, with what is drawn at random handed in.

    One thing is ours: the average becomes the live weights after the last step of stage 1. The code does so a step
    later, and names the ids of the step between by the weights of the beginning.
    """

    def __init__(
        self, weights: Weights, *, first_of_stage_2: int, lr: float, rate: float, **net: Any
    ) -> None:
        self.w = {name: tensor.clone() for name, tensor in weights.items()}
        self.ema = {name: tensor.clone() for name, tensor in weights.items()}
        self.net, self.start, self.lr, self.rate, self.number = net, first_of_stage_2, lr, rate, 0
        self.moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in self._trained()}
        self.ids: Tensor | None = None

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, tensor) for name, tensor in self.w.items() if name not in BUFFERS]

    def name_ids(self, x0: Tensor, eps: Tensor) -> Tensor:
        """By the averaged net in eval mode: the largest product with averaged rows, whatever their length."""
        t = torch.full((len(x0),), EXTRACTION, dtype=torch.float64)
        nothing = self.ema["unconditional_embed"].expand(len(x0), -1)
        scores = forward(self.ema, noised(x0, eps, t), t, nothing, training=False, **self.net)[1]
        return scores.argmax(1)

    def step(
        self, x0: Tensor, eps: Tensor, t: Tensor, dropped: Tensor, ids: Tensor | None = None
    ) -> None:
        """`ids` are those that `name_ids` gives, or others where two are as near."""
        rows = self.w["prototypes.weight"]
        self.w["prototypes.weight"] = rows / rows.square().sum(1, keepdim=True).sqrt()
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in self._trained()}
        w = self.w | leaves
        if self.number < self.start:
            y = w["unconditional_embed"].expand(len(x0), -1)
        else:
            self.ids = self.name_ids(x0, eps) if ids is None else ids
            y = torch.where(
                dropped[:, None], w["null_cfg_embed"], self.ema["prototypes.weight"][self.ids]
            )
        u, scores, seen = forward(w, noised(x0, eps, t), t, y, training=True, **self.net)
        flow = (u - (x0 - (1 - SIGMA_MIN) * eps)).square().flatten(1).mean(1).mean()
        entropy = -(codes(scores.detach()) * (scores / TEMPERATURE).log_softmax(1)).sum(1)
        inside = (t > MASK[0]) & (t < MASK[1])
        loss = flow + min(self.number / self.start, 1.0) * (entropy * inside).mean()
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        self.number += 1
        for name, gradient in zip(leaves, gradients, strict=True):
            self._adam(name, torch.zeros_like(leaves[name]) if gradient is None else gradient)
        for name, value in zip(BUFFERS, seen, strict=True):
            self.w[name] = (1 - NORM_MOMENTUM) * self.w[name] + NORM_MOMENTUM * value
        self._average()

    def _adam(self, name: str, gradient: Tensor) -> None:
        first, second = self.moments[name]
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        self.moments[name] = first, second
        root = (second / (1 - BETAS[1] ** self.number)).sqrt() + ADAM_EPS
        self.w[name] = self.w[name] - self.lr * first / (1 - BETAS[0] ** self.number) / root

    def _average(self) -> None:
        """From stage 2 on, of parameters alone: BatchNorm's statistics stay those of the switch."""
        if self.number == self.start:
            self.ema = {name: tensor.clone() for name, tensor in self.w.items()}
        if self.number > self.start:
            for name, tensor in self._trained():
                self.ema[name] = (1 - self.rate) * self.ema[name] + self.rate * tensor
