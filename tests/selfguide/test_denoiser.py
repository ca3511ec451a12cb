"""The denoiser: guidance in all its forms, what the network is fed, and what it is never run for."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from selfguide.diffusion.conditions import CONDITIONED, NULL, UNCONDITIONAL, Condition
from selfguide.diffusion.denoiser import Denoiser, Other
from selfguide.diffusion.paths import RectifiedFlow, VarianceExploding
from selfguide.models import build
from shards.errors import UserError
from tests.selfguide.exact import PATHS, SD, exact, gaussian

X = gaussian(4, 3, 2, 2)
CONDITIONED_MEAN = 1.5
times = st.floats(0.01, 0.95)


def guided(path: str = "rf", **settings: Any) -> Denoiser:
    return exact(path, 4, shift=CONDITIONED_MEAN, **settings)


def states(denoiser: Denoiser) -> list[list[int]]:
    """States of the conditions that the network got, call by call."""
    return [condition.state.tolist() for _, _, condition in denoiser.model.seen]  # type: ignore[union-attr]


@pytest.mark.parametrize("path", PATHS)
@given(g=st.floats(-1, 6), tau=times)
def test_g_is_the_total_weight_on_data_noise_and_velocity_alike(
    path: str, g: float, tau: float
) -> None:
    conditional, null = guided(path).estimate(X, tau), guided(path, g=0.0).estimate(X, tau)
    for found, c, u in zip(guided(path, g=g).estimate(X, tau), conditional, null, strict=True):
        scale = c.abs().max()  # v of a noise level of 100 is 10,000
        torch.testing.assert_close(found / scale, (u + g * (c - u)) / scale, rtol=1e-9, atol=1e-9)


def test_g_of_one_is_the_plain_condition_to_the_bit_and_runs_nothing_else() -> None:
    denoiser = guided(g=1.0, guided_channels=1)
    plain = denoiser.model(X, torch.full((4,), 0.4), denoiser.condition)
    assert torch.equal(denoiser.velocity(X, 0.4), plain)
    assert states(denoiser) == [[CONDITIONED] * 4] * 2 and denoiser.evaluations == 1


def test_g_of_zero_runs_only_the_unconditional_half() -> None:
    denoiser = guided(g=0.0)
    denoiser.velocity(X, 0.4)
    assert states(denoiser) == [[NULL] * 4] and denoiser.evaluations == 1


def test_an_unconditional_image_stays_unconditional_in_both_halves() -> None:
    mixed = torch.tensor([CONDITIONED, NULL, UNCONDITIONAL, CONDITIONED])
    conditional = guided(g=3.0, batched=False)
    denoiser = replace(conditional, condition=replace(conditional.condition, state=mixed))
    denoiser.velocity(X, 0.4)
    assert states(denoiser) == [mixed.tolist(), [NULL, NULL, UNCONDITIONAL, NULL]]


@pytest.mark.parametrize("g", [0.0, 3.0])
@pytest.mark.parametrize("state", [NULL, UNCONDITIONAL])
def test_without_conditioned_images_the_halves_are_one_and_run_once(g: float, state: int) -> None:
    condition = Condition(torch.full((4,), state), id=torch.zeros(4, dtype=torch.int64))
    denoiser = replace(exact("rf", 4, g=g), condition=condition)
    found = denoiser.velocity(X, 0.4)
    assert torch.equal(found, guided(g=0.0).velocity(X, 0.4))
    assert states(denoiser) == [[state] * 4] and denoiser.evaluations == 1


def test_an_unconditional_batch_is_still_guided_by_a_reference() -> None:
    weaker = exact("rf", 4, shift=0.7)
    found = exact("rf", 4, g=2.0, weak=Other(weaker)).velocity(X, 0.5)
    ours, theirs = (
        exact("rf", 4, **conditional).velocity(X, 0.5) for conditional in ({}, {"shift": 0.7})
    )
    torch.testing.assert_close(found, theirs + 2 * (ours - theirs))
    assert states(weaker) == [[CONDITIONED] * 4]


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_acts_in_its_interval_ends_included_and_costs_nothing_outside(
    batched: bool,
) -> None:
    for tau, inside in ((0.2, True), (0.6, True), (0.19, False), (0.61, False), (0.4, True)):
        denoiser = guided(g=3.0, interval=(0.2, 0.6), batched=batched)
        found = denoiser.velocity(X, tau)
        conditional, null = guided().velocity(X, tau), guided(g=0.0).velocity(X, tau)
        torch.testing.assert_close(
            found, null + 3 * (conditional - null) if inside else conditional
        )
        images = sum(len(state) for state in states(denoiser))
        assert images == (8 if inside else 4) and denoiser.evaluations == 1


def test_an_end_of_the_interval_that_was_rounded_otherwise_is_still_in() -> None:
    third = 0.1 + 0.2  # 0.30000000000000004
    for interval, tau in (((0.0, 0.3), third), ((third, 1.0), 0.3)):
        denoiser = guided(g=3.0, interval=interval)
        denoiser.velocity(X, tau)
        assert states(denoiser) == [[CONDITIONED] * 4 + [NULL] * 4]
    outside = guided(g=3.0, interval=(0.0, 0.3))
    outside.velocity(X, 0.3 + 1e-6)
    assert states(outside) == [[CONDITIONED] * 4]


@given(g=st.floats(-1, 4), channels=st.integers(1, 3), tau=times)
def test_guided_channels_touches_the_first_so_many(g: float, channels: int, tau: float) -> None:
    some = guided(g=g, guided_channels=channels).velocity(X, tau)
    conditional, everywhere = guided().velocity(X, tau), guided(g=g).velocity(X, tau)
    torch.testing.assert_close(some[:, :channels], everywhere[:, :channels])
    torch.testing.assert_close(some[:, channels:], conditional[:, channels:], rtol=0, atol=0)


@pytest.mark.parametrize("path", ["rf", "edm", "ddpm"])
def test_one_batch_or_in_turn_is_the_same(path: str) -> None:
    together, in_turn = (guided(path, g=2.5, batched=batched) for batched in (True, False))
    torch.testing.assert_close(
        together.velocity(X, 0.5), in_turn.velocity(X, 0.5), rtol=1e-12, atol=0
    )
    assert states(together) == [[CONDITIONED] * 4 + [NULL] * 4]
    assert states(in_turn) == [[CONDITIONED] * 4, [NULL] * 4]
    assert together.evaluations == in_turn.evaluations == 1


@pytest.mark.parametrize("field", ["id", "multi_hot", "dense", "spatial", "patch"])
def test_one_batch_or_in_turn_is_the_same_on_a_network(field: str) -> None:
    fields = {
        "id": torch.tensor([0, 4, 9]),
        "multi_hot": torch.eye(10)[:3],
        "dense": torch.randn(3, 6),
        "spatial": torch.randn(3, 2, 8, 8),
        "patch": torch.randn(3, 16, 5),
    }
    net = build("dit_digits", classes=10, dense=6, spatial=2, dense_patch=5).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    condition = Condition.of(**{field: fields[field]})
    x = gaussian(3, 1, 8, 8).float()
    with torch.no_grad():
        together, in_turn, plain = (
            Denoiser(net, RectifiedFlow(), condition, g, batched=batched).velocity(x, 0.3)
            for g, batched in ((2.0, True), (2.0, False), (1.0, None))
        )
    torch.testing.assert_close(together, in_turn, rtol=1e-4, atol=1e-4)
    assert (together - plain).abs().max() > 1e-3  # the condition is heard


@pytest.mark.parametrize("path", ["rf", "edm"])
def test_autoguidance_puts_the_reference_where_the_unguided_half_was(path: str) -> None:
    weaker = exact(path, 4, shift=0.7)
    denoiser = guided(path, g=2.0, weak=Other(weaker))
    found = denoiser.estimate(X, 0.5)
    ours, theirs = guided(path).estimate(X, 0.5), exact(path, 4, shift=0.7).estimate(X, 0.5)
    torch.testing.assert_close(found.x0, theirs.x0 + 2 * (ours.x0 - theirs.x0))
    assert states(denoiser) == [[CONDITIONED] * 4] == states(weaker)
    assert denoiser.evaluations == 1 and weaker.evaluations == 0


def test_a_reference_has_a_condition_and_guidance_of_its_own() -> None:
    unconditional = exact("rf", 4, g=1.0)
    guided(g=2.0, weak=Other(unconditional)).velocity(X, 0.5)
    assert states(unconditional) == [[UNCONDITIONAL] * 4]
    twice = guided(g=3.0)
    found = guided(g=2.0, weak=Other(twice)).velocity(X, 0.5)
    ours, theirs = guided().velocity(X, 0.5), guided(g=3.0).velocity(X, 0.5)
    torch.testing.assert_close(found, theirs + 2 * (ours - theirs))


def test_a_reference_is_not_run_where_it_would_not_count() -> None:
    weaker = exact("rf", 4)
    guided(g=1.0, weak=Other(weaker)).velocity(X, 0.5)
    guided(g=2.0, interval=(0.0, 0.3), weak=Other(weaker)).velocity(X, 0.5)
    assert not states(weaker)


class Recorder(nn.Module):
    """A network in bf16 that keeps what it was fed, and gives twice the channels: a learned sigma."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.fed: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        self.fed = (x, tau)
        conditional = (condition.state == CONDITIONED).to(x.dtype).view(-1, 1, 1, 1)
        return torch.cat((self.weight * x + conditional / 3, 1e6 * x), dim=1)


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("net", [torch.bfloat16, torch.float32, torch.float64])
def test_the_net_gets_its_dtype_and_the_state_keeps_its_own(
    net: torch.dtype, state: torch.dtype
) -> None:
    model = Recorder(net)
    condition = Condition.of(id=torch.zeros(4, dtype=torch.int64))
    x = X.to(state)
    v = Denoiser(model, RectifiedFlow(), condition, 1.7).velocity(x, 0.3)
    assert model.fed is not None
    seen, tau = model.fed
    assert seen.dtype == net and v.dtype == state and v.shape == x.shape
    assert tau.dtype == torch.float32 and tau.tolist() == pytest.approx([0.3] * len(seen))
    # halves are rounded by the net, and added up in the dtype of the state
    null, conditional = x.to(net), x.to(net) + torch.ones((), dtype=net) / 3
    assert torch.equal(v, null.to(state) + 1.7 * (conditional.to(state) - null.to(state)))


