"""What a checkpoint costs: ten steps of training with one that a process beside them writes, or that they wait for.

Rows of a stall are what the training process itself spends on a checkpoint, and their ratio is that to ten steps. The
writer's seconds are of a core that training leaves idle, or not.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from selfguide.distributed import RankInfo
from selfguide.spec.config import Config
from selfguide.spec.initial_weights import SCRATCH
from selfguide.spec.run import Lease, RunFolder
from selfguide.training import checkpoint, retention
from selfguide.training.components import Components
from selfguide.training.saver import Saver
from selfguide.training.stability import Stability
from selfguide.training.state import State
from selfguide.training.telemetry import Telemetry
from tools.bench.gpu.steps import Trained, config_of
from tools.bench.harness import Row, Variant, measure, part, seconds_of

TITLE = "saves: ten steps with a checkpoint, DiT of 10 M parameters, AdamW and one average, fp32, one process"
STEPS = 10
# seconds that a step should take, whatever the machine; so there is a checkpoint every five
STEP_S = 0.5


def suite(repeats: int) -> list[Row]:
    config = _lasting(STEP_S)
    with tempfile.TemporaryDirectory(prefix="saves-") as folder:
        return timed(config, RunFolder(Path(folder)), repeats)


def _lasting(step_s: float) -> Config:
    """A DiT of 10 M parameters at the batch whose step takes about `step_s` here."""

    def at(batch: int) -> Config:
        config = config_of("dit_digits", batch, backend="torch")
        return replace(config, model=replace(config.model, width=256, depth=8, heads=8))

    batch = 32
    # the second time near that batch
    for _ in range(2):
        trained = Trained(at(batch), RankInfo(0, 0, 1))
        trained.step()  # warms up
        took = statistics.median(seconds_of(trained.step) for _ in range(10))
        batch = max(1, round(batch * step_s / took))
    return at(batch)


class Saving:
    """One network in training, and both ways to save it."""

    def __init__(self, config: Config, run: RunFolder) -> None:
        self.trained, self.rank_info = Trained(config, RankInfo(0, 0, 1)), RankInfo(0, 0, 1)
        self.lease = Lease(run, run.open_attempt())
        self.state = State(
            self.trained.engine,
            self.trained.averages,
            Components(()),
            None,
            SCRATCH,
            Stability(config.train),
        )
        telemetry = Telemetry(run, 1, self.rank_info, config.train.images)
        self.saver = Saver(config.train, self.rank_info, self.lease, telemetry)
        self.stalls: dict[str, list[float]] = {"beside": [], "here": []}
        self.writer_s: list[float] = []

    def steps(self) -> None:
        for _ in range(STEPS):
            self.trained.step()

    def beside(self) -> None:
        """The process writes while the steps are taken."""
        before = self.saver.writer.cpu_s
        stall = seconds_of(lambda: self.saver.save(self._folder(), self.state))
        for _ in range(STEPS):
            self.trained.step()
            stall += seconds_of(self.saver.poll)
        # as the next save would, which is due now
        stall += seconds_of(self.saver.wait)
        self.stalls["beside"].append(stall)
        self.writer_s.append(self.saver.writer.cpu_s - before)

    def here(self) -> None:
        stall = seconds_of(self._save)
        self.steps()
        self.stalls["here"].append(stall)

    def _save(self) -> None:
        folder = self._folder()
        checkpoint.save(folder, self.state, self.rank_info, self.lease)
        retention.prune(folder.parent, self.trained.config.train.keep_checkpoints)

    def _folder(self) -> Path:
        self.state.images = self.trained.images
        return self.lease.run.checkpoint(self.state.images)


def timed(config: Config, run: RunFolder, repeats: int) -> list[Row]:
    saving = Saving(config, run)
    variants = [
        Variant("ten steps", saving.steps),
        Variant("and a checkpoint written beside them", saving.beside),
        Variant("and a checkpoint written here", saving.here),
    ]
    try:
        rows = measure(variants, repeats=repeats, warmup=1)
    finally:
        saving.saver.close(wait=True)
    base = rows[0].median
    parts = {f"stall of one written {how}": s for how, s in saving.stalls.items()}
    parts["CPU of the writer for one"] = saving.writer_s
    # behind the first turn, which warms up
    return [*rows, *(part(name, seconds[1:], base) for name, seconds in parts.items())]
