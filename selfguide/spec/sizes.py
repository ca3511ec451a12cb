"""How large things are, without building them: one table of backbones, and memory and checkpoint bytes of a run.

A row states the input, classes and learned sigma that its published parameter count belongs to.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from selfguide.spec.architecture import Architecture
from selfguide.spec.averages import averages_of
from selfguide.spec.dit import DiTArchitecture
from selfguide.spec.suggest import check_known, nearest
from selfguide.spec.unet import UNetArchitecture
from selfguide.spec.uvit import UViTArchitecture
from shards.errors import UserError

if TYPE_CHECKING:
    from selfguide.spec.config import Config

BYTES = {"fp32": 4, "bf16": 2}
UNCERTAINTY_FEATURES = 128  # EDM2

_DIT = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}

# name -> the architecture as published: its input, classes and learned sigma belong to the count in its paper
TABLE: dict[str, Architecture] = {
    f"dit_{name}_{patch}": DiTArchitecture(
        size=32,
        channels=4,
        patch=patch,
        width=w,
        depth=d,
        heads=h,
        learn_sigma=True,
        classes=1000,
        time="index",
    )
    for name, (w, d, h) in _DIT.items()
    for patch in (1, 2, 4, 8)
}
TABLE |= {
    f"lightningdit_{name}_1": DiTArchitecture(
        size=16,
        channels=32,
        patch=1,
        width=w,
        depth=d,
        heads=h,
        classes=1000,
        norm="rms",
        mlp="swiglu",
        rope=True,
        time="data",
    )
    for name, (w, d, h) in _DIT.items()
    if name in ("b", "xl")
}
TABLE["dit_digits"] = DiTArchitecture(
    size=8, channels=1, patch=2, width=64, depth=4, heads=4, classes=10
)
TABLE["dit_emoji"] = DiTArchitecture(
    size=8, channels=4, patch=2, width=96, depth=4, heads=4, classes=9
)

_UVIT = {
    "s": (512, 12, 8),
    "s_deep": (512, 16, 8),
    "m": (768, 16, 12),
    "l": (1024, 20, 16),
    "h": (1152, 28, 16),
}


def _uvit(size: str, patch: int, edge: int, channels: int, **rest: Any) -> UViTArchitecture:
    width, depth, heads = _UVIT[size]
    shape: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "time": "noise_999"}
    return UViTArchitecture(size=edge, channels=channels, patch=patch, **(shape | rest))


# Bao et al. 2023; the continuous VP nets read 999 tau, those on Stable Diffusion's 1000 betas the index 1..1000
TABLE |= {
    "uvit_s_2": _uvit("s", 2, 32, 3),  # CIFAR-10, unconditional
    "uvit_s_4": _uvit("s", 4, 64, 3),  # CelebA 64, unconditional
    # MS-COCO 256 in latents; its 77 text tokens and their projection, 0.4 M, are not here
    "uvit_s_deep_2": _uvit("s_deep", 2, 32, 4, time="noise_1000"),
    "uvit_m_4": _uvit("m", 4, 64, 3, classes=1000),  # ImageNet 64
    "uvit_l_2": _uvit("l", 2, 32, 4, classes=1000),  # ImageNet 256 in latents
    "uvit_l_4": _uvit("l", 4, 64, 4, classes=1000),  # ImageNet 512; ImageNet 64 is channels=3
    "uvit_h_2": _uvit("h", 2, 32, 4, classes=1000, conv=False, time="noise_1000"),
    "uvit_h_4": _uvit("h", 4, 64, 4, classes=1000, conv=False, time="noise_1000"),
}

_SGDM: dict[str, Any] = {
    "form": "sgdm",
    "mult": (1, 2, 4),
    "blocks": 2,
    "attention": (4,),
    "heads": 8,
    "channels": 3,
    "time": "index",
}
# images in [-1, 1], no learned sigma; K (Hu et al. 2023) is 5000 clusters of ImageNet, 100 of VOC. Their code drops
# 0.1 of the activations where their table says 0: model.dropout=0.1
TABLE |= {
    "unet_ddpm": UNetArchitecture(
        form="ddpm",
        size=32,
        channels=3,
        mult=(1, 2, 2, 2),
        blocks=2,
        attention=(2,),
        residual=False,
        dropout=0.1,
        time="noise",
    ),
    "unet_ddpmpp": UNetArchitecture(
        form="ddpm",
        size=32,
        channels=3,
        mult=(2, 2, 2),
        blocks=4,
        attention=(2,),
        dropout=0.1,
        time="noise",
    ),
    "unet_edm_32": UNetArchitecture(
        form="edm",
        size=32,
        channels=3,
        mult=(2, 2, 2),
        blocks=4,
        attention=(2,),
        dropout=0.13,  # CIFAR
        time="log_sigma",
    ),
    "unet_edm_64": UNetArchitecture(
        form="edm",
        size=64,
        channels=3,
        mult=(1, 2, 2, 2),
        blocks=4,
        attention=(4,),
        dropout=0.05,  # FFHQ
        time="log_sigma",
    ),
    # C-EDM's FFHQ at 128 px (Adaloglou et al. 2025): the network of 64 px, which attends at 16 px there too
    "unet_edm_128": UNetArchitecture(
        form="edm",
        size=128,
        channels=3,
        mult=(1, 2, 2, 2),
        blocks=4,
        attention=(8,),
        dropout=0.05,
        time="log_sigma",
    ),
    # ImageNet 64
    "unet_adm_64": UNetArchitecture(
        form="adm",
        size=64,
        channels=3,
        base=192,
        mult=(1, 2, 3, 4),
        blocks=3,
        attention=(2, 4, 8),
        head_width=64,
        classes=1000,
        dropout=0.1,
        time="log_sigma",
    ),
    "unet_sgdm_32": UNetArchitecture(size=32, classes=5000, **_SGDM),
    "unet_sgdm_64": UNetArchitecture(size=64, classes=5000, **_SGDM),
    # boxes of VOC; masks of its segments take classes=21, spatial=21. By the paper's text, and as it was released
    "unet_sgdm_cross_64": UNetArchitecture(size=64, classes=100, spatial=1, context=8, **_SGDM),
    "unet_sgdm_released_64": UNetArchitecture(
        size=64,
        classes=100,
        spatial=1,
        context=8,
        **_SGDM | {"form": "imagen", "residual": False, "whole_index": True},
    ),
    # in SD-VAE's latents of 256 px
    "unet_sgdm_256": UNetArchitecture(
        size=32,
        classes=5000,
        **_SGDM | {"mult": (1, 2, 2, 3, 4), "attention": (4, 8), "channels": 4},
    ),
}
# ours, for scikit-learn's 8 x 8 digits on CPUs
TABLE |= {
    "uvit_digits": UViTArchitecture(
        size=8, channels=1, patch=2, width=64, depth=4, heads=4, classes=10, time="noise_999"
    ),
    "unet_digits": UNetArchitecture(
        form="edm",
        size=8,
        channels=1,
        base=32,
        mult=(1, 2),
        blocks=1,
        attention=(2,),
        groups=8,
        classes=10,
        time="log_sigma",
    ),
}
# ours, for a first run on one's own images of 32 and 64 pixels: 64 and 256 tokens as wide as DeiT-Ti's and DiT-S's
# (Touvron et al. 2021, Peebles & Xie 2023), and a UNet of EDM's blocks (Karras et al. 2022)
TABLE |= {
    "dit_tiny_32": DiTArchitecture(size=32, channels=3, patch=4, width=192, depth=6, heads=3),
    "dit_small_64": DiTArchitecture(size=64, channels=3, patch=4, width=384, depth=12, heads=6),
    "unet_small_32": UNetArchitecture(
        form="edm",
        size=32,
        channels=3,
        base=64,
        mult=(1, 2, 2),
        blocks=1,
        attention=(4,),
        groups=8,
        time="log_sigma",
    ),
}

# small nets of this project, of no paper
OURS = frozenset(
    {
        "dit_digits",
        "dit_emoji",
        "dit_small_64",
        "dit_tiny_32",
        "unet_digits",
        "unet_small_32",
        "uvit_digits",
    }
)

# What the choice model=NAME sets beside its row: corrections that came when runs of that name existed already, whose
# configs have the row alone. From the codes of their papers:
# of DDAE's UNets the last norm has 8 groups, and torch's initial weights stay (Xiang et al. 2023);
# the map of EDM's labels has a bias (Karras et al. 2022);
# who learned on a table of 1000 steps was fed whole numbers (Peebles & Xie 2023, Hu et al. 2023, Bao et al. 2023);
# DiT's attention is timm's, and so are its norms of q and k where they are asked for;
# U-ViT's label rows are torch's own embedding, of std 1.
_DDAE = {"out_groups": 8, "plain_init": True}
_TABLED = ("uvit_s_deep_2", "uvit_h_2", "uvit_h_4")
CORRECTED: dict[str, dict[str, Any]] = {
    "unet_ddpm": _DDAE,
    "unet_ddpmpp": _DDAE,
    **{name: {"label_bias": True} for name in ("unet_edm_32", "unet_edm_64", "unet_edm_128")},
    **{
        name: {"whole_index": True, "qk_bias": True}
        for name in TABLE
        if name.startswith("dit_") and name not in OURS
    },
    **{f"unet_sgdm_{which}": {"whole_index": True} for which in ("32", "64", "cross_64", "256")},
    **{
        name: {"token_std": 1.0} | ({"whole_index": True} if name in _TABLED else {})
        for name in TABLE
        if name.startswith("uvit") and name not in OURS
    },
}


def row(name: str) -> Architecture:
    """The published architecture of that name."""
    check_known("model.name", name, TABLE)
    return TABLE[name]


def preset(name: str, **changes: Any) -> Architecture:
    """What the choice model=NAME is: that row with its corrections, and with fields changed."""
    return override(name, **CORRECTED.get(name, {}) | changes)


def override(name: str, **changes: Any) -> Architecture:
    """That row with some of its fields changed; a field its family does not have is an error."""
    base = row(name)
    known = [field.name for field in fields(base)]
    for field in changes:
        if field not in known:
            raise UserError(
                f"model.{field} is not a field of {name}{nearest(field, known)}; known: {', '.join(known)}"
            )
    return replace(base, **changes)


def architecture(config: Config) -> Architecture:
    """The network this experiment trains: its table row, its overrides, its data's shape, the inputs of others.

    Those are of guidance, and of augmentation.
    """
    channels, size, _ = config.data.shape
    asked = {k: v for k, v in asdict(config.model).items() if k != "name" and v is not None}
    inputs = {"size": size, "channels": channels, "augment": config.augment.labels}
    inputs |= config.guidance.network_inputs(config.data.classes)
    return config.guidance.fit(override(config.model.name, **(inputs | asked)))


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one rank between steps, without activations and communication buffers; and on disk."""

    parameters: int
    weights: int
    gradients: int
    optimiser: int
    ema: int
    teacher: int
    checkpoint: int
    snapshot: int

    @property
    def rank(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.ema + self.teacher


def footprint(config: Config) -> Footprint:
    """Closed formulas for the configured engine; activations depend on the kernels and are not in it."""
    net = architecture(config)
    head = config.guidance.head(net)
    n = net.parameters() + (head.parameters if head else 0)
    n += sum(each.parameters(net) for each in config.components.values())
    if config.path.weighting == "uncertainty":
        n += UNCERTAINTY_FEATURES + (config.path.uncertainty == "affine")
    word, horizons = BYTES[config.engine.dtype], len(averages_of(config))
    stage = config.engine.zero_stage if config.engine.backend == "deepspeed" else 0
    sharded = stage > 0
    share = -(-n // config.ranks) if sharded else n
    # bf16 steps on fp32 masters; in fp32 only stages 1 and 2 keep a second copy of the weights
    masters = 4 * share if stage in (1, 2) or config.engine.dtype == "bf16" else 0
    taught = config.guidance.learns_online or any(
        each.wants_teacher for each in config.components.values()
    )
    teacher = word * n if taught else 0
    return Footprint(
        parameters=n,
        weights=word * (share if stage == 3 else n),
        gradients=word * (share if stage >= 2 else n),
        optimiser=masters + 8 * share,
        ema=4 * share * horizons,
        teacher=teacher,
        checkpoint=4 * n * (3 + horizons) + teacher,
        snapshot=4 * n * horizons,
    )
