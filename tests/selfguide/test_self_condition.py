"""Self-conditioning: later layers read e + s(t) * P(z), z being the mean of a layer; nothing else changes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from launcher.compose import compose
from selfguide.diffusion.conditions import Condition
from selfguide.models import assemble, build
from selfguide.models.backbone import Backbone
from selfguide.models.dit import DiT
from selfguide.models.execution import configure_execution
from selfguide.models.self_condition import SelfCondition
from selfguide.models.unet import UNet
from selfguide.networks.official import release
from selfguide.networks.student import build_student
from selfguide.spec.config import Config, EngineConfig
from selfguide.spec.identity import digest, identity
from selfguide.spec.sizes import TABLE, override
from selfguide.spec.unet import UNetArchitecture
from selfguide.training.engine.build import layout_of
from shards.errors import UserError
from tests.selfguide import test_engines
from tests.selfguide.test_backbones import condition_of, kinds
from tests.selfguide.test_initialise import begin, config, from_snapshot, publish

_DIT: dict[str, Any] = {"size": 8, "channels": 1, "patch": 2, "width": 32, "depth": 4, "heads": 4}
_UNET: dict[str, Any] = {
    "size": 16,
    "base": 16,
    "groups": 4,
    "mult": (1, 2),
    "blocks": 1,
    "dropout": 0.0,
}
# name of the row, what is smaller, the layer that conditions
NETS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dit": ("dit_s_2", _DIT | {"classes": 7}, "block_2"),
    "cls": ("dit_s_2", _DIT | {"classes": 7, "cls_token": True}, "block_1"),
    "lightning": ("lightningdit_b_1", _DIT | {"classes": 7, "patch": 1, "cls_token": True}, "block_3"),
    "ddpm": ("unet_ddpm", _UNET | {"classes": 7, "attention": (2,), "out_groups": 4}, "mid"),
    "ddpmpp": ("unet_ddpmpp", _UNET | {"classes": 7, "out_groups": 4}, "out_2"),
    "edm": ("unet_edm_32", _UNET | {"classes": 7}, "out_1"),
    "adm": ("unet_adm_64", _UNET | {"classes": 7, "attention": (2,), "head_width": 4}, "out_3"),
}  # fmt: skip
ADDS = ("adaptive", "direct")


def made(kind: str, add: str | None, *, awake: bool = False, **more: Any) -> Backbone:
    """The plain net, or the self-conditioned one; fresh, or with nothing at zero."""
    name, sizes, layer = NETS[kind]
    own = {} if add is None else {"self_condition": layer, "self_add": add}
    torch.manual_seed(0)
    net = build(name, **sizes | own | more)
    if awake:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def own_part(net: Backbone) -> SelfCondition:
    part = net.self_condition
    assert isinstance(part, SelfCondition)
    return part


def inputs(net: Backbone, batch: int = 3) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, net.net.channels, net.net.size, net.net.size, generator=generator)
    condition = Condition.of(id=torch.arange(batch)).drop(torch.arange(batch) == 1)
    return x.to(next(net.parameters()).dtype), torch.linspace(0.1, 0.9, batch), condition


def gradients(net: Backbone, out: Tensor | None = None) -> dict[str, Tensor]:
    """Of every parameter, from that prediction or the one of `inputs`."""
    net.zero_grad()
    out = net.forward(*inputs(net)) if out is None else out
    (out - 1).square().mean().backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    assert not missing, "every parameter is in every forward"
    return {name: p.grad.clone() for name, p in net.named_parameters()}  # type: ignore[union-attr]


def test_counts_are_the_published_ones() -> None:
    """Xiang et al. 2025, table 9: +0.46 M for both UNets of DDAE, +1.38 M for DiT-B."""
    for name, layer, more in (
        ("unet_ddpm", "out_7", 460_288),
        ("unet_ddpmpp", "out_8", 460_288),
        ("dit_b_1", "block_8", 1_378_560),
        ("lightningdit_b_1", "block_9", 1_378_560),
    ):
        with torch.device("meta"):
            nets = [build(name), build(name, self_condition=layer)]
        counted = [sum(p.numel() for p in net.parameters()) for net in nets]
        assert counted[1] - counted[0] == more, name
        assert [net.net.parameters() for net in nets] == counted


@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("kind", NETS)
def test_formulas_count_what_is_built_and_computed_at_every_layer(kind: str, add: str) -> None:
    plain, every = made(kind, None), made(kind, add).net.layers[:-1]
    for layer in every:
        net = made(kind, add, self_condition=layer.name)
        assert net.net.parameters() == sum(p.numel() for p in net.parameters()), layer
        flops = []
        for each in (plain, net):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                each(*inputs(each, 1))
            flops.append(counter.get_total_flops())
        assert flops[1] - flops[0] == 2 * (net.net.forward_macs() - plain.net.forward_macs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("kind", NETS)
def test_a_fresh_net_is_the_plain_one_bit_for_bit(kind: str, add: str, dtype: torch.dtype) -> None:
    plain, ours = made(kind, None).to(dtype), made(kind, add).to(dtype)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    # DiT's last map begins at zero: what comes before it says more
    layers = range(1, len(plain.net.layers) + 1)
    for mine, theirs in zip(
        ours.features_of(*inputs(ours), layers),
        plain.features_of(*inputs(plain), layers),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    assert torch.equal(ours(*inputs(ours)), plain(*inputs(plain)))


@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("kind", NETS)
def test_a_first_step_moves_the_added_map_and_else_what_it_moved_without(
    kind: str, add: str
) -> None:
    """At zero the term adds nothing, to gradients neither; only the map that is zero has one."""
    plain, ours = made(kind, None, awake=True), made(kind, add)
    ours.load_state_dict(plain.state_dict(), strict=False)
    before, found = gradients(plain), gradients(ours)
    for name, gradient in before.items():
        if name.startswith(("blocks.", "stages.")):
            assert torch.equal(found[name], gradient), name
        # the embedding's sums those of both halves in another order
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    zero = "self_condition.project" if add == "direct" else "self_condition.scale.out"
    moved = {name for name in found.keys() - before.keys() if found[name].any()}
    assert moved == {f"{zero}.weight", f"{zero}.bias"}


def test_whatever_is_drawn_behind_the_backbone_stays_as_it_is() -> None:
    """The head of online guidance is drawn of the same seed, after the backbone."""
    base = config("d")
    plain = build_student(base, 3).state_dict()
    ours = build_student(with_self(base), 3).state_dict()
    assert plain.keys() < ours.keys() and any(name.startswith("head.") for name in plain)
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())
    again = build_student(with_self(base), 3).state_dict()
    other = build_student(with_self(base), 4).state_dict()
    drawn = "backbone.self_condition.project.weight"
    assert torch.equal(ours[drawn], again[drawn]) and not torch.equal(ours[drawn], other[drawn])


def with_self(base: Config, layer: str | None = "block_2", add: Any = "adaptive") -> Config:
    return replace(base, model=replace(base.model, self_condition=layer, self_add=add))


def plain_scale(net: Backbone, tau: Tensor) -> Tensor:
    """s(t) from its weights: sinusoid, Linear, SiLU, Linear."""
    scale = own_part(net).scale
    assert scale is not None
    kind, t = net.net.time, tau.double()
    fed = {
        "noise": t, "data": 1 - t, "index": 1000 * t - 1, "log_sigma": (t / (1 - t)).log() / 4,
    }[kind]  # fmt: skip
    half = scale.frequencies // 2
    ddpm = isinstance(net.net, UNetArchitecture) and not net.net.guided
    rates = [10_000 ** -(i / (half - 1 if ddpm else half)) for i in range(half)]
    sines = [[math.sin(value * rate) for rate in rates] for value in fed.tolist()]
    cosines = [[math.cos(value * rate) for rate in rates] for value in fed.tolist()]
    waves = torch.tensor(
        [[*s, *c] if ddpm else [*c, *s] for s, c in zip(sines, cosines, strict=True)]
    )
    hidden = waves.double() @ scale.hidden.weight.double().T + scale.hidden.bias.double()
    hidden = hidden / (1 + (-hidden).exp())
    return hidden @ scale.out.weight.double().T + scale.out.bias.double()


@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("kind", NETS)
def test_blocks_behind_the_layer_read_the_embedding_and_the_projected_mean(
    kind: str, add: str
) -> None:
    """A re-derivation in fp64 from the weights and the layer's output, block by block."""
    net = made(kind, add, awake=True)
    part, read = own_part(net), dict[int, Tensor]()
    blocks = list(net.repeated())
    for number, block in enumerate(blocks):
        block.register_forward_hook(
            lambda _, given, out, number=number: read.update({number: given[1].detach()})
        )
    x, tau, condition = inputs(net)
    # the embedding itself, before any activation
    with torch.no_grad():
        number = net.net.layer(NETS[kind][2])
        tokens = net.features(x, tau, condition, number)
        early = dict(read)
        net(x, tau, condition)
    extras = net.net.layers[number - 1].extras
    z = tokens[:, extras:].double().sum(1) / (tokens.shape[1] - extras)
    added = z @ part.project.weight.double().T + part.project.bias.double()
    if add == "adaptive":
        added = plain_scale(net, tau) * added
    assert 0 < len(early) < len(blocks), "what lies behind the layer is not run for its features"
    silu = torch.nn.functional.silu
    embedding = embedded(net, tau, condition)
    for number in range(len(blocks)):
        wanted = silu(embedding if number in early else embedding + added)
        torch.testing.assert_close(read[number].double(), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(silu(embedding), silu(embedding + added), atol=1e-3)


@torch.no_grad()
def embedded(net: Backbone, tau: Tensor, condition: Condition) -> Tensor:
    """What the net makes of time and condition, before it is activated."""
    kind, plain = net.net.time, net
    fed = {
        "noise": tau, "data": 1 - tau, "index": 1000 * tau - 1, "log_sigma": (tau / (1 - tau)).log() / 4,
    }[kind]  # fmt: skip
    if isinstance(plain, UNet):
        return plain._embed(fed, condition).double()
    assert isinstance(plain, DiT) and plain.condition is not None
    return (plain.time(fed) + plain.condition(condition)).double()


@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("kind", NETS)
def test_layers_up_to_the_designated_one_never_see_the_term(kind: str, add: str) -> None:
    net = made(kind, add, awake=True)
    layers = range(1, len(net.net.layers) + 1)
    number = own_part(net).number
    before = net.features_of(*inputs(net), layers)
    with torch.no_grad():
        for parameter in own_part(net).parameters():
            parameter.add_(0.3)
    after = net.features_of(*inputs(net), layers)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [layer <= number for layer in layers]
    # and reading them runs no part of it
    ran: list[int] = []
    own_part(net).register_forward_hook(lambda *_: ran.append(1))
    net.features(*inputs(net), number)
    assert not ran
    net.features(*inputs(net), number + 1)
    assert len(ran) == 1


@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("kind", ["cls", "ddpmpp"])
def test_the_gradient_of_an_early_weight_goes_through_the_pooled_feature(
    kind: str, add: str
) -> None:
    """Against a difference quotient in fp64; without the way through z it is another number."""
    net = made(kind, add, awake=True).double()
    weight = next(net.patchify.parameters() if isinstance(net, DiT) else net.stages[0].parameters())  # type: ignore
    towards = torch.randn(
        weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )

    def loss() -> float:
        with torch.no_grad():
            return (net(*inputs(net)) - 1).square().mean().item()

    name = next(n for n, p in net.named_parameters() if p is weight)
    whole = (gradients(net)[name] * towards).sum().item()
    step, sides = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * towards)
        sides.append(loss())
        with torch.no_grad():
            weight.sub_(sign * step * towards)
    assert whole == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5)
    cut = own_part(net).register_forward_pre_hook(
        lambda _, given: (given[0], given[1].detach(), given[2])
    )
    assert (gradients(net)[name] * towards).sum().item() != pytest.approx(whole, rel=1e-3)
    cut.remove()


