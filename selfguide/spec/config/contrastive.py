"""`contrastive=`: a denoiser that tells its images from each other, by what its own average sees in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from selfguide.spec.config.laws import AtLeast, Positive, ReadWith, Within
from selfguide.spec.config.path import check_on_path
from selfguide.spec.config.representation import ComponentSettings
from selfguide.spec.sizes import architecture
from shards.errors import UserError

if TYPE_CHECKING:
    from selfguide.spec.architecture import Architecture
    from selfguide.spec.config import Config

# of a contrastive head's time embedding
TIME_FREQUENCIES = 256
# images of all ranks in a micro-batch that a contrastive loss needs: with fewer the standard deviations that its
# BatchNorm measures are off by 1 / sqrt(2 (n - 1)), more than 0.18, and there are fewer than 15 negatives
LEAST_CONTRASTED = 16
_ON = ReadWith("weight=WEIGHT")


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(ComponentSettings):
    """Contrastive self-distillation (DDAE++, Xiang et al. 2025, arXiv 2505.10999, section 4.2, tables 3 and 7)."""

    # of the loss beside denoising, 0.01 in DDAE++; 0 and null train without it
    weight: Annotated[float | None, Within(0.0)] = None
    # whose tokens are read, by number from 1 or by name; null is the middle
    layer: Annotated[str | None, _ON] = None
    # how they become one vector: the mean of the image's, or [CLS], which DDAE++ reads of U-ViTs
    feature: Annotated[Literal["pooled", "cls"], _ON] = "pooled"
    # whether the projector is fed the noise-time
    head: Annotated[Literal["time", "plain"], _ON] = "time"
    # noise in which the teacher sees its view: where a linear probe is best, or the path's least
    target: Annotated[Literal["probe", "minimal"], _ON] = "probe"
    # where that probe is best: 0.06 on CIFAR, and about 0.25 in VA-VAE's latents (DDAE++, table 10)
    noise_time: Annotated[float, Within(0.0, 1.0, below=True), _ON] = 0.06
    # what the teacher sees, in noise of its own: the image mirrored and moved, or as it was before `augment`
    view: Annotated[Literal["moved", "same"], _ON] = "moved"
    # MoCo v3's for ViTs, as are the next two; DDAE++ gives none of the three
    temperature: Annotated[float, Positive(), _ON] = 0.2
    # of the hidden layers of projector and predictor
    hidden: Annotated[int, AtLeast(1), _ON] = 4096
    # of what is compared
    width: Annotated[int, AtLeast(2), _ON] = 256

    wants_teacher: ClassVar[bool] = True

    @property
    def on(self) -> bool:
        return bool(self.weight)

    def number(self, net: Architecture) -> int:
        """The layer that is read, counted from 1.

        Raises:
            UserError: `net` has none of that name or number.
        """
        return net.middle if self.layer is None else net.layer(self.layer, "contrastive.layer")

    def reads(self, net: Architecture) -> int:
        return self.number(net)

    def check(self, config: Config, net: Architecture) -> None:
        self.number(net)
        if self.feature == "cls" and not getattr(net, "cls_token", False):
            raise UserError(
                "contrastive.feature=cls reads a learned [CLS] token, and this network has none; set "
                "model.cls_token=true (transformers), or take contrastive.feature=pooled"
            )
        if self.target == "minimal" and self.noise_time != ContrastiveConfig.noise_time:
            raise UserError(
                f"contrastive.noise_time={self.noise_time:g} is read with contrastive.target=probe only; take that, or "
                f"leave it out, which is contrastive.noise_time={ContrastiveConfig.noise_time:g}"
            )
        if self.target == "probe":
            check_on_path(config.path, "contrastive.noise_time={}", self.noise_time)
        together = config.ranks * config.micro_batch
        if together < LEAST_CONTRASTED:
            raise UserError(
                f"contrastive.weight={self.weight} with micro-batches of {together} images on all ranks: its BatchNorm "
                f"and its negatives are of {LEAST_CONTRASTED} images or more; take {_larger(config)}, or "
                "contrastive.weight=0"
            )
        if config.guidance.source in ("labels", "sidecar") and not config.trains_null:
            raise UserError(
                f"contrastive.weight={self.weight} with guidance.drop=0: its branches read images without their "
                "condition, and this network would never be trained to; take guidance.drop=0.1, or "
                "contrastive.weight=0"
            )
        if config.elastic:
            raise UserError(
                f"min_nodes={config.min_nodes} with contrastive.weight={self.weight}: an image is told from the "
                "others of a micro-batch on all ranks, which would be fewer on fewer nodes; take "
                f"min_nodes={config.nodes}, or contrastive.weight=0"
            )

    def parameters(self, net: Architecture) -> int:
        features, h, p = net.layers[self.number(net) - 1].width, self.hidden, self.width
        # maps without bias, norms of which the last of each part has no scale and bias
        projector = features * h + 2 * h + h * h + 2 * h + h * p
        predictor = p * h + 2 * h + h * p
        if self.head == "plain":
            return projector + predictor
        embedding = TIME_FREQUENCIES * features + features + features * features + features
        return projector + predictor + embedding + 2 * h * features + 2 * h

    def identity(self, config: Config) -> dict[str, Any]:
        """How many images are contrasted at once; the layer by its name, however it was given."""
        net = architecture(config)
        return {
            "layer": net.layers[self.number(net) - 1].name,
            "statistics_over": config.ranks * config.micro_batch,
        }


def _larger(config: Config) -> str:
    """What is typed for micro-batches of enough images: the fewest that divide the batch, or else a larger batch."""
    each, ranks = config.train.batch // config.ranks, config.ranks
    enough = (n for n in range(1, each + 1) if each % n == 0 and n * ranks >= LEAST_CONTRASTED)
    if (images := next(enough, None)) is not None:
        return f"train.micro_batch={images}"
    larger = f"train.batch={-(-LEAST_CONTRASTED // ranks) * ranks}"
    return larger if config.train.micro_batch is None else f"train.micro_batch=null {larger}"
