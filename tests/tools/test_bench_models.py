"""The plain forms that the backbones are timed against: other ways to the same numbers."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from selfguide.diffusion.conditions import Condition
from selfguide.models import assemble
from selfguide.spec.unet import UNetArchitecture
from tools.bench import __main__ as command
from tools.bench import models
from tools.bench.models import PLAIN, SIZES, awake

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


def test_every_family_is_timed_in_its_published_size() -> None:
    assert {type(net) for net in SIZES["s"].values()} == {type(n) for n in SIZES["all"].values()}
    assert any(isinstance(net, UNetArchitecture) for net in SIZES["s"].values())


@pytest.mark.slow
def test_the_models_suite_runs_and_speaks_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.SIZES, "s", {"uvit_s_2": tiny("uvit_s_2")})
    assert command.main(["models", "--repeats", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["suites"]["models"]
    names = [row["name"] for row in rows]
    for what in ("forward", "forward+backward"):
        for variant in ("plain", "plain again (A/A)", "ours", "ours, compiled"):
            assert f"uvit_s_2 {what}: {variant}" in names
    assert len(rows) == 8 and all(row["median"] > 0 for row in rows)
