"""Linear and k-NN probes: independent oracles, closed cases, choice without the test part, ranks and kills."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from selfguide.evaluation.metrics.probe import (
    NEIGHBOURS,
    TEMPERATURE,
    Accuracy,
    LinearProbes,
    NearestNeighbours,
    best_of,
    knn_accuracy,
    linear_accuracy,
)


def scans() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Digits to train on and to test on, with their labels."""
    x, y = load_digits(return_X_y=True)
    rows, labels = torch.from_numpy(x).float() / 8 - 1, torch.from_numpy(y)
    return rows[:1300], labels[:1300], rows[1300:], labels[1300:]


def test_linear_accuracy_of_digits_is_near_scikit_learns() -> None:
    train, labels, test, truth = scans()
    theirs = LogisticRegression(max_iter=2000, C=1e3).fit(train, labels).score(test, truth)
    ours = linear_accuracy(train, labels, test, truth, passes=40, batch=64, lr=4e-3)
    assert ours.value == pytest.approx(theirs, abs=0.02)
    assert ours.se == pytest.approx(math.sqrt(ours.value * (1 - ours.value) / len(truth)))


@pytest.mark.parametrize("batch", [1, 7, 5000])
def test_nearest_neighbours_of_digits_vote_as_scikit_learns(batch: int) -> None:
    train, labels, test, truth = (each[:300] for each in scans())
    oracle = KNeighborsClassifier(
        NEIGHBOURS,
        metric="cosine",
        algorithm="brute",
        weights=lambda d: np.exp((1 - d) / TEMPERATURE),
    )
    near = NearestNeighbours(test)
    for some, of in zip(train.split(batch), labels.split(batch), strict=True):
        near.see(some, of)
    assert near.predictions(10).tolist() == oracle.fit(train, labels).predict(test).tolist()
    found = knn_accuracy(train, labels, test, truth, batch=batch)
    assert found.value == pytest.approx(oracle.score(test, truth))


def test_one_neighbour_of_a_set_in_itself_tells_every_label() -> None:
    train, labels, _, _ = scans()
    assert knn_accuracy(train, labels, train, labels, k=1) == Accuracy(1.0, 0.0)


def test_nearest_neighbours_at_one_cosine_are_the_first_and_classes_with_one_vote_the_lower() -> (
    None
):
    rows = torch.tensor([[1.0, 0.0]] * 3)
    near = NearestNeighbours(rows[:1], k=2)
    near.see(rows[:1], torch.tensor([2]))
    near.see(rows[1:], torch.tensor([1, 0]))
    assert near.labels.tolist() == [[2, 1]]
    assert near.predictions(3).tolist() == [1]


def test_neighbours_of_fewer_images_than_asked_for_are_all_of_them() -> None:
    rows = torch.eye(3)
    found = knn_accuracy(rows, torch.arange(3), rows, torch.arange(3), k=20)
    assert found.value == 1.0


def test_linear_probes_of_separable_classes_tell_all_and_of_one_constant_the_commonest() -> None:
    # class 1 is the commonest
    labels = torch.where(torch.arange(90) < 30, 1, torch.arange(90) % 3)
    clear, blind = torch.eye(3)[labels], torch.ones(90, 4)
    probes = LinearProbes([3, 4], 3, steps=200, lr=0.05)
    for _ in range(200):
        probes.step([clear, blind], labels)
    of_clear, of_blind = probes.predictions([clear, blind])
    assert torch.equal(of_clear, labels)
    assert set(of_blind.tolist()) == {1}


def test_a_linear_probe_beside_others_is_bitwise_what_it_is_alone() -> None:
    train, labels, _, _ = scans()
    both, alone = (LinearProbes(widths, 10, steps=8, lr=0.01) for widths in ([64, 8], [64]))
    for rows in torch.arange(256).split(32):
        both.step([train[rows], train[rows, 20:28]], labels[rows])
        alone.step([train[rows]], labels[rows])
    assert torch.equal(both.weights[0], alone.weights[0])
    assert torch.equal(both.biases[0], alone.biases[0])


def test_the_first_step_of_a_linear_probe_is_adams_and_the_last_is_small() -> None:
    probes = LinearProbes([2], 2, steps=2, lr=0.1)
    rows, labels = torch.tensor([[1.0, -2.0]]), torch.tensor([0])
    probes.step([rows], labels)
    # Adam's first step is the learning rate against the sign of the gradient
    assert torch.allclose(probes.weights[0], torch.tensor([[0.1, -0.1], [-0.1, 0.1]]), atol=1e-6)
    before = probes.weights[0].detach().clone()
    probes.step([rows], labels)
    assert probes.optimiser.param_groups[0]["lr"] == pytest.approx(0.05)
    assert (probes.weights[0] - before).abs().max() < 0.06


def test_the_best_cell_is_chosen_on_the_validation_part() -> None:
    cells = [
        {"layer": "a", "linear_validation": 0.8, "linear_accuracy": 0.9},
        {"layer": "b", "linear_validation": 0.9, "linear_accuracy": 0.1},
        {"layer": "c", "linear_validation": 0.9, "linear_accuracy": 1.0},
    ]
    assert best_of(cells, "linear")["layer"] == "b"
