"""What telemetry costs: a training step of the digits' DiT, with and without what the loop tells of it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from selfguide.distributed import RankInfo
from selfguide.spec.config import Config
from selfguide.spec.run import RunFolder
from selfguide.training.engine.protocol import Step
from selfguide.training.telemetry import Telemetry
from tools.bench.gpu.steps import Trained, config_of
from tools.bench.harness import Row, Variant, measure

TITLE = "telemetry: one step of 128 images, DiT of the digits, fp32, one process, a report every 20 steps"
BATCH = 128
# the digits' experiments report every 78 steps
REPORT = 20
# what the loop marks in a step
_MARKS = ("data", "forward_backward", "optimiser", "optimiser", "other", "data")


def suite(repeats: int) -> list[Row]:
    config = config_of("dit_digits", BATCH, backend="torch")
    with tempfile.TemporaryDirectory(prefix="telemetry-") as folder:
        return _timed(config, RunFolder(Path(folder)), repeats)


def _timed(config: Config, run: RunFolder, repeats: int) -> list[Row]:
    alone, trained = Trained(config, RankInfo(0, 0, 1)), Trained(config, RankInfo(0, 0, 1))
    run.attempt(1).mkdir(parents=True)
    telemetry = Telemetry(run, 1, RankInfo(0, 0, 1), config.train.images)
    telemetry.begin(replace(config, train=replace(config.train, trackers=())), None, 0)
    telemetry.restart(0)
    losses, done = torch.rand(BATCH), Step(torch.tensor(True), torch.tensor(1.0))

    def without() -> None:
        for _ in range(REPORT):
            alone.step()

    def with_it() -> None:
        for _ in range(REPORT):
            trained.step()
            for section in _MARKS:
                telemetry.wall.mark(section)
            telemetry.spectrum.add(losses, trained.tau, trained.condition.state)
            telemetry.add(loss=losses.mean())
            telemetry.stepped(done)
            telemetry.read(0.0, 0)
        telemetry.report(trained.images)

    variants = [Variant("a step", without), Variant("with telemetry", with_it)]
    return measure(variants, repeats=repeats, units=REPORT)
