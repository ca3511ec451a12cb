"""`guidance=`: where a condition comes from. One class a source; what they differ in are its methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from selfguide.spec.averages import AverageSpec
from selfguide.spec.config.laws import (
    Within,
)
from shards.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

    from selfguide.spec.architecture import Architecture
    from selfguide.spec.config import Config
    from selfguide.spec.config.train import TrainConfig

# shares of images whose condition may be dropped
DROP = Within(0.0, 1.0, below=True)


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
    drop: Annotated[float, DROP] = 0.1

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
