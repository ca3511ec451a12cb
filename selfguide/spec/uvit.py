"""U-ViT in numbers (Bao et al. 2023, "All are Worth Words", section 3 and its table of sizes)."""

from __future__ import annotations

from dataclasses import dataclass

from selfguide.spec.architecture import ROUTED_FROM, Layer, PatchTransformer, require


@dataclass(frozen=True, kw_only=True)
class UViTArchitecture(PatchTransformer):
    """A transformer to which time and condition are tokens, with long skips from its first blocks to its last.

    `depth` counts as its authors do: the in-blocks and the out-blocks, as many of each, without the one between.
    """

    conv: bool = True  # a 3x3 convolution over the output; the published H goes without

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.width % 2 == 0,
            "width",
            self.width,
            "must be even for the sinusoid of time",
        )
        require(
            self.depth % 2 == 0,
            "depth",
            self.depth,
            "must be even: each in-block has an out-block, the middle one is not counted",
        )
        require(
            self.self_condition is None,
            "self_condition",
            self.self_condition,
            "adds to the vector of time and condition, and U-ViT has tokens in its place, of which [CLS] is its "
            "self-condition; take model.cls_token=true, and drop it",
        )
        for field in ("dense", "dense_patch"):
            require(
                getattr(self, field) in (0, self.width),
                field,
                getattr(self, field),
                f"must equal model.width={self.width}: U-ViT's tokens are the prototypes themselves; "
                f"leave guidance.prototype_width out or set it to {self.width}",
            )

    @property
    def condition_token(self) -> bool:
        """Whether a token holds the condition, or by a row of its own that it was dropped or never known.

        The published unconditional nets have none, nor has SGFM's with prototypes for each patch, where the rows are
        added to the patches. Masks alone do have one: their zeros could as well be an empty mask.
        """
        return bool(self.classes or self.dense or self.spatial)

    @property
    def extras(self) -> int:
        """Tokens before the patches: [CLS], time, condition, augmentation."""
        return int(self.cls_token) + 1 + int(self.condition_token) + int(self.augment > 0)

    @property
    def apart(self) -> bool:
        """Whether attention passes between two tokens are closed: between [CLS] and the augmentation's (DDAE++)."""
        return self.cls_token and self.augment > 0

    @property
    def layers(self) -> tuple[Layer, ...]:
        half = range(1, self.depth // 2 + 1)
        names = [*(f"in_{i}" for i in half), "mid", *(f"out_{i}" for i in half)]
        tokens = self.extras + self.tokens
        return tuple(Layer(name, tokens, self.width, self.extras) for name in names)

    def parameters(self) -> int:
        d, p2, out = self.width, self.patch**2, self.out_channels
        embed = p2 * (self.channels + self.spatial) * d + d
        positions = (self.extras + self.tokens) * d
        condition = self.classes * d + 2 * d if self.condition_token else 0
        patchwise = 2 * d if self.dense_patch else 0
        attention = 3 * d * d + (d * d + d)
        mlp = (4 * d * d + 4 * d) + (4 * d * d + d)
        blocks = (self.depth + 1) * (attention + mlp + 4 * d)
        skips = self.depth // 2 * (2 * d * d + d)
        final = 2 * d + (d * p2 * out + p2 * out) + (9 * out * out + out if self.conv else 0)
        cls = d if self.cls_token else 0
        ends = embed + positions + cls + condition + patchwise + final + self.augment * d
        return ends + blocks + skips

    def _macs(self, routed: int) -> int:
        d, p2, out = self.width, self.patch**2, self.out_channels
        total = self.depth + 1
        dense = min(total, 2 * (ROUTED_FROM - 1))
        half = dense // 2  # of these the out-blocks

        def of(count: int, skips: int, tokens: int) -> int:
            n = self.extras + tokens
            return count * (12 * n * d * d + 2 * n * n * d) + skips * 2 * n * d * d

        blocks = of(dense, half, self.tokens) + of(total - dense, self.depth // 2 - half, routed)
        ends = self.tokens * p2 * d * (self.channels + self.spatial + out) + self.augment * d
        return blocks + ends + (9 * out * out * self.size**2 if self.conv else 0)
