"""Weights in the layouts of DiT, SiT and U-ViT: what came in goes out, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selfguide.models import assemble
from selfguide.networks.official import adopt, release
from selfguide.spec.sizes import override
from shards.errors import UserError
from tests.selfguide.test_official import CLASSES, dit_weights, init, small, uvit_weights


@pytest.mark.parametrize(
    ("form", "name", "theirs", "ours"),
    [
        ("dit", "dit_s_2", {}, {"learn_sigma": True}),
        ("dit", "dit_s_2", {"sigma": False}, {"learn_sigma": False}),
        ("sit", "dit_s_2", {}, {"learn_sigma": True}),
        ("uvit", "uvit_s_2", {}, {"conv": True}),
        ("uvit", "uvit_s_2", {"conv": False}, {"conv": False}),
    ],
)
def test_official_weights_released_are_bit_for_bit_those_that_came_in(
    form: str, name: str, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    given = (uvit_weights if form == "uvit" else dit_weights)(**theirs)
    backbone = small(name, **ours)
    adopt(backbone, given, init(form, labels="keep"))
    found = release(backbone, form)
    assert found.keys() == given.keys()
    for key, tensor in given.items():
        assert found[key].shape == tensor.shape, key
        assert torch.equal(found[key], tensor), key
    # and what went out comes in
    again = small(name, **ours)
    adopt(again, found, init(form, labels="keep"))
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_a_model_that_a_layout_has_no_place_for_is_refused() -> None:
    for name, form, changes in (
        ("dit_s_2", "uvit", {}),
        ("uvit_s_2", "dit", {}),
        ("dit_s_2", "dit", {"cls_token": True}),
        ("dit_s_2", "dit", {"dense": 8, "classes": 0}),
        ("dit_s_2", "sit", {"qk_norm": True}),
    ):
        net = override(
            name, size=8, channels=3, width=32, depth=2, heads=4, **{"classes": CLASSES} | changes
        )
        with pytest.raises(UserError, match="--form"):
            release(assemble(net), form)
