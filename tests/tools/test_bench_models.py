"""The libraries' networks that the backbones are timed against: of the same shape."""

import json
from dataclasses import replace

import pytest
import torch

from selfguide.models import assemble
from selfguide.spec.unet import UNetArchitecture
from tools.bench import __main__ as command
from tools.bench import models
from tools.bench.models import SIZES
from tools.bench.networks import rival


@pytest.mark.parametrize("name", SIZES["s"])
def test_a_librarys_network_has_the_shape_of_ours(name: str) -> None:
    net = SIZES["s"][name]
    found = rival(net)
    assert found is not None
    _, theirs, forward = found
    counted = {"embed", "norm", "mod", "linear", "time", "class", "skip", "condition", "label"}

    def blocks(module: torch.nn.Module) -> int:
        """Parameters of convolutions and of the blocks' matrices; embeddings and modulation differ by design."""
        return sum(
            p.numel()
            for n, p in module.named_parameters()
            if p.ndim > 1 and not any(word in n for word in counted)
        )

    assert blocks(theirs) == pytest.approx(blocks(assemble(net)), rel=0.2)
    x, tau = torch.randn(2, net.channels, net.size, net.size), torch.tensor([0.1, 0.9])
    ids = torch.tensor([0, 1]) if net.classes else None
    with torch.no_grad():
        given = forward(x, tau, ids)
    assert given.numel() == 2 * net.out_channels * net.size**2


def test_every_family_is_timed_in_its_published_size() -> None:
    assert {type(net) for net in SIZES["s"].values()} == {type(n) for n in SIZES["all"].values()}
    assert any(isinstance(net, UNetArchitecture) for net in SIZES["s"].values())


@pytest.mark.slow
def test_the_models_suite_runs_and_speaks_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(SIZES["s"]["uvit_s_2"], width=32, depth=2, heads=2)
    monkeypatch.setitem(models.SIZES, "s", {"uvit_s_2": small})
    assert command.main(["models", "--repeats", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["suites"]["models"]
    names = [row["name"] for row in rows]
    theirs = "timm ViT, no skips"
    for what in ("forward", "forward+backward"):
        for variant in (theirs, f"{theirs} again (A/A)", "ours", "ours, compiled"):
            assert f"uvit_s_2 {what}: {variant}" in names
    assert len(rows) == 8 and all(row["median"] > 0 for row in rows)
