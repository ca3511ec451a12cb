"""`guidance=`: where a condition comes from. One class a source; what they differ in are its methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from selfguide.spec.architecture import PatchTransformer
from selfguide.spec.averages import AverageSpec
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
from selfguide.spec.schedules import switch_after
from selfguide.spec.sizes import row
from selfguide.spec.unet import UNetArchitecture
from selfguide.spec.uvit import UViTArchitecture
from shards import storage
from shards.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

    from selfguide.spec.architecture import Architecture
    from selfguide.spec.config import Config
    from selfguide.spec.config.train import TrainConfig

_DROP = Within(0.0, 1.0, below=True)
_TRAINING_VIEW = ReadWith("view=training")


class HeadSettings(NamedTuple):
    """A projection head with prototypes, and what it reads of the backbone."""

    # widths of what it reads after pooling, of its hidden layer, and of a prototype; number of prototypes
    features: int
    hidden: int
    width: int
    groups: int
    # block whose output is read, counted from 1; how its tokens are pooled, "patch" leaves each by itself
    layer: int
    pooling: str
    # at which images are compared with prototypes
    noise_time: float
    # the fields of `OnlineGuidance`
    condition_rows: str
    id_rows: str
    prototype_gradient: str
    unconditional: str
    query_noise: str
    # of its linear maps at the start
    std: float | None
    # whether what it learns ends at the backbone
    stop_gradient: bool

    @property
    def parameters(self) -> int:
        """Trainable ones: the projection Linear-BatchNorm-ReLU-Linear and the K prototypes (SGFM)."""
        features, hidden, p = self.features, self.hidden, self.width
        return (features * hidden + hidden) + 2 * hidden + (hidden * p + p) + self.groups * p


class Guidance:
    """What the rest of the project asks of a guidance source's settings."""

    # whether a teacher extracts features while training, and the network has a head that learns from them
    learns_online: ClassVar[bool] = False
    # whether training sees human labels by its own settings
    uses_labels: ClassVar[bool] = False

    @property
    def one_group(self) -> bool:
        """Whether the network is conditioned on one group an image, so that groups can be drawn evenly."""
        return False

    @property
    def average(self) -> AverageSpec | None:
        """The average that a teacher of its own follows, ahead of those of `train`; None is the first of these."""
        return None

    @property
    def takes_tokens(self) -> bool:
        """Whether published weights give positions and a null row too; else these begin afresh."""
        return True

    @property
    def publishes_teacher(self) -> bool:
        """Whether a snapshot holds the teacher's buffers; else the student's."""
        return False

    @property
    def folders(self) -> dict[str, str]:
        """The configured sidecars by field."""
        return {}

    def absolute(self) -> Self:
        """The same with absolute paths: jobs run from their code copy, wherever that lies."""
        return self

    def network_inputs(self, classes: int) -> dict[str, int]:
        """Sizes of the network's condition inputs, for data with so many `classes`, before the network is known."""
        return {"classes": 0, "spatial": 0}

    def fit(self, net: Architecture) -> Architecture:
        """`net` with the inputs whose size depends on the network itself."""
        return net

    def switch_images(self, train: TrainConfig) -> int:
        """The image count from which the network is conditioned; 0 is from the beginning."""
        return 0

    def head(self, net: Architecture) -> HeadSettings | None:
        """The head beside the backbone `net`, if the source has one.

        Raises:
            UserError: it would read a layer that `net` does not have.
        """
        return None

    def check(self, config: Config) -> None:
        """Laws between the source and the rest, as far as the network's sizes are not needed.

        Raises:
            UserError: the first that does not hold, with its cure.
        """

    def identity(self, config: Config, promises: Mapping[str, Any]) -> dict[str, Any]:
        """What changes a run's result beside the fields; `promises` are the hashes of the sidecars' rows."""
        return {}


@dataclass(frozen=True, kw_only=True)
class NoGuidance(Guidance):
    """Unconditional training."""

    source: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class LabelGuidance(Guidance):
    """Human labels from the shards: the upper reference, never label-free."""

    source: Literal["labels"] = "labels"
    # DiT, SiT
    drop: Annotated[float, _DROP] = 0.1

    uses_labels: ClassVar[bool] = True

    @property
    def one_group(self) -> bool:
        return True

    def network_inputs(self, classes: int) -> dict[str, int]:
        return {"classes": classes, "spatial": 0}

    def check(self, config: Config) -> None:
        if config.data.classes < 1:
            raise UserError(
                f"guidance.source=labels needs data.classes > 0, not {config.data.classes}; give data.classes=... "
                "if the shards have labels, else guidance=online"
            )


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
    drop: Annotated[float, _DROP] = 0.1
    # images over which p(k) is counted, one to two of them
    window: Annotated[int, Images()] = 65_536
    # prototypes below this part of an even share of a window begin anew; 0 never
    revive: Annotated[float, _DROP] = 0.0
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


