"""What an engine costs: a training step of the digits' DiT on two gloo ranks, against a hand-written DDP loop.

Averages are timed by themselves, so that their ratio is their share of a step.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from launcher.compose import compose
from selfguide.diffusion.conditions import Condition
from selfguide.distributed import RankInfo
from selfguide.networks.student import build_student
from selfguide.spec.averages import AverageSpec
from selfguide.spec.config import Config, EngineConfig
from selfguide.spec.rank_status import RankStatus
from selfguide.training.ema import Averages
from selfguide.training.engine.build import build_engine
from selfguide.training.stop import StopVote
from shards.read.stream import Stream
from tools.bench.harness import Row, Variant, measure
from tools.ranks import run_ranks

TITLE = "engine: one step, unconditional DiT of the digits, fp32, 2 gloo ranks"
WORLD = 2
# images of all ranks: steps of about 5, 50 and 500 ms on two cores
BATCHES = (8, 128, 1024)
ENGINES = {
    "torch engine": EngineConfig(backend="torch"),
    **{f"DeepSpeed ZeRO-{stage}": EngineConfig(zero_stage=stage) for stage in (0, 1, 2, 3)},
}
AVERAGES = (AverageSpec(halflife=500_000), AverageSpec(width=0.05), AverageSpec(width=0.1))


def suite(repeats: int) -> list[Row]:
    rows = []
    for batch in BATCHES:
        config = compose(["experiment=digits_uncond", "cluster=local", f"train.batch={batch}"])
        found = run_ranks(WORLD, _timed, config, repeats, timeout=None)[0]
        rows += [replace(row, name=f"{batch} images: {row.name}") for row in found]
    return rows


class _AlwaysReady:
    """A stream whose batches are there."""

    def ready(self, batches: int, timeout_s: float = 0.0) -> bool:
        return True


def _timed(rank_info: RankInfo, config: Config, repeats: int) -> list[Row]:
    micro = config.train.batch // WORLD
    x, tau = torch.randn(micro, 1, 8, 8), torch.rand(micro)
    condition = Condition.unconditional(micro)

    ddp = nn.parallel.DistributedDataParallel(build_student(config, 0).backbone)
    optimiser = torch.optim.AdamW(ddp.parameters(), lr=1e-3, fused=True)

    def by_hand() -> None:
        ddp(x, tau, condition).square().mean().backward()
        nn.utils.clip_grad_norm_(ddp.parameters(), config.train.clip or math.inf)
        optimiser.step()
        optimiser.zero_grad()

    variants = [Variant("hand-written DDP", by_hand)]
    for name, engine_config in ENGINES.items():
        engine = build_engine(
            replace(config, engine=engine_config), build_student(config, 0), rank_info
        )

        def step(engine=engine) -> None:  # type: ignore[no-untyped-def]
            engine.backward(engine.forward(x, tau, condition, None).prediction.square().mean())
            engine.step(1e-3)

        variants.append(Variant(name, step))
        if engine_config.backend == "torch":
            # what a step of training adds to it so that all ranks may be asked to stop
            vote = StopVote(RankStatus(), cast(Stream, _AlwaysReady()))

            def voted(step=step, vote=vote) -> None:  # type: ignore[no-untyped-def]
                step()
                vote.stop(at_once=False)

            variants.append(Variant(f"{name}, asking at each step whether to stop", voted))
            for specs in (AVERAGES[:1], AVERAGES):
                averages = Averages(engine, specs, config.train.ema_ramp)
                update = partial(averages.update, config.train.batch, 1_000_000, torch.tensor(True))
                count = len(specs)
                variants.append(Variant(f"{count} average{'s' if count > 1 else ''} alone", update))
    return measure(variants, repeats=repeats, fence=dist.barrier)
