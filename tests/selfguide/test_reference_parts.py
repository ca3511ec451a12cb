"""A reference of a part of some shards: drawn by a seed where their order is not random, the same by any ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from selfguide.evaluation.features.net import FeatureNet
from selfguide.evaluation.scores import Known, make_reference, part_of
from selfguide.randomness import sample
from shards.format import manifest as manifests
from tests.shards import foreign
from tools.shards.__main__ import main as tool

CLASSES, EACH = 10, 20


class Level(nn.Module):
    """Features of an image: its level, of which each class has one, and two that tell images apart."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.stack([x[:, 0].mean((1, 2)), x[:, 1, 0, 0], x[:, 2, 3, 3]], 1), None


@pytest.fixture
def net() -> FeatureNet:
    return FeatureNet(
        name="level", sha256="", resize="TF1 bilinear", size=8, mean=(0.0,) * 3, std=(1.0,) * 3, width=3, spatial=0,
        net=Level(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def by_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexed tars, a class each: images of class c have the red level 20 c."""
    root = tmp_path_factory.mktemp("tars")
    images = foreign.pixels(CLASSES * EACH)
    for c in range(CLASSES):
        members: dict[str, bytes] = {}
        for i in range(c * EACH, (c + 1) * EACH):
            images[i, :, :, 0] = 20 * c
            members |= {
                f"{i:06d}.png": foreign.encoded(images[i], "PNG"),
                f"{i:06d}.cls": str(c).encode(),
            }
        foreign.tar(root / f"{c:05d}.tar", members)
    assert tool(["index", str(root)]) == 0
    return root


def classes(known: Known | None) -> set[int]:
    assert known is not None and known.features is not None
    return {round(float(level) / 20) for level in known.features[:, 0]}


def test_part_of_class_sorted_shards_drawn_by_a_seed_has_every_class(
    by_class: Path, net: FeatureNet, tmp_path: Path
) -> None:
    first = make_reference(str(by_class), net, tmp_path / "first", count=60)
    drawn = make_reference(str(by_class), net, tmp_path / "drawn", count=60, seed=0)
    other = make_reference(str(by_class), net, tmp_path / "other", count=60, seed=1)
    assert classes(first) == {0, 1, 2} and classes(drawn) == classes(other) == {*range(CLASSES)}
    assert drawn is not None and other is not None and first is not None
    assert drawn.main.count == first.main.count == 60
    assert not np.allclose(drawn.main.mean, other.main.mean)
    assert drawn.main.about["seed"] == 0 and "seed" not in first.main.about
    # also where precision and recall look at some of them alone
    some = make_reference(str(by_class), net, tmp_path / "some", count=100, seed=0, kept=50)
    assert some is not None and some.features is not None and len(some.features) == 50
    assert len(classes(some)) > 5


def test_part_that_is_drawn_is_the_same_in_any_blocks_and_by_any_ranks(
    by_class: Path, net: FeatureNet, tmp_path: Path
) -> None:
    alone = make_reference(str(by_class), net, tmp_path / "1", count=60, seed=3, part=60)
    for rank in (1, 2, 0):
        found = make_reference(
            str(by_class), net, tmp_path / "3", count=60, seed=3, part=7, rank=rank, world=3
        )
    assert alone is not None and found is not None
    assert alone.features is not None and found.features is not None
    assert np.allclose(alone.features, found.features)
    # these are the images at the ordinals that the seed names
    rows = part_of(manifests.load(str(by_class)).count, 60, 3).numpy()
    assert np.array_equal(
        np.round(np.asarray(alone.features[:, 0], float) / 20).astype(int), rows // EACH
    )


def test_sample_without_replacement_is_even_and_part_of_a_larger_one() -> None:
    small, large = sample(5, "reference", 1000, 100), sample(5, "reference", 1000, 400)
    assert len(small) == len(small.unique()) == 100
    assert torch.equal(small, small.sort().values) and set(small.tolist()) < set(large.tolist())
    assert torch.equal(sample(5, "reference", 1000, 1000), torch.arange(1000))
    assert not torch.equal(small, sample(6, "reference", 1000, 100))
    # each is drawn by one seed in ten
    drawn = [sample(seed, "reference", 50, 5) for seed in range(2000)]
    often = torch.cat(drawn).bincount(minlength=50)
    assert often.min() > 140 and often.max() < 260
