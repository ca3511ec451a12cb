"""DiT: the published sizes, the closed formulas, and gradients into every parameter whatever the condition."""

import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.flop_counter import FlopCounterMode

from selfguide.diffusion.conditions import Condition, check_condition
from selfguide.models import build
from selfguide.models.backbone import pool
from selfguide.models.dit import DiT, grid_positions, rotate, rotations
from selfguide.spec.dit import DiTArchitecture
from selfguide.spec.sizes import TABLE, override, row
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


NAMES = sorted(n for n in TABLE if isinstance(TABLE[n], DiTArchitecture))
MODERN: dict = {"norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True}  # LightningDiT's


def test_ddaes_and_lightnings_counts_hold() -> None:
    # Xiang et al. 2025: unconditional DiT-B/1 on 16 x 16 x 32; Yao et al. 2025: XL/1 on the same
    small = override("dit_b_1", size=16, channels=32, classes=0, learn_sigma=False)
    assert small.parameters() / 1e6 == pytest.approx(129.8, rel=0.005)
    assert override("lightningdit_b_1", classes=0).parameters() / 1e6 == pytest.approx(
        129.8, rel=0.005
    )
    assert row("lightningdit_xl_1").parameters() / 1e6 == pytest.approx(675, rel=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_formula_counts_what_is_built(name: str) -> None:
    conditioned = {"cls_token": True, "classes": 0, "dense": 96, "spatial": 3, "dense_patch": 8}
    with torch.device("meta"):
        for overrides in (
            {},
            {"depth": 2, "learn_sigma": False, **conditioned},
            {"depth": 2, **MODERN},
        ):
            net = build(name, **overrides)
            assert sum(p.numel() for p in net.parameters()) == net.net.parameters()


@pytest.mark.parametrize(
    "overrides",
    [{}, {"spatial": 2, "dense_patch": 8}, MODERN],
    ids=["plain", "conditioned", "modern"],
)
def test_flops_equal_torchs_counter(overrides: dict) -> None:
    net = build("dit_digits", dense=64, cls_token=True, **overrides)
    conditioned = {"dense": torch.randn(1, 64)}
    if net.net.spatial:
        conditioned |= {"spatial": torch.rand(1, 2, 8, 8), "patch": torch.randn(1, 16, 8)}
    counter = FlopCounterMode(display=False)
    with (
        counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        net(torch.randn(1, 1, 8, 8), torch.rand(1), Condition.of(**conditioned))
    assert counter.get_total_flops() == 2 * net.net.forward_macs()


def test_rotary_scores_depend_on_the_offset_only() -> None:
    torch.manual_seed(0)
    edge, width = 5, 16
    turn = rotations(edge, width)
    q, k = torch.randn(2, 1, 1, 1, width).expand(2, 1, 1, edge * edge, width)
    scores = (rotate(q, *turn) @ rotate(k, *turn).mT)[0, 0].view(edge, edge, edge, edge)
    # the same step, one row down and two columns right, wherever it starts
    steps = [scores[i, j, i + 1, j + 2] for i in range(edge - 1) for j in range(edge - 2)]
    torch.testing.assert_close(
        torch.stack(steps), steps[0].expand(len(steps)), rtol=1e-4, atol=1e-4
    )
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3  # rows and columns differ


def test_the_rotary_table_is_the_plain_formula() -> None:
    """Pair i of an axis's half of a head turns by its place times theta^(-2 i / (d / 2)); rows, then columns."""
    edge, width, theta = 5, 24, 1e4
    rates = [theta ** (-2 * i / (width / 2)) for i in range(width // 4)]
    angles = [
        [at * rate for at in (row, column) for rate in rates]
        for row in range(edge)
        for column in range(edge)
    ]
    wanted = torch.tensor(angles, dtype=torch.float64)
    cos, sin = rotations(edge, width)
    torch.testing.assert_close(cos.double(), wanted.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin.double(), wanted.sin(), atol=1e-6, rtol=0)
    x = torch.randn(1, 1, edge * edge, width, dtype=torch.float64)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.exp(1j * wanted)
    turned = torch.view_as_real(pairs).flatten(-2)
    torch.testing.assert_close(rotate(x, wanted.cos(), wanted.sin()), turned)


def test_positions_are_the_releases() -> None:
    """Column before row, sines before cosines: weights trained on other positions would not fit."""
    edge, width = 4, 16
    table = grid_positions(edge, width).double()
    for token in range(edge * edge):
        for axis, at in enumerate((token % edge, token // edge)):
            half = table[token, axis * 8 : axis * 8 + 8]
            rates = [10_000 ** (-i / 4) for i in range(4)]
            wanted = [math.sin(at * r) for r in rates] + [math.cos(at * r) for r in rates]
            torch.testing.assert_close(
                half, torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0
            )


def test_normalised_queries_and_keys_bound_the_scores() -> None:
    net = small(qk_norm=True, norm="rms", heads=4)
    attention = net.blocks[0].attention
    torch.nn.init.ones_(attention.q_norm.weight)
    q = attention.q_norm(1e4 * torch.randn(2, 4, 17, 8))
    torch.testing.assert_close(q.square().mean(-1), torch.ones(2, 4, 17), rtol=1e-4, atol=1e-4)


def test_a_multi_hot_is_the_mean_of_its_rows() -> None:
    net, x, tau = small(classes=5), torch.randn(2, 2, 8, 8), torch.rand(2)
    one = torch.nn.functional.one_hot(torch.tensor([3, 1]), 5)
    torch.testing.assert_close(
        net(x, tau, Condition.of(multi_hot=one)),
        net(x, tau, Condition.of(id=torch.tensor([3, 1]))),
    )
    both = Condition.of(multi_hot=torch.tensor([[1, 0, 0, 1, 0]]))
    rows = net.condition.labels.weight
    torch.testing.assert_close(net.condition(both)[0], (rows[0] + rows[3]) / 2)


def test_masks_and_patch_vectors_are_dropped_with_the_rest() -> None:
    net, x, tau = small(spatial=1, dense_patch=6), torch.randn(2, 2, 8, 8), torch.rand(2)
    conditioned = Condition.of(spatial=torch.rand(2, 1, 8, 8), patch=torch.randn(2, 16, 6))
    other = Condition.of(spatial=torch.rand(2, 1, 8, 8), patch=torch.randn(2, 16, 6))
    assert not torch.allclose(net(x, tau, conditioned), net(x, tau, other))
    torch.testing.assert_close(net(x, tau, conditioned.null()), net(x, tau, other.null()))


def small(**overrides: Any) -> DiT:
    torch.manual_seed(0)
    shape = {"size": 8, "channels": 2, "patch": 2, "width": 32, "depth": 3, "heads": 4}
    net = DiT(DiTArchitecture(**(shape | overrides)))
    for parameter in net.parameters():  # zero gates would hide what is behind them
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize("kind", ["conditioned", "null", "unconditional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient_in_every_state(kind: str, dtype: torch.dtype) -> None:
    net = small(dense=8, cls_token=True, spatial=1, dense_patch=5, **MODERN).to(dtype)
    conditioned = Condition.of(
        dense=torch.randn(4, 8), spatial=torch.rand(4, 1, 8, 8), patch=torch.randn(4, 16, 5)
    )
    condition = {
        "conditioned": conditioned,
        "null": conditioned.null(),
        "unconditional": Condition.unconditional(4),
    }[kind]
    out = net(torch.randn(4, 2, 8, 8, dtype=dtype), torch.rand(4), condition)
    out.float().square().mean().backward()
    assert out.dtype == dtype and all(p.grad is not None for p in net.parameters())


def test_features_are_the_captured_tokens_and_stop_there() -> None:
    net, x, tau = small(classes=3), torch.randn(4, 2, 8, 8), torch.rand(4)
    condition = Condition.of(id=torch.tensor([0, 1, 2, 0]))
    _, (captured,) = net.with_features(x, tau, condition, [2])
    ran: list[int] = []
    net.blocks[2].register_forward_hook(lambda *_: ran.append(1))
    assert torch.equal(net.features(x, tau, condition, 2), captured)
    assert not ran


def test_null_and_unconditional_differ_and_null_ignores_the_id() -> None:
    net, x, tau = small(classes=3), torch.randn(4, 2, 8, 8), torch.rand(4)
    conditioned = Condition.of(id=torch.tensor([0, 1, 2, 0]))
    null = net(x, tau, conditioned.null())
    torch.testing.assert_close(
        null, net(x, tau, Condition.of(id=torch.zeros(4, dtype=torch.int64)).null())
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


@pytest.mark.parametrize("overrides", [{}, MODERN], ids=["plain", "modern"])
def test_overfits_64_digits(overrides: dict) -> None:
    """Each with a noise and a time of its own: the loss falls to less than a twentieth."""
    images = torch.tensor(load_digits().images[:64], dtype=torch.float32)[:, None] / 8 - 1
    torch.manual_seed(0)
    net = build("dit_digits", classes=64, **overrides)
    optimiser = torch.optim.AdamW(net.parameters(), lr=4e-3, betas=(0.9, 0.99))
    eps, tau, losses = torch.randn_like(images), torch.rand(64), []
    t, condition = tau.view(-1, 1, 1, 1), Condition.of(id=torch.arange(64))
    for _ in range(140):
        velocity = net((1 - t) * images + t * eps, tau, condition)
        loss = (velocity - (eps - images)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch": 3}, "model.patch=3 does not divide"),
        ({"heads": 5}, "model.heads=5 does not divide"),
        ({"heads": 32, "rope": True}, "model.rope=True turns pairs"),
        ({"depht": 2}, "model.depht is not a field of dit_digits; did you mean 'depth'"),
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
    with pytest.raises(UserError, match="layer=9 is not one of this network's 1 to 3"):
        net.features(torch.randn(2, 2, 8, 8), torch.rand(2), Condition.unconditional(2), 9)
    with pytest.raises(UserError, match="group 3 is not one of 0 to 2"):
        check_condition(Condition.of(id=torch.tensor([0, 3])), net.net)
    with pytest.raises(ValueError, match="expected images of shape"):
        net(torch.randn(2, 1, 8, 8), torch.rand(2), Condition.unconditional(2))
    with pytest.raises(UserError, match=r"condition.dense was given, and this network takes id"):
        net(torch.randn(2, 2, 8, 8), torch.rand(2), Condition.of(dense=torch.randn(2, 5)))
