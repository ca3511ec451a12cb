"""The network in training: backbone and guidance head under one roof, so that one engine steps both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.objectives import Uncertainty
from selfguide.diffusion.paths import build_path
from selfguide.models import assemble
from selfguide.models.backbone import Backbone, pool
from selfguide.models.blocks import ConditionEmbedding
from selfguide.networks.branch import Branch
from selfguide.networks.branches import build_branches
from selfguide.networks.head import PrototypeHead
from selfguide.spec.config import Config
from selfguide.spec.sizes import architecture
from shards.errors import UserError


class Outputs(NamedTuple):
    """The raw prediction (B, C, H, W), a learned sigma cut off; scores (B, K) of the guidance head, u (B,) of the
    uncertainty, each None without its module. Rows of scores are images, or (level "patch") the patches of one image
    after the other. `embedding` (rows, P) and `prototypes` (K, P) are the unit vectors that were compared, detached.

    Where the head waits for the micro-batches to come, `features` (rows, F) is what it is to read of this one.
    `branches` holds what each branch made of this micro-batch, by name.
    """

    prediction: Tensor
    scores: Tensor | None
    log_variance: Tensor | None
    embedding: Tensor | None = None
    prototypes: Tensor | None = None
    features: Tensor | None = None
    branches: dict[str, Tensor] | None = None


class Student(nn.Module):
    """Backbone and what reads its layers in the same forward: branches, and with an online source the head.

    The head's features are detached unless `stop_gradient` is false.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: PrototypeHead | None,
        *,
        layer: int = 0,
        pooling: str = "cls",
        uncertainty: Uncertainty | None = None,
        stop_gradient: bool = True,
        branches: Mapping[str, Branch] | None = None,
    ) -> None:
        super().__init__()
        self.stop_gradient = stop_gradient
        self.backbone, self.head, self.uncertainty = backbone, head, uncertainty
        self.layer, self.pooling = layer, pooling
        self.branches = nn.ModuleDict(branches or {})
        # images whose features were read so far, which telemetry counts the work of
        self.extracted = 0
        self.extras = backbone.net.layers[layer - 1].extras if layer else 0
        self.cls = bool(getattr(backbone.net, "cls_token", False))
        if head is not None and pooling == "cls" and not self.cls:
            raise UserError("guidance.pooling=cls needs a network with model.cls_token=true")

    def forward(
        self,
        x: Tensor,
        tau: Tensor,
        condition: Condition,
        features: Tensor | None = None,
        before: Sequence[Tensor] = (),
        last: bool = True,
    ) -> Outputs:
        """What the loss of a micro-batch is made of.

        Args:
            features: (rows, F) that the head reads; None takes those of this forward.
            before: features of the micro-batches whose statistics this one shares, and which came before it. The head
                reads them all together, so that its BatchNorm and Sinkhorn see them as one batch.
            last: False where more of them come. Then the head waits.
        """
        u = self.uncertainty(tau) if self.uncertainty is not None else None
        own = [self.layer] if self.head is not None and features is None else []
        layers = [*own, *(cast(Branch, branch).layer for branch in self.branches.values())]
        out, tokens = self.backbone.with_features(x, tau, condition, layers)
        if own:
            read = tokens.pop(0)
            # stop-gradient: L_SK trains the head and the prototypes only (SGFM, section 3.2)
            features = self._read(read.detach() if self.stop_gradient else read)
        made = zip(self.branches.items(), tokens, strict=True)
        outputs = Outputs(
            self._cut(out),
            None,
            u,
            features=features,
            branches={name: branch(each, tau, condition) for (name, branch), each in made},
        )
        if self.head is None or not last:
            return outputs
        assert features is not None
        together = torch.cat((*before, features)) if before else features
        scores, embedding, prototypes = self._compare(self.head, together)
        return outputs._replace(
            scores=scores, embedding=embedding, prototypes=prototypes, features=None
        )

    @staticmethod
    def _compare(head: PrototypeHead, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embedding, prototypes = head.embed(features), head.rows()
        return embedding @ prototypes.T, embedding.detach(), prototypes.detach()

    def predict(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """(B, C, H, W); a learned sigma, where the architecture has one, is cut off."""
        return self._cut(self.backbone(x, tau, condition))

    def features(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """(B, F) pooled tokens of the head's layer, or (B L, F) of patches; the rest of the backbone is not run."""
        self.extracted += len(x)
        return self._read(self.backbone.features(x, tau, condition, self.layer))

    def _read(self, tokens: Tensor) -> Tensor:
        if self.pooling == "patch":
            return tokens[:, self.extras :].flatten(0, 1)
        return pool(tokens, self.pooling, self.extras, cls=self.cls)

    def _cut(self, out: Tensor) -> Tensor:
        return out[:, : self.backbone.net.channels]


def build_student(config: Config, seed: int) -> Student:
    """The student this experiment trains; the same weights for the same seed on every rank."""
    net = architecture(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = assemble(net)
        settings, head = config.guidance.head(net), None
        if settings is not None:
            _zero_unconditional(backbone, settings.unconditional == "zero")
            head = PrototypeHead(
                settings.features,
                settings.hidden,
                settings.width,
                settings.groups,
                condition=settings.condition_rows,
                ids=settings.id_rows,
                gradient=settings.prototype_gradient,
                std=settings.std,
            )
        uncertainty = None
        if config.path.weighting == "uncertainty":
            normalised = config.path.uncertainty == "normalised"
            uncertainty = Uncertainty(build_path(config.path), normalised=normalised)
        # last: what came before them draws the same weights without them
        branches = build_branches(config, net)
    if settings is None:
        return Student(backbone, None, uncertainty=uncertainty, branches=branches)
    return Student(
        backbone,
        head,
        layer=settings.layer,
        pooling=settings.pooling,
        uncertainty=uncertainty,
        stop_gradient=settings.stop_gradient,
        branches=branches,
    )


def _zero_unconditional(backbone: Backbone, zero: bool) -> None:
    """Whether zeros stand for unconditional images, rather than a learned row. In UNets they always do."""
    for module in backbone.modules():
        if isinstance(module, ConditionEmbedding):
            module.zero_unconditional = zero
