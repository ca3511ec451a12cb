"""How well frozen features tell labels: a linear classifier, and a vote among the nearest training images.

Both take features as they come, batch by batch, so that those of a large training part are never kept. The linear
classifier is trained as Xiang et al. 2023 (DDAE, arXiv 2303.09769) train theirs: one map, cross-entropy, Adam, a cosine
to 0, features as they are. The vote is that of Wu et al. 2018 (arXiv 1805.01978), with the numbers of Caron et al. 2021
(arXiv 2104.14294): 20 neighbours by cosine, each with the weight exp(cosine / 0.07).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

NEIGHBOURS, TEMPERATURE = 20, 0.07


@dataclass(frozen=True)
class Accuracy:
    """The share of labels that were predicted, and its standard error, that of a share of so many images."""

    value: float
    se: float

    @staticmethod
    def of(predicted: Tensor, labels: Tensor) -> Accuracy:
        """Of predicted labels (N,) and true ones (N,)."""
        share = (predicted == labels).double().mean().item()
        return Accuracy(share, math.sqrt(share * (1 - share) / len(labels)))


class LinearProbes:
    """Linear classifiers, one of each of several features, that are trained on the same images together.

    They begin at zero, so that nothing about them is random, and none of them changes another.
    """

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        *,
        steps: int,
        lr: float,
        device: torch.device | str = "cpu",
    ) -> None:
        """`widths` of the features; `steps` are those of the whole training, `lr` the first of them has."""
        self.steps, self.lr, self.done = steps, lr, 0
        self.weights = [torch.zeros(classes, n, device=device, requires_grad=True) for n in widths]
        self.biases = [torch.zeros(classes, device=device, requires_grad=True) for _ in widths]
        self.optimiser = torch.optim.Adam([*self.weights, *self.biases], lr=lr)

    def step(self, features: Sequence[Tensor], labels: Tensor) -> None:
        """One step on features (B, F) of each kind and labels (B,)."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * (1 + math.cos(math.pi * self.done / self.steps)) / 2
        with torch.enable_grad():
            losses = [cross_entropy(scores, labels) for scores in self.scores(features)]
            self.optimiser.zero_grad()
            torch.stack(losses).sum().backward()
        self.optimiser.step()
        self.done += 1

    def scores(self, features: Sequence[Tensor]) -> list[Tensor]:
        """(N, K) of each kind of features (N, F)."""
        three = zip(features, self.weights, self.biases, strict=True)
        return [each @ weight.T + bias for each, weight, bias in three]

    @torch.no_grad()
    def predictions(self, features: Sequence[Tensor]) -> list[Tensor]:
        """(N,) the class that each kind of features (N, F) predicts."""
        return [scores.argmax(1) for scores in self.scores(features)]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from."""
        parameters = [p.detach() for p in (*self.weights, *self.biases)]
        return {
            "done": self.done,
            "parameters": parameters,
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another one of the same settings was."""
        self.done = state["done"]
        self.optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for mine, theirs in zip(
                (*self.weights, *self.biases), state["parameters"], strict=True
            ):
                mine.copy_(theirs)


class NearestNeighbours:
    """The nearest training images of each query, of those that were seen so far.

    Of neighbours at the same cosine the first one seen is nearer, and of classes with the same vote the first one wins.
    """

    def __init__(self, queries: Tensor, k: int = NEIGHBOURS) -> None:
        """`queries` (M, F)."""
        self.queries, self.k = normalize(queries.float()), k
        self.cosines = queries.new_empty((len(queries), 0), dtype=torch.float32)
        self.labels = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)

    def see(self, features: Tensor, labels: Tensor) -> None:
        """More training images: features (B, F) and labels (B,)."""
        cosines = self.queries @ normalize(features.float()).T
        both = torch.cat((self.cosines, cosines), 1)
        # equals stay in their order
        self.cosines, at = (x[:, : self.k] for x in both.sort(dim=1, descending=True, stable=True))
        seen = torch.cat((self.labels, labels.expand(len(self.queries), -1)), 1)
        self.labels = seen.gather(1, at)

    def predictions(self, classes: int) -> Tensor:
        """(M,) the class that the neighbours vote for."""
        votes = self.cosines.new_zeros((len(self.queries), classes), dtype=torch.float64)
        votes.scatter_add_(1, self.labels, (self.cosines.double() / TEMPERATURE).exp())
        return votes.argmax(1)


def linear_accuracy(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    passes: int,
    batch: int,
    lr: float,
    seed: int = 0,
) -> Accuracy:
    """Of a linear classifier of features (N, F) that are at hand, on others (M, F); labels are whole numbers from 0."""
    classes = 1 + int(torch.cat((labels, test_labels)).max())
    shuffled = torch.Generator().manual_seed(seed)
    steps = passes * math.ceil(len(features) / batch)
    probes = LinearProbes([features.shape[1]], classes, steps=steps, lr=lr, device=features.device)
    for _ in range(passes):
        order = torch.randperm(len(features), generator=shuffled).to(features.device)
        for rows in order.split(batch):
            probes.step([features[rows]], labels[rows])
    return Accuracy.of(probes.predictions([test_features])[0], test_labels)


def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = NEIGHBOURS,
    batch: int = 8192,
) -> Accuracy:
    """Of a vote among the `k` nearest of features (N, F) at hand, on others (M, F); labels are whole numbers from 0."""
    near = NearestNeighbours(test_features, k)
    for some, of in zip(features.split(batch), labels.split(batch), strict=True):
        near.see(some, of)
    classes = 1 + int(torch.cat((labels, test_labels)).max())
    return Accuracy.of(near.predictions(classes), test_labels)


def best_of(cells: Iterable[Mapping[str, Any]], probe: str) -> Mapping[str, Any]:
    """The cell that tells the labels of the validation part best, the first of equals: the test part never chooses.

    `probe` is "linear" or "knn".
    """
    return max(cells, key=lambda cell: cell[f"{probe}_validation"])
