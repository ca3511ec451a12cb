"""UNets: published counts, closed formulas, every condition, every way to run them, wrong sizes by name."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from selfguide.diffusion.conditions import Condition
from selfguide.models import build
from selfguide.models.unet import UNet
from selfguide.models.unet_blocks import ConditionLinear
from selfguide.spec.config import ModelConfig
from selfguide.spec.config import build as read
from selfguide.spec.sizes import TABLE, override, row
from selfguide.spec.unet import UNetArchitecture
from shards.errors import UserError

NAMES = sorted(name for name in TABLE if isinstance(TABLE[name], UNetArchitecture))
FORMS: dict[str, dict[str, Any]] = {  # a tiny net of every kind of row
    "ddpm": {"form": "ddpm", "residual": False, "time": "noise"},
    "ddpmpp": {"form": "ddpm", "time": "noise"},
    "edm": {"form": "edm", "time": "log_sigma"},
    "sgdm": {"form": "sgdm", "heads": 2, "time": "index"},
    "cross": {"form": "sgdm", "heads": 2, "context": 3, "time": "index"},
    "imagen": {"form": "imagen", "heads": 2, "context": 3, "residual": False, "time": "index"},
    "adm": {"form": "adm", "head_width": 8, "time": "log_sigma"},
}


def tiny(kind: str, *, random: bool = True, **changes: Any) -> UNet:
    torch.manual_seed(0)
    shape = {"size": 8, "channels": 2, "base": 16, "groups": 4}
    grids = {"mult": (1, 2), "blocks": 1, "attention": (2,)}
    net = UNet(UNetArchitecture(**(shape | grids | FORMS[kind] | changes)))
    if random:  # zeros at the ends of residual paths would hide what is before them
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
    return net


def everything(batch: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "id": torch.arange(batch) % 5,
        "multi_hot": (torch.rand(batch, 5) < 0.5).float(),
        "dense": torch.randn(batch, 6),
        "spatial": torch.rand(batch, 1, 8, 8),
    }


CONDITION_INPUTS = {"classes": 5, "dense": 6, "spatial": 1}
INPUT = torch.Generator().manual_seed(2)
X, TAU = torch.randn(4, 2, 8, 8, generator=INPUT), torch.rand(4, generator=INPUT)


# --- sizes


@pytest.mark.parametrize(
    ("name", "millions"),
    # Xiang et al. 2023, table of backbones; Karras et al. 2022's release has 1152 more, of its augmentation's labels,
    # and names its ADM 296 M
    [
        ("unet_ddpm", 35.7),
        ("unet_ddpmpp", 56.5),
        ("unet_edm_32", 55.734 - 0.001152),
        ("unet_adm_64", 295.9),
    ],
)
def test_published_counts_hold(name: str, millions: float) -> None:
    assert row(name).parameters() / 1e6 == pytest.approx(millions, rel=0.002)


def test_the_released_cross_attention_net_has_its_weights_but_for_those_it_never_reads() -> None:
    """Hu et al. 2023's code: 63,315,307 trainable, among them a second map of the condition to tokens, unused."""
    middle = int(math.sqrt(32 * 100))  # its width, of contexts of 32 and 100 groups
    unread = (100 + 1) * middle + 2 * (middle + 1) * middle + (middle + 1) * 32
    assert row("unet_sgdm_released_64").parameters() == 63_315_307 - unread


def test_time_and_guidance_have_their_published_widths() -> None:
    """Hu et al. 2023: 512 and 256 side by side; with context tokens added; EDM's before the time's MLP."""
    for name, guidance, embedding in (
        ("unet_sgdm_32", 256, 768),
        ("unet_sgdm_cross_64", 512, 512),
        ("unet_sgdm_released_64", 512, 512),
        ("unet_adm_64", 768, 768),
        ("unet_edm_32", 128, 512),
        ("unet_ddpm", 512, 512),
    ):
        net = override(name, classes=10)
        assert isinstance(net, UNetArchitecture)
        assert (net.guidance_width, net.embedding) == (guidance, embedding), name


def test_the_feature_layers_are_ddaes() -> None:
    assert [layer.name for layer in row("unet_ddpm").layers if layer.name[:3] == "out"][
        -1
    ] == "out_12"
    assert row("unet_ddpmpp").layers[-1].name == "out_15"
    for name in NAMES:
        assert row(name).layer_of(None).name == "mid"


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_formula_counts_what_is_built(name: str) -> None:
    inputs = {"classes": 7, "dense": 12, "spatial": 3, "learn_sigma": True}
    changes = [{}, {"classes": 0}, inputs, inputs | {"classes": 0, "blocks": 1, "base": 64}]
    with torch.device("meta"):
        for overrides in changes:
            net = build(name, **overrides)
            assert sum(p.numel() for p in net.parameters()) == net.net.parameters()


