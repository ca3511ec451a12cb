"""What verbs of the study share: which runs its arms are, how they are trained, and where what is found out is kept."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launcher.compose import compose
from shards.errors import UserError
from shards.format import manifest as manifests
from tools import flags
from tools.shards.__main__ import main as shards_command
from tools.study.arms import UNCONDITIONAL, Arm, find_groups, settings
from tools.study.measure import Bench, both_nets
from tools.study.training import Trained, named, train

DIGITS = "data/digits"
Runs = Mapping[Arm, list[Trained]]


@dataclass(frozen=True)
class Study:
    """Where a study's runs and results are, and what is set of all its runs."""

    runs: Path
    out: Path
    overrides: tuple[str, ...] = ()
    # of a run, evenly spread over its images
    snapshots: int = 4

    @staticmethod
    def of(options: argparse.Namespace) -> Study:
        return Study(options.runs, Path(options.out), tuple(options.overrides))

    @property
    def notes(self) -> Path:
        """The sidecars of arms that find their groups beforehand."""
        return (self.out / "notes").absolute()

    @cached_property
    def root(self) -> str:
        """The digits' shards."""
        typed = [word for word in self.overrides if word.startswith("data.root=")]
        return typed[-1].partition("=")[2] if typed else DIGITS

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.root, self.out / "scores", both_nets())

    def train(self, arms: Sequence[Arm], seeds: Sequence[int]) -> Runs:
        """Trains every arm with every seed, as one sweep, and returns the runs by seed.

        Raises:
            UserError: one of them cannot be trained, or failed.
        """
        if any(arm.data == "digits" for arm in arms):
            self._make_digits()
        if any(arm.groups_by for arm in arms):
            first = train([self._typed(UNCONDITIONAL, seeds[0])], self._common)[0]
            find_groups(arms, self.root, first.final, self.notes)
        # a seed of all arms comes before the next seed: what is ended early can be compared
        listed = [(arm, seed) for seed in seeds for arm in arms]
        found = train([self._typed(arm, seed) for arm, seed in listed], self._common)
        return _by_arm(arms, listed, found)

    def known(self, arms: Sequence[Arm], seeds: Sequence[int]) -> Runs:
        """The runs that have finished; arms of which none has are left out."""
        there = [arm for arm in arms if not arm.groups_by or (self.notes / arm.name).exists()]
        listed = [(arm, seed) for seed in seeds for arm in there]
        found = named([self._typed(arm, seed) for arm, seed in listed], self._common)
        done = [each for each in zip(listed, found, strict=True) if each[1].run.finished()]
        made = _by_arm(there, [each for each, _ in done], [each for _, each in done])
        return {arm: runs for arm, runs in made.items() if runs}

    @property
    def _common(self) -> tuple[str, ...]:
        own = any(word.startswith("cluster=") for word in self.overrides)
        return (*(() if own else ("cluster=local",)), *self.overrides, f"runs={self.runs}")

    def _typed(self, arm: Arm, seed: int) -> tuple[str, ...]:
        words = settings(arm, seed, self.notes)
        images = compose([*words, *self._common]).train.images
        return (*words, f"train.snapshot_every={images // self.snapshots}")

    def _make_digits(self) -> None:
        try:
            manifests.load(self.root)
        except UserError:
            shards_command(["make", "digits", "--out", self.root])


def _by_arm(
    arms: Sequence[Arm], listed: Sequence[tuple[Arm, int]], found: Sequence[Trained]
) -> dict[Arm, list[Trained]]:
    pairs = list(zip(listed, found, strict=True))
    return {arm: [run for (of, _), run in pairs if of == arm] for arm in arms}


def add(parser: argparse.ArgumentParser, seeds: Sequence[int]) -> None:
    """The flags of verbs that train."""
    flags.add(
        parser,
        ("overrides key=value*", str, None, "for every run"),
        ("--seeds +", int, list(seeds), f"of each arm ({' '.join(map(str, seeds))})"),
        ("--runs", Path, Path("runs"), "where runs are (runs)"),
        ("--out DIR", str, "study", "where groups, scores and reports are kept (study)"),
        flags.JSON,
    )
