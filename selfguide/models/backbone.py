"""What all backbones share: checked inputs, features on request, recomputed activations, compiled blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfguide.diffusion.conditions import Condition, check_fields
from selfguide.models.blocks import ConditionEmbedding
from selfguide.models.routing import Route
from selfguide.spec.architecture import Architecture, PatchTransformer
from selfguide.spec.config import POOLINGS
from selfguide.spec.suggest import check_known
from shards.errors import UserError


class Backbone(nn.Module, ABC):
    """(B, C, H, W), (B,) noise-times in [0, 1], condition -> (B, C_out, H, W)."""

    recompute = False  # forget activations inside blocks, compute them again in backward
    channels_last = False  # activations in that layout: for convolutions on GPUs
    _drawn: Tensor | None = None  # within `routed`, which tokens go on

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """The prediction."""
        return self.with_features(x, tau, condition, ())[0]

    def with_features(
        self, x: Tensor, tau: Tensor, condition: Condition, layers: Sequence[int | str]
    ) -> tuple[Tensor, list[Tensor]]:
        """The prediction, and the tokens (B, T, D) of each of `layers` on the way to it, extras first."""
        self._check(x, tau, condition)
        wanted = [self.net.layer(layer) for layer in layers]
        out, captured = self._run(x, tau, condition, wanted, stop=False)
        return out, [captured[number] for number in wanted]

    def features(self, x: Tensor, tau: Tensor, condition: Condition, layer: int | str) -> Tensor:
        """Tokens (B, T, D) of `layer`, counted from 1 or by name; what lies behind it is not run."""
        return self.features_of(x, tau, condition, (layer,))[0]

    def features_of(
        self, x: Tensor, tau: Tensor, condition: Condition, layers: Sequence[int | str]
    ) -> list[Tensor]:
        """Tokens (B, T, D) of each of `layers` from one forward, as far as the last of them."""
        self._check(x, tau, condition)
        wanted = [self.net.layer(layer) for layer in layers]
        _, captured = self._run(x, tau, condition, wanted, stop=True)
        return [captured[number] for number in wanted]

    def _draw_tokens(self, std: float) -> None:
        """Draws [CLS], null, unconditional and label rows anew, with another std than ours."""
        cls: Tensor | None = getattr(self, "cls", None)
        rows = [] if cls is None else [cls]
        for module in self.modules():
            if isinstance(module, ConditionEmbedding):
                rows += [module.null, module.unconditional]
                rows += [] if module.labels is None else [module.labels.weight]
        for row in rows:
            nn.init.normal_(row, std=std)

    def _route(self, tokens: Tensor) -> Route | None:
        """The way of `tokens` (B, extras + T, D) through the middle blocks; None where all of them go."""
        routes = self.training or self._drawn is not None
        if not routes or not getattr(self.net, "route", 0.0):
            return None
        assert isinstance(self.net, PatchTransformer)
        return Route(self.net, tokens, self._drawn)

    @contextmanager
    def routed(self, drawn: Tensor) -> Iterator[None]:
        """Forwards within go the way of training with `model.route`, in eval mode, too.

        Args:
            drawn: (B, T); the patch tokens whose numbers are the smallest go through the middle blocks.

        Raises:
            UserError: the network was not trained to skip tokens.
        """
        if not getattr(self.net, "route", 0.0):
            raise UserError(
                "this network has no way that skips tokens: it was trained without model.route; take another weak model"
            )
        self._drawn = drawn
        try:
            yield
        finally:
            self._drawn = None

    @abstractmethod
    def _run(
        self, x: Tensor, tau: Tensor, condition: Condition, wanted: Collection[int], *, stop: bool
    ) -> tuple[Any, dict[int, Tensor]]:
        """(prediction, tokens of the `wanted` layers by number); with `stop` nothing runs after the last of these, and
        the prediction is None.
        """

    @abstractmethod
    def repeated(self) -> Iterable[nn.Module]:
        """The blocks that make up the net: what is compiled, and recomputed, one by one."""

    def _call(self, block: nn.Module, *inputs: Any) -> Any:
        """One block's forward, recomputed in backward where asked."""
        if self.recompute and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _laid_out(self, x: Tensor) -> Tensor:
        """(B, C, H, W) as it is to lie in memory; convolutions hand the layout on, whatever their weights'.

        To be asked of the first convolution's output: with a single channel both layouts are one.
        """
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def _check(self, x: Tensor, tau: Tensor, condition: Condition) -> None:
        """Shapes only: a look at values would wait for the GPU."""
        expected = (self.net.channels, self.net.size, self.net.size)
        if tuple(x.shape[1:]) != expected:
            raise UserError(
                f"expected images of shape {expected}, found {tuple(x.shape[1:])}; give the model their size"
            )
        if tuple(tau.shape) != (len(x),):
            raise UserError(
                f"tau has shape {tuple(tau.shape)} and there are {len(x)} images; "
                f"give one noise-time for each, shape ({len(x)},)"
            )
        if len(condition) != len(x):
            raise UserError(
                f"condition is of {len(condition)} images and there are {len(x)}; give one state for each"
            )
        check_fields(condition, self.net)


def pool(tokens: Tensor, pooling: str, extras: int, *, cls: bool = True) -> Tensor:
    """(B, extras + T, D) -> (B, F). `cls`: the first of the extras is a [CLS].

    cls        that token
    mean       the mean of the patches
    flat       all patches side by side
    attention  their mean weighted by softmax(<q, patch> / sqrt(D)), q being [CLS] or else their plain mean; our own,
               without parameters: patches that look like the summary of the image count for more
    """
    if pooling == "cls":
        if not (extras and cls):
            raise UserError("pooling 'cls' needs a network with cls_token=true")
        return tokens[:, 0]
    patches = tokens[:, extras:]
    if pooling == "mean":
        return patches.mean(1)
    if pooling == "flat":
        return patches.flatten(1)
    check_known("pooling", pooling, POOLINGS)
    query = tokens[:, 0] if extras and cls else patches.mean(1)
    scale = tokens.shape[-1] ** -0.5
    scores = (patches.float() @ query.float()[:, :, None])[:, :, 0] * scale  # (B, T)
    return (scores.softmax(1)[:, :, None] * patches.float()).sum(1).to(tokens.dtype)
