"""The feature net of fd_digits: what is committed is good enough, small enough, and named by its hash."""

from importlib import resources

import torch

from selfguide.evaluation.features.digitnet import WEIGHTS, embed, half, load_digitnet
from tools.digitnet import LEAST, accuracy, digits


def test_the_committed_weights_are_right_on_the_half_they_never_saw() -> None:
    images, labels = digits()
    even, odd = half(len(images))
    assert not set(even.tolist()) & set(odd.tolist()) and len(even) + len(odd) == 1797
    net, sha256 = load_digitnet()
    assert accuracy(net, images[odd], labels[odd]) >= LEAST and len(sha256) == 64


def test_the_weights_are_small() -> None:
    path = resources.files("selfguide.evaluation.features").joinpath("weights", WEIGHTS)
    assert len(path.read_bytes()) < 1_000_000


def test_embedding_does_not_depend_on_the_batch() -> None:
    images, _ = digits()
    net, _ = load_digitnet()
    whole, p = embed(net, images[:100])
    parts, _ = embed(net, images[:100], batch=7)
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(p.sum(1), torch.ones(100))
