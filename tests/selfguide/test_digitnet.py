"""The feature net of fd_digits: what is committed is good enough, small enough, and named by its hash."""

from importlib import resources

import pytest
import torch

from selfguide.evaluation.features.digitnet import (
    FITTED_ON,
    WEIGHTS,
    embed,
    half,
    load_digitnet,
)
from selfguide.spec.metrics import FEATURES
from tools.digitnet import LEAST, accuracy, digits


@pytest.mark.parametrize("protocol", FITTED_ON)
def test_the_committed_weights_are_right_on_the_half_they_never_saw(protocol: str) -> None:
    images, labels = digits()
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
    images, _ = digits()
    net, _ = load_digitnet()
    whole, p = embed(net, images[:100])
    parts, _ = embed(net, images[:100], batch=7)
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(p.sum(1), torch.ones(100))
