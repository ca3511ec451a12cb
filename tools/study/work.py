"""What verbs of the study share: which runs its arms are, how they are trained, and where what is found out is kept."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launcher.compose import compose
from launcher.sites import takes_config_dir
from shards.errors import UserError
from shards.format import manifest as manifests
from tools import flags
from tools.shards.__main__ import main as shards_command
from tools.study.arms import EMOJI, UNCONDITIONAL, Arm, find_groups
from tools.study.measure import Bench, both_nets
from tools.study.training import Trained, named, train

DIGITS = "data/digits"
LATENTS = "data/emoji-latents"
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

    @cached_property
    def first(self) -> Trained:
        """The unconditional run of seed 0, in whose features arms find their groups beforehand."""
        return named([self._with_cadence(UNCONDITIONAL.settings)], self._common)[0]

    @property
    def notes(self) -> Path:
        """The sidecars of these arms; a run's id tells of all that decides its features."""
        return (self.out / "notes" / self.first.run.root.name).absolute()

    @cached_property
    def root(self) -> str:
        """The digits' shards."""
        typed = [word for word in self.overrides if word.startswith("data.root=")]
        return typed[-1].partition("=")[2] if typed else DIGITS

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.root, self.out / "scores", both_nets())

    def train(self, seeds: Mapping[Arm, Sequence[int]]) -> Runs:
        """Trains every arm with its seeds, as one sweep, and returns the runs by seed.

        Raises:
            UserError: one of them cannot be trained, or failed.
        """
        if any(arm.data == "digits" for arm in seeds):
            self._make_digits()
        found = [arm for arm in seeds if arm.groups_by]
        if found:
            train([self._with_cadence(UNCONDITIONAL.settings)], self._common)
            find_groups(found, self.root, self.first.final, self.notes)
        listed = _in_turn(seeds)
        return _by_arm(listed, train([self._typed(*each) for each in listed], self._common))

    def known(self, arms: Sequence[Arm], seeds: Sequence[int]) -> Runs:
        """The runs that have finished; arms of which none has are left out."""
        there = [arm for arm in arms if not arm.groups_by or (self.notes / arm.name).exists()]
        listed = _in_turn(dict.fromkeys(there, seeds))
        found = named([self._typed(*each) for each in listed], self._common)
        done = [each for each in zip(listed, found, strict=True) if each[1].run.finished()]
        return _by_arm([each for each, _ in done], [each for _, each in done])

    @property
    def _common(self) -> tuple[str, ...]:
        own = any(word.startswith("cluster=") for word in self.overrides)
        return (*(() if own else ("cluster=local",)), *self.overrides, f"runs={self.runs}")

    def _typed(self, arm: Arm, seed: int) -> tuple[str, ...]:
        ids = (f"guidance.ids={self.notes / arm.name}",) if arm.groups_by else ()
        return self._with_cadence((*arm.settings, *ids, f"seed={seed}"))

    def _with_cadence(self, words: tuple[str, ...]) -> tuple[str, ...]:
        images = compose([*words, *self._common]).train.images
        return (*words, f"train.snapshot_every={images // self.snapshots}")

    def _make_digits(self) -> None:
        try:
            manifests.load(self.root)
        except UserError:
            with contextlib.redirect_stdout(sys.stderr):
                shards_command(["make", "digits", "--out", self.root])


def emoji() -> tuple[Arm, ...]:
    """The arms on the emoji's latents, where these have been made."""
    try:
        manifests.load(LATENTS)
    except UserError:
        return ()
    return EMOJI


def _in_turn(seeds: Mapping[Arm, Sequence[int]]) -> list[tuple[Arm, int]]:
    """A seed of all arms before the next seed: what is ended early can be compared."""
    every = dict.fromkeys(seed for several in seeds.values() for seed in several)
    return [(arm, seed) for seed in every for arm, own in seeds.items() if seed in own]


def _by_arm(
    listed: Sequence[tuple[Arm, int]], found: Sequence[Trained]
) -> dict[Arm, list[Trained]]:
    pairs = list(zip(listed, found, strict=True))
    return {arm: [run for (of, _), run in pairs if of == arm] for (arm, _), _ in pairs}


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
    takes_config_dir(parser)
