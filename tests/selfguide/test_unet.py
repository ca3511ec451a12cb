"""UNets: published counts, closed formulas, whole nets against diffusers' and against a plain EDM, every condition."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from selfguide.conditions import Condition
from selfguide.models import build
from selfguide.models.unet import UNet
from selfguide.models.unet_blocks import Attention, ResidualBlock, ToldLinear, endpoint_sinusoid
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


TOLD = {"classes": 5, "dense": 6, "spatial": 1}
INPUT = torch.Generator().manual_seed(2)
X, TAU = torch.randn(4, 2, 8, 8, generator=INPUT), torch.rand(4, generator=INPUT)


# --- sizes


@pytest.mark.parametrize(
    ("name", "millions"),
    # Xiang et al. 2023, table of backbones; Karras et al. 2022's release has 1152 more, of its augmentation's labels
    [("unet_ddpm", 35.7), ("unet_ddpmpp", 56.5), ("unet_edm_32", 55.734 - 0.001152)],
)
def test_published_counts_hold(name: str, millions: float) -> None:
    assert row(name).parameters() / 1e6 == pytest.approx(millions, rel=0.002)


def test_time_and_guidance_have_their_published_widths() -> None:
    """Hu et al. 2023: 512 and 256 side by side; with context tokens added; EDM's before the time's MLP."""
    for name, guidance, embedding in (
        ("unet_sgdm_32", 256, 768),
        ("unet_sgdm_cross_64", 512, 512),
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
    told = {"classes": 7, "dense": 12, "spatial": 3, "learn_sigma": True}
    changes = [{}, {"classes": 0}, told, told | {"classes": 0, "blocks": 1, "base": 64}]
    with torch.device("meta"):
        for overrides in changes:
            net = build(name, **overrides)
            assert sum(p.numel() for p in net.parameters()) == net.net.parameters()


@pytest.mark.parametrize("name", NAMES)
def test_flops_equal_torchs_counter(name: str) -> None:
    with torch.device("meta"):
        model = build(name, dense=6, spatial=1)
        net = model.net
        told = {"dense": torch.empty(1, 6), "spatial": torch.empty(1, 1, net.size, net.size)}
        if net.classes:
            told["id"] = torch.empty(1, dtype=torch.int64)
        counter = FlopCounterMode(display=False)
        math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with counter, torch.no_grad(), math_only:
            x = torch.empty(1, net.channels, net.size, net.size)
            model(x, torch.empty(1), Condition.told(**told))
    assert counter.get_total_flops() == 2 * net.forward_macs()


@pytest.mark.parametrize("kind", FORMS)
def test_layers_have_the_shapes_they_state(kind: str) -> None:
    model = tiny(kind, blocks=2, mult=(1, 2, 2))
    for layer in model.net.layers:
        tokens = model.features(X, TAU, Condition.unconditional(4), layer.name)
        assert tokens.shape == (4, layer.tokens, layer.width), layer


# --- whole nets and their parts against other people's


def copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())


def copy_residual(ours: ResidualBlock, theirs: Any) -> None:
    copy(ours.embedding, theirs.time_emb_proj)
    for part in ("norm1", "conv1", "norm2", "conv2"):
        copy(getattr(ours, part), getattr(theirs, part))
    assert (ours.shortcut is None) == (theirs.conv_shortcut is None)
    if ours.shortcut is not None:
        copy(ours.shortcut, theirs.conv_shortcut)


def copy_attention(ours: Attention, theirs: Any) -> None:
    copy(ours.norm, theirs.group_norm)
    copy(ours.project, theirs.to_out[0])
    parts = (theirs.to_q, theirs.to_k, theirs.to_v)
    ours.qkv.load_state_dict(
        {key: torch.cat([part.state_dict()[key] for part in parts]) for key in ("weight", "bias")}
    )


def stages_of(theirs: Any) -> list[tuple[Any, ...]]:
    """diffusers' modules in the order of our stages: (convolution,) or (residual, attention or None)."""
    found: list[tuple[Any, ...]] = [(theirs.conv_in,)]

    def append(blocks: Any, change: str) -> None:
        for block in blocks:
            attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
            found.extend(zip(block.resnets, attentions, strict=True))
            changers = getattr(block, change, None)
            if changers:
                convolves = hasattr(changers[0], "conv")
                found.append((changers[0].conv,) if convolves else (changers[0], None))

    append(theirs.down_blocks, "downsamplers")
    mid = theirs.mid_block
    found.append((mid.resnets[0], mid.attentions[0], mid.resnets[1]))
    append(theirs.up_blocks, "upsamplers")
    return found


