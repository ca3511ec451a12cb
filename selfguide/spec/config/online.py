"""`guidance=online`: groups that the model finds while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from selfguide.spec.architecture import PatchTransformer
from selfguide.spec.averages import AverageSpec
from selfguide.spec.config.guidance import DROP, Guidance, HeadSettings
from selfguide.spec.config.laws import (
    AtLeast,
    Formerly,
    Images,
    Neutral,
    Positive,
    ReadWith,
    Share,
    Span,
    Within,
)
from selfguide.spec.config.model import Pooling
from selfguide.spec.config.path import check_on_path
from selfguide.spec.schedules import switch_after
from selfguide.spec.sizes import row
from selfguide.spec.unet import UNetArchitecture
from shards.errors import UserError

if TYPE_CHECKING:
    from selfguide.spec.architecture import Architecture
    from selfguide.spec.config import Config
    from selfguide.spec.config.train import TrainConfig

_TRAINING_VIEW = ReadWith("view=training")


@dataclass(frozen=True, kw_only=True)
class OnlineGuidance(Guidance):
    """Prototypes found while training by a Sinkhorn over all ranks (Hu et al. 2023, arXiv 2312.08825).

    Where the published method can be read in several ways a field decides, and its default is the corrected form;
    configs/guidance/sgfm_paper and sgfm_code choose the published ones.
    """

    source: Literal["online"] = "online"
    # K
    groups: Annotated[int, AtLeast(2)] = 300
    # what has a prototype: an image, or each of its patches
    level: Literal["image", "patch"] = "image"
    # P; None is the model's width, as in the paper
    prototype_width: Annotated[int | None, AtLeast(1)] = None
    # None is half the feature's width, as in the paper
    head_width: Annotated[int | None, AtLeast(1)] = None
    # block whose output is read, counted from 1; None is the middle
    layer: int | None = None
    # of the tokens there; level "patch" reads each patch's
    pooling: Annotated[Pooling, ReadWith("level=image")] = "cls"
    # at which ids are extracted
    noise_time: Annotated[float, Within(0.0, 1.0)] = 0.2
    # what the head learns from; "training" is the paper's
    view: Literal["extraction", "training"] = "extraction"
    # noise-times whose L_SK counts
    mask: Annotated[tuple[float, float], Span(), _TRAINING_VIEW] = (0.15, 0.25)
    # the condition of the head's view: as at extraction, or what the step trains with (the code)
    view_condition: Annotated[
        Literal["unconditional", "as_trained"],
        _TRAINING_VIEW,
        Formerly("view_told", {"unconditional": "nothing"}),
    ] = "unconditional"
    # the samples Sinkhorn shares out: those whose L_SK counts, or all (the code)
    codes_over: Annotated[Literal["counted", "all"], _TRAINING_VIEW] = "counted"
    # what L_SK is a mean over; "all" (the code) weighs it by the mask's share
    mean_over: Annotated[Literal["counted", "all"], _TRAINING_VIEW] = "counted"
    # noise in which ids are extracted; "training" is the step's (the code)
    extraction_noise: Literal["own", "training"] = "own"
    # whose BatchNorm statistics name ids; "frozen" are those at the switch (the code)
    teacher_buffers: Literal["student", "frozen"] = "student"
    # the rows a model is conditioned on; "averaged" are averages of unit rows, a little shorter than 1 (the code)
    condition_rows: Annotated[Literal["unit", "averaged"], Formerly("told_rows")] = "unit"
    # the rows that name ids: the nearest unit row, or the largest product with the averages as they are (the code)
    id_rows: Annotated[
        Literal["unit", "averaged"],
        ReadWith("condition_rows=averaged", "prototype_gradient=plain"),
        Neutral("unit"),
    ] = "unit"
    # of prototypes: along the sphere, or as it is (the code), where rows become unit after averages took them
    prototype_gradient: Annotated[Literal["tangent", "plain"], Neutral("tangent")] = "tangent"
    # the unconditional state: a learned row, as in the code, or zeros, as in the paper
    unconditional: Annotated[Literal["embedding", "zero"], Formerly("untold")] = "embedding"
    # share of training after which the model is conditioned on its prototypes
    switch: Annotated[float, Share()] = 0.5
    epsilon: Annotated[float, Positive()] = 0.05
    iterations: Annotated[int, AtLeast(1)] = 3
    # recent features of each rank that join Sinkhorn (SwAV); SGFM found that they give nothing
    queue: Annotated[int, AtLeast(0, "counts features: take {low} or more")] = 0
    temperature: Annotated[float, Positive()] = 0.1
    # lambda, and whether it is reached linearly at the switch or holds from the beginning (an ablation, section 5.2)
    weight: Annotated[float, Within(0.0)] = 1.0
    warmup: Annotated[Literal["linear", "none"], Neutral("linear")] = "linear"
    # whether L_SK trains the head and the prototypes alone; false trains the backbone too (an ablation, section 5.2)
    stop_gradient: Annotated[bool, Neutral(True)] = True
    drop: Annotated[float, DROP] = 0.1
    # images over which p(k) is counted, one to two of them
    window: Annotated[int, Images()] = 65_536
    # prototypes below this part of an even share of a window begin anew; 0 never
    revive: Annotated[float, DROP] = 0.0
    # images between refreshes of the teacher from the EMA masters
    teacher_refresh: Annotated[int, Images()] = 1024
    # share of the student that the teacher's average takes at every step (the code: 1e-4, at batch 1024 a half-life of
    # 7.10 million images); None: the teacher follows the first average of `train`
    teacher_rate: Annotated[float | None, Within(0.0, 1.0, above=True), Neutral(None)] = None
    # whose BatchNorm statistics a snapshot holds
    snapshot_buffers: Annotated[
        Literal["student", "teacher"], ReadWith("teacher_buffers=frozen"), Neutral("student")
    ] = "student"
    # std of a transformer's [CLS], null and unconditional at the start (the code: 1); None is the model's
    token_std: Annotated[float | None, Positive(), Neutral(None)] = None
    # std of the head's linear maps at the start, whose biases are then 0 (the code: 0.02); None is torch's own
    head_std: Annotated[float | None, Positive(), Neutral(None)] = None
    # of published weights where training begins: U-ViT's positions and the null row; the code keeps neither
    official_tokens: Annotated[Literal["taken", "fresh"], Neutral("taken")] = "taken"
    # noise in which a snapshot is asked for the group of an image: the same for all, or each image's own (the code)
    query_noise: Annotated[Literal["shared", "own"], Neutral("shared")] = "shared"

    learns_online: ClassVar[bool] = True

    @property
    def one_group(self) -> bool:
        """Of an image, unless each patch has its own."""
        return self.level == "image"

    @property
    def average(self) -> AverageSpec | None:
        return None if self.teacher_rate is None else AverageSpec(rate=self.teacher_rate)

    @property
    def takes_tokens(self) -> bool:
        return self.official_tokens == "taken"

    @property
    def publishes_teacher(self) -> bool:
        return self.snapshot_buffers == "teacher"

    def fit(self, net: Architecture) -> Architecture:
        if self.token_std is not None and isinstance(net, PatchTransformer):
            net = replace(net, token_std=self.token_std)
        width = self.condition_width(net)
        patches = self.level == "patch"
        return replace(net, dense_patch=width) if patches else replace(net, dense=width)

    def condition_width(self, net: Architecture) -> int:
        """P: what was asked for, or the width of the layer that is read."""
        return self.prototype_width or net.layer_of(self.layer, "guidance.layer").width

    def switch_images(self, train: TrainConfig) -> int:
        """A whole number of batches."""
        return switch_after(self.switch, train.images, train.batch)

    def head(self, net: Architecture) -> HeadSettings:
        layer = net.layer_of(self.layer, "guidance.layer")
        flat = self.pooling == "flat" and self.level == "image"
        features = layer.width * (layer.tokens - layer.extras if flat else 1)
        return HeadSettings(
            features=features,
            hidden=self.head_width or features // 2,
            width=self.condition_width(net),
            groups=self.groups,
            layer=self.layer or net.middle,
            pooling="patch" if self.level == "patch" else self.pooling,
            noise_time=self.noise_time,
            condition_rows=self.condition_rows,
            id_rows=self.id_rows,
            prototype_gradient=self.prototype_gradient,
            unconditional=self.unconditional,
            query_noise=self.query_noise,
            std=self.head_std,
            stop_gradient=self.stop_gradient,
        )

    def check(self, config: Config) -> None:
        if self.level == "patch" and isinstance(row(config.model.name), UNetArchitecture):
            raise UserError(
                f"guidance.level=patch conditions each patch of a transformer, and model.name={config.model.name!r} is "
                "a UNet; take guidance.level=image, or a DiT or U-ViT"
            )
        if self.level == "image" and self.pooling == "cls" and not config.model.cls_token:
            raise UserError(
                "guidance.pooling=cls reads a learned [CLS] token and model.cls_token is false; set "
                "model.cls_token=true, or guidance.pooling=flat (small nets) or mean"
            )
        if not self.stop_gradient:
            self._check_gradient(config)
        if self.noise_time == 1:
            raise UserError(
                f"guidance.noise_time={self.noise_time} is pure noise, of which no groups can be made; "
                "take a value below 1"
            )
        check_on_path(config.path, "guidance.noise_time={}", self.noise_time)
        # both stages have a step at least
        steps = config.train.images // config.train.batch
        if steps == 1:
            raise UserError(
                f"train.images={config.train.images} is one step of train.batch={config.train.batch}, and "
                "guidance=online has two stages; train for two batches or more"
            )
        if round(self.switch * steps) == steps:
            latest = math.floor((1 - 1 / steps) * 1000) / 1000
            raise UserError(
                f"guidance.switch={self.switch} is the end of {steps} steps: the model would never be conditioned on "
                f"its prototypes; take guidance.switch={latest:g} or less"
            )

    def _check_gradient(self, config: Config) -> None:
        """Raises UserError where the head does not read the backbone's own forward, whole."""
        if self.view != "training" or self.view_condition != "as_trained":
            raise UserError(
                f"guidance.stop_gradient=false with guidance.view={self.view}: the head then reads the teacher, which "
                "has no gradient; take guidance.view=training guidance.view_condition=as_trained"
            )
        if config.train.batch != config.ranks * config.micro_batch or config.elastic:
            raise UserError(
                "guidance.stop_gradient=false needs each rank's images in one forward, and training accumulates; drop "
                "train.micro_batch and min_nodes"
            )

    def identity(self, config: Config, promises: Mapping[str, Any]) -> dict[str, Any]:
        """What Sinkhorn and BatchNorm see at once: the batch, unless it is accumulated in pieces."""
        return {"statistics_over": config.ranks * config.micro_batch}
