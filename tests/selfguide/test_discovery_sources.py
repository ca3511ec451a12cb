"""What finds labels, against plain re-derivations with the hyper-parameters of its sources.

Written from papers and the facts of their codes: DINO's ViT and its positions (Caron et al. 2021), LOST (Simeoni et al.
2021), STEGO (Hamilton et al. 2022), TEMI (Adaloglou et al. 2023), and k-means as SGDM runs it (Hu et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from selfguide.discovery.corrected import before, plain
from selfguide.discovery.kmeans import beginning, kmeans
from selfguide.discovery.lost import in_pixels, lost_boxes
from selfguide.discovery.neighbours import neighbours
from selfguide.discovery.nets import VIEWS
from selfguide.discovery.stego import PRESETS, Fit, StegoConfig
from selfguide.discovery.temi import Heads, TemiConfig
from selfguide.discovery.temi_fit import _pairs, fit, state_file
from selfguide.discovery.vit import FrozenViT, load_vit, positions_of
from selfguide.randomness import stream_seed
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.test_boxes import plain_lost

Agree = Callable[[Any, Any, float], None]


@pytest.fixture
def wide() -> Iterator[None]:
    """fp64 by default, so that nothing but a formula can differ."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- DINO's ViT -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit() -> FrozenViT:
    made = load_vit("vit_tiny_patch16_224", "random:0", positions="dino")
    generator = torch.Generator().manual_seed(1)
    for parameter in made.net.parameters():  # timm begins with zeros and ones here and there
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def cubic(distance: float) -> float:
    """The weight of a pixel so far away, with torch's coefficient of -3/4."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def resampling(old: int, new: int) -> np.ndarray:
    """(new, old): what each position has of the old ones; the factor is (new + 0.1) / old."""
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / (new + 0.1) - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(j, 0), old - 1)] += cubic(centre - j)
    return weights


def plain_vit(vit: FrozenViT, image: Tensor) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Keys of the last attention and tokens behind the last norm, both (n, 192) without [CLS], and the grid."""
    w = {name: t.double().numpy() for name, t in vit.net.state_dict().items()}
    patch, heads, width = 16, 3, 192
    h, across = (-(-edge // patch) for edge in image.shape[1:])
    x = np.zeros((3, h * patch, across * patch))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if vit.net.pretrained_cfg["mean"] == (0.5, 0.5, 0.5):
        mean = std = (0.5, 0.5, 0.5)
    for c in range(3):
        x[c, : image.shape[1], : image.shape[2]] = (image[c].numpy() / 255 - mean[c]) / std[c]
    kernel, bias = w["patch_embed.proj.weight"].reshape(width, -1), w["patch_embed.proj.bias"]
    rows = [
        kernel @ x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].ravel() + bias
        for i in range(h)
        for j in range(across)
    ]
    tokens = np.concatenate((w["cls_token"][0], np.stack(rows)))
    own = w["pos_embed"][0, 1:].reshape(14, 14, width)
    moved = np.einsum("ia,jb,abd->ijd", resampling(14, h), resampling(14, across), own)
    tokens += np.concatenate((w["pos_embed"][0, :1], moved.reshape(-1, width)))

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    gelu = np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)
    keys = tokens
    for i in range(12):
        block = f"blocks.{i}"
        q, keys, v = np.split(
            linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens)), 3, axis=1
        )
        mixed = []
        for head in np.split(np.arange(width), heads):
            scores = q[:, head] @ keys[:, head].T / math.sqrt(width // heads)
            shares = np.exp(scores - scores.max(1, keepdims=True))
            mixed.append(shares / shares.sum(1, keepdims=True) @ v[:, head])
        tokens = tokens + linear(f"{block}.attn.proj", np.concatenate(mixed, axis=1))
        inner = gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", tokens)))
        tokens = tokens + linear(f"{block}.mlp.fc2", inner)
    return keys[1:], norm("norm", tokens)[1:], (h, across)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """(3, H, W) uint8, smooth as images are, with a brighter blob."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(0, 160, (1, 3, 6, 8))).float()
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    x[:, height // 3 : height // 2, width // 4 : width // 2] += 90
    return x.round().clamp(0, 255).byte()


# smaller and larger than 224 px, of another shape, with edges that patches do not divide, and the net's own
@pytest.mark.parametrize("size", [(75, 100), (176, 240), (320, 320), (224, 224)])
def test_dinos_features_at_any_size_are_a_plain_forward(
    vit: FrozenViT, size: tuple[int, int], agree: Agree
) -> None:
    image = picture(*size)
    keys, tokens, grid = plain_vit(vit, image)
    if size == (224, 224):  # no resampling at all, so no offset either
        assert grid == (14, 14)
        np.testing.assert_array_equal(
            vit.keys(image[None]).numpy(), replace(vit, positions="timm").keys(image[None]).numpy()
        )
        return
    for found, expected in ((vit.keys, keys), (vit.patches, tokens)):
        agree(found(image[None])[0].flatten(1).T, expected, 2e-5)


def test_positions_of_before_differ_as_was_measured(vit: FrozenViT) -> None:
    """timm's resampling, with antialiasing and without the offset: 0.5 % and more, the most where grids shrink."""
    image = picture(176, 240)[None]
    now, then = vit.keys(image), replace(vit, positions="timm").keys(image)
    assert 0.001 < float((now - then).norm() / now.norm()) < 0.1


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("vit_small_patch8_224.dino", "dino"),
        ("vit_base_patch14_dinov2.lvd142m", "dino"),
        ("vit_base_patch14_reg4_dinov2.lvd142m", "timm"),
        ("vit_base_patch16_224.mae", "timm"),
        ("test_vit.r160_in1k", "timm"),
    ],
)
def test_positions_are_those_of_the_code_that_published_the_weights(
    name: str, positions: str
) -> None:
    assert positions_of(name) == positions


