"""A trainer of a few lines that dies by an exception, and the bugs that real ones have shipped, to be planted in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from tests.resume_kit.kit import Kill, Seen

Bug = Literal["average", "warm-up", "epoch", "second resume", "newest"]
BUGS: tuple[Bug, ...] = ("average", "warm-up", "epoch", "second resume", "newest")
SAMPLES, WIDTH = 44, 6
_NAMES = ("weights", "momentum", "average")


class KilledError(Exception):
    """The trainer died."""


@dataclass
class State:
    """Of linear regression by momentum, with an average that warms up by its own count of steps."""

    images: int = 0
    weights: np.ndarray = field(default_factory=lambda: np.linspace(-1, 1, WIDTH))
    momentum: np.ndarray = field(default_factory=lambda: np.zeros(WIDTH))
    average: np.ndarray = field(default_factory=lambda: np.linspace(-1, 1, WIDTH))
    averaged: int = 0


@dataclass
class Toy:
    """Sixteen samples a step; names of checkpoints have no leading zeros, and are not in the order of their images."""

    bug: Bug | None = None
    batch: int = 16
    images: int = 1200
    every: int = 80
    swaps: bool = True

    def attempt(self, folder: Path, world: int = 1, kill: Kill | None = None) -> Seen:
        state = self._resume(folder)
        begun = state.images
        losses: dict[int, float] = {}
        order: dict[int, list[int]] = {}
        with contextlib.suppress(KilledError):
            while state.images < self.images:
                at = state.images
                if kill is not None and kill.where == "step" and kill.images == at:
                    raise KilledError
                order[at] = self._samples(begun, at)
                losses[at] = self._step(state, order[at], world)
                if state.images % self.every == 0 or state.images >= self.images:
                    here = kill if kill is not None and kill.images == state.images else None
                    self._sample(state, dies=here is not None and here.where == "swap")
                    share = here.share if here is not None and here.where == "save" else None
                    self._save(folder, state, begun, share)
        return Seen(begun, losses, order)

    def saved(self, folder: Path) -> Sequence[tuple[int, Path]]:
        manifests = folder.glob("img-*/manifest.json")
        return sorted((int(path.parent.name[4:]), path.parent) for path in manifests)

    def final(self, folder: Path) -> Mapping[str, np.ndarray]:
        last = folder / f"img-{self.images}"
        held = {name: np.load(last / f"{name}.npy") for name in _NAMES}
        counts = json.loads((last / "manifest.json").read_text())
        return held | {name: np.array(count) for name, count in counts.items()}

    def _samples(self, begun: int, images: int) -> list[int]:
        """Each epoch is a permutation; batches cross their ends."""
        position = images
        if self.bug == "epoch":
            # the epoch is known, and where in it is not
            position = begun // SAMPLES * SAMPLES + images - begun
        places = range(position, position + self.batch)
        orders = {p // SAMPLES: None for p in places}
        drawn = {e: np.random.default_rng(e).permutation(SAMPLES) for e in orders}
        return [int(drawn[p // SAMPLES][p % SAMPLES]) for p in places]

    def _step(self, state: State, samples: list[int], world: int) -> float:
        """Each rank adds up its share, and the ranks add up theirs."""
        gradient, loss = np.zeros(WIDTH), 0.0
        for rank in range(world):
            mine = samples[rank * self.batch // world : (rank + 1) * self.batch // world]
            x = np.stack([np.random.default_rng(1000 + s).normal(size=WIDTH) for s in mine])
            off = x @ state.weights - np.sin(mine)
            gradient, loss = gradient + x.T @ off, loss + float(off @ off)
        state.momentum = 0.9 * state.momentum + gradient / self.batch
        state.weights = state.weights - 0.01 * state.momentum
        state.images, state.averaged = state.images + self.batch, state.averaged + 1
        keep = min(0.99, (1 + state.averaged) / (10 + state.averaged))
        state.average = keep * state.average + (1 - keep) * state.weights
        return loss / self.batch

    @staticmethod
    def _sample(state: State, *, dies: bool) -> None:
        """The average stands in for the weights, as for a sample in the midst of training."""
        state.weights, state.average = state.average, state.weights
        if dies:
            raise KilledError
        state.weights, state.average = state.average, state.weights

    def _save(self, folder: Path, state: State, begun: int, share: float | None) -> None:
        """Three files, then the manifest; `share` of this is done when it dies."""
        images = state.images - begun if self.bug == "second resume" else state.images
        counts = json.dumps({"images": images, "averaged": state.averaged})
        draft = folder / f"img-{state.images}"
        draft.mkdir(parents=True, exist_ok=True)
        for done, name in enumerate(_NAMES):
            if share is not None and done >= share * (len(_NAMES) + 1):
                raise KilledError
            np.save(draft / f"{name}.npy", getattr(state, name))
        if share is not None:
            raise KilledError
        (draft / "manifest.json").write_text(counts)

    def _resume(self, folder: Path) -> State:
        found = [path for _, path in self.saved(folder)]
        if not found:
            return State()
        newest = found[-1]
        if self.bug == "newest":
            newest = max(found, key=lambda path: path.name)
        counts = json.loads((newest / "manifest.json").read_text())
        held = {name: np.load(newest / f"{name}.npy") for name in _NAMES}
        state = State(counts["images"], averaged=counts["averaged"], **held)
        if self.bug == "average":
            state.average = state.weights.copy()
        if self.bug == "warm-up":
            state.averaged = 0
        return state
