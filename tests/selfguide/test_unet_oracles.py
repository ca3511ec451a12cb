"""UNets, whole and in parts, against diffusers' and against EDM's written out plainly."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.models.unet_blocks import Attention, ResidualBlock, endpoint_sinusoid
from tests.selfguide.test_unet import TAU, X, tiny


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


@pytest.mark.parametrize(
    ("kind", "out_groups"),
    # DDAE's last norm has groups of its own
    [*((kind, 0) for kind in DIFFUSERS), ("ddpm", 8), ("ddpmpp", 8)],
)
def test_a_whole_net_equals_diffusers(kind: str, out_groups: int) -> None:
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
    theirs.conv_norm_out.num_groups = out_groups or 4
    ours = tiny(kind, blocks=2, time="noise_1000", out_groups=out_groups)
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
    model, condition = tiny("edm", classes=5), Condition.of(id=torch.tensor([4, 0, 2, 2]))
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
    block, context = model.stages[4].attention, torch.randn(4, 3, 32)  # type: ignore[union-attr]
    x = torch.randn(4, 32, 4, 4)
    grid = plain_norm(block.norm, x, 1e-5).flatten(2).transpose(1, 2)
    q, k, v = block.qkv(grid).chunk(3, dim=2)
    condition_k, condition_v = block.context(context).chunk(2, dim=2)
    k, v = torch.cat((condition_k, k), dim=1), torch.cat((condition_v, v), dim=1)  # (B, 3 + 16, C)
    heads = []
    for h in (slice(0, 16), slice(16, 32)):
        scores = q[:, :, h] @ k[:, :, h].mT / math.sqrt(16)
        heads.append(scores.softmax(dim=2) @ v[:, :, h])
    mixed = block.project(torch.cat(heads, dim=2))
    wanted = x + mixed.transpose(1, 2).reshape(4, 32, 4, 4)
    torch.testing.assert_close(block(x, context), wanted, rtol=1e-4, atol=1e-4)


def test_the_sinusoid_takes_in_both_ends() -> None:
    table = endpoint_sinusoid(torch.tensor([0.7, 300.0]), 8).double()
    rates = [1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4]
    for i, value in enumerate((0.7, 300.0)):
        wanted = [math.sin(value * r) for r in rates] + [math.cos(value * r) for r in rates]
        torch.testing.assert_close(
            table[i], torch.tensor(wanted, dtype=torch.float64), atol=1e-4, rtol=0
        )
