"""The libraries' networks that backbones are timed against; their plain forms, another way to the same numbers."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from selfguide.diffusion.conditions import Condition
from selfguide.models import assemble
from selfguide.models.backbone import Backbone
from selfguide.models.dit import DiT
from selfguide.models.unet import UNet
from selfguide.models.uvit import UViT
from selfguide.spec.unet import UNetArchitecture
from tests.tools.plain import PlainDiT, PlainUViT
from tests.tools.plain_unet import PlainUNet
from tools.awake import awake
from tools.bench import __main__ as command
from tools.bench import models
from tools.bench.libraries import library_network
from tools.bench.models import SIZES

PLAIN: dict[type[Backbone], Any] = {DiT: PlainDiT, UViT: PlainUViT, UNet: PlainUNet}

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


@pytest.mark.parametrize("name", SIZES["all"])
def test_the_network_of_a_library_takes_and_gives_what_ours_does(name: str) -> None:
    net = tiny(name)
    library, made, forward = library_network(net)
    assert library == ("timm" if name.startswith("uvit") else "diffusers")
    ids = torch.tensor([0, 4, 2]) if net.classes else None
    found = forward(torch.randn(3, net.channels, net.size, net.size), torch.rand(3), ids)
    # the ViT gives all its tokens
    assert found.numel() == 3 * net.out_channels * net.size**2 or library == "timm"
    assert all(parameter.requires_grad for parameter in made.parameters() if parameter.ndim > 1)


@pytest.mark.parametrize("name", SIZES["all"])
def test_the_network_of_a_library_is_as_large_as_ours(name: str) -> None:
    net = SIZES["all"][name]
    with torch.device("meta"):
        _, made, _ = library_network(net)
    # DiT's tables of classes and embeddings of time stand in every block there, and cost next to nothing to apply
    apart = [p.numel() for n, p in made.named_parameters() if ".norm1.emb." in n]
    theirs = sum(parameter.numel() for parameter in made.parameters()) - sum(apart)
    own = net.parameters() - (sum(apart) // net.depth if apart else 0)
    assert 0.9 < theirs / own < 1.1, theirs / own
    if name == "unet_ddpm":
        assert theirs == own


def test_every_family_is_timed_in_its_published_size() -> None:
    assert {type(net) for net in SIZES["s"].values()} == {type(n) for n in SIZES["all"].values()}
    assert any(isinstance(net, UNetArchitecture) for net in SIZES["s"].values())


@pytest.mark.parametrize("name", SIZES["all"])
def test_a_step_with_self_conditioning_is_timed_where_a_net_has_the_path(name: str) -> None:
    torch.manual_seed(0)
    ours = awake(assemble(tiny(name)))
    found = list(models.self_conditioned_steps(ours, 2))
    assert len(found) == (not name.startswith(("uvit", "unet_sgdm")))
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    for _, variants in found:
        assert [each.name for each in variants] == ["without", "with"]
        for each in variants:
            each.run()
        # a whole step, of all but rows that this batch does not need
        changed = [bool((p != b).any()) for p, b in zip(ours.parameters(), before, strict=True)]
        assert sum(changed) > 0.9 * len(changed)


@pytest.mark.slow
def test_the_models_suite_runs_and_speaks_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.SIZES, "s", {"uvit_s_2": tiny("uvit_s_2")})
    assert command.main(["models", "--repeats", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["suites"]["models"]
    names = [row["name"] for row in rows]
    for what in ("forward", "forward+backward"):
        for variant in ("timm", "timm again (A/A)", "ours", "ours, compiled"):
            assert f"uvit_s_2 {what}: {variant}" in names
    assert sum("as far as the layer" in name for name in names) == 1
    assert len(rows) == 11 and all(row["median"] > 0 for row in rows)
