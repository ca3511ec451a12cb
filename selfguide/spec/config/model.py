"""`model=`: which network, and what an experiment changes of its published form."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Annotated, Literal

from selfguide.spec.architecture import TimeInput
from selfguide.spec.config.laws import Neutral, Positive, ReadWith

# how features of a layer's tokens become one vector; see `selfguide.models.backbone.pool`
Pooling = Literal["cls", "mean", "flat", "attention"]
POOLINGS = typing.get_args(Pooling)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A row of `selfguide.spec.sizes` and what this experiment changes of it (None keeps the row's value).

    Which of the fields a model has depends on its family; one that it does not have is an error.
    """

    name: str
    # edge of the square input, in latent pixels
    size: int | None = None
    channels: int | None = None
    learn_sigma: bool | None = None
    time: TimeInput | None = None
    # an index that fp32 missed is that of the path's table
    whole_index: Annotated[bool | None, Neutral(None)] = None
    # a learned token that collects what the online guidance reads
    cls_token: bool | None = None
    # the layer whose pooled feature joins what later layers read of time and condition, by number from 1 or by name
    # such as out_7 (DDAE++); of a U-ViT its [CLS] token does
    self_condition: Annotated[str | None, Neutral(None)] = None
    # scaled by a vector that is learned of the time, or as it is
    self_add: Annotated[
        Literal["adaptive", "direct"], ReadWith("self_condition=LAYER"), Neutral("adaptive")
    ] = "adaptive"
    # std of that token, of null, unconditional and label rows at the start
    token_std: Annotated[float | None, Positive(), Neutral(None)] = None
    # transformers
    patch: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    norm: Literal["layer", "rms"] | None = None
    mlp: Literal["gelu", "swiglu"] | None = None
    rope: bool | None = None
    # the share of the patch tokens that skips the middle blocks in training (TREAD); sampling runs all
    route: Annotated[float | None, Neutral(None)] = None
    qk_norm: bool | None = None
    # the layer norms of q and k have a bias and eps 1e-5
    qk_bias: Annotated[bool | None, Neutral(None)] = None
    # U-ViT's 3x3 convolution over the output
    conv: bool | None = None
    # UNets
    base: int | None = None
    # width of each grid over `base`
    mult: tuple[int, ...] | None = None
    # residual blocks of each grid
    blocks: int | None = None
    # downsamplings at which blocks attend
    attention: tuple[int, ...] | None = None
    # of every group norm, and of the last one where that differs
    groups: int | None = None
    out_groups: Annotated[int | None, Neutral(None)] = None
    dropout: float | None = None
    # width of an attention head, in place of their number
    head_width: Annotated[int | None, Neutral(None)] = None
    # the map of EDM's labels has a bias
    label_bias: Annotated[bool | None, Neutral(None)] = None
    # every weight begins as torch's layers do
    plain_init: Annotated[bool | None, Neutral(None)] = None
