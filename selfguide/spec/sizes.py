"""How large things are, without building them: architectures, parameters, FLOPs, memory, checkpoint bytes.

Sizes are those of Peebles & Xie (2023, table 1); a row states the input it was published for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from selfguide.spec.config import Config, LabelGuidance, OnlineGuidance, nearest
from shards.errors import UserError

TIME_FREQUENCIES = 256  # width of DiT's sinusoid
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A diffusion transformer to the last number: what `selfguide.models.build` builds."""

    size: int  # edge of the square input
    channels: int
    patch: int
    width: int
    depth: int
    heads: int
    learn_sigma: bool = False
    cls_token: bool = False
    classes: int = 0  # rows of the label table, without null and unconditional
    dense: int = 0  # width of a dense condition (a prototype), 0 for none

    def __post_init__(self) -> None:
        if self.size % self.patch:
            raise UserError(
                f"model.patch={self.patch} does not divide the input edge {self.size}; take one of its divisors"
            )
        if self.width % self.heads:
            raise UserError(f"model.heads={self.heads} does not divide model.width={self.width}")
        if self.width % 4:
            raise UserError(
                f"model.width={self.width} must be a multiple of 4 for the 2-d sinusoid of positions"
            )

    @property
    def tokens(self) -> int:
        """Patch tokens, without [CLS]."""
        return (self.size // self.patch) ** 2

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)

    def parameters(self) -> int:
        """Trainable scalars of the backbone, exactly."""
        d, p2 = self.width, self.patch**2
        embed = p2 * self.channels * d + d
        time = TIME_FREQUENCIES * d + d + d * d + d
        condition = self.classes * d + 2 * d + (self.dense * d + d if self.dense else 0)
        block = (
            (3 * d * d + 3 * d)
            + (d * d + d)
            + (4 * d * d + 4 * d)
            + (4 * d * d + d)
            + (6 * d * d + 6 * d)
        )
        final = (2 * d * d + 2 * d) + (d * p2 * self.out_channels + p2 * self.out_channels)
        return embed + time + condition + self.depth * block + final + (d if self.cls_token else 0)

    def forward_macs(self) -> int:
        """Multiply-adds of one image's forward; training costs three times that, a MAC is two FLOPs."""
        d, n, p2 = self.width, self.tokens + int(self.cls_token), self.patch**2
        block = 12 * n * d * d + 2 * n * n * d + 6 * d * d
        ends = self.tokens * p2 * d * (self.channels + self.out_channels)
        return self.depth * block + ends + 3 * d * d + TIME_FREQUENCIES * d + self.dense * d


_WIDTHS = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}

TABLE: dict[str, Architecture] = {
    f"dit_{name}_{patch}": Architecture(
        size=32, channels=4, patch=patch, width=w, depth=d, heads=h, learn_sigma=True, classes=1000
    )
    for name, (w, d, h) in _WIDTHS.items()
    for patch in (1, 2, 4, 8)
}
TABLE["dit_digits"] = Architecture(
    size=8, channels=1, patch=2, width=64, depth=4, heads=4, classes=10
)


def row(name: str) -> Architecture:
    """The published architecture of that name."""
    if name not in TABLE:
        raise UserError(
            f"model.name={name!r} is unknown{nearest(name, TABLE)}; known: {', '.join(TABLE)}"
        )
    return TABLE[name]


def architecture(config: Config) -> Architecture:
    """The network this experiment trains: its table row, its overrides, its data's shape, its guidance's inputs."""
    base, model, guidance = row(config.model.name), config.model, config.guidance
    channels, size, _ = config.data.shape

    def given(name: str) -> Any:
        return getattr(base if getattr(model, name) is None else model, name)

    return replace(
        base,
        patch=given("patch"),
        width=given("width"),
        depth=given("depth"),
        heads=given("heads"),
        learn_sigma=given("learn_sigma"),
        cls_token=model.cls_token,
        size=model.size or size,
        channels=model.channels or channels,
        classes=config.data.classes if isinstance(guidance, LabelGuidance) else 0,
        dense=prototype_width(guidance, model.width or base.width)
        if isinstance(guidance, OnlineGuidance)
        else 0,
    )


def prototype_width(guidance: OnlineGuidance, width: int) -> int:
    """P; equal to the model's width unless asked otherwise (SGFM)."""
    return guidance.prototype_width or width


def feature_width(guidance: OnlineGuidance, net: Architecture) -> int:
    """Width of what the online head reads, after pooling."""
    return net.tokens * net.width if guidance.pooling == "flat" else net.width


def head_parameters(guidance: OnlineGuidance, net: Architecture) -> int:
    """Projection Linear-BatchNorm-ReLU-Linear and the K prototypes (SGFM)."""
    features, p = feature_width(guidance, net), net.dense
    hidden = guidance.head_width or features // 2
    return (features * hidden + hidden) + 2 * hidden + (hidden * p + p) + guidance.groups * p


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one rank between steps, without activations and communication buffers; and on disk."""

    parameters: int
    weights: int
    gradients: int
    optimiser: int
    ema: int
    teacher: int
    checkpoint: int
    snapshot: int

    @property
    def rank(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.ema + self.teacher


def footprint(config: Config) -> Footprint:
    """Closed formulas for the configured engine; activations depend on the kernels and are not in it."""
    net = architecture(config)
    online = isinstance(config.guidance, OnlineGuidance)
    n = net.parameters()
    if isinstance(config.guidance, OnlineGuidance):
        n += head_parameters(config.guidance, net)
    word, horizons = BYTES[config.engine.dtype], len(config.train.ema_halflife)
    sharded = config.engine.backend == "deepspeed"
    share = -(-n // config.ranks) if sharded else n
    # fp32 torch keeps no second copy of the weights; ZeRO and bf16 step on fp32 masters
    masters = 4 * share if sharded or config.engine.dtype == "bf16" else 0
    gradient_share = share if sharded and config.engine.zero_stage >= 2 else n
    return Footprint(
        parameters=n,
        weights=word * n,
        gradients=word * gradient_share,
        optimiser=masters + 8 * share,
        ema=4 * share * horizons,
        teacher=word * n if online else 0,
        checkpoint=4 * n * (3 + horizons) + (word * n if online else 0),
        snapshot=4 * n * horizons,
    )