@pytest.mark.parametrize("name", NAMES)
def test_flops_equal_torchs_counter(name: str) -> None:
    with torch.device("meta"):
        model = build(name, dense=6, spatial=1)
        net = model.net
        inputs = {"dense": torch.empty(1, 6), "spatial": torch.empty(1, 1, net.size, net.size)}
        if net.classes:
            inputs["id"] = torch.empty(1, dtype=torch.int64)
        counter = FlopCounterMode(display=False)
        math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with counter, torch.no_grad(), math_only:
            x = torch.empty(1, net.channels, net.size, net.size)
            model(x, torch.empty(1), Condition.of(**inputs))
    assert counter.get_total_flops() == 2 * net.forward_macs()


@pytest.mark.parametrize("kind", FORMS)
def test_layers_have_the_shapes_they_state(kind: str) -> None:
    model = tiny(kind, blocks=2, mult=(1, 2, 2))
    for layer in model.net.layers:
        tokens = model.features(X, TAU, Condition.unconditional(4), layer.name)
        assert tokens.shape == (4, layer.tokens, layer.width), layer


# --- conditions


def test_a_looked_up_row_is_the_one_hot_times_the_weight() -> None:
    torch.manual_seed(0)
    ours, inputs = ConditionLinear(5, 6, 8), everything()
    plain = nn.Linear(5 + 6, 8)
    ours.load_state_dict(
        {
            "rows": plain.weight[:, :5].T.clone(),
            "dense": plain.weight[:, 5:].T.clone(),
            "bias": plain.bias.clone(),
        }
    )
    condition = Condition.of(id=inputs["id"], dense=inputs["dense"])
    wanted = plain(torch.cat((F.one_hot(inputs["id"], 5).float(), inputs["dense"]), dim=1))
    torch.testing.assert_close(ours(condition), wanted)
    several = Condition.of(multi_hot=inputs["multi_hot"])
    vector = torch.cat((inputs["multi_hot"], torch.zeros(4, 6)), dim=1)
    torch.testing.assert_close(ours(several), plain(vector))
    alone = Condition.of(dense=inputs["dense"])
    vector = torch.cat((torch.zeros(4, 5), inputs["dense"]), dim=1)
    torch.testing.assert_close(ours(alone), plain(vector))
    torch.testing.assert_close(ours(condition.null()), plain.bias.expand(4, 8))


def test_rows_begin_as_a_linear_map_of_the_one_hot_would() -> None:
    torch.manual_seed(0)
    ours, plain = ConditionLinear(400, 0, 64), nn.Linear(400, 64)
    assert ours.rows is not None
    assert ours.rows.std().item() == pytest.approx(plain.weight.std().item(), rel=0.03)
    ours.xavier()
    nn.init.xavier_uniform_(plain.weight)
    assert ours.rows.std().item() == pytest.approx(plain.weight.std().item(), rel=0.03)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("field", ["id", "multi_hot", "dense", "spatial"])
def test_a_condition_changes_the_output_and_a_dropped_one_does_not(kind: str, field: str) -> None:
    model, value = tiny(kind, **CONDITION_INPUTS), everything()[field]
    other = value.flip(0) if field != "multi_hot" else 1 - value
    mask = torch.tensor([False, True, False, True])
    with torch.no_grad():
        one, two = (model(X, TAU, Condition.of(**{field: v}).drop(mask)) for v in (value, other))
        unconditioned = model(X, TAU, Condition.unconditional(4))
    for image in range(4):
        same = torch.equal(one[image], two[image])
        assert same == bool(mask[image]), image
    torch.testing.assert_close(
        one[mask], unconditioned[mask]
    )  # null and unconditional are both zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", FORMS)
def test_every_parameter_gets_a_gradient_in_every_state(kind: str, dtype: torch.dtype) -> None:
    model, inputs = tiny(kind, **CONDITION_INPUTS).to(dtype), everything()
    every = Condition.of(**inputs)
    masked = Condition.of(spatial=inputs["spatial"])
    for condition in (every, masked, every.null(), Condition.unconditional(4)):
        model.zero_grad(set_to_none=True)
        out = model(X.to(dtype), TAU, condition)
        out.float().square().mean().backward()
        assert out.dtype == dtype
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert condition is not every or parameter.grad.abs().max() > 0, name


def test_patch_vectors_are_no_condition_of_a_unet() -> None:
    model = tiny("sgdm", classes=5)
    assert model.net.accepts == {"id", "multi_hot"}
    with pytest.raises(UserError, match=r"condition.patch was given, and this network takes id"):
        model(X, TAU, Condition.of(patch=torch.randn(4, 16, 6)))


# --- how it runs


@pytest.mark.parametrize("kind", FORMS)
def test_features_are_the_captured_tokens_and_stop_there(kind: str) -> None:
    model, condition = tiny(kind, classes=5), Condition.of(id=torch.arange(4))
    for layer in ("in_1", "mid", "out_2"):
        _, (captured,) = model.with_features(X, TAU, condition, [layer])
        ran: list[int] = []
        behind = model.stages[1 + [stage.name for stage in model.net.stages].index(layer)]
        hook = behind.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        assert torch.equal(model.features(X, TAU, condition, layer), captured)
        hook.remove()
        assert not ran


