"""Each published U-ViT is its source's: sizes, a forward in fp64, and first weights by kind of module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from launcher.compose import compose
from selfguide.diffusion.conditions import Condition
from selfguide.models import assemble
from selfguide.models.uvit import UViT
from selfguide.networks.official import adopt
from selfguide.spec.config import InitConfig, ModelConfig
from selfguide.spec.sizes import CORRECTED, TABLE, override, row
from selfguide.spec.uvit import UViTArchitecture
from tests.selfguide import published
from tests.selfguide.test_online import online_config


class Source(NamedTuple):
    """A configuration of Bao et al. 2023: rows of its label table, and what its net is fed at noise-time 1."""

    size: int
    channels: int
    patch: int
    width: int
    depth: int
    heads: int
    rows: int
    fed: int
    conv: bool = True


SOURCES = {
    "uvit_s_2": Source(32, 3, 2, 512, 12, 8, 0, 999),  # cifar10
    "uvit_s_4": Source(64, 3, 4, 512, 12, 8, 0, 999),  # celeba64
    "uvit_s_deep_2": Source(32, 4, 2, 512, 16, 8, 0, 1000),  # mscoco, less its text
    "uvit_m_4": Source(64, 3, 4, 768, 16, 12, 1000, 999),  # imagenet64, labels never dropped
    "uvit_l_2": Source(32, 4, 2, 1024, 20, 16, 1001, 999),  # imagenet256
    "uvit_l_4": Source(64, 4, 4, 1024, 20, 16, 1001, 999),  # imagenet512
    "uvit_h_2": Source(32, 4, 2, 1152, 28, 16, 1001, 1000, conv=False),
    "uvit_h_4": Source(64, 4, 4, 1152, 28, 16, 1001, 1000, conv=False),
}


def test_every_published_size_has_its_source() -> None:
    named = {name for name in TABLE if name.startswith("uvit") and name[-1].isdigit()}
    assert named == SOURCES.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_a_row_has_the_sizes_of_its_source(name: str) -> None:
    net, source = row(name), SOURCES[name]
    assert isinstance(net, UViTArchitecture)
    fields = ("size", "channels", "patch", "width", "depth", "heads")
    assert tuple(getattr(net, f) for f in fields) == source[:6]
    # of 1,001 rows the last is for dropped labels
    assert net.classes == source.rows - (source.rows == 1001) and net.conv == source.conv
    assert not net.learn_sigma and not net.cls_token


@pytest.mark.parametrize("name", SOURCES)
def test_its_forward_is_the_one_of_its_source(name: str) -> None:
    """With random weights under their names, of three narrow blocks and a grid of 4 x 4 patches."""
    source = SOURCES[name]
    small = {"depth": 2, "size": 4 * source.patch, "width": 8 * source.heads}
    torch.manual_seed(0)
    weights = published.uvit_weights(
        channels=source.channels, patch=source.patch, rows=source.rows, conv=source.conv, **small,
    )  # fmt: skip
    with torch.device("meta"):  # every weight that is used is theirs
        ours = assemble(override(name, **small)).eval()
    ours.to_empty(device="cpu")
    for tensor in ours.state_dict().values():
        tensor.fill_(1e3)  # not what lay in memory, which may be no number
    keep = "keep" if source.rows else "drop"
    begin = InitConfig(source="official", path="w.pt", form="uvit", labels=keep)  # type: ignore[arg-type]
    base = online_config()
    adopt(ours, weights, replace(base, init=begin, model=ModelConfig(name=name)))
    exact = {n: tensor.double() for n, tensor in weights.items()}
    x = torch.randn(3, source.channels, small["size"], small["size"], dtype=torch.float64)
    tau, y = torch.tensor([0.02, 0.5, 0.98]), torch.tensor([3, 999, 0])
    pairs: list[tuple[Condition, Any]] = [(Condition.unconditional(3), None)]
    if source.rows:
        pairs = [(Condition.of(id=y), y)]
    if source.rows == 1001:
        pairs.append((Condition.of(id=y).null(), torch.full_like(y, 1000)))
    with torch.no_grad():
        for condition, rows in pairs:
            wanted = published.uvit(
                exact, x, source.fed * tau, rows, patch=source.patch, heads=source.heads
            )
            assert wanted.std() > 0.1
            torch.testing.assert_close(ours.double()(x, tau, condition), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SOURCES)
def test_its_first_weights_are_those_of_its_source(name: str) -> None:
    """Means and stds by kind, as `model=NAME` begins; depth and width only repeat them."""
    made = compose(["experiment=digits_dit", "cluster=local", f"model={name}"])
    assert made.model.token_std == 1.0 == CORRECTED[name]["token_std"]
    source = SOURCES[name]
    torch.manual_seed(0)
    small = {"depth": 2, "width": 16 * source.heads, "size": 4 * source.patch}
    net = assemble(override(name, token_std=made.model.token_std, **small))
    assert isinstance(net, UViT)
    convolutions = {"patchify": source.channels * source.patch**2, "smooth": 9 * source.channels}
    for each, tensor in net.named_parameters():
        stem = each.partition(".")[0]
        if stem in convolutions:  # torch's own, uniform with a std of 1 / sqrt(3 fan-in)
            fan = convolutions[stem]
            assert tensor.abs().max() <= fan**-0.5
            assert published.has_spread(tensor, (3 * fan) ** -0.5)
        elif "norm" in each or each.endswith("bias"):
            assert (tensor == float(each.endswith("weight"))).all(), each
        else:
            std = 1.0 if each.startswith("condition.") else 0.02
            assert published.has_spread(tensor, std), each