DIFFUSERS: dict[str, dict[str, Any]] = {
    "ddpm": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 1,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "attention_head_dim": None,
    },
    "ddpmpp": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "attention_head_dim": None,
    },
    "sgdm": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "attention_head_dim": 16,  # two heads
    },
}


@pytest.mark.parametrize("kind", DIFFUSERS)
def test_a_whole_net_equals_diffusers(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    theirs = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(16, 32),
        layers_per_block=2,
        norm_num_groups=4,
        attn_norm_num_groups=4,
        norm_eps=1e-5,
        **DIFFUSERS[kind],
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = tiny(kind, blocks=2, time="noise_1000")
    copy(ours.time.hidden, theirs.time_embedding.linear_1)
    copy(ours.time.out, theirs.time_embedding.linear_2)
    copy(ours.norm, theirs.conv_norm_out)
    copy(ours.out, theirs.conv_out)
    for stage, parts in zip(ours.stages, stages_of(theirs), strict=True):
        if len(parts) == 1:
            copy(stage if isinstance(stage, nn.Conv2d) else stage.conv, parts[0])
            continue
        copy_residual(stage.first, parts[0])
        assert (stage.attention is None) == (parts[1] is None)
        if parts[1] is not None:
            copy_attention(stage.attention, parts[1])
        if len(parts) == 3:
            copy_residual(stage.second, parts[2])
    with torch.no_grad():
        wanted = theirs(X, 1000 * TAU).sample
        found = ours(X, TAU, Condition.unconditional(4))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def plain_norm(norm: Any, x: Tensor, eps: float) -> Tensor:
    grouped = x.view(len(x), norm.num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled.view_as(x) * norm.weight[:, None, None] + norm.bias[:, None, None]


def plain_edm_residual(block: Any, x: Tensor, c: Tensor, change: str = "") -> Tensor:
    def grid(y: Tensor) -> Tensor:
        if change == "up":
            return y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        if change == "down":
            return torch.stack([y[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
        return y

    y = plain_norm(block.norm1, x, 1e-6)
    h = block.conv1(grid(y * torch.sigmoid(y)))
    h = h + (c @ block.embedding.weight.T + block.embedding.bias)[:, :, None, None]
    y = plain_norm(block.norm2, h, 1e-6)
    h = block.conv2(y * torch.sigmoid(y))
    short = grid(x) if block.shortcut is None else block.shortcut(grid(x))
    return (short + h) * math.sqrt(0.5)


def plain_edm_attention(block: Any, x: Tensor) -> Tensor:
    batch, width = x.shape[:2]
    qkv = F.conv2d(
        plain_norm(block.norm, x, 1e-6), block.qkv.weight[:, :, None, None], block.qkv.bias
    )
    q, k, v = qkv.reshape(batch, 3, width, -1).unbind(1)  # one head
    weights = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(width)).softmax(dim=2)
    mixed = torch.einsum("bqk,bck->bcq", weights, v).view_as(x)
    out = F.conv2d(mixed, block.project.weight[:, :, None, None], block.project.bias)
    return (out + x) * math.sqrt(0.5)


def test_a_whole_net_equals_a_plain_edm() -> None:
    """Two grids and one block each, stage by stage, after Karras et al. 2022, table 7 and section C.2."""
    model, condition = tiny("edm", classes=5), Condition.told(id=torch.tensor([4, 0, 2, 2]))
    (stem, in_2, in_3, in_4, mid, out_1, out_2, up, out_3, out_4), residual = (
        model.stages,
        plain_edm_residual,
    )
    with torch.no_grad():
        sigma = TAU / (1 - TAU)
        angles = (sigma.log() / 4)[:, None] * torch.tensor([1e-4 ** (i / 7) for i in range(8)])
        one_hot = F.one_hot(condition.id, 5).float() * math.sqrt(5)  # type: ignore[arg-type]
        c = torch.cat((angles.sin(), angles.cos()), dim=1) + one_hot @ model.told.rows
        c = F.silu(model.time.out(F.silu(model.time.hidden(c))))
        x1 = stem(X)
        x2 = residual(in_2.first, x1, c)
        x3 = residual(in_3.first, x2, c, "down")
        x4 = plain_edm_attention(in_4.attention, residual(in_4.first, x3, c))
        x = plain_edm_attention(mid.attention, residual(mid.first, x4, c))
        x = residual(mid.second, x, c)
        x = residual(out_1.first, torch.cat((x, x4), dim=1), c)
        assert out_1.attention is None  # the decoder attends once for each grid
        x = residual(out_2.first, torch.cat((x, x3), dim=1), c)
        x = residual(up.first, plain_edm_attention(out_2.attention, x), c, "up")
        x = residual(out_3.first, torch.cat((x, x2), dim=1), c)
        x = residual(out_4.first, torch.cat((x, x1), dim=1), c)
        y = plain_norm(model.norm, x, 1e-6)
        wanted = model.out(y * torch.sigmoid(y))
        found = model(X, TAU, condition)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_attention_reads_the_context_beside_the_grid() -> None:
    model = tiny("cross", classes=5)
    block, told = model.stages[4].attention, torch.randn(4, 3, 32)  # type: ignore[union-attr]
    x = torch.randn(4, 32, 4, 4)
    grid = plain_norm(block.norm, x, 1e-5).flatten(2).transpose(1, 2)
    q, k, v = block.qkv(grid).chunk(3, dim=2)
    told_k, told_v = block.context(told).chunk(2, dim=2)
    k, v = torch.cat((told_k, k), dim=1), torch.cat((told_v, v), dim=1)  # (B, 3 + 16, C)
    heads = []
    for h in (slice(0, 16), slice(16, 32)):
        scores = q[:, :, h] @ k[:, :, h].mT / math.sqrt(16)
        heads.append(scores.softmax(dim=2) @ v[:, :, h])
    mixed = block.project(torch.cat(heads, dim=2))
    wanted = x + mixed.transpose(1, 2).reshape(4, 32, 4, 4)
    torch.testing.assert_close(block(x, told), wanted, rtol=1e-4, atol=1e-4)


def test_the_sinusoid_takes_in_both_ends() -> None:
    table = endpoint_sinusoid(torch.tensor([0.7, 300.0]), 8).double()
    rates = [1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4]
    for i, value in enumerate((0.7, 300.0)):
        wanted = [math.sin(value * r) for r in rates] + [math.cos(value * r) for r in rates]
        torch.testing.assert_close(
            table[i], torch.tensor(wanted, dtype=torch.float64), atol=1e-4, rtol=0
        )


# --- conditions


def test_a_looked_up_row_is_the_one_hot_times_the_weight() -> None:
    torch.manual_seed(0)
    ours, told = ToldLinear(5, 6, 8), everything()
    plain = nn.Linear(5 + 6, 8)
    ours.load_state_dict(
        {
            "rows": plain.weight[:, :5].T.clone(),
            "dense": plain.weight[:, 5:].T.clone(),
            "bias": plain.bias.clone(),
        }
    )
    condition = Condition.told(id=told["id"], dense=told["dense"])
    wanted = plain(torch.cat((F.one_hot(told["id"], 5).float(), told["dense"]), dim=1))
    torch.testing.assert_close(ours(condition), wanted)
    several = Condition.told(multi_hot=told["multi_hot"])
    vector = torch.cat((told["multi_hot"], torch.zeros(4, 6)), dim=1)
    torch.testing.assert_close(ours(several), plain(vector))
    alone = Condition.told(dense=told["dense"])
    vector = torch.cat((torch.zeros(4, 5), told["dense"]), dim=1)
    torch.testing.assert_close(ours(alone), plain(vector))
    torch.testing.assert_close(ours(condition.null()), plain.bias.expand(4, 8))


def test_rows_begin_as_a_linear_map_of_the_one_hot_would() -> None:
    torch.manual_seed(0)
    ours, plain = ToldLinear(400, 0, 64), nn.Linear(400, 64)
    assert ours.rows is not None
    assert ours.rows.std().item() == pytest.approx(plain.weight.std().item(), rel=0.03)
    ours.xavier()
    nn.init.xavier_uniform_(plain.weight)
    assert ours.rows.std().item() == pytest.approx(plain.weight.std().item(), rel=0.03)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("field", ["id", "multi_hot", "dense", "spatial"])
def test_what_is_told_matters_and_what_is_dropped_does_not(kind: str, field: str) -> None:
    model, value = tiny(kind, **TOLD), everything()[field]
    other = value.flip(0) if field != "multi_hot" else 1 - value
    mask = torch.tensor([False, True, False, True])
    with torch.no_grad():
        one, two = (model(X, TAU, Condition.told(**{field: v}).drop(mask)) for v in (value, other))
        untold = model(X, TAU, Condition.unconditional(4))
    for image in range(4):
        same = torch.equal(one[image], two[image])
        assert same == bool(mask[image]), image
    torch.testing.assert_close(one[mask], untold[mask])  # null and unconditional are both zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", FORMS)
def test_every_parameter_gets_a_gradient_in_every_state(kind: str, dtype: torch.dtype) -> None:
    model, told = tiny(kind, **TOLD).to(dtype), everything()
    every = Condition.told(**told)
    masked = Condition.told(spatial=told["spatial"])
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
        model(X, TAU, Condition.told(patch=torch.randn(4, 16, 6)))


# --- how it runs


@pytest.mark.parametrize("kind", FORMS)
def test_features_are_the_captured_tokens_and_stop_there(kind: str) -> None:
    model, condition = tiny(kind, classes=5), Condition.told(id=torch.arange(4))
    for layer in ("in_1", "mid", "out_2"):
        _, captured = model(X, TAU, condition, capture=layer)
        ran: list[int] = []
        behind = model.stages[1 + [stage.name for stage in model.net.stages].index(layer)]
        hook = behind.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        assert torch.equal(model.features(X, TAU, condition, layer), captured)
        hook.remove()
        assert not ran


@pytest.mark.parametrize("kind", FORMS)
def test_recomputed_gradients_are_the_same_bits(kind: str) -> None:
    model, condition = tiny(kind, dropout=0.2, **TOLD).train(), Condition.told(**everything())
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
    model, condition = tiny(kind, **TOLD), Condition.told(**everything())
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
    model, condition = tiny(kind, **TOLD), Condition.told(**everything())
    wanted = model(X, TAU, condition)
    torch.compiler.reset()
    for block in model.repeated():
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=32):  # no two of its blocks are alike
        torch.testing.assert_close(model(X, TAU, condition), wanted)


@pytest.mark.parametrize("kind", FORMS)
def test_a_fresh_net_predicts_nothing_and_its_blocks_pass_on_their_input(kind: str) -> None:
    model = tiny(kind, random=False, **TOLD)
    condition, edm = Condition.told(**everything()), kind == "edm"
    out = model(X, TAU, condition).abs().max()
    assert 0 < out < 1e-3 if edm else out == 0  # EDM's residual paths begin near zero
    block, x = model.stages[4], torch.randn(4, 32, 4, 4)
    assert block.attention is not None and block.second is not None
    kept = block(x, torch.randn(4, model.net.embedding), torch.randn(4, 3, 32))
    # three residual sums, each times sqrt(1/2) in EDM
    torch.testing.assert_close(kept, x * 0.5**1.5 if edm else x, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", FORMS)
def test_a_small_net_learns_64_digits_by_heart(kind: str) -> None:
    digits = load_digits()
    x0 = torch.tensor(digits.images[:64, None] / 8 - 1, dtype=torch.float32)
    condition = Condition.told(id=torch.tensor(digits.target[:64]))
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
        ({"blocks": 0}, "model.blocks=0 must be at least 1"),
        ({"mult": ()}, "names no grid"),
        ({"dropout": 1.0}, "model.dropout=1.0 is a share"),
        ({"context": 8}, "model.context=8 is a number of tokens that only the form sgdm reads"),
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