@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("kind", NETS)
def test_every_condition_works_and_starts_as_without(kind: str, add: str) -> None:
    """Null, unconditional, groups, several, a prototype or feature, masks, and vectors of patches."""
    inner = {"spatial": 2} | (
        {"dense": 24}
        if kind not in ("dit", "cls", "lightning")
        else {"dense": 32, "dense_patch": 32}
    )
    plain, ours = made(kind, None, **inner), made(kind, add, **inner)
    awake = made(kind, add, awake=True, **inner)
    torch.manual_seed(5)
    conditions = [condition_of(plain.net, what, 3) for what in kinds(plain.net)]
    dropped = torch.tensor([False, True, False])
    for condition in [*(each.drop(dropped) for each in conditions), Condition.unconditional(3)]:
        x, tau, _ = inputs(plain)
        assert torch.equal(ours(x, tau, condition), plain(x, tau, condition))
        loss = awake(x, tau, condition)
        assert loss.isfinite().all()
        found = gradients(awake, loss)
        assert all(
            found[f"self_condition.{n}"].any() for n, _ in own_part(awake).named_parameters()
        )


@pytest.mark.parametrize("kind", ["dit", "lightning"])
@pytest.mark.parametrize("layer", ["block_1", "block_3", "block_5"])
def test_a_routed_net_pools_all_tokens_also_those_that_wait(kind: str, layer: str) -> None:
    net = made(kind, "adaptive", awake=True, depth=6, route=0.5, self_condition=layer).train()
    pooled: list[Tensor] = []
    own_part(net).register_forward_pre_hook(lambda _, given: pooled.append(given[1].detach()))
    number = net.net.layer(layer)
    torch.manual_seed(7)
    out, captured = net._run(*inputs(net), (number,), stop=False)
    extras = net.net.layers[0].extras
    assert captured[number].shape[1] == net.net.layers[0].tokens
    assert torch.equal(pooled[0], captured[number][:, extras:].mean(1))
    assert gradients(net, out)["self_condition.project.weight"].any()
    plain = made(kind, None, depth=6, route=0.5).train()
    fresh = made(kind, "adaptive", depth=6, route=0.5, self_condition=layer).train()
    outs = []
    for each in (plain, fresh):
        torch.manual_seed(7)
        outs.append(each._run(*inputs(each), (6,), stop=False)[1][6])
    assert torch.equal(*outs)


