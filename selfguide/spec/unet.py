"""UNets in numbers: DDPM's and DDPM++'s, EDM's two, and self-guided diffusion's, each as one plan of stages.

ddpm: Ho et al. 2020, appendix B, and the two forms of it in Xiang et al. 2023 (DDAE). edm: Song et al. 2021's DDPM++ as
Karras et al. 2022, table 1, train it. adm: Dhariwal & Nichol 2021, as Karras et al. 2022 train it. sgdm: its blocks in
Hu et al. 2023 (self-guided diffusion). imagen: those with the attention of Imagen (Saharia et al. 2022, appendix B), as
Hu et al. 2023 released their net with context tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from selfguide.spec.architecture import Architecture, Layer, divisor, require

CONTEXT_WIDTH = 32  # of a context token (Hu et al. 2023)
TIME_TOKENS = 8  # context tokens that the time makes in the form imagen (their code)


class Stage(NamedTuple):
    """One step of the forward, on a grid of `edge` x `edge` (after a halving or doubling)."""

    name: str  # "" where its output is no layer
    kind: Literal["stem", "encode", "down", "middle", "decode", "up"]
    inputs: int  # channels, those of the skip included
    width: int  # channels that leave
    edge: int
    attention: bool = False


class Linear(NamedTuple):
    """A linear map, applied at `positions` places: a convolution has `taps` weights for each pair of channels."""

    inputs: int
    outputs: int
    taps: int = 1
    positions: int = 1
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class UNetArchitecture(Architecture):
    """Residual blocks down a pyramid of grids and up again, every output of the way down concatenated on the way up.

    `form` names whose conventions hold where the nets differ: how time and condition join, the norm they act on,
    where the decoder attends, how blocks begin.
    """

    form: Literal["ddpm", "edm", "adm", "sgdm", "imagen"]
    mult: tuple[int, ...]  # width of each grid over `base`; the next grid has half the edge
    blocks: int  # residual blocks for each grid on the way down; one more on the way up
    attention: tuple[
        int, ...
    ]  # downsamplings, 1, 2, 4, ..., at which blocks attend; the middle always does
    base: int = 128
    heads: int = 1
    head_width: int = 0  # of attention, in place of `heads`; 0 leaves it to them
    groups: int = 32  # of every group norm
    out_groups: int = 0  # of the last one, before the output; 0 is as many as of the others
    residual: bool = True  # down and up by BigGAN's residual blocks, not by one convolution
    context: int = 0  # tokens of the condition that attention reads beside the image's
    dropout: float = 0.0
    label_bias: bool = False  # of the condition's map in the form edm, as in EDM's code
    plain_init: bool = False  # every weight begins as torch's layers do (DDAE's code)

    def __post_init__(self) -> None:
        super().__post_init__()
        halvings = len(self.mult) - 1
        scales = [2**level for level in range(len(self.mult))]
        require(bool(self.mult), "mult", self.mult, "names no grid; give a width for each")
        require(
            self.size % scales[-1] == 0,
            "size",
            self.size,
            f"is halved {halvings} times: it must be a multiple of {scales[-1]}",
        )
        require(
            self.base % self.groups == 0,
            "groups",
            self.groups,
            f"does not divide model.base={self.base}; take model.groups={divisor(self.base, self.groups)}",
        )
        require(
            self.stages[-1].width % (self.out_groups or self.groups) == 0,
            "out_groups",
            self.out_groups,
            f"does not divide the width {self.stages[-1].width} before the output",
        )
        require(
            self.base % 4 == 0,
            "base",
            self.base,
            "must be a multiple of 4 for the sinusoid of time",
        )
        require(
            set(self.attention) <= set(scales),
            "attention",
            self.attention,
            f"is not among this network's downsamplings {', '.join(map(str, scales))}; take 'model.attention="
            f"[{','.join(str(each) for each in scales if each in self.attention)}]'",
        )
        for stage in self.stages:
            field, parts = (
                ("head_width", self.head_width) if self.head_width else ("heads", self.heads)
            )
            require(
                not stage.attention or stage.width % parts == 0,
                field,
                parts,
                f"does not divide the width {stage.width} of the grid of edge {stage.edge}; take model.{field}="
                f"{divisor(math.gcd(*(each.width for each in self.stages if each.attention)), parts)}",
            )
        require(0 <= self.dropout < 1, "dropout", self.dropout, "is a share: take 0 to below 1")
        require(
            self.context == 0 or self.form in ("sgdm", "imagen"),
            "context",
            self.context,
            "is a number of tokens that only the forms sgdm and imagen read",
        )
        require(
            not self.label_bias or self.form == "edm",
            "label_bias",
            self.label_bias,
            "is a part of the form edm only",
        )
        require(
            not self.dense_patch,
            "dense_patch",
            self.dense_patch,
            "needs a transformer: a UNet has no patches",
        )
        require(
            self.self_condition is None or self.form not in ("sgdm", "imagen"),
            "self_condition",
            self.self_condition,
            f"adds to the one vector that holds time and condition, and the form {self.form} has others beside it; "
            "drop it, or take a net of the form ddpm, edm or adm such as model=unet_ddpm",
        )
        self._settle_self_condition()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Everything from the first to the last residual block, in the order of the forward."""
        made = [Stage("in_1", "stem", self.channels + self.spatial, self.base, self.size)]
        for level, width in enumerate(self._widths):
            edge, attend = self.size >> level, 2**level in self.attention
            if level:
                above = made[-1].width
                made.append(Stage(f"in_{len(made) + 1}", "down", above, above, edge))
            for _ in range(self.blocks):
                name = f"in_{len(made) + 1}"
                made.append(Stage(name, "encode", made[-1].width, width, edge, attend))
        skips, below, number = [stage.width for stage in made], self._widths[-1], 0
        made.append(Stage("mid", "middle", below, below, made[-1].edge, True))
        for level, width in reversed(list(enumerate(self._widths))):
            edge = self.size >> level
            for block in range(self.blocks + 1):
                # EDM attends once for each grid on the way up, after its last block
                attend = 2**level in self.attention and (self.form != "edm" or block == self.blocks)
                number, inputs = number + 1, below + skips.pop()
                made.append(Stage(f"out_{number}", "decode", inputs, width, edge, attend))
                below = width
            if level:
                made.append(Stage("", "up", width, width, 2 * edge))
        return tuple(made)

    @property
    def _widths(self) -> list[int]:
        return [self.base * mult for mult in self.mult]

    @property
    def layers(self) -> tuple[Layer, ...]:
        named = (stage for stage in self.stages if stage.name)
        return tuple(Layer(stage.name, stage.edge**2, stage.width) for stage in named)

    @property
    def time_width(self) -> int:
        return 4 * self.base

    @property
    def guidance(self) -> Literal["early", "concat", "add", "late", "none"]:
        """How the condition vector meets the time: before the time's MLP, or behind it, beside its output or added.

        What is added comes from an MLP of its own ("add"), or from one linear map ("late").
        """
        if not self.condition_width:
            return "none"
        if self.form in ("edm", "adm"):
            return "early" if self.form == "edm" else "late"
        return "concat" if self.form == "sgdm" and not self.context else "add"

    @property
    def guidance_width(self) -> int:
        """Width of the embedded condition."""
        return self.base * {"early": 1, "concat": 2, "add": 4, "late": 4, "none": 0}[self.guidance]

    @property
    def condition_bias(self) -> bool:
        """Whether the first map of the condition vector has a bias."""
        return self.guidance in ("concat", "add") or (self.guidance == "early" and self.label_bias)

    @property
    def condition_width(self) -> int:
        """Width of the condition vector: groups and dense features."""
        return self.classes + self.dense

    @property
    def tokens(self) -> int:
        """Context tokens of the condition; a net without conditions has none."""
        return self.context if self.condition_width else 0

    @property
    def time_tokens(self) -> int:
        """Context tokens of the time."""
        return TIME_TOKENS if self.form == "imagen" else 0

    @property
    def keys_beside(self) -> int:
        """Keys that attention reads beside the grid's: of the context, and in the form imagen a learned null one."""
        return self.tokens + self.time_tokens + int(self.form == "imagen")

    def heads_of(self, width: int) -> int:
        """Heads of attention over a grid of that width."""
        return width // self.head_width if self.head_width else self.heads

    @property
    def embedding(self) -> int:
        """Width of time and condition together, as every residual block reads them."""
        return self.time_width + (self.guidance_width if self.guidance == "concat" else 0)

    @property
    def modulation(self) -> int:
        """What a block makes of the embedding, for each of its channels: a scale and a shift, or a shift."""
        return 2 if self.guided else 1

    @property
    def guided(self) -> bool:
        """Whether it has the blocks of guided diffusion (Dhariwal & Nichol 2021)."""
        return self.form in ("adm", "sgdm", "imagen")

    def projects(self, stage: Stage) -> bool:
        """Whether the shortcut of a residual block has weights: EDM's has them at every change of grid too."""
        resampled = stage.kind in ("down", "up")
        return stage.inputs != stage.width or (resampled and self.form == "edm")

    def parameters(self) -> int:
        return sum(m.taps * m.inputs * m.outputs + m.bias * m.outputs for m in self._maps())

    def forward_macs(self) -> int:
        maps = sum(m.taps * m.inputs * m.outputs * m.positions for m in self._maps())
        attended = ((s.edge**2, s.width) for s in self.stages if s.attention)
        return maps + sum(2 * n * (n + self.keys_beside) * width for n, width in attended)

    def _maps(self) -> list[Linear]:
        return [
            Linear(self.base, self.time_width),
            Linear(self.time_width, self.time_width),
            Linear(self.augment, self.base, bias=False),
            *self._condition_maps(),
            *(Linear(*each) for each in self._self_maps(self.base, self.embedding)),
            *(linear for stage in self.stages for linear in self._stage_maps(stage)),
            _norm(self._widths[0]),
            Linear(self._widths[0], self.out_channels, 9, self.size**2),
        ]

    def _condition_maps(self) -> Iterator[Linear]:
        joined = [] if self.guidance == "none" else [self.guidance_width]
        if self.tokens:
            joined.append(self.tokens * CONTEXT_WIDTH)
        if self.time_tokens:
            yield Linear(self.base, self.base)
            yield Linear(self.base, self.time_tokens * CONTEXT_WIDTH)
        if self.tokens or self.time_tokens:
            yield _norm(CONTEXT_WIDTH)
        for width in joined:
            yield Linear(self.classes, width, positions=0, bias=False)  # rows are looked up
            yield Linear(self.dense, width, bias=self.condition_bias)
        if self.guidance in ("concat", "add"):
            yield Linear(self.guidance_width, self.guidance_width)

    def _stage_maps(self, stage: Stage) -> list[Linear]:
        positions, width = stage.edge**2, stage.width
        first = Linear(stage.inputs, width, 9, positions)
        if stage.kind == "stem" or (stage.kind in ("down", "up") and not self.residual):
            return [first]
        embedded = Linear(self.embedding, self.modulation * width)
        second = Linear(width, width, 9, positions)
        block = [_norm(stage.inputs), first, embedded, _norm(width), second]
        maps = block * 2 if stage.kind == "middle" else block
        if self.projects(stage):
            maps.append(Linear(stage.inputs, width, 1, positions))
        if stage.attention:
            maps += self._imagen_maps(stage) if self.form == "imagen" else self._own_maps(stage)
        return maps

    def _own_maps(self, stage: Stage) -> list[Linear]:
        """Attention whose heads each have their keys and values."""
        positions, width = stage.edge**2, stage.width
        maps = [
            _norm(width),
            Linear(width, 3 * width, 1, positions),
            Linear(width, width, 1, positions),
        ]
        return [*maps, Linear(CONTEXT_WIDTH, 2 * width, 1, self.tokens)] if self.tokens else maps

    def _imagen_maps(self, stage: Stage) -> list[Linear]:
        """Attention whose heads share one key and value for each token; its norms of the grid have no bias."""
        positions, width = stage.edge**2, stage.width
        head = width // self.heads_of(width)
        scale = Linear(1, width, positions=0, bias=False)
        square = Linear(width, width, 1, positions, bias=False)
        return [
            *(scale, square, square, scale),
            Linear(width, 2 * head, 1, positions, bias=False),
            Linear(2, head, positions=0, bias=False),  # the null key and value
            _norm(CONTEXT_WIDTH),
            Linear(CONTEXT_WIDTH, 2 * head, 1, self.tokens + self.time_tokens),
        ]


def _norm(width: int) -> Linear:
    """The scale and the bias of a norm, whose multiply-adds are not counted."""
    return Linear(1, width, positions=0)
