"""Every backbone preset that names a source, against that source written out plainly: forwards and first weights."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.models import build
from selfguide.models.backbone import Backbone
from selfguide.models.blocks import time_input
from selfguide.spec.sizes import CORRECTED, OURS, TABLE
from tests.selfguide.sources import Recipe, Transformer, Weights, dit, first_weights, unet

# Xiang et al. 2023's code: torch's GroupNorm, 8 groups in the last one
DDAE: dict[str, Any] = {"out_groups": 8, "ends": True}
# Karras et al. 2022's code, DDPM++
EDM: dict[str, Any] = {
    "joins": "early", "eps": 1e-6, "projects": True, "once": True, "keeps": math.sqrt(0.5), "ends": True,
}  # fmt: skip
# Hu et al. 2023's code, on the blocks of guided diffusion
SGDM: dict[str, Any] = {
    "heads": 8,
    "adaptive": True,
    "attention": (4,),
    "mult": (1, 2, 4),
    "blocks": 2,
}
UNETS = {
    "unet_ddpm": Recipe((1, 2, 2, 2), 2, (2,), convolves=True, **DDAE),
    "unet_ddpmpp": Recipe((2, 2, 2), 4, (2,), **DDAE),
    "unet_edm_32": Recipe((2, 2, 2), 4, (2,), **EDM),
    "unet_edm_64": Recipe((1, 2, 2, 2), 4, (4,), **EDM),
    "unet_edm_128": Recipe((1, 2, 2, 2), 4, (8,), **EDM),
    "unet_adm_64": Recipe((1, 2, 3, 4), 3, (2, 4, 8), joins="late", head_width=64, adaptive=True),
    "unet_sgdm_32": Recipe(**SGDM, joins="concat"),
    "unet_sgdm_64": Recipe(**SGDM, joins="concat"),
    "unet_sgdm_256": Recipe(
        **SGDM | {"mult": (1, 2, 2, 3, 4), "attention": (4, 8)}, joins="concat"
    ),
    # by the paper's text, section 4.1
    "unet_sgdm_cross_64": Recipe(**SGDM, joins="add", context=True),
    "unet_sgdm_released_64": Recipe(**SGDM, joins="add", context=True, convolves=True, imagen=True),
}
DITS = [n for n in TABLE if n.startswith(("dit_", "lightningdit_")) and n not in OURS]
# indices of a table of 1000 that fp32 misses, and noise levels that training meets
INDEX, SIGMA = torch.tensor([0, 122, 500, 998]), torch.tensor([0.004, 0.3, 1.0, 60.0])


SIZE = 16


def preset(name: str, **small: Any) -> Backbone:
    """What model=NAME builds, at sizes that a test can afford."""
    torch.manual_seed(0)
    return build(name, **small).eval()


def small_unet(name: str) -> Backbone:
    """All blocks and grids, a quarter or a sixth as wide; 32 groups still divide every width."""
    narrow = {"base": 32, "size": SIZE, "classes": 0 if name.startswith("unet_ddpm") else 7}
    return preset(name, **narrow | ({"head_width": 32} if name == "unet_adm_64" else {}))


def small_dit(name: str, **changes: Any) -> Backbone:
    size = 2 * TABLE[name].patch  # type: ignore[attr-defined]
    return preset(name, width=48, depth=3, size=size, heads=3, classes=7, **changes)


def random_weights(net: Backbone) -> Weights:
    """Of the size that keeps activations in bounds, none of them zero; put into `net`, which becomes fp64."""
    net.double()
    generator = torch.Generator().manual_seed(1)
    for name, p in net.named_parameters():
        draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        scale = name.endswith("weight") and p.dim() == 1
        spread = 0.1 if p.dim() == 1 else 1 / math.sqrt(math.prod(p.shape[1:]))
        with torch.no_grad():
            p.copy_(scale + spread * draw)
    return Weights(net.state_dict())


def fed(net: Backbone) -> tuple[Tensor, Tensor]:
    """Noise-times (4,) as a run has them, and what the source feeds its net there."""
    if net.net.time == "log_sigma":
        return SIGMA / (1 + SIGMA), SIGMA.log() / 4
    tau = (INDEX + 1) / 1000
    return tau, {"index": INDEX, "noise": (INDEX + 1) / 1000, "data": 1 - tau}[net.net.time]


def error(found: Tensor, wanted: Tensor) -> float:
    """Of the largest number, the largest difference."""
    assert wanted.std() > 0.1
    return float((found - wanted).abs().max() / wanted.abs().max())


def unet_error(name: str, **changes: Any) -> float:
    net = small_unet(name)
    w, (tau, time) = random_weights(net), fed(net)
    recipe = replace(UNETS[name], **changes)
    net.train(recipe.undropped < 1)
    if recipe.head_width:
        recipe = replace(recipe, head_width=32)
    x, ids = torch.randn(4, net.net.channels, SIZE, SIZE, dtype=torch.float64), torch.arange(4)
    given: dict[str, Tensor] = {"id": ids} if net.net.classes else {}
    if net.net.spatial:
        given["spatial"] = torch.rand(4, 1, SIZE, SIZE, dtype=torch.float64)
    groups = F.one_hot(ids, 7).double() if net.net.classes else None
    with torch.no_grad():
        wanted = unet(w, recipe, x, time, groups, given.get("spatial"))
        assert w.read == set(w)  # no weight of ours is one that the source has not
        condition = Condition.of(**given) if given else Condition.unconditional(4)
        conditioned = error(net(x, tau, condition), wanted)
        if groups is None:
            return conditioned
        # a dropped condition is a vector of zeros, and so are its masks
        mask = None if "spatial" not in given else 0 * given["spatial"]
        wanted = unet(w, recipe, x, time, 0 * groups, mask)
        return max(conditioned, error(net(x, tau, condition.null()), wanted))


def dit_error(name: str, **changes: Any) -> float:
    net = small_dit(name, **changes)
    w, (tau, time) = random_weights(net), fed(net)
    size, lightning = net.net.size, name.startswith("lightning")
    x, ids = torch.randn(4, net.net.channels, size, size, dtype=torch.float64), torch.arange(4)
    recipe = Transformer(int(name[-1]), 3, lightning, changes.get("qk_norm", False))
    with torch.no_grad():
        wanted = dit(w, recipe, x, time, ids)
        assert w.read == set(w) - {"condition.null", "condition.unconditional"}
        return error(net(x, tau, Condition.of(id=ids)), wanted)


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_preset_computes_what_its_source_does(name: str) -> None:
    assert unet_error(name) < 1e-6


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("unet_ddpm", 0.1),
        ("unet_ddpmpp", 0.1),
        ("unet_edm_32", 0.13),
        ("unet_edm_64", 0.05),
        ("unet_edm_128", 0.05),
        ("unet_adm_64", 0.1),
    ],
)
def test_dropout_is_where_the_source_has_it(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of what it leaves in place of a draw: behind the second convolution its bias would be left whole."""
    monkeypatch.setattr(F, "dropout", lambda x, p, training: x * (1 - p) if training else x)
    assert unet_error(name, undropped=1 - share) < 1e-6


