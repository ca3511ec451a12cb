"""A training step as the loop takes it, on latents that lie on the device: noise, forward, backward, AdamW, average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.objectives import build_objective, sample_times
from selfguide.distributed import RankInfo
from selfguide.networks.student import build_student
from selfguide.randomness import normal
from selfguide.spec.averages import averages_of
from selfguide.spec.config import (
    ClusterConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    NoGuidance,
    PathConfig,
    SamplerConfig,
    TrainConfig,
)
from selfguide.spec.sizes import row
from selfguide.training.ema import Averages
from selfguide.training.engine.build import build_engine
from selfguide.training.engine.protocol import DTYPES
from selfguide.training.flops import Peak, count_flops
from tools.bench.gpu.timing import Extent, seconds

Execution = Literal["eager", "compiled", "graph"]


# the share of patch tokens that skips the middle blocks (TREAD, SPRINT)
ROUTE = 0.5


def config_of(model: str, batch: int, *, route: float | None = None, **engine: Any) -> Config:
    """An unconditional run of a published size, as it would be trained; `route` is `model.route`."""
    net = row(model)
    return Config(
        experiment="bench",
        model=ModelConfig(name=model, route=route),
        path=PathConfig(),
        sampler=SamplerConfig(),
        guidance=NoGuidance(),
        data=DataConfig(root="", shape=(net.channels, net.size, net.size)),
        train=TrainConfig(images=batch * 1_000_000, batch=batch),
        engine=EngineConfig(**engine),
        evaluation=EvaluationConfig(),
        cluster=ClusterConfig(kind="local", gpus_per_node=1),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As `engine.dtype` has it."""
    return next(name for name, each in DTYPES.items() if each is dtype)


class Trained:
    """One network in training on one device."""

    def __init__(self, config: Config, rank_info: RankInfo, *, graph: bool = False) -> None:
        self.config, self.device = config, rank_info.device
        self.engine = build_engine(config, build_student(config, 0), rank_info)
        train, batch = config.train, config.train.batch
        self.averages = Averages(
            self.engine, averages_of(config), train.ema_ramp, train.ema_rise, train.ramps_count
        )
        self.objective = build_objective(config.path)
        generator = torch.Generator().manual_seed(0)
        self.x0 = torch.randn(batch, *config.data.shape, generator=generator).to(self.device)
        self.position = torch.arange(batch, device=self.device)
        self.condition = Condition.unconditional(batch, self.device)
        self.images = 0
        self._draw()
        self._graph = self._captured() if graph else None

    def _draw(self) -> None:
        """Noise of the next step; into the same memory, which a graph reads."""
        config = self.config
        eps = normal(config.seed, "noise", self.position, tuple(self.x0.shape[1:]))
        path = self.objective.preconditioning.path
        tau = sample_times(config.path, path, config.seed, self.position, 0.0)
        x = self.objective.preconditioning.noised(self.x0, eps, tau)
        drawn = (x.to(DTYPES[config.engine.dtype]), tau, eps)
        if not self.images:
            self.x, self.tau, self.eps = drawn
        else:
            for mine, new in zip((self.x, self.tau, self.eps), drawn, strict=True):
                mine.copy_(new)
        self.position += len(self.position)
        self.images += len(self.position)

    def _compute(self) -> None:
        outputs = self.engine.forward(self.x, self.tau, self.condition, None)
        losses = self.objective.losses(outputs.prediction, self.x0, self.eps, self.tau)
        self.engine.backward(losses.mean())

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Forward and backward as one launch; the optimiser stays outside, and what it reads stays where it is."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._compute()
        return graph

    def forward_backward(self) -> None:
        """Gradients of one batch, which are added to those before."""
        self._draw()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._compute()

    def step(self) -> None:
        """All of a step, clipping, optimiser and average included."""
        self.forward_backward()
        step = self.engine.step(self.config.train.learning_rate)
        assert step is not None
        self.averages.update(len(self.position), self.images, step.applied)


def measured(
    model: str,
    batch: int,
    execution: Execution,
    extent: Extent,
    peak: Peak | None,
    route: float | None = None,
) -> dict[str, Any]:
    """Images/s and MFU of forward and backward alone, and of the whole step; those of the FLOPs that are computed."""
    if extent.device.type == "cuda":
        # the case before may have ended for want of it
        torch.cuda.reset_peak_memory_stats(extent.device)
    engine = {"dtype": dtype_name(extent.dtype), "compile": execution == "compiled"}
    config = config_of(model, batch, route=route, backend="torch", **engine)
    trained = Trained(config, RankInfo(0, 0, 1), graph=execution == "graph")
    flops = count_flops(config).training * batch
    found: dict[str, Any] = {"model": model, "batch": batch, "execution": execution}
    found["flops_step"] = flops
    if route is not None:
        dense = count_flops(config_of(model, batch)).training * batch
        found |= {"route": route, "flops_step_dense": dense}
    # the step first: it leaves gradients as they are at the start of one
    works = {"step": trained.step, "forward_backward": trained.forward_backward}
    for name, work in works.items():
        taken = seconds(work, extent)
        rate: dict[str, float] = {"ms": taken * 1e3, "images_per_s": batch / taken}
        rate["tflops"] = flops / taken / 1e12
        if peak is not None:
            rate["mfu"] = rate["tflops"] / peak.tflops
        found[name] = rate
    if extent.device.type == "cuda":
        found["memory_gib"] = torch.cuda.max_memory_allocated(extent.device) / 2**30
    return found


def cases(extent: Extent) -> Iterator[tuple[str, int, Execution]]:
    """The network that the goal is stated for comes first; of each network the larger batches do."""
    executions: tuple[Execution, ...] = ("compiled", "eager", "graph")
    middle = extent.batches[len(extent.batches) // 2 :] + extent.batches[: len(extent.batches) // 2]
    for model in extent.models:
        for batch in middle:
            for execution in executions:
                yield model, batch, execution


def routing(extent: Extent, peak: Peak | None, route: float | None) -> dict[str, Any]:
    """The step in which a share of the tokens skips the middle blocks, or the dense one."""
    execution: Execution = "compiled" if extent.device.type == "cuda" else "eager"
    return measured(extent.routed, extent.batch, execution, extent, peak, route)


def dtype_of(stage: int, extent: Extent) -> str:
    """What a ZeRO stage is measured in: stage 0 has no masters beside the weights, so it trains in fp32 alone."""
    return "fp32" if stage == 0 else dtype_name(extent.dtype)


def stage(rank_info: RankInfo, stage: int | None, dtype: str, extent: Extent) -> float:
    """Seconds of a step under ZeRO `stage` on one rank, or of bare torch; in a process of its own."""
    engine: dict[str, Any] = {"backend": "torch", "dtype": dtype}
    if stage is not None:
        engine = {"backend": "deepspeed", "zero_stage": stage, "dtype": dtype}
    trained = Trained(config_of(extent.model, extent.batch, **engine), rank_info)
    return seconds(trained.step, extent)
