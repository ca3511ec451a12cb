"""DiT: the published sizes, the closed formulas, and gradients into every parameter whatever the condition."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selfguide.conditions import Condition
from selfguide.models import build
from selfguide.models.backbone import pool
from selfguide.models.dit import DiT
from selfguide.spec.dit import DiTArchitecture
from selfguide.spec.sizes import TABLE, row
from shards.errors import UserError

# Peebles & Xie 2023, table 1, millions; patch 2, 256 px latents, 1000 classes, learned sigma
PUBLISHED = {"dit_s_2": 33, "dit_b_2": 130, "dit_l_2": 458, "dit_xl_2": 675}
GMACS = {"dit_s_2": 6.06, "dit_b_2": 23.01, "dit_l_2": 80.71, "dit_xl_2": 118.64}  # their "Gflops"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_hold(name: str) -> None:
    assert row(name).parameters() / 1e6 == pytest.approx(
        PUBLISHED[name], rel=0.015 if name == "dit_s_2" else 0.005
    )
    assert row(name).forward_macs() / 1e9 == pytest.approx(GMACS[name], rel=0.005)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_closed_formula_counts_what_is_built(name: str) -> None:
    with torch.device("meta"):
        for overrides in (
            {},
            {"cls_token": True, "classes": 0, "dense": 96, "depth": 2, "learn_sigma": False},
        ):
            net = build(name, **overrides)
            assert sum(p.numel() for p in net.parameters()) == net.net.parameters()


def test_flops_equal_torchs_counter() -> None:
    net = build("dit_digits", dense=64, cls_token=True)
    counter = FlopCounterMode(display=False)
    with (
        counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        net(torch.randn(1, 1, 8, 8), torch.rand(1), Condition.told(dense=torch.randn(1, 64)))
    assert counter.get_total_flops() == 2 * net.net.forward_macs()


def small(**overrides: int) -> DiT:
    torch.manual_seed(0)
    net = DiT(DiTArchitecture(size=8, channels=2, patch=2, width=32, depth=3, heads=4, **overrides))
    for parameter in net.parameters():  # zero gates would hide what is behind them
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize("kind", ["told", "null", "unconditional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient_in_every_state(kind: str, dtype: torch.dtype) -> None:
    net = small(dense=8, cls_token=True).to(dtype)
    told = Condition.told(dense=torch.randn(4, 8))
    condition = {"told": told, "null": told.null(), "unconditional": Condition.unconditional(4)}[
        kind
    ]
    out = net(torch.randn(4, 2, 8, 8, dtype=dtype), torch.rand(4), condition)
    out.float().square().mean().backward()
    assert out.dtype == dtype and all(p.grad is not None for p in net.parameters())


def test_features_are_the_captured_tokens_and_stop_there() -> None:
    net, x, tau = small(classes=3), torch.randn(4, 2, 8, 8), torch.rand(4)
    condition = Condition.told(id=torch.tensor([0, 1, 2, 0]))
    _, captured = net(x, tau, condition, capture=2)
    ran: list[int] = []
    net.blocks[2].register_forward_hook(lambda *_: ran.append(1))
    torch.testing.assert_close(net.features(x, tau, condition, 2), captured)
    assert not ran


def test_null_and_unconditional_differ_and_null_ignores_the_id() -> None:
    net, x, tau = small(classes=3), torch.randn(4, 2, 8, 8), torch.rand(4)
    told = Condition.told(id=torch.tensor([0, 1, 2, 0]))
    null = net(x, tau, told.null())
    torch.testing.assert_close(
        null, net(x, tau, Condition.told(id=torch.zeros(4, dtype=torch.int64)).null())
    )
    assert not torch.allclose(null, net(x, tau, Condition.unconditional(4)))


def test_pooling_reads_what_it_says() -> None:
    tokens = torch.randn(4, 17, 32)
    assert torch.equal(pool(tokens, "cls", 1), tokens[:, 0])
    assert torch.equal(pool(tokens, "mean", 1), tokens[:, 1:].mean(1))
    assert pool(tokens, "flat", 1).shape == (4, 16 * 32)


def test_at_initialisation_the_network_predicts_zero() -> None:
    net = build("dit_digits", classes=0)
    assert net(torch.randn(2, 1, 8, 8), torch.rand(2), Condition.unconditional(2)).abs().max() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch": 3}, "model.patch=3 does not divide"),
        ({"heads": 5}, "model.heads=5 does not divide"),
    ],
)
def test_impossible_sizes_are_named(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build("dit_digits", **change)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'dit_xl_2'"):
        build("dit_xl2")


def test_wrong_inputs_are_refused() -> None:
    net = small(classes=3)
    with pytest.raises(ValueError, match="expected images of shape"):
        net(torch.randn(2, 1, 8, 8), torch.rand(2), Condition.unconditional(2))
    with pytest.raises(UserError, match=r"condition.dense was given, and this network takes id"):
        net(torch.randn(2, 2, 8, 8), torch.rand(2), Condition.told(dense=torch.randn(2, 5)))