@pytest.mark.parametrize("name", DITS)
def test_a_dit_preset_computes_what_its_source_does(name: str) -> None:
    assert dit_error(name) < 1e-6


@pytest.mark.parametrize("name", ["dit_s_2", "lightningdit_xl_1"])
def test_normalised_queries_and_keys_are_timms_and_lightnings(name: str) -> None:
    assert dit_error(name, qk_norm=True) < 1e-6


def test_a_sit_is_a_dit_fed_the_share_of_data() -> None:
    assert dit_error("dit_xl_2", time="data") < 1e-6


# Peebles & Xie 2023, their code: width, depth, heads
DIT_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}


@pytest.mark.parametrize("name", DITS)
def test_a_dit_preset_has_its_sources_sizes(name: str) -> None:
    """Heads are seen by no count, and widths that a test can afford are others."""
    family, size, patch = name.split("_")
    net: Any = TABLE[name]
    assert (net.width, net.depth, net.heads) == DIT_SIZES[size]
    assert net.patch == int(patch) and net.classes == 1000
    lightning = family == "lightningdit"
    assert (net.size, net.channels, net.learn_sigma) == (
        (16, 32, False) if lightning else (32, 4, True)
    )


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_preset_has_its_sources_widths(name: str) -> None:
    net: Any = TABLE[name]
    assert net.base == (192 if name == "unet_adm_64" else 128)
    edge = (
        32
        if name in ("unet_ddpm", "unet_ddpmpp", "unet_sgdm_256")
        else int(name.rpartition("_")[2])
    )
    assert (net.size, net.channels) == (edge, 4 if name == "unet_sgdm_256" else 3)


