"""DiT and LightningDiT in numbers (Peebles & Xie 2023, table 1; Yao et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfguide.spec.architecture import ROUTED_FROM, Layer, PatchTransformer, require

TIME_FREQUENCIES = 256  # width of DiT's sinusoid


@dataclass(frozen=True, kw_only=True)
class DiTArchitecture(PatchTransformer):
    """A transformer over patches with adaLN-Zero; LightningDiT's parts are switches."""

    norm: Literal["layer", "rms"] = "layer"  # rms has a learned scale, layer none
    mlp: Literal["gelu", "swiglu"] = "gelu"
    rope: bool = False  # 2-d rotary positions on q and k, beside the fixed sinusoid
    qk_norm: bool = False
    qk_bias: bool = (
        False  # layer norms of q and k have a bias and eps 1e-5, as timm's; else neither, and 1e-6
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.width % 4 == 0,
            "width",
            self.width,
            "must be a multiple of 4 for the 2-d sinusoid of positions",
        )
        require(
            not self.rope or self.head_width % 4 == 0,
            "rope",
            self.rope,
            f"turns pairs along two axes: a head's width, here {self.head_width}, must be a multiple of 4",
        )
        self._settle_self_condition()

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Width inside the MLP; SwiGLU has three matrices, so two thirds of it."""
        return 4 * self.width if self.mlp == "gelu" else int(2 / 3 * 4 * self.width)

    @property
    def condition_row(self) -> bool:
        """Whether a vector beside the time's holds the condition, or that it is null or unconditional.

        With prototypes for each patch and nothing else the patches have rows of their own, as in SGFM: one for the
        image would be read when guidance drops all patches, and never be trained, since they are dropped one by one.
        """
        return bool(self.classes or self.dense or self.spatial or not self.dense_patch)

    @property
    def layers(self) -> tuple[Layer, ...]:
        extras = int(self.cls_token)
        return tuple(
            Layer(f"block_{i}", self.tokens + extras, self.width, extras)
            for i in range(1, self.depth + 1)
        )

    def parameters(self) -> int:
        d, p2, norms = self.width, self.patch**2, self.norm == "rms"
        embed = p2 * (self.channels + self.spatial) * d + d
        time = TIME_FREQUENCIES * d + d + d * d + d
        condition = self.classes * d + (self.dense * d + d if self.dense else 0)
        condition += 2 * d if self.condition_row else 0
        patchwise = self.dense_patch * d + d + 2 * d if self.dense_patch else 0
        qk_norms = 2 * self.head_width * self.qk_norm * (2 if self.qk_bias and not norms else 1)
        attention = (3 * d * d + 3 * d) + (d * d + d) + qk_norms
        if self.mlp == "gelu":
            mlp = (d * self.hidden + self.hidden) + (self.hidden * d + d)
        else:
            mlp = 2 * (d * self.hidden + self.hidden) + (self.hidden * d + d)
        block = attention + mlp + (6 * d * d + 6 * d) + 2 * d * norms
        final = (2 * d * d + 2 * d) + (d * p2 * self.out_channels + p2 * self.out_channels)
        own = sum(inputs * width + width for inputs, width in self._self_maps(TIME_FREQUENCIES, d))
        ends = embed + time + condition + patchwise + final + d * norms + own + self.augment * d
        return ends + self.depth * block + (d if self.cls_token else 0)

    def _macs(self, routed: int) -> int:
        d, p2 = self.width, self.patch**2

        def block(tokens: int) -> int:
            n = tokens + int(self.cls_token)
            mlp = (2 if self.mlp == "gelu" else 3) * n * d * self.hidden
            return 4 * n * d * d + mlp + 2 * n * n * d + 6 * d * d

        dense = min(self.depth, 2 * (ROUTED_FROM - 1))
        blocks = dense * block(self.tokens) + (self.depth - dense) * block(routed)
        ends = self.tokens * p2 * d * (self.channels + self.spatial + self.out_channels)
        condition = (self.dense + self.augment) * d + self.tokens * self.dense_patch * d
        condition += sum(inputs * width for inputs, width in self._self_maps(TIME_FREQUENCIES, d))
        return blocks + ends + 3 * d * d + TIME_FREQUENCIES * d + condition
