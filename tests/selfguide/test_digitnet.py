"""The feature net of fd_digits: what is committed is good enough, small enough, and named by its hash."""

from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch

from selfguide.evaluation.features.digitnet import (
    FITTED_ON,
    WEIGHTS,
    embed,
    half,
    load_digitnet,
)
from selfguide.evaluation.job import fd_digits
from selfguide.snapshot import load
from selfguide.spec.config import EvaluationConfig
from selfguide.spec.metrics import FEATURES
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import Protocol
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.snapshots import write_snapshot
from tools.better import drawn_pixels
from tools.digitnet import LEAST, accuracy
from tools.digitnet import digits as all_digits


@pytest.mark.parametrize("protocol", FITTED_ON)
def test_the_committed_weights_are_right_on_the_half_they_never_saw(protocol: str) -> None:
    images, labels = all_digits()
    even, odd = half(len(images))
    assert not set(even.tolist()) & set(odd.tolist()) and len(even) + len(odd) == 1797
    net, sha256 = load_digitnet(protocol)
    unseen = odd if FITTED_ON[protocol] == "even" else even
    assert accuracy(net, images[unseen], labels[unseen]) >= LEAST
    assert sha256 == FEATURES[protocol].sha256


@pytest.mark.parametrize("file", WEIGHTS.values())
def test_the_weights_are_small(file: str) -> None:
    path = resources.files("selfguide.evaluation.features").joinpath("weights", file)
    assert len(path.read_bytes()) < 1_000_000


def test_embedding_does_not_depend_on_the_batch() -> None:
    images, _ = all_digits()
    net, _ = load_digitnet()
    whole, p = embed(net, images[:100])
    parts, _ = embed(net, images[:100], batch=7)
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(p.sum(1), torch.ones(100))


def test_samples_that_are_not_finite_get_no_score(digits: Path, tmp_path: Path) -> None:
    """As levels of brightness they would be some numbers, and their distance one, too."""
    shards = manifests.load(digits)
    data = {"root": str(digits), "header": shards.header, "manifest": shards.hash}
    words = ("sampler.steps=2", "model.depth=1", "model.width=32")
    snapshot = load(write_snapshot(tmp_path / "one", digits, *words, data=data))
    asked = replace(
        snapshot.config, evaluation=EvaluationConfig(protocol="fd_digits", samples=20, batch=8)
    )
    protocol = Protocol.of(asked, {"data": snapshot.data, "guidance": snapshot.guidance})
    scores, _, _ = fd_digits(snapshot, asked, protocol, RankStatus())
    assert scores["fd_digits"] > 0
    # a product that no number of 32 bits holds
    snapshot.student.get_parameter("backbone.final.weight").data.fill_(3e38)
    with pytest.raises(UserError, match=r"sample \d+ of this snapshot is NaN or infinite"):
        fd_digits(snapshot, asked, protocol, RankStatus())
    with pytest.raises(UserError, match=r"sample \d+ of this snapshot is NaN or infinite"):
        drawn_pixels(snapshot, 0, 8)(0, 20)