def test_every_preset_that_names_a_source_is_compared() -> None:
    others = {name for name in TABLE if name.startswith("uvit_")}  # see test_uvit
    assert set(UNETS) | set(DITS) == set(TABLE) - OURS - others


@pytest.mark.parametrize(
    ("name", "field"), [("unet_ddpm", "out_groups"), ("unet_edm_32", "label_bias")]
)
def test_a_preset_of_before_its_correction_is_told_from_its_source(
    name: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = {key: value for key, value in CORRECTED[name].items() if key != field}
    monkeypatch.setitem(CORRECTED, name, rest)
    if field == "label_bias":
        with pytest.raises(KeyError):
            unet_error(name)
    else:
        assert unet_error(name) > 0.01


# --- the index


def test_whole_indices_are_whole_and_times_between_stay() -> None:
    tau = torch.arange(1, 1001) / 1000
    missed = time_input("index", tau)
    assert 0 < (missed - torch.arange(1000)).abs().max() < 1e-3
    assert torch.equal(time_input("index", tau, whole=True), torch.arange(1000.0))
    assert torch.equal(time_input("noise_1000", tau, whole=True), torch.arange(1.0, 1001.0))
    between = torch.tensor([0.0123456, 0.5003])
    assert torch.equal(time_input("index", between, whole=True), time_input("index", between))


# --- first weights


def fresh(source: str) -> Backbone:
    """Wide enough that standard deviations are known to a percent."""
    name = {
        "ddae": "unet_ddpmpp", "edm": "unet_edm_32", "adm": "unet_adm_64", "sgdm": "unet_sgdm_32",
        "imagen": "unet_sgdm_released_64", "dit": "dit_b_2",
    }[source]  # fmt: skip
    if source == "dit":
        return preset(name, width=192, depth=2, heads=3)
    return preset(name, base=64, blocks=1, classes=0 if source == "ddae" else 200)


def statistics(source: str) -> dict[str, tuple[float, float, int]]:
    """By kind of module: mean and standard deviation of (weight - the source's mean) / its deviation, and how many."""
    w, kinds = fresh(source).state_dict(), defaultdict(list)
    for name, kind, mean, std in first_weights(source, w):
        if std == 0:
            assert torch.equal(w[name], torch.full_like(w[name], mean)), name
        kinds[kind].append((w[name] - mean).flatten() / (std or 1))
    found = {kind: torch.cat(parts) for kind, parts in kinds.items()}
    return {k: (float(z.mean()), float(z.std()), z.numel()) for k, z in found.items()}


@pytest.mark.parametrize("source", ["ddae", "edm", "adm", "sgdm", "imagen", "dit"])
def test_first_weights_are_drawn_as_the_source_draws_them(source: str) -> None:
    for kind, (mean, std, number) in statistics(source).items():
        assert abs(mean) < 5 / math.sqrt(number), kind
        assert std == 0 or abs(std - 1) < 5 / math.sqrt(2 * number), kind
