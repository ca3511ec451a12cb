"""Linear and k-NN probes of every layer of a snapshot at every noise-time, in one pass over the data at a time.

DDAE++'s protocol: the averaged student, frozen and without a condition, reads images noised anew at each pass; the
tokens of a layer are pooled, or one patch of each image is picked at random; one linear map of each layer and
noise-time is trained, all of them on the same batches. Images are mirrored as in training and never cropped at random.
The vote of nearest neighbours reads each training image once, not mirrored, with noise of its own. The model's input
itself is probed beside the layers.

A layer and a noise-time are chosen on a validation part. The test part is looked at once, and chooses nothing.

A noise-time is one rank's: what it measures depends on no other, so any number of ranks makes the same bytes. Its state
is kept after each pass, and a killed job goes on there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfguide.discovery.features import SnapshotFeatures
from selfguide.discovery.resumable import load, record, save
from selfguide.evaluation.features.net import exact
from selfguide.evaluation.labelled import Batch, Batches, Labelled, Part
from selfguide.evaluation.metrics.probe import (
    Accuracy,
    LinearProbes,
    NearestNeighbours,
    best_of,
)
from selfguide.snapshot import Snapshot
from selfguide.spec.config import EvaluationConfig
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import PASS, layer_name
from shards import cli
from shards.errors import UserError
from shards.format.manifest import Manifest
from shards.wait import wait_until

# what stands for the layer of the model's input, which is read without noise
INPUT = "input"
PROBES = ("linear", "knn")

# whose labels probes are asked for
_ASKED: tuple[Part, Part] = ("validation", "test")


@dataclass(frozen=True)
class Probed:
    """The scores of a snapshot, and the table that they were chosen from."""

    scores: dict[str, float]
    table: dict[str, Any]


def probe(
    snapshot: Snapshot,
    evaluation: EvaluationConfig,
    status: RankStatus,
    work: Path,
    *,
    root: str | None = None,
    rank: int = 0,
    world: int = 1,
) -> Probed | None:
    """Probes a snapshot; None on ranks but the first.

    Args:
        work: a folder of this snapshot under this protocol alone, in which finished work is kept until it is removed.
        root: labelled shards that are read in place of those that the snapshot was trained on.

    Raises:
        UserError: shards without labels, or of another shape or kind than the snapshot reads; a layer or noise-time
            that it does not have. Nothing was measured.
    """
    data = Labelled(
        root=root or snapshot.data["root"],
        test_root=evaluation.shards,
        most=evaluation.samples,
        seed=evaluation.seed,
    )
    given = [(data.root, data.manifest, None if root else snapshot.data.get("manifest"))]
    if evaluation.shards:
        given.append((evaluation.shards, data.test_manifest, evaluation.manifest))
    for of, manifest, wanted in given:
        _check_shards(snapshot, of, manifest, wanted)
    units = _units(snapshot, data, evaluation)
    # reads labels, and may refuse them: before anything is written
    _ = data.parts
    work.mkdir(parents=True, exist_ok=True)
    with exact():
        _measure([u for u in units[rank::world] if not u.file(work).exists()], data, status, work)
    if rank:
        return None
    wait_until(lambda: all(unit.file(work).exists() for unit in units), poll_s=0.5)
    return _summary(data, [unit.measured(work) for unit in units])


def _check_shards(snapshot: Snapshot, root: str, manifest: Manifest, wanted: str | None) -> None:
    if wanted is not None and manifest.hash != wanted:
        raise UserError(
            f"{root} holds manifest {manifest.hash[:12]}, and the protocol reads {wanted[:12]}; put those shards back"
        )
    net = snapshot.student.backbone.net
    expected, found = (net.channels, net.size, net.size), manifest.model_shape
    cropped = snapshot.config.data.crop and found[0] == net.channels and min(found[1:]) >= net.size
    if found != expected and not cropped:
        raise UserError(
            f"the shards in {root} are of {list(found)}, and this snapshot reads {list(expected)}; give shards made as "
            f"those that it was trained on, {snapshot.data['root']}"
        )


@dataclass(frozen=True)
class _Asked:
    """Images whose labels are to be predicted: features (M, F) of each layer, labels (M,), neighbours found so far."""

    features: list[Tensor]
    labels: Tensor
    near: list[NearestNeighbours]

    @staticmethod
    def of(batches: list[list[Tensor]], labels: Tensor) -> _Asked:
        """From each batch's features of each layer."""
        features = [torch.cat(of_layer) for of_layer in zip(*batches, strict=True)]
        return _Asked(features, labels, [NearestNeighbours(each) for each in features])

    def see(self, features: list[Tensor], labels: Tensor) -> None:
        """More training images: features (B, F) of each layer, labels (B,)."""
        for near, each in zip(self.near, features, strict=True):
            near.see(each, labels)

    def accuracies(self, probes: LinearProbes, classes: int) -> list[dict[str, Accuracy]]:
        """Of each layer, by the kind of probe."""
        linear = probes.predictions(self.features)
        votes = [near.predictions(classes) for near in self.near]
        return [
            {"linear": Accuracy.of(a, self.labels), "knn": Accuracy.of(b, self.labels)}
            for a, b in zip(linear, votes, strict=True)
        ]


