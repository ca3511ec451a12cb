"""Architectures and conditions that no backbone can take are refused; what dropped images hold never matters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfguide.diffusion.conditions import (
    CONDITIONED,
    NULL,
    UNCONDITIONAL,
    Condition,
    check_condition,
)
from selfguide.models import build
from selfguide.models.backbone import Backbone
from shards.errors import UserError

SMALL, ABSENT = "is too small; take 1 or more", "is too small; take 0 or more"
EVERY: list[tuple[dict[str, Any], str]] = [  # whatever the family
    ({"size": 0}, f"model.size=0 {SMALL}"),
    ({"size": -32}, f"model.size=-32 {SMALL}"),
    ({"channels": 0}, f"model.channels=0 {SMALL}"),
    ({"heads": 0}, f"model.heads=0 {SMALL}"),
    ({"heads": -2}, f"model.heads=-2 {SMALL}"),
    ({"classes": -1}, f"model.classes=-1 {ABSENT}"),
    ({"dense": -3}, f"model.dense=-3 {ABSENT}"),
    ({"spatial": -1}, f"model.spatial=-1 {ABSENT}"),
    ({"dense_patch": -1}, f"model.dense_patch=-1 {ABSENT}"),
    ({"classes": 2.5}, "model.classes=2.5 must be a whole number"),
    ({"heads": True}, "model.heads=True must be a whole number"),
    ({"learn_sigma": "no"}, "model.learn_sigma=no must be true or false"),
    ({"time": "bogus"}, "model.time=bogus is not one of: noise, data"),
    ({"time": "log_sigm"}, "did you mean 'log_sigma'"),
    ({"time": []}, "model.time=[] is not one of"),
]
TRANSFORMERS: list[tuple[dict[str, Any], str]] = [
    ({"patch": 0}, f"model.patch=0 {SMALL}"),
    ({"patch": -2}, f"model.patch=-2 {SMALL}"),
    ({"width": 0}, f"model.width=0 {SMALL}"),
    ({"width": -4}, f"model.width=-4 {SMALL}"),
    ({"depth": 0}, f"model.depth=0 {SMALL}"),
    ({"depth": -1}, f"model.depth=-1 {SMALL}"),
]
DIT: list[tuple[dict[str, Any], str]] = [
    ({"norm": "bogus"}, "model.norm=bogus is not one of: layer, rms"),
    ({"mlp": "bogus"}, "model.mlp=bogus is not one of: gelu, swiglu"),
]
UNET: list[tuple[dict[str, Any], str]] = [
    ({"form": "bogus"}, "model.form=bogus is not one of: ddpm, edm, adm, sgdm, imagen"),
    ({"groups": 0}, f"model.groups=0 {SMALL}"),
    ({"groups": -8}, f"model.groups=-8 {SMALL}"),
    ({"base": 0}, f"model.base=0 {SMALL}"),
    ({"base": -32}, f"model.base=-32 {SMALL}"),
    ({"blocks": -1}, f"model.blocks=-1 {SMALL}"),
    ({"context": -1}, f"model.context=-1 {ABSENT}"),
    ({"mult": [1, 0]}, f"model.mult[1]=0 {SMALL}"),
    ({"mult": (1, -2)}, f"model.mult[1]=-2 {SMALL}"),
    ({"mult": (1, 1.5)}, "model.mult[1]=1.5 must be a whole number"),
    ({"mult": 2}, "model.mult=2 must be a list of integers"),
    ({"attention": (0,)}, f"model.attention[0]=0 {SMALL}"),
    ({"dropout": "much"}, "model.dropout=much must be a number"),
    ({"dropout": float("nan")}, "model.dropout=nan is a share"),
]
IMPOSSIBLE = [
    (name, change, words)
    for name, laws in {
        "dit_s_2": EVERY + TRANSFORMERS + DIT,
        "uvit_s_2": EVERY + TRANSFORMERS,
        "unet_digits": EVERY + UNET,
    }.items()
    for change, words in laws
]


@pytest.mark.parametrize(("name", "change", "words"), IMPOSSIBLE)
def test_impossible_sizes_are_named(name: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        build(name, **change)
    assert words in str(raised.value)


# --- conditions


DIT_NET = {"classes": 5, "dense": 8, "spatial": 1, "dense_patch": 6}
NETS: dict[str, dict[str, Any]] = {
    "dit_digits": {"depth": 2, "width": 16} | DIT_NET,
    "uvit_digits": {"depth": 2, "width": 16} | DIT_NET | {"dense": 16, "dense_patch": 16},
    "unet_digits": {"base": 16} | DIT_NET | {"dense_patch": 0},  # conditioned before the time's MLP
    "unet_sgdm_32": {"size": 8, "base": 16, "mult": (1, 2), "attention": (2,), "blocks": 1}
    | {"groups": 4, "heads": 2, "context": 2, "channels": 1}  # conditioned by an MLP and by tokens
    | DIT_NET
    | {"dense_patch": 0},
}
FAMILIES = pytest.mark.parametrize("name", NETS)
STATES = torch.tensor([CONDITIONED, NULL, UNCONDITIONAL, CONDITIONED])


def tiny(name: str) -> Backbone:
    torch.manual_seed(0)
    net = build(name, **NETS[name]).eval()
    for parameter in net.parameters():  # zeros at the ends would hide what is before them
        nn.init.normal_(parameter, std=0.1)
    return net


def inputs(net: Backbone, batch: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, net.net.channels, 8, 8), torch.rand(batch)


def everything(net: Backbone) -> Condition:
    arch = net.net
    inputs = {
        "id": torch.arange(4),
        "multi_hot": torch.rand(4, 5),
        "dense": torch.randn(4, arch.dense),
        "spatial": torch.rand(4, 1, 8, 8),
        "patch": torch.randn(4, 16, arch.dense_patch),
    }
    return Condition(STATES, **{name: inputs[name] for name in sorted(arch.accepts)})


def spoilt(condition: Condition, bad: float) -> Condition:
    """Nonsense where images are not conditioned."""
    unconditioned = condition.state != CONDITIONED
    changed = {name: value.clone() for name, value in condition.given.items()}
    for name, value in changed.items():
        value[unconditioned] = (-1 if bad < 0 else 10**6) if name == "id" else bad
    return replace(condition, **changed)


@FAMILIES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -3e38])
def test_what_a_dropped_image_holds_reaches_nothing(name: str, bad: float) -> None:
    """Neither the prediction nor a gradient, and no parameter is left without one."""
    net = tiny(name)
    x, tau = inputs(net)
    clean, found = everything(net), []
    for condition in (clean, spoilt(clean, bad)):
        check_condition(condition, net.net)
        net.zero_grad(set_to_none=True)
        out = net(x, tau, condition)
        out.square().mean().backward()
        grads = [parameter.grad for parameter in net.parameters()]
        assert all(grad is not None for grad in grads)
        found.append([out.detach(), *grads])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*found, strict=True))


@FAMILIES
def test_dropped_images_send_no_gradient_into_what_they_hold(name: str) -> None:
    net = tiny(name)
    x, tau = inputs(net)
    condition = everything(net)
    vectors = {k: v.requires_grad_() for k, v in condition.given.items() if v.is_floating_point()}
    net(x, tau, condition).square().mean().backward()
    for field, vector in vectors.items():
        assert vector.grad is not None, field
        got = vector.grad.flatten(1).abs().amax(1) > 0
        assert got.tolist() == [True, False, False, True], field


@pytest.mark.parametrize(
    ("field", "at", "bad", "words"),
    [
        ("id", 3, -1, "group -1 is not one of 0 to 4"),
        ("id", 0, 5, "group 5 is not one of 0 to 4"),
        ("multi_hot", 3, float("nan"), "condition.multi_hot holds nan; give finite numbers"),
        ("multi_hot", 3, -0.5, "condition.multi_hot holds -0.5, the share of a group; take 0"),
        ("dense", 0, float("inf"), "condition.dense holds inf; give finite numbers"),
        ("spatial", 0, -float("inf"), "condition.spatial holds -inf; give finite numbers"),
        ("patch", 3, float("nan"), "condition.patch holds nan; give finite numbers"),
    ],
)
def test_bad_values_of_conditioned_images_are_named(
    field: str, at: int, bad: float, words: str
) -> None:
    net = tiny("dit_digits")
    condition = everything(net)
    check_condition(condition, net.net)
    condition.given[field][at].view(-1)[-1] = bad
    with pytest.raises(UserError) as raised:
        check_condition(condition, net.net)
    assert words in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_ids_must_be_whole_numbers(dtype: torch.dtype) -> None:
    net = tiny("dit_digits")
    x, tau = inputs(net)
    condition = Condition.of(id=torch.zeros(4, dtype=dtype))
    with pytest.raises(UserError, match=rf"condition.id has type {dtype}; .* int64"):
        check_condition(condition, net.net)
    with pytest.raises(UserError, match=r"condition\.id has type"):
        net(x, tau, condition)


@FAMILIES
def test_images_times_and_conditions_are_as_many(name: str) -> None:
    """A batch of one would broadcast in silence."""
    net = tiny(name)
    x, tau = inputs(net)
    for few in (1, 3):
        with pytest.raises(UserError, match=rf"condition is of {few} images and there are 4"):
            net(x, tau, Condition.unconditional(few))
        with pytest.raises(UserError, match=rf"tau has shape \({few},\) and there are 4 images"):
            net.features(x, tau[:few], Condition.unconditional(4), 1)
    for wrong in (tau[0], tau[:, None]):
        with pytest.raises(UserError, match="give one noise-time for each"):
            net(x, wrong, Condition.unconditional(4))