class Role(NamedTuple):
    """What a field of `SidecarGuidance` may name."""

    # kinds of sidecar
    kinds: tuple[str, ...]
    # the field that says how large the network's input for it is
    size: str
    # the verbs of tools.annotate that make one
    made_by: str


ROLES = {
    "ids": Role(("id", "multi_hot"), "groups", "kmeans or temi"),
    "layout": Role(("box", "mask"), "channels", "lost or stego"),
    "dense": Role(("dense",), "width", "features"),
}


@dataclass(frozen=True, kw_only=True)
class SidecarGuidance(Guidance):
    """What was found of each image beforehand, read from annotation sidecars; see `shards.sidecar`.

    Any of them, together: SGDM (Hu et al. 2023, arXiv 2210.06462) conditions on a group and a box or mask.
    """

    source: Literal["sidecar"] = "sidecar"
    # folder of a sidecar of kind id or multi_hot
    ids: str | None = None
    # K of `ids`; without them, of a mask, whose groups are a multi-hot condition too
    groups: int = 0
    # of kind box or mask
    layout: str | None = None
    # of `layout`: 1 for boxes, the groups of a mask
    channels: int = 0
    # of kind dense
    dense: str | None = None
    # P of `dense`
    width: int = 0
    # one mask for all of them (SGDM)
    drop: Annotated[float, _DROP] = 0.1
    # share of images conditioned on another image's row: a control
    shuffle: Annotated[float, Within(0.0, 1.0)] = 0.0

    @property
    def one_group(self) -> bool:
        """Where ids are all that is given."""
        return self.ids is not None and self.layout is None and self.dense is None

    @property
    def folders(self) -> dict[str, str]:
        """The configured sidecars by field."""
        named = {field: getattr(self, field) for field in ROLES}
        return {field: folder for field, folder in named.items() if folder is not None}

    def absolute(self) -> Self:
        resolved: dict[str, Any] = {
            field: str(storage.expanded(folder).resolve()) for field, folder in self.folders.items()
        }
        return replace(self, **resolved)

    def network_inputs(self, classes: int) -> dict[str, int]:
        return {"classes": self.groups, "dense": self.width, "spatial": self.channels}

    def check(self, config: Config) -> None:
        if not self.folders:
            raise UserError(
                "guidance.source=sidecar has no condition yet; give guidance.ids=FOLDER with guidance.groups=K, "
                "guidance.layout=FOLDER with guidance.channels=M, or guidance.dense=FOLDER with guidance.width=P"
            )
        for field, folder in self.folders.items():
            if not folder.strip() or storage.is_remote(folder):
                raise UserError(
                    f"guidance.{field}={folder!r}: rows are mapped into memory; give a folder on a file system that "
                    "all nodes share"
                )
        for field, role in ROLES.items():
            self._check_size(field, role)
        base = row(config.model.name)
        width = config.model.width or getattr(base, "width", 0)
        if isinstance(base, UViTArchitecture) and self.width not in (0, width):
            raise UserError(
                f"guidance.width={self.width}, and model.name={config.model.name} takes a dense condition as a token "
                f"of its own width, {width}; take features of that width, or a DiT or UNet, which project them"
            )

    def _check_size(self, field: str, role: Role) -> None:
        folder, size = getattr(self, field), getattr(self, role.size)
        if folder is not None and size < 1:
            raise UserError(
                f"guidance.{role.size}={size} is too small for guidance.{field}={folder}; give the number that its "
                "record names, 1 or more"
            )
        if folder is None and size and not (field == "ids" and self.layout is not None):
            raise UserError(
                f"guidance.{role.size}={size} is read with guidance.{field} only; give guidance.{field}=FOLDER, or "
                "drop it"
            )
        if field == "ids" and folder is None and size not in (0, self.channels):
            raise UserError(
                f"guidance.groups={size} without guidance.ids are the groups that guidance.layout holds; take "
                f"guidance.groups={self.channels}, or 0 to condition on the layout alone"
            )

    def identity(self, config: Config, promises: Mapping[str, Any]) -> dict[str, Any]:
        """What the sidecars hold, not where they lie."""
        return dict.fromkeys(self.folders) | dict(promises)
