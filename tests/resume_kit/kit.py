"""Checks that any trainer can be held to: whatever kills it, it ends where it would have ended without.

A trainer shows its attempts (`Trainer`), and `CHECKS` kill them: at random steps, in a save, while averages stand in
for the weights, twice between two checkpoints, and with other numbers of ranks after each. Each check raises
AssertionError and names what differs.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

# of values that depend on the order in which ranks add up
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Kill:
    """Where an attempt dies: at its step, save or swap of averages, at so many images; `share` of a save is done."""

    images: int
    where: Literal["step", "save", "swap"] = "step"
    share: float = 0.0


@dataclass(frozen=True)
class Seen:
    """What an attempt did: the images it began at, and by the images before each step its loss and its samples."""

    begun: int
    losses: Mapping[int, float]
    order: Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupted: its steps, and what its last checkpoint holds."""

    seen: Seen
    final: Mapping[str, np.ndarray]


class Trainer(Protocol):
    """A trainer with a run of `images` images in steps of `batch`, saved after each `every` images."""

    batch: int
    images: int
    every: int
    # whether it has a moment at which averages stand in for the weights
    swaps: bool

    def attempt(self, folder: Path, world: int = 1, kill: Kill | None = None) -> Seen:
        """Works on the run in `folder`, from its newest checkpoint to the end, or until it is killed."""

    def saved(self, folder: Path) -> Sequence[tuple[int, Path]]:
        """Images of every complete checkpoint with its file or folder."""

    def final(self, folder: Path) -> Mapping[str, np.ndarray]:
        """All that the last checkpoint holds, by name: weights, moments, averages, and counters such as warm-ups'."""


def check_steps(trainer: Trainer, whole: Whole, folder: Path) -> None:
    """Killed at random steps, the run ends with the same bits, and each step is what it was."""
    rng = random.Random(0)
    steps = range(trainer.batch, trainer.images, trainer.batch)
    for images in sorted(rng.sample(steps, min(3, len(steps)))):
        _alike(whole, trainer.attempt(folder, kill=Kill(images)))
    _ends_alike(trainer, whole, folder)


def check_saves(trainer: Trainer, whole: Whole, folder: Path) -> None:
    """Killed in a save, at its beginning, in the middle and near its end: no half of it is ever read."""
    for share in (0.0, 0.5, 0.9):
        at = folder / f"{share}"
        second = 2 * trainer.every
        _alike(whole, trainer.attempt(at, kill=Kill(second, "save", share)))
        found = trainer.attempt(at)
        assert found.begun in (trainer.every, second), f"it began at {found.begun:,} images"
        _alike(whole, found)
        _ends_alike(trainer, whole, at, finished=True)


def check_twice(trainer: Trainer, whole: Whole, folder: Path) -> None:
    """Killed, resumed, saved once more, killed again, and resumed again; then killed twice before the next save."""
    every, batch = trainer.every, trainer.batch
    for images in (every + batch, 2 * every + batch, 2 * every + batch):
        _alike(whole, trainer.attempt(folder, kill=Kill(images)))
    _ends_alike(trainer, whole, folder)


def check_swap(trainer: Trainer, whole: Whole, folder: Path) -> None:
    """Killed while an average stands in for the weights, which is nobody's state."""
    if trainer.swaps:
        _alike(whole, trainer.attempt(folder, kill=Kill(2 * trainer.every, "swap")))
        _ends_alike(trainer, whole, folder)


def check_newest(trainer: Trainer, whole: Whole, folder: Path) -> None:
    """The newest checkpoint is that of the most images, not of the last name or the latest date."""
    last = (trainer.images - 1) // trainer.every * trainer.every
    trainer.attempt(folder, kill=Kill(last + trainer.batch))
    found = trainer.saved(folder)
    for age, (_, path) in enumerate(found):
        for each in [path, *path.rglob("*")]:
            os.utime(each, (1e9 - age, 1e9 - age))
    begun = trainer.attempt(folder).begun
    assert begun == max(images for images, _ in found), f"it began at {begun:,} images"


def check_worlds(trainer: Trainer, whole: Whole, folder: Path) -> None:
    """On two ranks, then one, then four: the same up to the order of sums, and the same samples at each step."""
    every, batch = trainer.every, trainer.batch
    for world, kill in ((2, Kill(every + batch)), (1, Kill(2 * every + batch)), (4, None)):
        seen = trainer.attempt(folder, world, kill)
        _took_steps(seen)
        for images, samples in seen.order.items():
            wanted = whole.seen.order[images]
            assert sorted(samples) == sorted(wanted), f"other samples at {images:,} images"
    _same(whole.final, trainer.final(folder), TOLERANCE)


CHECKS: Mapping[str, Callable[[Trainer, Whole, Path], None]] = {
    check.__name__: check
    for check in (check_steps, check_saves, check_twice, check_swap, check_newest, check_worlds)
}


def whole_of(trainer: Trainer, folder: Path) -> Whole:
    """The run that every check compares with."""
    return Whole(trainer.attempt(folder), trainer.final(folder))


def failures(trainer: Trainer, root: Path) -> Mapping[str, str]:
    """Runs every check in a folder of its own; returns what the ones said that failed, by name."""
    whole, found = whole_of(trainer, root / "whole"), {}
    for name, check in CHECKS.items():
        try:
            check(trainer, whole, root / name)
        except AssertionError as error:
            found[name] = str(error)
    return found


def _alike(whole: Whole, seen: Seen) -> None:
    """Every step that an attempt took is the step of the run that nothing interrupted."""
    wanted = whole.seen
    _took_steps(seen)
    for images, samples in seen.order.items():
        assert list(samples) == list(wanted.order[images]), f"other samples at {images:,} images"
    for images, loss in seen.losses.items():
        assert loss == wanted.losses[images], f"another loss at {images:,} images"


def _took_steps(seen: Seen) -> None:
    """It says what it did: what says nothing is like anything."""
    assert seen.order and seen.losses, f"no step was seen from {seen.begun:,} images on"
    assert min(seen.order) == seen.begun, f"its first step is not that at {seen.begun:,} images"


def _ends_alike(trainer: Trainer, whole: Whole, folder: Path, *, finished: bool = False) -> None:
    if not finished:
        _alike(whole, trainer.attempt(folder))
    _same(whole.final, trainer.final(folder), 0.0)


def _same(
    wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], tolerance: float
) -> None:
    assert wanted.keys() == found.keys(), f"{wanted.keys() ^ found.keys()} are in one of the two"
    for name, value in wanted.items():
        gap = np.abs(np.asarray(value, np.float64) - np.asarray(found[name], np.float64)).max()
        assert gap <= tolerance, f"{name} differs by {gap:.2g}"
