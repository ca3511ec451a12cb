"""What an engine costs: a training step of the digits' DiT on two gloo ranks, against loops that a user would write.

A ratio is to the hand-written DDP loop, but that of ZeRO-1 to DeepSpeed's own loop, and that of a step without
communication to the torch engine's, whose share it is. What the training loop adds to a step is timed inside it, and
its ratio is its share of the hand-written step.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import shards
from launcher.compose import compose
from selfguide.diffusion.conditions import Condition
from selfguide.distributed import RankInfo
from selfguide.networks.student import build_student
from selfguide.spec.averages import AverageSpec
from selfguide.spec.config import Config, EngineConfig
from selfguide.spec.rank_status import RankStatus
from selfguide.training.ema import Averages
from selfguide.training.engine.build import build_engine
from selfguide.training.engine.protocol import Engine
from selfguide.training.stop import StopVote
from shards.read.stream import Stream
from tools.bench.harness import Row, Variant, measure, part, seconds_of
from tools.ranks import run_ranks
from tools.shards.__main__ import main as shards_command

TITLE = "engine: one step, unconditional DiT of the digits, fp32, 2 gloo ranks"
WORLD = 2
# images of all ranks: steps of about 5, 50 and 500 ms on two cores
BATCHES = (8, 128, 1024)
TORCH, ZERO_1, OWN_ZERO_1 = "torch engine", "DeepSpeed ZeRO-1", "DeepSpeed's own ZeRO-1"
ENGINES = {
    TORCH: EngineConfig(backend="torch"),
    **{f"DeepSpeed ZeRO-{stage}": EngineConfig(zero_stage=stage) for stage in (0, 1, 2, 3)},
}
AVERAGES = {
    "1 average": (AverageSpec(halflife=500_000),),
    "3 averages": (
        AverageSpec(halflife=500_000),
        AverageSpec(width=0.05),
        AverageSpec(width=0.1),
    ),
}


def suite(repeats: int) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        root = Path(folder) / "digits"
        with contextlib.redirect_stdout(io.StringIO()):
            shards_command(["make", "digits", "--out", str(root)])
        for batch in BATCHES:
            words = [f"data.root={root}", "cluster=local", f"train.batch={batch}"]
            config = compose(["experiment=digits_uncond", *words])
            found = run_ranks(WORLD, _timed, config, repeats, timeout=None, on_cpu=True)[0]
            rows += [replace(row, name=f"{batch} images: {row.name}") for row in found]
    return rows


class _Batch:
    """What every step of the benchmark computes: a mean square of the prediction for the same images."""

    def __init__(self, config: Config) -> None:
        micro = config.train.batch // WORLD
        self.config = config
        self.x, self.tau = torch.randn(micro, *config.data.shape), torch.rand(micro)
        self.condition = Condition.unconditional(micro)
        self.clip = config.train.clip or math.inf

    def loss(self, network: Callable[..., torch.Tensor]) -> torch.Tensor:
        return network(self.x, self.tau, self.condition).square().mean()

    def by_hand(self, *, communicates: bool) -> Callable[[], None]:
        """A loop of torch, data-parallel by DDP, or of each rank by itself."""
        backbone: nn.Module = build_student(self.config, 0).backbone
        if communicates:
            backbone = nn.parallel.DistributedDataParallel(backbone)
        optimiser = torch.optim.AdamW(backbone.parameters(), lr=1e-3, fused=True)

        def step() -> None:
            self.loss(backbone).backward()
            nn.utils.clip_grad_norm_(backbone.parameters(), self.clip)
            optimiser.step()
            optimiser.zero_grad()

        return step

    def by_deepspeed(self) -> Callable[[], None]:
        """The loop of DeepSpeed's own pages; it must have been started."""
        import deepspeed

        backbone = build_student(self.config, 0).backbone
        engine, *_ = deepspeed.initialize(
            model=backbone,
            optimizer=torch.optim.AdamW(backbone.parameters(), lr=1e-3, fused=True),
            config={
                "train_micro_batch_size_per_gpu": len(self.x),
                "gradient_clipping": self.config.train.clip or 0.0,
                "zero_optimization": {"stage": 1},
            },
        )

        def step() -> None:
            engine.backward(self.loss(engine))
            engine.step()

        return step

    def by_engine(self, engine: Engine) -> Callable[[], None]:
        def step() -> None:
            prediction = engine.forward(self.x, self.tau, self.condition, None).prediction
            engine.backward(prediction.square().mean())
            engine.step(1e-3)

        return step


class _Loop:
    """The torch engine's step and what the training loop adds to it, each part timed by itself."""

    def __init__(self, batch: _Batch, engine: Engine, stream: Stream) -> None:
        self._step, self._batches = batch.by_engine(engine), iter(stream)
        self._images, ramp = batch.config.train.batch, batch.config.train.ema_ramp
        self._averages = {name: Averages(engine, specs, ramp) for name, specs in AVERAGES.items()}
        self._vote = StopVote(RankStatus(), stream)
        self.seconds: dict[str, list[float]] = {}

    def __call__(self) -> None:
        self._part("waiting for a batch", lambda: next(self._batches))
        self._step()
        self._part("asking whether to stop", lambda: self._vote.stop(at_once=False))
        for name, averages in self._averages.items():
            applied = torch.tensor(True)
            self._part(
                name,
                lambda a=averages, t=applied: a.update(self._images, 1_000_000, t),  # type: ignore[misc]
            )

    def _part(self, name: str, work: Callable[[], object]) -> None:
        self.seconds.setdefault(name, []).append(seconds_of(work))


def _timed(rank_info: RankInfo, config: Config, repeats: int) -> list[Row]:
    batch = _Batch(config)
    variants = [Variant("hand-written DDP", batch.by_hand(communicates=True))]
    with shards.open(
        config.data.roots,
        global_batch=config.train.batch,
        micro_batch=config.train.batch // WORLD,
        rank=rank_info.rank,
        world=WORLD,
        seed=0,
    ) as stream:
        for name, settings in ENGINES.items():
            student = build_student(config, 0)
            engine = build_engine(replace(config, engine=settings), student, rank_info)
            base = OWN_ZERO_1 if name == ZERO_1 else None
            variants.append(Variant(name, batch.by_engine(engine), base))
            if name == TORCH:
                loop = _Loop(batch, engine, stream)
        variants += [
            Variant(f"{TORCH} with a stream, a vote and averages", loop),
            Variant("no communication", batch.by_hand(communicates=False), TORCH),
            Variant(OWN_ZERO_1, batch.by_deepspeed()),
        ]
        rows = measure(variants, repeats=repeats, fence=dist.barrier)
    parts = loop.seconds.items()
    rows += [part(f"{name}, alone", each[-repeats:], rows[0].median) for name, each in parts]
    return rows + _extraction(batch, repeats)


@torch.no_grad()
def _extraction(batch: _Batch, repeats: int) -> list[Row]:
    """Features of the middle layer, by a forward to its end and by one that stops there."""
    backbone = build_student(batch.config, 0).backbone.eval()
    given, layer = (batch.x, batch.tau, batch.condition), backbone.net.middle
    variants = [
        Variant("features, by a whole forward", lambda: backbone.with_features(*given, [layer])),
        Variant(f"features, to {layer}", lambda: backbone.features(*given, layer)),
    ]
    return measure(variants, repeats=repeats, fence=dist.barrier)