@pytest.mark.parametrize("kind", FORMS)
def test_recomputed_gradients_are_the_same_bits(kind: str) -> None:
    model, condition = (
        tiny(kind, dropout=0.2, **CONDITION_INPUTS).train(),
        Condition.of(**everything()),
    )
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        model(X, TAU, condition).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_is_for_training_only() -> None:
    model, condition = tiny("edm", dropout=0.5), Condition.unconditional(4)
    assert not torch.equal(model.train()(X, TAU, condition), model(X, TAU, condition))
    assert torch.equal(model.eval()(X, TAU, condition), model(X, TAU, condition))


@pytest.mark.parametrize("asked", ["by the flag", "by the weights"])
@pytest.mark.parametrize("kind", FORMS)
def test_the_layout_in_memory_changes_nothing(kind: str, asked: str) -> None:
    model, condition = tiny(kind, **CONDITION_INPUTS), Condition.of(**everything())
    with torch.no_grad():
        wanted = model(X, TAU, condition)
        if asked == "by the flag":
            model.channels_last = True
        else:
            model.to(memory_format=torch.channels_last)
        found = model(X, TAU, condition)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["ddpm", "cross"])
def test_every_block_is_one_graph(kind: str) -> None:
    model, condition = tiny(kind, **CONDITION_INPUTS), Condition.of(**everything())
    wanted = model(X, TAU, condition)
    torch.compiler.reset()
    for block in model.repeated():
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=32):  # no two of its blocks are alike
        torch.testing.assert_close(model(X, TAU, condition), wanted)


@pytest.mark.parametrize("kind", FORMS)
def test_a_fresh_net_predicts_nothing_and_its_blocks_pass_on_their_input(kind: str) -> None:
    model = tiny(kind, random=False, **CONDITION_INPUTS)
    condition, edm = Condition.of(**everything()), kind == "edm"
    out = model(X, TAU, condition).abs().max()
    assert 0 < out < 1e-3 if edm else out == 0  # EDM's residual paths begin near zero
    block, x = model.stages[4], torch.randn(4, 32, 4, 4)
    assert block.attention is not None and block.second is not None
    context = torch.randn(4, 3, 32)
    kept = block(x, torch.randn(4, model.net.embedding), context)
    if kind == "imagen":  # its attention begins awake, on a path that a norm ends
        torch.testing.assert_close(kept, block.attention(x, context))
        assert (kept - x).square().mean().item() == pytest.approx(1, rel=0.01)
        return
    # three residual sums, each times sqrt(1/2) in EDM
    torch.testing.assert_close(kept, x * 0.5**1.5 if edm else x, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", FORMS)
def test_a_small_net_learns_64_digits_by_heart(kind: str) -> None:
    digits = load_digits()
    x0 = torch.tensor(digits.images[:64, None] / 8 - 1, dtype=torch.float32)
    condition = Condition.of(id=torch.tensor(digits.target[:64]))
    model = tiny(kind, random=False, channels=1, classes=10)
    eps, tau = torch.randn_like(x0), torch.linspace(0.05, 0.95, 64)
    x = torch.lerp(x0, eps, tau[:, None, None, None])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = (model(x, tau, condition) - (eps - x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


# --- what users type


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 20}, "model.size=20 is halved 3 times: it must be a multiple of 8"),
        ({"heads": 3}, "model.heads=3 does not divide the width 256 of the grid of edge 16"),
        ({"base": 48}, "model.groups=32 does not divide model.base=48"),
        ({"base": 6, "groups": 2}, "model.base=6 must be a multiple of 4"),
        ({"attention": (3,)}, "is not among this network's downsamplings 1, 2, 4, 8"),
        ({"blocks": 0}, "model.blocks=0 is too small; take 1 or more"),
        ({"mult": ()}, "names no grid"),
        ({"dropout": 1.0}, "model.dropout=1.0 is a share"),
        (
            {"context": 8},
            "model.context=8 is a number of tokens that only the forms sgdm and imagen",
        ),
        ({"label_bias": True}, "model.label_bias=True is a part of the form edm only"),
        ({"head_width": 48}, "model.head_width=48 does not divide the width 256"),
        ({"dense_patch": 8}, "model.dense_patch=8 needs a transformer"),
        ({"depth": 2}, "model.depth is not a field of unet_ddpm"),
    ],
)
def test_impossible_sizes_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        override("unet_ddpm", **change)


def test_a_config_reaches_the_net() -> None:
    typed = {"name": "unet_ddpm", "mult": [1, 2], "blocks": 1, "attention": [1, 2], "base": 64}
    config = read(ModelConfig, typed | {"dropout": 0, "groups": 16})
    asked = {key: value for key, value in vars(config).items() if value is not None}
    net = override(asked.pop("name"), **asked)
    assert isinstance(net, UNetArchitecture)
    assert (net.mult, net.attention, net.groups) == ((1, 2), (1, 2), 16)
    assert [stage.name for stage in net.stages if stage.attention] == [
        "in_2", "in_4", "mid", "out_1", "out_2", "out_3", "out_4"
    ]  # fmt: skip
