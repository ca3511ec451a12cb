"""Several configurations by several seeds: each measured once, their results collected, and shown as one table.

`tools.compare` trains experiments so, and `tools.study` measures layers and noise-times of snapshots.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from launcher.compose import compose
from selfguide.spec.config import Config
from selfguide.spec.records import Protocol, grid_path, records
from selfguide.spec.run import RunFolder
from shards import cli
from shards.errors import UserError

C = TypeVar("C")
S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True)
class Result:
    """The final record of one run."""

    experiment: str
    seed: int
    run: str
    scores: dict[str, float]
    grid: str  # file of its samples


def run_all(
    configs: Sequence[C], seeds: Sequence[S], one: Callable[[C, S], R], doing: str = ""
) -> dict[C, list[R]]:
    """The results of each configuration by seed; `one` gives a result, and finds one that it gave before.

    All configurations come before the next seed, so what is ended early can be compared. `doing` names a progress bar.
    """
    found: dict[C, list[R]] = {config: [] for config in configs}
    jobs = [(config, seed) for seed in seeds for config in found]
    for config, seed in cli.track(jobs, len(jobs), doing) if doing else jobs:
        found[config].append(one(config, seed))
    return found


def train(overrides: Sequence[str], seed: int, runs: Path) -> Result:
    """Submits `experiment=NAME key=value ...` on this machine, follows it to its end, and returns its final record.

    A run that is finished is not trained again, and one that was ended goes on where it was.

    Raises:
        UserError: it failed, or has no score of its final snapshot.
    """
    given = [*overrides, f"seed={seed}", "cluster=local", f"runs={runs}"]
    # only the end is compared: a cadence is no part of a run, and evaluations cost training its cores
    given.append(f"train.snapshot_every={compose(given).train.images}")
    config = compose(given)
    print(f"== {config.experiment}, seed {seed}", flush=True)
    command = [sys.executable, "-m", "launcher.submit", *given, "follow=true", "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(
            f"{config.experiment} with seed {seed} ended with exit code {done.returncode}; see above"
        )
    return final_result(RunFolder(Path(json.loads(done.stdout)["folder"])), config)


def final_result(run: RunFolder, config: Config) -> Result:
    """The record of the run's final snapshot under the protocol of `config`.

    Raises:
        UserError: there is none.
    """
    images = config.train.images
    protocol = Protocol.of(config, run.snapshot_manifest(images))
    for record in records(run):
        if record.done and (record.images, record.protocol_key) == (images, protocol.key):
            grid = str(grid_path(run, record.key, record.attempt))
            return Result(config.experiment, config.seed, record.run, dict(record.scores), grid)
    raise UserError(f"{run.root} has no score of its final snapshot; its evaluation failed")
