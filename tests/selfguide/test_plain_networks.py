"""Whole backbones against plain forms of them, written as one would at first: other ways to the same numbers."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from selfguide.diffusion.conditions import Condition
from selfguide.models import assemble
from selfguide.models.backbone import Backbone
from selfguide.models.dit import DiT
from selfguide.models.unet import UNet
from selfguide.models.uvit import UViT
from tests.selfguide.plain_transformers import PlainDiT, PlainUViT
from tests.selfguide.plain_unet import PlainUNet
from tools.bench.models import SIZES

PLAIN: dict[type[Backbone], type[nn.Module]] = {DiT: PlainDiT, UViT: PlainUViT, UNet: PlainUNet}
TINY: dict[str, dict[str, Any]] = {
    "dit": {"width": 32, "depth": 2, "heads": 2},
    "lightningdit": {"width": 32, "depth": 2, "heads": 2},
    "uvit": {"width": 32, "depth": 2, "heads": 2},
    "unet": {"base": 32, "blocks": 1, "dropout": 0.0},
}


def tiny(name: str) -> Any:
    """The row's switches at a width that a test can afford."""
    net = SIZES["all"][name]
    changes = TINY[name.split("_")[0]] | ({"classes": 5} if net.classes else {})
    known = {field.name for field in fields(net)}
    return replace(net, **{key: value for key, value in changes.items() if key in known})


def awake(net: Backbone) -> Backbone:
    """No weight at its initial zero, which would hide a wrong number behind it."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        with torch.no_grad():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return net


@pytest.mark.parametrize("name", SIZES["all"])
def test_plain_and_ours_give_the_same_numbers_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    net = tiny(name)
    ours = awake(assemble(net))
    plain = PLAIN[type(ours)](ours)
    x = torch.randn(3, net.channels, net.size, net.size, requires_grad=True)
    tau, ids = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 2]) if net.classes else None
    conditioned = Condition.unconditional(3) if ids is None else Condition.of(id=ids)
    for given, condition in ((ids, conditioned), (None, Condition.unconditional(3))):
        expected, found = plain(x, tau, given), ours(x, tau, condition)
        assert expected.abs().mean() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        slopes = [torch.autograd.grad(out.square().sum(), x)[0] for out in (expected, found)]
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-4)
