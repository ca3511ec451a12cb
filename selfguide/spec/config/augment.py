"""`augment=`: non-leaky augmentation of training images (Karras et al. 2022, EDM, appendix F.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from selfguide.spec.config.laws import Neutral, Within
from selfguide.spec.config.representation import ComponentSettings
from shards.errors import UserError

if TYPE_CHECKING:
    from selfguide.spec.architecture import Architecture
    from selfguide.spec.config import Config
    from shards.format.header import Header  # needs NumPy, and a dry run does not

# numbers that say what was done to an image
LABELS = 9


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(ComponentSettings):
    """Non-leaky augmentation; none without a probability."""

    # with which each operation is done to an image, beside the mirror image, which is every second one. EDM: 0.12 on
    # CIFAR, 0.15 on FFHQ and AFHQ
    probability: Annotated[float | None, Within(0.0, 1.0, above=True), Neutral(None)] = None

    @property
    def on(self) -> bool:
        return self.probability is not None

    @property
    def labels(self) -> int:
        """Width of the augmentation label of an image; 0 is none."""
        return LABELS if self.on else 0

    @property
    def typed(self) -> str:
        """As a user types it."""
        return f"augment.probability={self.probability}"

    def check(self, config: Config, net: Architecture) -> None:
        """Raises UserError where images cannot be moved, or conditions would have to move with them."""
        guidance = config.guidance
        if config.data.flip:
            raise UserError(
                f"{self.typed} mirrors every second image already and tells the network so, which data.flip=true would "
                "not; set data.flip=false"
            )
        if "layout" in guidance.folders:
            raise UserError(
                f"{self.typed} with guidance.layout={guidance.folders['layout']}: boxes and masks would have to move "
                "with their image; set augment.probability=null, or leave guidance.layout out"
            )
        if getattr(guidance, "level", "image") == "patch":
            raise UserError(
                f"{self.typed} with guidance.level=patch: prototypes are those of the image's own patches, which would "
                "have to move with it; set augment.probability=null, or guidance.level=image"
            )
        if (
            getattr(guidance, "view", None) == "training"
            and getattr(guidance, "view_condition", None) == "unconditional"
        ):
            raise UserError(
                f"{self.typed} with guidance.view=training and guidance.view_condition=unconditional: the head would "
                "read moved images and not be told so, as the network is; take guidance.view=extraction, or "
                "guidance.view_condition=as_trained"
            )
        if config.data.shape[-1] < 2:
            raise UserError(
                f"{self.typed} mirrors an image at its edges and data.shape is {list(config.data.shape)}; set "
                "augment.probability=null"
            )


def check_augmented(config: Config, header: Header) -> None:
    """Returns when the shards hold what can be moved.

    Raises:
        UserError: they hold latents, or every image with its mirror image.
    """
    typed, root = config.augment.typed, config.data.root
    if not config.augment.on:
        return
    if header.kind == "latent":
        raise UserError(
            f"{typed}, and the shards in {root} hold latents: a latent that is turned or shifted is not the latent of "
            "the turned or shifted image; set augment.probability=null, or train on images"
        )
    if header.flips:
        raise UserError(
            f"{typed}, and the shards in {root} hold every image with its mirror image, one of which is picked at each "
            "visit without telling the network; set augment.probability=null, or write shards with header flips=False"
        )
