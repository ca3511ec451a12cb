"""Token routing: in training some tokens skip the middle blocks, everywhere else the network is the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from selfguide.diffusion.conditions import Condition
from selfguide.models import build
from selfguide.models.backbone import Backbone
from selfguide.models.routing import Route
from selfguide.spec.architecture import PatchTransformer
from selfguide.training.work import routed
from shards.errors import UserError

SMALL = {"size": 8, "channels": 1, "patch": 2, "width": 32, "heads": 4, "classes": 0}
NETS = {
    "dit": ("dit_s_2", {"depth": 6, "cls_token": True}),
    "rope": ("lightningdit_b_1", {"depth": 6, "patch": 1, "cls_token": True}),
    "uvit": ("uvit_s_2", {"depth": 6}),
}


def made(kind: str, route: float) -> Backbone:
    name, more = NETS[kind]
    torch.manual_seed(0)
    net = build(name, **SMALL | more, route=route)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 1, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator), Condition.unconditional(batch)


@pytest.mark.parametrize("kind", NETS)
def test_weights_sampling_and_features_are_those_of_the_dense_network(kind: str) -> None:
    dense, routed = made(kind, 0.0).eval(), made(kind, 0.5).eval()
    assert dense.state_dict().keys() == routed.state_dict().keys()
    assert torch.equal(dense(*inputs()), routed(*inputs()))
    for mine, theirs in zip(
        dense.features_of(*inputs(), (2, 3, 6)),
        routed.features_of(*inputs(), (2, 3, 6)),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    # a network that trains whole is that of before as well
    assert torch.equal(dense(*inputs()), made(kind, 0.0).train()(*inputs()))


@pytest.mark.parametrize("kind", NETS)
def test_a_route_that_keeps_every_token_computes_the_dense_prediction(kind: str) -> None:
    """Among few tokens a share rounds to none; the way through the middle is the routed one all the same."""
    dense, routed = made(kind, 0.0).train(), made(kind, 0.001).train()
    torch.testing.assert_close(routed(*inputs()), dense(*inputs()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", NETS)
def test_tokens_that_wait_are_unchanged_behind_the_middle_blocks_and_others_are_not(
    kind: str,
) -> None:
    net = made(kind, 0.5).train()
    assert isinstance(net.net, PatchTransformer)
    extras, count = net.net.layers[0].extras, len(net.net.layers)
    torch.manual_seed(3)
    _, layers = net._run(*inputs(), range(1, count + 1), stop=False)
    torch.manual_seed(3)
    kept = Route(net.net, layers[1]).kept
    assert kept.shape == (2, extras + net.net.tokens // 2)
    assert torch.equal(kept[:, :extras], torch.arange(extras).expand(2, -1))
    went = torch.zeros(layers[1].shape[:2], dtype=torch.bool).scatter(1, kept, True)
    for layer in range(3, count - 1):
        same = (layers[layer] == layers[2]).all(-1)
        assert torch.equal(same, ~went), layer
    assert not (layers[count - 1] == layers[2]).all(-1).any(), "the last blocks see every token"
    assert not torch.equal(went[0], went[1]), "each image has a subset of its own"


@pytest.mark.parametrize("kind", NETS)
def test_every_parameter_learns_and_the_route_follows_the_seed(kind: str) -> None:
    net = made(kind, 0.5).train()
    losses = []
    for seed in (0, 0, 1):
        net.zero_grad()
        torch.manual_seed(seed)
        loss = net(*inputs()).square().mean()  # type: ignore[union-attr]
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1] != losses[2]
    unused = [n for n, p in net.named_parameters() if p.grad is None]
    assert not unused


@pytest.mark.parametrize("kind", NETS)
def test_a_step_leaves_out_the_same_tokens_however_its_batch_is_cut(kind: str) -> None:
    """So another number of ranks trains the same run."""
    net, position = made(kind, 0.5).train(), torch.arange(700, 704)
    x, tau, condition = inputs(4)
    with routed(net, 3, position):
        whole = net(x, tau, condition)
    for at in range(4):
        one = slice(at, at + 1)
        with routed(net, 3, position[one]):
            alone = net(x[one], tau[one], Condition.unconditional(1))
        torch.testing.assert_close(alone, whole[one], rtol=1e-4, atol=1e-5)
    with routed(net, 4, position):
        assert not torch.allclose(net(x, tau, condition), whole, atol=1e-4)


@pytest.mark.parametrize("kind", NETS)
def test_formula_of_routed_work_counts_what_is_computed(kind: str) -> None:
    counted = {}
    for route in (0.0, 0.5):
        net = made(kind, route).train()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(*inputs(1))
        counted[route] = counter.get_total_flops()
        # the middle blocks' difference is exact; both leave out what the counter does not know alike
        counted[route] -= 2 * net.net.training_macs()
    assert counted[0.0] == counted[0.5]
    assert made(kind, 0.5).net.training_macs() < made(kind, 0.5).net.forward_macs()


@pytest.mark.parametrize(
    ("more", "names"),
    [({"route": 1.0}, "model.route=1.0"), ({"route": -0.1}, "model.route=-0.1"),
     ({"route": 0.5, "depth": 4}, "model.route=0.5")],
)  # fmt: skip
def test_a_route_that_cannot_be_is_refused_with_the_cure(
    more: dict[str, float], names: str
) -> None:
    with pytest.raises(UserError) as raised:
        build("dit_s_2", **SMALL | {"depth": 6} | more)
    assert names in str(raised.value)