@pytest.mark.parametrize("kind", ["cls", "edm"])
def test_recomputed_activations_give_the_same_bits(kind: str) -> None:
    net = made(kind, "adaptive", awake=True).train()
    kept = gradients(net)
    configure_execution(net, EngineConfig(recompute=True), torch.device("cpu"))
    again = gradients(net)
    assert all(torch.equal(again[name], gradient) for name, gradient in kept.items())


@pytest.mark.parametrize("kind", ["dit"])
def test_compiled_blocks_are_the_plain_nets_graphs(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vector of later blocks is another tensor, and no other graph."""
    from torch._dynamo.utils import counters

    by = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda *a, options=None, **k: by(*a, **k))
    graphs = []
    for add in (None, "adaptive"):
        torch._dynamo.reset()
        counters.clear()
        eager, net = (made(kind, add, awake=True).train() for _ in range(2))
        configure_execution(net, EngineConfig(compile=True), torch.device("cpu"))
        counters.clear()
        wanted, found = gradients(eager), gradients(net)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_stages_of_zero_train_it_as_torch_does_bit_for_bit(ranks: Any) -> None:
    torch_one, *staged = (
        with_self(test_engines.config(*each)) for each in (("torch",), ("deepspeed", 2))
    )
    before = ranks(2, test_engines.each, [torch_one, *staged])
    alone = ranks(2, test_engines.each, [with_self(test_engines.config("deepspeed", 3))])
    wanted = before[0][0]["weights"]
    plain = test_engines.config("torch")
    assert len(wanted) == before[0][0]["total"] > layout_of(plain, build_student(plain, 0)).total
    for found in (*before[0], *before[1], *alone[0], *alone[1]):
        assert found["weights"] == wanted


def test_a_snapshot_without_it_begins_a_run_with_it_and_not_the_other_way_round(
    tmp_path: Path,
) -> None:
    theirs = publish(tmp_path / "plain", config("d"))
    ours, _, fresh = begin(with_self(config("d", from_snapshot(tmp_path / "plain")), add="direct"))
    for name, tensor in ours.state_dict().items():
        source = fresh if ".self_condition." in name else theirs
        assert torch.equal(tensor, source.state_dict()[name]), name
    publish(tmp_path / "own", with_self(config("d")))
    begin(with_self(config("d", from_snapshot(tmp_path / "own")), layer="2"))
    for layer, add, says in (
        (
            None,
            "adaptive",
            "model.self_condition=block_2, and this run null; set model.self_condition=block_2",
        ),
        ("block_1", "adaptive", "model.self_condition=block_2, and this run block_1"),
        ("block_2", "direct", "model.self_add=adaptive, and this run direct"),
    ):
        with pytest.raises(UserError, match=says):
            begin(with_self(config("d", from_snapshot(tmp_path / "own")), layer, add))


def test_files_of_others_have_no_place_for_it() -> None:
    net = override("dit_s_2", **_DIT, self_condition=2)
    with pytest.raises(UserError, match="self_condition=block_2, the layer that conditions"):
        release(assemble(net), "dit")


def test_runs_without_it_keep_their_ids_and_runs_with_it_have_their_own() -> None:
    def of(*words: str) -> str:
        return digest(identity(compose(["experiment=digits_uncond", "cluster=local", *words]), "m"))

    plain = of()
    assert of("model.self_condition=null", "model.self_add=adaptive") == plain
    own = of("model.self_condition=2"), of("model.self_condition=3")
    direct = of("model.self_condition=2", "model.self_add=direct")
    assert len({plain, *own, direct}) == 4


def test_every_family_but_u_vit_and_sgdms_forms_takes_it_at_its_published_size() -> None:
    for name, net in TABLE.items():
        refused = name.startswith(("uvit", "unet_sgdm"))
        try:
            made = override(name, self_condition=net.layers[-2].name)
        except UserError:
            assert refused, name
            continue
        assert not refused and made.self_condition == net.layers[-2].name
        assert override(name, self_condition=len(net.layers) - 1) == made


def test_a_self_conditioned_u_vit_decays_cls_and_neither_biases_nor_positions() -> None:
    """Xiang et al. 2025, appendix A; as the rows of their tables are typed."""
    cfg = compose(
        [
            *("experiment=ddaepp/cifar10_uvit", "cluster=local", "model.cls_token=true"),
            *("model.token_std=0.02", "model.width=32", "model.depth=2", "model.heads=4"),
        ]
    )
    student = build_student(cfg, 0)
    layout = layout_of(cfg, student)
    decayed = {
        name: group.weight_decay for group in layout.groups for name in layout.names_of(group)
    }
    assert decayed["backbone.cls"] == 0.03
    spared = {name for name, decay in decayed.items() if decay == 0}
    ends = ("bias", "positions")
    assert spared == {name for name in decayed if name.rpartition(".")[2] in ends}
    assert student.backbone.get_parameter("cls").std().item() == pytest.approx(0.02, rel=0.5)