class _Unit:
    """All layers at one noise-time, or the input."""

    def __init__(
        self,
        name: str,
        noise_time: float | None,
        net: SnapshotFeatures,
        layers: list[str],
        widths: list[int],
        data: Labelled,
        evaluation: EvaluationConfig,
    ) -> None:
        self.name, self.noise_time, self.net, self.layers = name, noise_time, net, layers
        self.numbers = [net.snapshot.student.backbone.net.layer(each) for each in layers]
        self.widths, self.data, self.evaluation = widths, data, evaluation
        self.passes = 0

    def file(self, work: Path) -> Path:
        """Its cells, once they are measured."""
        return work / f"{self.name}.json"

    def measured(self, work: Path) -> list[dict[str, Any]]:
        """Its cells from that file."""
        return json.loads(self.file(work).read_text())["cells"]

    @cached_property
    def probes(self) -> LinearProbes:
        """Its linear maps."""
        evaluation = self.evaluation
        steps = evaluation.passes * -(-len(self.data.parts["train"]) // evaluation.batch)
        return LinearProbes(
            self.widths,
            self.data.classes,
            steps=steps,
            lr=evaluation.learning_rate,
            device=self.net.snapshot.device,
        )

    def resume(self, work: Path) -> None:
        """Goes on behind the last pass that is kept."""
        state = load(self._state(work))
        if state is not None:
            self.passes = state["passes"]
            self.probes.load_state_dict(state["probes"])

    def passed(self, work: Path) -> None:
        """Keeps one more pass."""
        self.passes += 1
        save(self._state(work), {"passes": self.passes, "probes": self.probes.state_dict()})

    def publish(self, work: Path, validation: _Asked, test: _Asked) -> None:
        """Writes its cells; the state that they came from is of no use then."""
        classes, cells = self.data.classes, []
        of_validation = validation.accuracies(self.probes, classes)
        of_test = test.accuracies(self.probes, classes)
        for layer, chosen, shown in zip(
            self.layers or [INPUT], of_validation, of_test, strict=True
        ):
            cell: dict[str, Any] = {"layer": layer, "noise_time": self.noise_time}
            for kind in PROBES:
                cell |= {
                    f"{kind}_validation": chosen[kind].value,
                    f"{kind}_accuracy": shown[kind].value,
                    f"{kind}_accuracy_se": shown[kind].se,
                }
            cells.append(cell)
        record(self.file(work), lambda: {"cells": cells})
        self._state(work).unlink(missing_ok=True)

    def features(self, batch: Batch) -> list[Tensor]:
        """(B, F) of each layer, on the snapshot's device."""
        if self.noise_time is None:
            return [batch.x0.flatten(1).to(self.net.snapshot.device)]
        place = batch.place if self.evaluation.pooling == "token" else None
        return self.net.of_layers(batch.x0, batch.eps, self.numbers, place, batch.mirrored)

    def _state(self, work: Path) -> Path:
        return work / f"{self.name}{PASS}"


def _units(snapshot: Snapshot, data: Labelled, evaluation: EvaluationConfig) -> list[_Unit]:
    """The work of a probe, checked against the snapshot.

    Raises:
        UserError: no such layer or noise-time, or shards of another kind.
    """
    net = snapshot.student.backbone.net
    layers = [layer_name(snapshot.config, each) for each in evaluation.layers]
    layers = layers or [layer.name for layer in net.layers]
    widths = [net.layer_of(layer).width for layer in layers]

    def reads(noise_time: float) -> SnapshotFeatures:
        # checks both sets of shards, and is given stored values of neither; a patch is picked of tokens as they are
        pooling = "mean" if evaluation.pooling == "token" else evaluation.pooling
        found = [
            SnapshotFeatures(snapshot, each.header, noise_time=noise_time, pooling=pooling)
            for each in (data.test_manifest, data.manifest)
        ]
        return found[-1]

    times = evaluation.noise_times
    units = [_Unit(f"t{t}", t, reads(t), layers, widths, data, evaluation) for t in times]
    flat = net.channels * net.size**2
    return [*units, _Unit(INPUT, None, units[0].net, [], [flat], data, evaluation)]


def _measure(units: list[_Unit], data: Labelled, status: RankStatus, work: Path) -> None:
    """Publishes the cells of each unit, from as few passes over the data as they need together."""
    if not units:
        return
    for unit in units:
        unit.resume(work)
    evaluation = units[0].evaluation
    batches = Batches(data, units[0].net, status, size=evaluation.batch)
    passes = evaluation.passes
    for number in cli.track(range(passes), passes, "passes of linear probes"):
        due = [unit for unit in units if unit.passes == number]
        if not due:
            continue
        for batch in batches.shuffled(number):
            for unit in due:
                unit.probes.step(unit.features(batch), batch.labels)
        for unit in due:
            unit.passed(work)
    asked: dict[Part, list[_Asked]] = {}
    for part in _ASKED:
        features: list[list[list[Tensor]]] = [[] for _ in units]
        labels = []
        for batch in batches.plain(part):
            labels.append(batch.labels)
            for unit, kept in zip(units, features, strict=True):
                kept.append(unit.features(batch))
        asked[part] = [_Asked.of(kept, torch.cat(labels)) for kept in features]
    for batch in batches.plain("train"):
        for number, unit in enumerate(units):
            seen = unit.features(batch)
            for part in _ASKED:
                asked[part][number].see(seen, batch.labels)
    for number, unit in enumerate(units):
        status.enter("evaluate")
        unit.publish(work, *(asked[part][number] for part in _ASKED))


def _summary(data: Labelled, cells_of: list[list[dict[str, Any]]]) -> Probed:
    """The best cells by their validation part, with their accuracies on the test part."""
    *layers, (of_input,) = cells_of
    cells = [cell for of_time in layers for cell in of_time]
    table: dict[str, Any] = {
        "classes": data.classes,
        "images": {part: len(ordinals) for part, ordinals in data.parts.items()},
        "cells": cells,
        INPUT: of_input,
    }
    scores = {}
    for kind in PROBES:
        best = best_of(cells, kind)
        table[f"{kind}_best"] = {name: best[name] for name in ("layer", "noise_time")}
        for name in (f"{kind}_accuracy", f"{kind}_accuracy_se"):
            scores[name] = best[name]
        scores[f"{kind}_accuracy_{INPUT}"] = of_input[f"{kind}_accuracy"]
    return Probed(scores, table)