def test_edm_networks_read_unit_variance() -> None:
    path, model = VarianceExploding(), Recorder(torch.float64)
    condition = Condition.unconditional(4000)
    x0, eps = SD * gaussian(4000, 1, 2, 2, seed=1), gaussian(4000, 1, 2, 2, seed=2)
    for sigma in (0.002, 0.5, 80.0):
        denoiser = Denoiser(model, path, condition, prediction="edm", sigma_data=SD)
        denoiser.velocity(x0 + sigma * eps, sigma / (1 + sigma))
        assert model.fed is not None
        assert abs(model.fed[0].std() - 1) < 0.03


def test_a_condition_that_the_network_cannot_take_is_refused_at_construction() -> None:
    net = build("dit_digits", classes=10)
    with pytest.raises(UserError, match="group 10 is not one of 0 to 9"):
        Denoiser(net, RectifiedFlow(), Condition.of(id=torch.tensor([3, 10])))
    with pytest.raises(UserError, match=r"condition\.dense was given"):
        Denoiser(net, RectifiedFlow(), Condition.of(dense=torch.zeros(2, 4)))
    with pytest.raises(UserError, match="guided_channels=2 is not one of 1 to 1"):
        Denoiser(net, RectifiedFlow(), Condition.unconditional(2), guided_channels=2)


