"""What a user may set: frozen dataclasses, one file a group, each field with its laws beside its type.

Hydra composes YAML into a mapping; `build` turns it into these classes and refuses what they do not know, with
the nearest name. Counts of images are the clock: every cadence, schedule and horizon is in images seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from selfguide.spec.config.align import AlignConfig
from selfguide.spec.config.augment import AugmentConfig
from selfguide.spec.config.auxiliary import AuxiliaryConfig
from selfguide.spec.config.build import build
from selfguide.spec.config.cluster import ClusterConfig
from selfguide.spec.config.contrastive import ContrastiveConfig
from selfguide.spec.config.data import DataConfig
from selfguide.spec.config.engine import EngineConfig
from selfguide.spec.config.evaluation import EvaluationConfig
from selfguide.spec.config.guidance import Guidance, LabelGuidance, NoGuidance
from selfguide.spec.config.init import InitConfig
from selfguide.spec.config.laws import AtLeast, Seed
from selfguide.spec.config.model import POOLINGS, ModelConfig, Pooling
from selfguide.spec.config.online import OnlineGuidance
from selfguide.spec.config.path import PathConfig, Prediction
from selfguide.spec.config.representation import ComponentSettings
from selfguide.spec.config.sampler import SamplerConfig
from selfguide.spec.config.sidecar import SidecarGuidance
from selfguide.spec.config.train import TrainConfig

__all__ = [
    "POOLINGS", "AlignConfig", "AugmentConfig", "AuxiliaryConfig", "ClusterConfig", "Config", "ContrastiveConfig",
    "DataConfig", "EngineConfig", "EvaluationConfig", "Guidance", "InitConfig", "LabelGuidance", "ModelConfig",
    "NoGuidance", "OnlineGuidance", "PathConfig", "Pooling", "Prediction", "SamplerConfig", "SidecarGuidance",
    "TrainConfig", "build",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything one submission resolves to."""

    experiment: str
    model: ModelConfig
    path: PathConfig
    sampler: SamplerConfig
    guidance: NoGuidance | LabelGuidance | OnlineGuidance | SidecarGuidance
    data: DataConfig
    train: TrainConfig
    engine: EngineConfig
    evaluation: EvaluationConfig
    cluster: ClusterConfig
    init: InitConfig = field(default_factory=InitConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    # further protocols, `evaluation=[first,second,...]`; like the first they are no part of a run's identity
    more_evaluations: tuple[EvaluationConfig, ...] = ()
    nodes: Annotated[int, AtLeast(1)] = 1
    # fewest nodes on which the run may go on where no more are to be had; None is `nodes`
    min_nodes: Annotated[int | None, AtLeast(1)] = None
    seed: Annotated[int, Seed()] = 0
    name: str | None = None
    runs: str = "runs"
    follow: bool = False
    dry_run: bool = False

    @property
    def scored_by(self) -> tuple[Config, ...]:
        """One config for each protocol that scores the run, as if it were the only one; none with evaluation=none."""
        each = (self.evaluation, *self.more_evaluations)
        wanted = [one for one in each if one.protocol != "none"]
        if len(each) == len(wanted) == 1:
            return (self,)
        return tuple(replace(self, evaluation=one, more_evaluations=()) for one in wanted)

    @property
    def components(self) -> dict[str, ComponentSettings]:
        """Settings of the training components beside guidance that the run has, by the name of their group."""
        found: dict[str, ComponentSettings] = {
            "augment": self.augment,
            "auxiliary": self.auxiliary,
            "align": self.align,
            "contrastive": self.contrastive,
        }
        return {name: settings for name, settings in found.items() if settings.on}

    @property
    def ranks(self) -> int:
        return self.nodes * self.cluster.gpus_per_node

    @property
    def elastic(self) -> bool:
        """Whether the run may also train on fewer nodes."""
        return self.min_nodes is not None and self.min_nodes < self.nodes

    @property
    def trains_null(self) -> bool:
        """Whether a conditioned network learns to read images without their condition as well."""
        return getattr(self.guidance, "drop", 0) > 0

    @property
    def micro_batch(self) -> int:
        """Images per rank and forward."""
        return self.train.micro_batch or self.train.batch // self.ranks
