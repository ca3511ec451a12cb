"""The optimiser of masters that lie in one flat vector: Adam or AdamW of whole groups, Muon of single matrices.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix. Scaled to the root mean
square of AdamW's steps (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4), it takes AdamW's learning rate
and weight decay. What is no matrix is AdamW's. Nothing here reads a value on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selfguide.spec.config import TrainConfig
from selfguide.training.engine.layout import Layout, Owned, Shard
from selfguide.training.engine.protocol import Moments
from shards.errors import UserError


def fused_adam(train: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, or Adam, whose weight decay is part of the gradient, in fused kernels over torch's `groups`."""
    kind = torch.optim.Adam if train.optimiser == "adam" else torch.optim.AdamW
    return kind(groups, lr=train.learning_rate, betas=train.betas, fused=True)


class _Piece(NamedTuple):
    """Numbers [start, stop) of the flat vector that are one tensor of an optimiser."""

    start: int
    stop: int
    shape: tuple[int, ...]
    weight_decay: float
    matrix: bool


class FlatOptimiser:
    """Steps `flat` (N,), the masters of a whole layout, in place."""

    def __init__(self, layout: Layout, flat: Tensor, train: TrainConfig) -> None:
        self._pieces = tuple(_pieces(layout))
        self.owned = [Owned(p.start, p.stop, flat[p.start : p.stop]) for p in self._pieces]
        self._stepped = [
            nn.Parameter(own.master.view(p.shape))
            for own, p in zip(self.owned, self._pieces, strict=True)
        ]
        self.adam = fused_adam(train, self._groups(matrices=False))
        matrices = self._groups(matrices=True)
        self._muon = _muon(train, matrices) if matrices else None

    def _groups(self, *, matrices: bool) -> list[dict[str, Any]]:
        return [
            {"params": [stepped], "weight_decay": piece.weight_decay}
            for stepped, piece in zip(self._stepped, self._pieces, strict=True)
            if piece.matrix == matrices
        ]

    def prepare(self, gradient: Tensor, applied: Tensor, learning_rate: float) -> None:
        """Hands out the gradient (N,) of a step that does nothing unless `applied`, a bool scalar on the device."""
        for stepped, piece in zip(self._stepped, self._pieces, strict=True):
            stepped.grad = gradient[piece.start : piece.stop].view(piece.shape)
        for optimiser in (self.adam, self._muon):
            for group in optimiser.param_groups if optimiser is not None else ():
                group["lr"] = learning_rate
        # how torch's GradScaler tells a fused optimiser on the device to leave everything as it is
        self.adam.found_inf = (~applied).float()  # type: ignore[attr-defined]

    def step(self, gradient: Tensor, applied: Tensor, learning_rate: float) -> None:
        """Both optimisers' step, as `prepare` describes it."""
        self.prepare(gradient, applied, learning_rate)
        self.adam.step()
        if self._muon is None:
            return
        matrices = [p for group in self._muon.param_groups for p in group["params"]]
        before = [matrix.detach().clone() for matrix in matrices]
        for matrix in matrices:
            # Muon knows no flag: a gradient equal to the momentum leaves that as it is
            momentum = self._muon.state[matrix]["momentum_buffer"]
            matrix.grad = torch.where(applied, matrix.grad, momentum)
        self._muon.step()
        for matrix, old in zip(matrices, before, strict=True):
            matrix.detach().copy_(torch.where(applied, matrix.detach(), old))

    def moments(self) -> Moments:
        """The state itself; Muon's second moments, and all before the first step, are new zeros."""
        counts = [s["step"] for s in self.adam.state.values()]
        first, second = self._named("exp_avg", "momentum_buffer"), self._named("exp_avg_sq", "")
        return Moments(first, second, int(counts[0]) if counts else 0)

    def _named(self, of_adam: str, of_muon: str) -> Shard:
        found = []
        for stepped, piece in zip(self._stepped, self._pieces, strict=True):
            optimiser = self._muon if piece.matrix else self.adam
            assert optimiser is not None
            held = optimiser.state.get(stepped, {}).get(of_muon if piece.matrix else of_adam)
            found.append(torch.zeros_like(stepped).view(-1) if held is None else held.view(-1))
        return tuple(found)

    def load_moments(self, moments: Moments) -> None:
        loaded = zip(self._stepped, self._pieces, moments.first, moments.second, strict=True)
        for stepped, piece, first, second in loaded:
            if piece.matrix:
                assert self._muon is not None
                self._muon.state[stepped]["momentum_buffer"] = first.view(piece.shape)
                continue
            step = torch.tensor(float(moments.count), device=stepped.device)
            self.adam.state[stepped] = {"step": step, "exp_avg": first, "exp_avg_sq": second}


def _pieces(layout: Layout) -> Iterator[_Piece]:
    """A group each, and of a group that is Muon's a parameter each."""
    for group in layout.groups:
        if not group.muon:
            size = (group.stop - group.start,)
            yield _Piece(group.start, group.stop, size, group.weight_decay, False)
            continue
        for name in layout.names_of(group):
            start, stop = layout.interval(name)
            shape = layout.shapes[layout.names.index(name)]
            yield _Piece(start, stop, shape, group.weight_decay, True)


def _muon(train: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's Muon with a momentum of zero for each matrix.

    Raises:
        UserError: this torch has none.
    """
    kind = getattr(torch.optim, "Muon", None)
    if kind is None:
        raise UserError(
            f"train.optimiser=muon needs torch 2.9 or newer, and this is torch {torch.__version__}; install one, or "
            "take train.optimiser=adamw"
        )
    made: torch.optim.Optimizer = kind(
        groups, lr=train.learning_rate, adjust_lr_fn="match_rms_adamw"
    )
    for group in groups:
        for matrix in group["params"]:
            made.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
    return made