BAD = [
    ({"g": math.nan}, "g=nan must be a finite number"),
    ({"g": math.inf}, "g=inf must be a finite number"),
    ({"interval": (0.6, 0.2)}, r"interval=\[0.6, 0.2\].*lower one first"),
    ({"interval": (math.nan, 0.2)}, "interval"),
    ({"guided_channels": 0}, "guided_channels=0"),
    ({"weak": Other(exact("rf", 4)), "batched": True}, "batched=True.*drop one"),
    ({"weak": Other(exact("rf_eps", 4))}, "'eps'.*RectifiedFlow.*'v'"),
    ({"weak": Other(exact("vp", 4))}, "VariancePreserving"),
    ({"weak": Other(exact("smin", 4))}, "one kind"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        guided(**settings)


@pytest.mark.parametrize("batched", [True, False])
def test_one_condition_for_each_image_of_the_state(batched: bool) -> None:
    for denoiser in (guided(g=2.0, batched=batched), guided(), exact("rf", 4)):
        with pytest.raises(UserError, match=r"is of 4 images and the state has 3.*one for each"):
            denoiser.velocity(X[:3], 0.5)
    with pytest.raises(UserError, match="is of 3 images and the state has 4"):
        guided(g=2.0, weak=Other(exact("rf", 3))).velocity(X, 0.5)


def test_what_was_checked_at_construction_cannot_be_changed_behind_it() -> None:
    denoiser = guided(g=2.0)
    denoiser.velocity(X, 0.5)
    others = {"condition": Condition.unconditional(4), "g": math.nan, "prediction": "eps"}
    for name, value in (others | {"evaluations": 0}).items():
        with pytest.raises(FrozenInstanceError):
            setattr(denoiser, name, value)
    changed = replace(denoiser, condition=others["condition"], prediction="eps")
    assert changed.preconditioning.prediction == "eps" and changed.evaluations == 0
    changed.velocity(X, 0.5)
    assert states(changed)[-1] == [UNCONDITIONAL] * 4 and denoiser.evaluations == 1


def test_only_small_batches_go_together_by_default() -> None:
    small, large = guided(g=2.0), guided(g=2.0)
    small.velocity(gaussian(4, 8, 8, 8), 0.5)
    large.velocity(gaussian(4, 8, 8, 9), 0.5)
    assert (len(states(small)), len(states(large))) == (1, 2)
