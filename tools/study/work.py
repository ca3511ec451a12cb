"""What verbs of the study share: which runs its arms are, how they are trained, and where what is found out is kept."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launcher.compose import compose
from launcher.sites import takes_config_dir
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from tools import flags
from tools.shards.__main__ import main as shards_command
from tools.study.arms import EMOJI, UNCONDITIONAL, Arm, find_groups
from tools.study.measure import Bench, both_nets, cores
from tools.study.training import Trained, named, train

DIGITS = "data/digits"
LATENTS = "data/emoji-latents"
Runs = Mapping[Arm, list[Trained]]
# a run of the study: its arm and its seed
_Point = tuple[Arm, int]
_Pair = tuple[_Point, Trained]


@dataclass(frozen=True)
class Study:
    """Where a study's runs and results are, and what is set of all its runs."""

    runs: Path
    out: Path
    overrides: tuple[str, ...] = ()
    # of a run, evenly spread over its images
    snapshots: int = 4
    # whether jobs score runs of digits while they train; what a study needs of these it measures by itself
    evaluated: bool = False
    # processes that measure at once
    workers: int = 1

    @staticmethod
    def of(options: argparse.Namespace) -> Study:
        flags.check_least(options, 1, "workers")
        return Study(
            options.runs, Path(options.out), tuple(options.overrides), workers=options.workers
        )

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
        return self._typed_roots[-1].partition("=")[2] if self._typed_roots else DIGITS

    @property
    def _typed_roots(self) -> tuple[str, ...]:
        return tuple(word for word in self.overrides if word.startswith("data.root="))

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.root, self.out / "scores", both_nets(), self.workers)

    def train(self, seeds: Mapping[Arm, Sequence[int]]) -> Runs:
        """Trains every arm with its seeds, and returns the runs by seed.

        They are one sweep, or two where groups have to be found first: in features of the unconditional run, which
        trains with the others that need none.

        Raises:
            UserError: one of them cannot be trained, failed, or lacks snapshots of this study.
        """
        if any(arm.data == "digits" for arm in seeds):
            self._make_digits()
        listed = _in_turn(seeds)
        # what is trained is not trained again, whatever snapshots it has: better said before hours of training
        self._check_snapshots(self._named([each for each in listed if not each[0].groups_by]))
        found = [arm for arm in seeds if arm.groups_by]
        if found:
            # beside the run in whose features groups are found, what needs none
            early = [each for each in listed if not each[0].groups_by and each[1] == listed[0][1]]
            points = dict.fromkeys([(UNCONDITIONAL, 0), *early])
            train([self._typed(*each) for each in points], self._common)
            find_groups(found, self.root, self.first.final, self.notes)
            self._check_snapshots(self._named(listed))
        trained = train([self._typed(*each) for each in listed], self._common)
        pairs = list(zip(listed, trained, strict=True))
        self._check_snapshots(pairs)
        return _by_arm(pairs)

    def known(self, seeds: Mapping[Arm, Sequence[int]]) -> Runs:
        """The runs that have finished; arms of which none has are left out.

        So is, and that is said, a run that others may have started, whose snapshots are not those of this study.
        """
        # one that was ended may have left a folder without its groups
        there = {
            arm: own
            for arm, own in seeds.items()
            if not arm.groups_by or (self.notes / arm.name / storage.MANIFEST).exists()
        }
        done = []
        for pair in self._named(_in_turn(there)):
            (arm, seed), run = pair
            if not run.finished:
                continue
            try:
                self._check_snapshots([pair])
            except UserError as error:
                print(f"{arm.name}, seed {seed}, is left out: {error}", file=sys.stderr)
            else:
                done.append(pair)
        return _by_arm(done)

    def _named(self, listed: Sequence[_Point]) -> list[_Pair]:
        found = named([self._typed(*each) for each in listed], self._common)
        return list(zip(listed, found, strict=True))

    def _check_snapshots(self, pairs: Iterable[_Pair]) -> None:
        """Of runs on the digits: on the emoji only the scores of a run are read.

        Raises:
            UserError: a run lacks one of the snapshots that every run of this study has, by which arms would be
                searched over different guidance, or is not to keep them.
        """
        for each in [run for (arm, _), run in pairs if arm.data == "digits"]:
            train, published = each.config.train, each.run.published()
            count = -(-train.images // train.snapshot_every)
            if train.keep_snapshots is not None and train.keep_snapshots < count:
                raise UserError(
                    f"train.keep_snapshots={train.keep_snapshots}: the study reads all of a run's snapshots; take "
                    f"train.keep_snapshots={count} or more, or leave it out"
                )
            last = train.images
            if not each.finished:
                # it goes on from its newest checkpoint, and publishes what is due there
                last = min(last, max(each.run.saved(), default=0) - train.batch)
            wanted = range(train.snapshot_every, last + 1, train.snapshot_every)
            # a snapshot is taken after the step that reaches its count
            missing = [n for n in wanted if not any(0 <= at - n < train.batch for at in published)]
            if missing:
                raise UserError(
                    f"{each.run.root} was trained with other snapshots than this study's and lacks those after "
                    f"{', '.join(f'{n:,}' for n in missing)} images: give --runs DIR, a folder of the study's own"
                )

    @property
    def _common(self) -> tuple[str, ...]:
        own = any(word.startswith("cluster=") for word in self.overrides)
        # where digits are is nothing that a run on other data could use
        others = [word for word in self.overrides if word not in self._typed_roots]
        return (*(() if own else ("cluster=local",)), *others, f"runs={self.runs}")

    def _typed(self, arm: Arm, seed: int) -> tuple[str, ...]:
        ids = (f"guidance.ids={self.notes / arm.name}",) if arm.groups_by else ()
        return self._with_cadence((*arm.settings, *ids, f"seed={seed}"), arm.data)

    def _with_cadence(self, words: tuple[str, ...], data: str = "digits") -> tuple[str, ...]:
        if data == "digits":
            words = (*words, *self._typed_roots)
            asked = any(word.startswith("evaluation") for word in self.overrides)
            words += () if self.evaluated or asked else ("evaluation=none",)
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


def _in_turn(seeds: Mapping[Arm, Sequence[int]]) -> list[_Point]:
    """A seed of all arms before the next seed: what is ended early can be compared."""
    every = dict.fromkeys(seed for several in seeds.values() for seed in several)
    return [(arm, seed) for seed in every for arm, own in seeds.items() if seed in own]


def _by_arm(pairs: Sequence[_Pair]) -> dict[Arm, list[Trained]]:
    return {arm: [run for (of, _), run in pairs if of == arm] for (arm, _), _ in pairs}


def add(parser: argparse.ArgumentParser, seeds: Sequence[int]) -> None:
    """The flags of verbs that train."""
    flags.add(
        parser,
        ("overrides key=value*", str, None, "settings of every run, as for launcher.submit"),
        ("--seeds +", int, list(seeds), f"of each arm ({' '.join(map(str, seeds))})"),
        ("--runs", Path, Path("runs"), "where runs are (runs)"),
        ("--out DIR", flags.here, "study", "where groups, scores and reports are kept (study)"),
        ("--workers N", int, cores(), "processes that measure at once, a core each (all cores)"),
        flags.JSON,
    )
    takes_config_dir(parser)
