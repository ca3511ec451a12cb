"""UNets, built from the one plan that `selfguide.spec.unet` states: DDPM's and DDPM++'s as in DDAE (Ho et al. 2020;
Song et al. 2021; Xiang et al. 2023), EDM's (Karras et al. 2022), its ADM (Dhariwal & Nichol 2021) and self-guided
diffusion's (Hu et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.models.backbone import Backbone
from selfguide.models.blocks import (
    AugmentEmbedding,
    TimeEmbedding,
    sinusoid,
    time_input,
    with_spatial,
)
from selfguide.models.self_condition import SelfCondition
from selfguide.models.unet_blocks import (
    Attention,
    Block,
    ConditionLinear,
    ContextTokens,
    GroupNorm,
    GuidanceMLP,
    Resample,
    ResidualBlock,
    endpoint_sinusoid,
)
from selfguide.spec.unet import Stage, UNetArchitecture


class UNet(Backbone):
    """The condition enters as one vector and as masks beside the input; null and unconditional are zeros of both."""

    net: UNetArchitecture

    def __init__(self, net: UNetArchitecture) -> None:
        super().__init__(net)
        wave = sinusoid if net.guided else endpoint_sinusoid
        self.time = TimeEmbedding(net.base, net.time_width, wave)
        # the module's name is that of its tensors in snapshots and checkpoints
        self.told: nn.Module | None = None
        if net.guidance == "early":
            self.told = ConditionLinear(net.classes, net.dense, net.base, bias=net.label_bias)
        elif net.guidance == "late":
            self.told = ConditionLinear(net.classes, net.dense, net.time_width, bias=False)
        elif net.guidance != "none":
            self.told = GuidanceMLP(net)
        self.context = ContextTokens(net) if net.tokens or net.time_tokens else None
        self.stages = nn.ModuleList(_stage(net, stage) for stage in net.stages)
        width = net.stages[-1].width
        self.norm = GroupNorm(net, width, net.out_groups)
        self.out = nn.Conv2d(width, net.out_channels, 3, padding=1)
        self._initialise()
        self.augment = self._augment_embedding() if net.augment else None
        self.self_condition = (
            SelfCondition(net, net.base, net.embedding, wave) if net.self_condition else None
        )

    def _augment_embedding(self) -> AugmentEmbedding:
        """Drawn late, so that it changes none of the weights drawn before; in guided diffusion's blocks zero (EDM)."""
        made = AugmentEmbedding(self.net.augment, self.net.base)
        if self.net.guided:
            nn.init.zeros_(made.linear.weight)
        elif not self.net.plain_init:
            nn.init.xavier_uniform_(made.linear.weight)
        return made

    def _initialise(self) -> None:
        """Xavier's (Ho et al., Karras et al.) or torch's own (Dhariwal & Nichol); residual paths begin at zero."""
        if self.net.plain_init:
            return
        if not self.net.guided:
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
                elif isinstance(module, ConditionLinear):
                    module.xavier()
        nearly = 1e-5 if self.net.form == "edm" else 0.0
        for last in [self.out, *self._lasts()]:
            nn.init.xavier_uniform_(last.weight, gain=nearly)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        if self.net.form == "edm":
            for module in self.modules():
                if isinstance(module, Attention):
                    nn.init.xavier_uniform_(module.qkv.weight, gain=math.sqrt(0.2))
        if self.net.guidance == "late":
            for weight in self.told.parameters():  # type: ignore[union-attr]
                nn.init.normal_(weight)

    def _lasts(self) -> Iterable[nn.Conv2d | nn.Linear]:
        """The last map of every residual path."""
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                yield module.conv2
            elif isinstance(module, Attention):
                yield module.project

    def repeated(self) -> Iterable[nn.Module]:
        return [stage for stage in self.stages if isinstance(stage, Block)]

    def _run(
        self, x: Tensor, tau: Tensor, condition: Condition, wanted: Collection[int], *, stop: bool
    ) -> tuple[Any, dict[int, Tensor]]:
        names = {self.net.layers[number - 1].name: number for number in wanted}
        time = time_input(self.net.time, tau, whole=self.net.whole_index)
        embedding = self._embed(time, condition)
        c, context = F.silu(embedding), self._context(time, condition)
        x = with_spatial(x, condition, self.net.spatial)
        skips: list[Tensor] = []
        captured: dict[int, Tensor] = {}
        for plan, stage in zip(self.net.stages, self.stages, strict=True):
            if plan.kind == "decode":
                x = torch.cat((x, skips.pop()), dim=1)
            x = self._call(stage, x, c, context) if isinstance(stage, Block) else stage(x)
            x = self._laid_out(x) if plan.kind == "stem" else x
            if plan.kind in ("stem", "encode", "down"):
                skips.append(x)
            if plan.name in names:
                captured[names[plan.name]] = x.flatten(2).transpose(1, 2)  # (B, H W, C)
                if stop and len(captured) == len(names):
                    return None, captured
            if self.self_condition is not None and plan.name == self.net.self_condition:
                c = self.self_condition(embedding, x.mean((2, 3)), time)
        return self.out(F.silu(self.norm(x))), captured

    def _embed(self, time: Tensor, condition: Condition) -> Tensor:
        """Embeds time and condition in one vector, (B, embedding), before the activation for all blocks."""
        early = None if self.augment is None else self.augment(condition)
        if self.told is not None and self.net.guidance == "early":
            # EDM feeds one-hots of unit mean square
            embedded = self.told(condition, math.sqrt(self.net.classes))
            return self.time(time, embedded if early is None else embedded + early)
        c = self.time(time, early)
        if self.told is not None:
            embedded = self.told(condition)
            c = torch.cat((c, embedded), dim=1) if self.net.guidance == "concat" else c + embedded
        return c

    def _context(self, time: Tensor, condition: Condition) -> Tensor | None:
        """Tokens (B, S, 32) that attention reads beside the grid, where the net has any."""
        if self.context is None:
            return None
        return self.context(condition, self.time.waves(time))


def _stage(net: UNetArchitecture, stage: Stage) -> nn.Module:
    if stage.kind == "stem":
        return nn.Conv2d(stage.inputs, stage.width, 3, padding=1)
    if stage.kind in ("down", "up") and not net.residual:
        return Resample(stage.width, stage.kind)
    return Block(net, stage)
