"""Every backbone by name, two layers deep: forward and backward at its real width, every condition, both dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.models import build
from selfguide.models.backbone import Backbone
from selfguide.spec.architecture import Architecture
from selfguide.spec.sizes import TABLE

SPATIAL, GROUPS = 2, 7
# the widest transformer, and UNet, that is tried in bf16 on a CPU of these capabilities
WIDTH, BASE = 384, 64
NO_BF16 = ("AVX2", "NO AVX", "DEFAULT")


def shallow(name: str) -> dict[str, Any]:
    """Overrides that make the net two layers deep, and a UNet narrow, with every condition its family takes."""
    net = TABLE[name]
    inputs: dict[str, Any] = {"classes": GROUPS, "spatial": SPATIAL}
    if hasattr(net, "patch"):  # a transformer; a few tokens are enough
        few = {"size": 4 * net.patch, "depth": 2}
        return inputs | few | {"dense": net.width, "dense_patch": net.width}
    return inputs | {"size": 16, "blocks": 1, "dense": 24, "base": min(net.base, BASE)}


def condition_of(net: Architecture, what: tuple[str, ...], batch: int) -> Condition:
    """A condition with these fields, in the shapes the net takes."""
    values: dict[str, Tensor] = {
        "id": torch.arange(batch) % GROUPS,
        "multi_hot": (torch.rand(batch, GROUPS) < 0.5).float(),
        "dense": torch.nn.functional.normalize(torch.randn(batch, max(net.dense, 1)), dim=1),
        "spatial": torch.rand(batch, SPATIAL, net.size, net.size).round(),
        "patch": torch.randn(batch, getattr(net, "tokens", 1), max(net.dense_patch, 1)),
    }
    return Condition.of(**{name: values[name] for name in what})


def kinds(net: Architecture) -> list[tuple[str, ...]]:
    """Each field alone, and all of them but the multi-hot, which says what the id says."""
    alone = [(name,) for name in sorted(net.accepts)]
    return [*alone, tuple(sorted(net.accepts - {"multi_hot"}))]


def skip_slow(name: str, dtype: torch.dtype) -> None:
    """oneDNN computes in bf16 with AVX512 only: elsewhere PyTorch's own loops take a minute for a wide net."""
    net = TABLE[name]
    width = net.width if hasattr(net, "patch") else WIDTH // BASE * net.base
    if (
        width > WIDTH
        and dtype == torch.bfloat16
        and torch.backends.cpu.get_cpu_capability() in NO_BF16
    ):
        pytest.skip(f"without AVX512, bf16 is tried up to a width of {WIDTH}, or {BASE} in a UNet")


def finite_step(model: Backbone, condition: Condition, dtype: torch.dtype) -> None:
    net = model.net
    x = torch.randn(len(condition), net.channels, net.size, net.size, dtype=dtype)
    out = model(x, torch.rand(len(condition)), condition)
    assert out.shape == (len(condition), net.out_channels, net.size, net.size)
    assert out.dtype == dtype and out.isfinite().all()
    model.zero_grad(set_to_none=True)
    (out.float() - 1).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), name


def one_of_each_width() -> list[str]:
    """The names of all nets, but of transformers that differ by their patch only: the finest of them."""
    first: dict[str, str] = {}
    for name in sorted(TABLE):
        first.setdefault(name.rpartition("_")[0] if hasattr(TABLE[name], "patch") else name, name)
    return [*first.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        name if name in one_of_each_width() else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(TABLE)
    ],
)
def test_forward_and_backward_at_real_width(name: str, dtype: torch.dtype) -> None:
    """At the published input; the conditions' own test below uses a smaller one."""
    skip_slow(name, dtype)
    torch.manual_seed(0)
    changes = {"depth": 2} if hasattr(TABLE[name], "patch") else {"blocks": 1}
    model = build(name, **changes).to(dtype)
    finite_step(model, Condition.unconditional(1), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", one_of_each_width())
def test_every_condition_it_accepts(name: str, dtype: torch.dtype) -> None:
    skip_slow(name, dtype)
    torch.manual_seed(0)
    model = build(name, **shallow(name)).to(dtype)
    for what in kinds(model.net):
        condition = condition_of(model.net, what, 3).drop(torch.tensor([False, True, False]))
        finite_step(model, condition, dtype)