def test_a_net_without_positions_like_dinos_is_refused_them() -> None:
    with pytest.raises(UserError, match="positions=timm"):
        load_vit("test_vit2", "random:0", positions="dino")


# each source's transform by torchvision on PIL images: short edge, filter, and whether the centre is cut out
SOURCES: dict[str, Any] = {
    "sgdm": [transforms.Resize(224)],
    "temi": [transforms.Resize(224, transforms.InterpolationMode.BICUBIC)],
    "temi_in1k": [transforms.Resize(256), transforms.CenterCrop(224)],
    "timm": [
        transforms.Resize(248, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
    ],
}


@pytest.mark.parametrize("view", SOURCES)
def test_a_view_is_its_sources_transform(vit: FrozenViT, view: str, agree: Agree) -> None:
    """To two grey levels: PIL rounds between its two passes, torchvision's tensors at the end."""
    assert set(SOURCES) == set(VIEWS)
    image = picture(96, 96)
    expected = transforms.Compose(SOURCES[view])(Image.fromarray(image.permute(1, 2, 0).numpy()))
    seen = vit._viewed(image[None], view)[0].permute(1, 2, 0).double()
    agree(seen, torch.from_numpy(np.array(expected)).double(), 2.1 / 240)


# --- LOST -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_box_from_an_image_is_losts(vit: FrozenViT, seed: int) -> None:
    """165 patches, of which the 100 of the lowest degree may join; the last row and column hang over the edge."""
    image = picture(170, 233, seed)
    keys, _, grid = plain_vit(vit, image)
    top, left, bottom, right = plain_lost(keys, grid, 100)
    expected = [16 * top, 16 * left, min(16 * bottom, 170), min(16 * right, 233)]
    found = lost_boxes(vit.keys(image[None]).flatten(2).mT, grid)
    assert in_pixels(found, 16, (170, 233))[0].tolist() == expected


# --- TEMI -----------------------------------------------------------------------------------------


def plain_temi(x: np.ndarray, near: np.ndarray, config: TemiConfig) -> tuple[list[Any], np.ndarray]:
    """Weights of the teacher's heads, one dict a head, and each head's loss in the last epoch, all in fp64.

    AdamW of 1e-4 for weights and none for biases, a rate that rises from 0 over the first epochs and stays, a last
    layer that waits for an epoch, a teacher that keeps 0.996, a marginal that keeps 0.9, a temperature of 0.1.
    """
    begin = Heads(x.shape[1], config)
    student = []
    for i in range(config.heads):
        student.append(
            {
                "w1": begin.inner[i].T, "b1": begin.inner_bias[i, 0], "w2": begin.outer[i].T,
                "b2": begin.outer_bias[i, 0], "v": begin.directions[i], "g": begin.gain[i],
            }
        )  # fmt: skip
    student = [
        {n: t.detach().double().clone().requires_grad_() for n, t in h.items()} for h in student
    ]
    teacher = [{n: t.detach().clone() for n, t in head.items()} for head in student]
    moments = [{n: [torch.zeros_like(t)] * 2 + [0] for n, t in head.items()} for head in student]
    scaled = torch.from_numpy((x - x.mean(0)) / x.std(0)).double()
    marginal = torch.full((config.heads, config.groups), 1 / config.groups, dtype=torch.float64)
    count, steps = len(x), len(x) // config.batch
    warm = round(config.warmup * config.epochs) * steps
    rates = [*np.linspace(0, config.learning_rate * config.batch / 256, warm)]
    rates += [config.learning_rate * config.batch / 256] * (config.epochs * steps - warm)

    def probabilities(head: dict[str, Tensor], rows: Tensor) -> Tensor:
        hidden = rows @ head["w1"].T + head["b1"]
        z = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 @ head["w2"].T + head["b2"]
        z = z / z.square().sum(1, keepdim=True).sqrt()
        last = head["g"] * head["v"] / head["v"].square().sum(1, keepdim=True).sqrt()
        return torch.softmax(z @ last.T / 0.1, dim=1)

    losses = np.zeros(config.heads)
    for step in range(config.epochs * steps):
        epoch, within = divmod(step, steps)
        if within == 0:
            pairs, losses = torch.from_numpy(_pairs(near, config, epoch)), np.zeros(config.heads)
        a, b = pairs[within * config.batch : (within + 1) * config.batch].T
        said = [(probabilities(h, scaled[a]), probabilities(h, scaled[b])) for h in teacher]
        weight = torch.stack([(p * q).sum(1) for p, q in said]).mean(0)
        total = torch.zeros(())
        for i, (p, q) in enumerate(said):
            share = marginal[i] = 0.9 * marginal[i] + 0.1 * torch.cat((p, q)).mean(0)
            own, other = probabilities(student[i], scaled[a]), probabilities(student[i], scaled[b])
            forth = -weight * (((own * q) ** config.beta / share).sum(1)).log()
            back = -weight * (((other * p) ** config.beta / share).sum(1)).log()
            loss = (forth.mean() + back.mean()) / 2
            losses[i] += float(loss.detach()) * config.batch / count
            total = total + loss / config.heads
        gradients = torch.autograd.grad(total, [t for h in student for t in h.values()])
        index = 0
        for head, average, kept in zip(student, teacher, moments, strict=True):
            for name, tensor in head.items():
                gradient, index = gradients[index], index + 1
                if not (epoch == 0 and name in ("v", "g")):
                    decay = 0.0 if name in ("b1", "b2") else 1e-4
                    m, s, n = kept[name]
                    m, s, n = 0.9 * m + 0.1 * gradient, 0.999 * s + 0.001 * gradient**2, n + 1
                    kept[name] = [m, s, n]
                    direction = m / (1 - 0.9**n) / ((s / (1 - 0.999**n)).sqrt() + 1e-8)
                    with torch.no_grad():
                        tensor *= 1 - rates[step] * decay
                        tensor -= rates[step] * direction
                average[name] = 0.996 * average[name] + 0.004 * tensor.detach()
    return teacher, losses


def clouds() -> np.ndarray:
    """(320, 8) fp32 around five centres."""
    rng = np.random.default_rng(0)
    centres = rng.normal(scale=4, size=(5, 8))
    return (centres[rng.integers(0, 5, 320)] + rng.normal(size=(320, 8))).astype(np.float32)


# half of the epochs rise, so that the rate's beginning and its top are both in; memory lets the teacher keep 0.996
TEMI = TemiConfig(
    groups=5, heads=3, epochs=4, batch=32, learning_rate=8e-3, warmup=0.5, neighbours=10,
    hidden=32, width=16, memory=1e9,
)  # fmt: skip


def test_a_fit_of_temi_is_the_plain_loop(agree: Agree) -> None:
    x = clouds()
    near = neighbours(x, 10)
    expected, losses = plain_temi(x, near, TEMI)
    found = fit(x, near, TEMI)
    agree(torch.tensor(found.losses), losses, 1e-5)
    heads = found.heads
    for i, head in enumerate(expected):
        agree(heads.inner[i].T, head["w1"], 1e-4)
        agree(heads.outer[i].T, head["w2"], 1e-4)
        agree(heads.directions[i], head["v"], 1e-4)
        agree(heads.gain[i], head["g"], 1e-4)
        agree(heads.inner_bias[i, 0], head["b1"], 1e-3)
        agree(heads.outer_bias[i, 0], head["b2"], 1e-3)


def test_temis_hyper_parameters_are_its_codes_and_cedms() -> None:
    config = TemiConfig(groups=100)
    assert (config.heads, config.epochs, config.batch, config.neighbours) == (50, 200, 512, 50)
    assert (config.learning_rate, config.weight_decay, config.beta) == (1e-4, 1e-4, 0.6)
    assert (config.hidden, config.width, config.temperature, config.frozen) == (512, 256, 0.1, 1)
    assert (config.momentum, config.marginal_momentum) == (0.996, 0.9)
    assert round(config.warmup * config.epochs) == 20


def test_first_weights_are_drawn_as_the_sources_draw_them() -> None:
    """Means and deviations by kind of module: DINO's heads, torch's last layer and convolutions, a probe of N(0, 1)."""
    heads = Heads(64, TemiConfig(groups=40, heads=8))
    head, probe = (
        Fit(lambda i: i, torch.zeros(2, 1).long(), 384, PRESETS["voc"], seed=0).net,
        "centroids",
    )
    drawn = {
        "hidden": (heads.inner, 0.02),
        "bottleneck": (heads.outer, 0.02),
        "last": (heads.directions, 1 / math.sqrt(3 * 256)),  # uniform within 1 / sqrt(256)
        "linear": (head.linear.weight, 1 / math.sqrt(3 * 384)),
        "bend": (head.get_parameter("bend.0.weight"), 1 / math.sqrt(3 * 384)),
        "probe": (head.get_parameter(probe), 1.0),
    }
    for kind, (tensor, std) in drawn.items():
        tensor, number = tensor.detach(), tensor.numel()
        assert abs(float(tensor.mean())) < 5 * std / math.sqrt(number), kind
        assert abs(float(tensor.std()) / std - 1) < 5 / math.sqrt(2 * number), kind
    assert not heads.inner_bias.any() and not heads.outer_bias.any() and (heads.gain == 1).all()


def test_what_was_half_fitted_before_the_corrections_is_found_by_its_name() -> None:
    """Hashes that the version before them gave: of a fit's state, and of a record's settings."""
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    near = np.tile(np.arange(3, dtype=np.int32), (10, 1))
    old = before(TemiConfig(groups=3, neighbours=3))
    assert state_file(Path(), x, near, old) == Path("temi-2fc099318d02a7a4.pt")
    digests = {n: manifests.digest(plain(before(c)))[:16] for n, c in PRESETS.items()}
    assert digests == {"cocostuff27": "a3412b4bee13352a", "voc": "1603ce4a0956d19f"}


def test_temi_of_before_decays_biases_and_begins_a_step_higher() -> None:
    old = before(TEMI)
    assert plain(old).keys() == plain(TEMI).keys() - {"decay_biases", "warmup_from_zero"}
    assert [old.rate(step, 20, 320) for step in (0, 19, 20)] == [5e-5, 1e-3, 1e-3]
    assert [TEMI.rate(step, 20, 320) for step in (0, 19, 20)] == [0.0, 1e-3, 1e-3]
    x = clouds()
    near = neighbours(x, 10)
    # biases begin at 0, so a decay of 0.5 a step shows only where they have moved
    wide = replace(TEMI, weight_decay=50.0, warmup_from_zero=False)
    kept, decayed = fit(x, near, wide), fit(x, near, replace(wide, decay_biases=True))
    assert kept.heads.outer_bias.norm() > 1.05 * decayed.heads.outer_bias.norm()


# --- STEGO ----------------------------------------------------------------------------------------


def bilinear(maps: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(C, h, w) at points (n, 2) of x and y in [-1, 1], corners on the map's outermost centres: (n, C)."""
    _, h, w = maps.shape
    found = []
    for px, py in points:
        x, y = (px + 1) / 2 * (w - 1), (py + 1) / 2 * (h - 1)
        i, j = min(int(y), h - 2), min(int(x), w - 2)
        fy, fx = y - i, x - j
        top = maps[:, i, j] * (1 - fx) + maps[:, i, j + 1] * fx
        bottom = maps[:, i + 1, j] * (1 - fx) + maps[:, i + 1, j + 1] * fx
        found.append(top * (1 - fy) + bottom * fy)
    return np.stack(found)


def grid_weights(h: int, w: int, points: Tensor) -> Tensor:
    """(n, h w): what each of the points (n, 2) has of the map's values."""
    eye = np.eye(h * w).reshape(h * w, h, w)
    return torch.from_numpy(bilinear(eye, points.numpy()))


def units(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(-1, keepdim=True).sqrt()


def plain_stego(
    maps: Tensor, near: Tensor, config: StegoConfig, seed: int, steps: int
) -> dict[str, Tensor]:
    """Weights after so many steps of Adam, 5e-4 for the head and 5e-3 for the probe's centroids."""
    begin = Fit(lambda i: maps[i], near, maps.shape[1], config, seed=seed).net
    w = {n: p.detach().clone().requires_grad_() for n, p in begin.named_parameters()}
    kept = {n: [torch.zeros_like(p), torch.zeros_like(p)] for n, p in w.items()}
    _, channels, h, width = maps.shape

    def dropped(x: Tensor) -> Tensor:
        """A tenth of the channels of each image is 0, the others weigh as much more."""
        return x * torch.empty(len(x), channels, 1, 1).bernoulli_(0.9) / 0.9

    def at(x: Tensor, weights: list[Tensor]) -> Tensor:
        """(B, C, h, w) at each image's points: unit rows (B, n, C)."""
        return units(torch.stack([m @ one.flatten(1).T for one, m in zip(x, weights, strict=True)]))

    def loss(f: Tensor, f_other: Tensor, s: Tensor, s_other: Tensor, shift: float) -> Tensor:
        fd = f @ f_other.mT  # (B, n, n)
        fd = fd - fd.mean(2, keepdim=True) - (fd - fd.mean(2, keepdim=True)).mean() + fd.mean()
        return -((s @ s_other.mT).clamp(min=0) * (fd - shift)).mean()

    for step in range(steps):
        order = torch.Generator().manual_seed(stream_seed(seed, "stego-order", 0))
        crops = torch.randperm(len(near), generator=order)[16 * step : 16 * (step + 1)]
        torch.manual_seed(stream_seed(seed, "stego", step))
        column = torch.randint(7, (16,))
        x = maps[torch.cat((crops, near[crops, column]))]
        first, second = dropped(x), dropped(x)
        line = torch.einsum("bdhw,cd->bchw", first, w["linear.weight"][..., 0, 0])
        inner = torch.einsum("bdhw,cd->bchw", second, w["bend.0.weight"][..., 0, 0])
        inner = (inner + w["bend.0.bias"][:, None, None]).clamp(min=0)
        bent = torch.einsum("bdhw,cd->bchw", inner, w["bend.2.weight"][..., 0, 0])
        codes = line + bent + (w["linear.bias"] + w["bend.2.bias"])[:, None, None]
        compared = dropped(x)
        (f, f_near), (s, s_near) = compared.chunk(2), codes.chunk(2)
        here, there = (2 * torch.rand(16, 11, 11, 2) - 1 for _ in range(2))
        here_w, there_w = (
            [grid_weights(h, width, one.reshape(-1, 2)) for one in points]
            for points in (here, there)
        )
        f_here, s_here, s_there, f_there = (
            at(f, here_w),
            at(s, here_w),
            at(s, there_w),
            at(f, there_w),
        )
        own = loss(f_here, f_here, s_here, s_here, config.shifts.own)
        knn = loss(f_here, at(f_near, there_w), s_here, at(s_near, there_w), config.shifts.knn)
        random = []
        for _ in range(5):
            cycle = torch.randperm(16)
            partner = torch.empty_like(cycle)
            partner[cycle] = cycle.roll(1)
            random.append(
                loss(f_here, f_there[partner], s_here, s_there[partner], config.shifts.random)
            )
        cosines = units(codes.detach().movedim(1, -1)) @ units(w["centroids"]).T
        total = (
            0.67 * own + 0.25 * knn + 0.63 * torch.stack(random).mean() - cosines.amax(-1).mean()
        )
        for (name, tensor), g in zip(
            w.items(), torch.autograd.grad(total, list(w.values())), strict=True
        ):
            m, v = kept[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            rate = 5e-3 if name == "centroids" else 5e-4
            with torch.no_grad():
                unbiased = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                tensor -= rate * m / (1 - 0.9 ** (step + 1)) / unbiased
    return {name: tensor.detach() for name, tensor in w.items()}


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("preset", PRESETS)
def test_steps_of_stego_are_the_plain_ones(preset: str, agree: Agree) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(40, 24, 5, 5, generator=generator)
    near = torch.stack([torch.randperm(40, generator=generator)[:7] for _ in range(40)])
    config = replace(PRESETS[preset], steps=2)
    expected = plain_stego(maps, near, config, seed=3, steps=2)
    found = Fit(lambda i: maps[i], near, 24, config, seed=3)
    assert len(list(found.run())) == 2
    for name, parameter in found.net.named_parameters():
        agree(parameter.detach(), expected[name], 1e-9)


def test_stego_of_before_is_named_by_its_record_as_it_was() -> None:
    old = plain(before(PRESETS["cocostuff27"]))
    assert (old["batch"], old["epochs"]) == (64, 10)
    assert not {"steps", "dropouts", "resize", "mirror"} & old.keys()
    assert PRESETS["voc"].batch == 16 and PRESETS["voc"].steps == 5000
    assert before(PRESETS["voc"], typed={"batch"}).batch == 16


def test_codes_of_mirror_images_are_averaged() -> None:
    maps = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    net = Fit(
        lambda i: maps[i], torch.zeros(2, 1).long(), 6, StegoConfig(groups=3), seed=0
    ).net.eval()
    with torch.no_grad():
        codes = (net.codes(maps) + net.codes(maps.roll(1, 3)).flip(3)) / 2
        distances = units(codes.movedim(1, -1)) @ units(net.centroids).T
    assert torch.equal(net.masks(maps, (4, 4), maps.roll(1, 3)), distances.argmax(-1))


# --- k-means --------------------------------------------------------------------------------------


def plain_kmeans(x: np.ndarray, begin: np.ndarray, iterations: int) -> np.ndarray:
    """Lloyd's centroids of unit rows, in fp64."""
    rows = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    centroids = rows[begin]
    for _ in range(iterations):
        ids = ((rows[:, None] - centroids[None]) ** 2).sum(2).argmin(1)
        centroids = np.stack([rows[ids == k].mean(0) for k in range(len(begin))])
    return centroids


@pytest.mark.parametrize("assigned", ["unit", "raw"])
def test_kmeans_is_lloyds_of_unit_rows_and_assigns_as_asked(assigned: Any, agree: Agree) -> None:
    """30 iterations; published codes then assign rows as they are, whose length makes of the distance a product."""
    x = clouds() * np.random.default_rng(1).uniform(0.5, 20, (320, 1)).astype(np.float32)
    begin = beginning(320, 12, 0, 0)
    centroids = plain_kmeans(x, begin, 30)
    found = kmeans(x, 12, restarts=1, assigned=assigned)
    agree(torch.from_numpy(found.centroids), centroids, 1e-5)
    rows = x / np.linalg.norm(x, axis=1, keepdims=True) if assigned == "unit" else x
    expected = ((rows[:, None] - centroids[None]) ** 2).sum(2).argmin(1)
    assert (found.ids == expected).all()


def test_kmeans_on_a_share_of_the_samples_is_fitted_to_so_many_a_group() -> None:
    x = clouds()
    found = kmeans(x, 5, restarts=1, per_group=20)
    drawn = np.random.default_rng((0, 0, 1)).choice(320, 100, replace=False)
    centroids = plain_kmeans(x[drawn], beginning(100, 5, 0, 0), 30)
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-5)
    assert found.sizes.sum() == 320
