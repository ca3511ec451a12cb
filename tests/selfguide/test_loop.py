"""The loop where it turns: the switch, the end of a window, a step that is skipped."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from selfguide.data.normaliser import Normaliser
from selfguide.diffusion.objectives import build_objective
from selfguide.distributed import RankInfo
from selfguide.guidance.online import PROTOTYPES
from selfguide.models.execution import configure_execution
from selfguide.networks.student import build_student
from selfguide.spec.config import EngineConfig, TrainConfig
from selfguide.spec.initial_weights import SCRATCH
from selfguide.spec.run import Lease, RunFolder
from selfguide.training.job import build_state
from selfguide.training.loop import advance
from selfguide.training.stability import Stability
from selfguide.training.telemetry import Telemetry
from selfguide.training.unstable import Unstable, judge
from selfguide.training.work import Training
from shards.format.header import Header
from tests.selfguide.host_reads import HostReads
from tests.selfguide.test_online import online_config
from tools.awake import awake

BATCH, SWITCH = 64, 512  # of 1,024 images


class Given(Iterator[dict[str, np.ndarray]]):
    """Batches that need no reading, as a stream has them."""

    def __init__(self, batches: Iterator[dict[str, np.ndarray]]) -> None:
        self.batches, self.waited, self.substituted = batches, 0.0, 0

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self.batches)


def begun(
    folder: Path,
    images: int,
    broken: tuple[int, ...] = (),
    route: float | None = None,
    **guidance: Any,
) -> Training:
    """The real loop on one process, about to take its step at `images`; batches at `broken` hold a NaN."""
    config = online_config(**({"teacher_refresh": 1 << 20} | guidance))
    config = replace(
        config,
        model=replace(config.model, route=route, depth=route and 6),
        engine=replace(config.engine, backend="torch"),
        train=TrainConfig(images=1024, batch=BATCH, learning_rate=3e-3, ema_halflife=(500,)),
    )
    state = build_state(config, RankInfo(0, 0, 1), build_student(config, 0), [], SCRATCH)
    state.images = images

    def stream() -> Any:
        for start in range(images, 1024, BATCH):
            ordinal = np.arange(start, start + BATCH)
            x = np.random.default_rng(start).uniform(0, 16, (BATCH, 1, 8, 8)).astype(np.float32)
            if start in broken:
                x[3, 0, 4, 4] = np.nan
            yield {"x": x, "ordinal": ordinal, "position": ordinal}

    run = RunFolder(folder)
    return Training(
        config, RankInfo(0, 0, 1), state, Given(stream()), build_objective(config.path),
        Normaliser.of(Header(kind="image", shift=8.0, scale=0.125)), {},
        Telemetry(run, 1, RankInfo(0, 0, 1), 1024), Lease(run, 1),
    )  # fmt: skip


def masters(job: Training) -> torch.Tensor:
    return job.state.engine.gather(job.state.engine.masters)


def average(job: Training) -> torch.Tensor:
    return job.state.engine.gather(job.state.averages.shards[0])


def taught(job: Training) -> dict[str, torch.Tensor]:
    assert job.state.teacher is not None
    return {n: t.clone() for n, t in job.state.teacher.module.state_dict().items()}


def test_the_switch_alone_makes_teacher_and_averages_the_live_student_buffers_included(
    tmp_path: Path,
) -> None:
    """No other refresh is due, so nothing else can have done it."""
    job = begun(tmp_path, SWITCH - 2 * BATCH)
    before = taught(job)
    advance(job)
    assert all(torch.equal(t, before[n]) for n, t in taught(job).items()), "not before the switch"
    assert not torch.equal(average(job), masters(job))
    advance(job)
    assert job.state.images == SWITCH == job.state.averages.since
    live = job.state.engine.module.state_dict()
    assert {n for n in live if "running" in n} == {
        "head.norm.running_mean",
        "head.norm.running_var",
    }
    for name, tensor in taught(job).items():
        assert torch.equal(tensor, live[name]), name
    assert torch.equal(average(job), masters(job))
    now = taught(job)
    advance(job)
    assert all(torch.equal(t, now[n]) for n, t in taught(job).items()), "nor after it"


def test_a_skipped_step_leaves_nothing_that_breaks_the_next(tmp_path: Path) -> None:
    """A NaN passes through the statistics of the head; they serve every later step, and name ids."""
    for view in ({"queue": 100}, {"view": "training", "mask": (0.0, 1.0)}):
        job = begun(tmp_path, 0, broken=(BATCH,), **view)
        advance(job)
        kept, buffers = (
            masters(job).clone(),
            dict(job.state.engine.module.named_buffers()),
        )
        advance(job)
        assert torch.equal(masters(job), kept), "skipped"
        assert all(b.isfinite().all() for b in buffers.values())
        advance(job)
        assert not torch.equal(masters(job), kept), "and training goes on"


def test_nothing_is_read_on_the_host_between_two_reports(tmp_path: Path) -> None:
    for guidance in ({}, {"condition_rows": "averaged", "queue": 100}):
        job = begun(tmp_path, SWITCH - 2 * BATCH, broken=(SWITCH,), **guidance)
        advance(job)  # what is read once, to begin
        with HostReads() as reads:
            for _ in range(3):  # through the switch, and a step that is skipped
                advance(job)
        assert reads.total == 0, reads.seen


def test_skipped_steps_are_counted_in_the_next_report(tmp_path: Path) -> None:
    job = begun(tmp_path, 0, broken=(BATCH, 2 * BATCH))
    advance(job)
    line = job.telemetry.report(job.state.images)
    assert "skipped" not in line and line["grad_norm"] > 0
    advance(job)
    advance(job)
    line = job.telemetry.report(job.state.images)
    assert line["skipped"] == 2 and "grad_norm" not in line, "nothing was applied"
    advance(job)
    assert "skipped" not in job.telemetry.report(job.state.images)
    assert job.state.images == 4 * BATCH, "skipped images count as seen"


def test_prototypes_do_not_begin_anew_from_a_skipped_step(tmp_path: Path) -> None:
    job = begun(tmp_path, 0, broken=(BATCH,), window=BATCH, revive=0.9)
    advance(job)
    rows = job.state.engine.layout.split(masters(job))[PROTOTYPES].clone()
    advance(job)
    assert torch.equal(job.state.engine.layout.split(masters(job))[PROTOTYPES], rows)
    advance(job)
    moved = job.state.engine.layout.split(masters(job))[PROTOTYPES]
    assert moved.isfinite().all() and not torch.equal(moved, rows)


def watched(job: Training, steps: int, **limits: Any) -> Training:
    """`steps` steps of `job`, with a report after each; `limits` are fields of `train`."""
    train = replace(job.config.train, **limits)
    job.config, job.state.stability.limits = replace(job.config, train=train), train
    for _ in range(steps):
        advance(job)
        judge(job, job.telemetry.report(job.state.images)["loss"])
    return job


def test_a_run_that_skips_most_of_its_steps_ends_as_broken_and_names_the_images(
    tmp_path: Path,
) -> None:
    """Seven of eight steps, of which none is the seventh in a row."""
    broken = tuple(BATCH * step for step in range(16) if step % 8)
    job = begun(tmp_path, 0, broken=broken)
    with pytest.raises(Unstable, match="ordinals 963 of the shards") as error:
        watched(job, 16)
    assert job.state.images == 1024, "judged by the share of all, when training ends"
    assert "train.skipped_share=0.5" in str(error.value)
    left = json.loads((job.lease.run.attempt(1) / "numeric-0.json").read_text())
    assert left["gradient_norm"] is None
    (kept,) = left["micro_batches"]
    assert kept["ordinals"] == kept["positions"] == list(range(960, 1024))
    assert [n for n, norm in enumerate(kept["norms"]) if norm is None] == [3]
    assert all(0 < tau < 1 for tau in kept["noise_times"])


def test_images_that_break_a_run_are_kept_by_key_and_in_a_mixture_by_data_set(
    tmp_path: Path,
) -> None:
    """Several of a mixture have one ordinal."""
    job = begun(tmp_path, 0, broken=(0, BATCH))
    data = replace(job.config.data, root="/data/a", mix=("/data/b",), weights=(1.0, 1.0))
    job.config = replace(job.config, data=data)
    given = job.stream.batches  # type: ignore[attr-defined]
    job.stream.batches = (  # type: ignore[attr-defined]
        {
            **each,
            "key": np.array([f"n{number}" for number in each["ordinal"]]),
            "source": each["ordinal"] % 2,
        }
        for each in given
    )
    with pytest.raises(Unstable, match="images at the ordinals 67 of /data/b are not finite"):
        watched(job, 2, skips=2)
    left = json.loads((job.lease.run.attempt(1) / "numeric-0.json").read_text())
    (kept,) = left["micro_batches"]
    assert kept["ordinals"][:2] == [64, 65] and kept["keys"][:2] == ["n64", "n65"]
    assert kept["roots"][:2] == ["/data/a", "/data/b"]


@pytest.mark.parametrize("policy", ["stop", "go_on"])
def test_skipped_steps_in_a_row_break_a_run_unless_it_is_to_go_on(
    tmp_path: Path, policy: str
) -> None:
    job = begun(tmp_path, 0, broken=(BATCH, 2 * BATCH, 3 * BATCH, 5 * BATCH, 6 * BATCH))
    outcome = pytest.raises(Unstable) if policy == "stop" else contextlib.nullcontext()
    with outcome:
        watched(job, 8, skips=3, skipped_share=None, unstable=policy)
    assert job.state.images == (4 if policy == "stop" else 8) * BATCH


def test_what_breaks_in_the_network_is_named_by_its_module(tmp_path: Path) -> None:
    job = begun(tmp_path, 0)
    layers = [
        n for n, m in job.state.engine.module.named_modules() if isinstance(m, torch.nn.Linear)
    ]
    name = next(n for n in layers if "blocks.1" in n)
    layer = job.state.engine.module.get_submodule(name)
    layer.register_forward_hook(lambda _, __, output: output * float("inf"))
    with pytest.raises(Unstable, match=f"output of {re.escape(name)} is not finite"):
        watched(job, 2, skips=2)


@pytest.mark.parametrize("name", ["head.out", "head.prototypes"])
def test_what_breaks_in_a_head_is_named(tmp_path: Path, name: str) -> None:
    """The backbone's part of the step is finite."""
    job = begun(tmp_path, 0)
    engine = job.state.engine
    broken = name if name == "head.prototypes" else f"{name}.weight"
    advance(job)
    with torch.no_grad():
        engine.module.get_parameter(broken)[0].fill_(torch.nan)
    with pytest.raises(Unstable, match=f"output of {re.escape(name)} is not finite"):
        watched(job, 2, skips=2)


def test_the_cure_of_a_run_that_breaks_is_taken_as_printed(tmp_path: Path) -> None:
    job = begun(tmp_path, 0, broken=(0, BATCH))
    with pytest.raises(Unstable, match=r"train\.unstable=go_on train\.roll_backs=3$"):
        watched(job, 2, skips=2, unstable="roll_back", roll_backs=5)


def test_what_breaks_in_a_compiled_block_is_named_by_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph runs no hook that came after it, and a new one cannot hold an `if` over values."""
    # the same graphs, run by torch's own kernels: no C++ compiler is needed
    by = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda *a, options=None, **k: by(*a, **k))
    torch._dynamo.reset()
    counters.clear()
    job = begun(tmp_path, 0)
    backbone = job.state.engine.module.backbone
    configure_execution(backbone, EngineConfig(compile=True), torch.device("cpu"))
    name, layer = next(
        (n, m)
        for n, m in job.state.engine.module.named_modules()
        if "blocks.1" in n and isinstance(m, torch.nn.Linear)
    )
    advance(job)  # finite, and compiled
    with torch.no_grad():
        layer.weight.fill_(float("inf"))
    with pytest.raises(Unstable, match=f"output of {re.escape(name)} is not finite"):
        watched(job, 2, skips=2)
    assert (job.lease.run.attempt(1) / "numeric-0.json").exists()
    # what was compiled goes on as before
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    advance(job)
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_loss_that_jumps_breaks_a_run_where_it_is_asked_to(tmp_path: Path) -> None:
    for spike in (None, 4.0):
        stability = Stability(TrainConfig(images=64, batch=64, loss_spike=spike))
        for loss in [1.0, 2.0, 0.5, 1.1, 1.0, 0.9, 1.0, 1.2, 1.0, 1.0, 3.9, 1.0, float("nan")]:
            stability.stepped(torch.tensor(True))
            assert stability.judge(loss, last=False) is None
        stability.stepped(torch.tensor(True))
        assert (stability.judge(4.5, last=False) is None) == (spike is None)


def test_the_gradient_norm_of_a_step_whose_loss_jumps_is_in_the_evidence(tmp_path: Path) -> None:
    job = begun(tmp_path, 0)
    job.state.stability.limits = replace(job.config.train, loss_spike=2.0)
    job.state.stability.losses = [1e-6] * 10
    advance(job)
    line = job.telemetry.report(job.state.images)
    with pytest.raises(Unstable, match="the loss rose"):
        judge(job, line["loss"])
    left = json.loads((job.lease.run.attempt(1) / "numeric-0.json").read_text())
    assert left["gradient_norm"] == pytest.approx(line["grad_norm"]) and line["grad_norm"] > 0


def test_the_evidence_of_a_routed_step_is_of_the_tokens_that_it_drew(tmp_path: Path) -> None:
    job = begun(tmp_path, 0, route=0.5)
    # zero gates would hide which tokens the middle blocks see
    awake(job.state.engine.module)
    job.config = replace(job.config, train=replace(job.config.train, learning_rate=1e-12))
    job.state.stability.limits = replace(job.config.train, loss_spike=2.0)
    job.state.stability.losses = [1e-6] * 10
    advance(job)
    line = job.telemetry.report(job.state.images)
    with pytest.raises(Unstable, match="the loss rose"):
        judge(job, line["loss"])
    left = json.loads((job.lease.run.attempt(1) / "numeric-0.json").read_text())
    losses = left["micro_batches"][0]["losses"]
    assert sum(losses) / len(losses) == pytest.approx(line["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("usual", "high", "spike"),
    [
        ((1.0,), 2.9, 3.1),
        ((-1.0,), 0.9, 1.1),
        ((-2.0, -1.0), 1.4, 1.6),
        ((0.02, -0.02), 0.03, 0.05),
    ],
)
def test_a_loss_spike_of_any_sign_is_a_rise_by_so_many_times_the_usual_size(
    usual: tuple[float, ...], high: float, spike: float
) -> None:
    """A loss with learned uncertainty falls below 0."""
    said = []
    for newest in (high, spike):
        stability = Stability(TrainConfig(images=64, batch=64, loss_spike=3.0))
        for loss in [*(10 * usual)[:10], newest]:
            stability.stepped(torch.tensor(True))
            said.append(stability.judge(loss, last=False))
    assert said[:-1] == [None] * 21 and f"rose to {spike:g} from" in str(said[-1])


@given(st.lists(st.booleans(), min_size=1, max_size=400), st.integers(1, 60), st.integers(1, 9))
def test_counts_of_skipped_steps_pass_through_checkpoints(
    applied: list[bool], every: int, attempts: int
) -> None:
    """Whenever it is reported and however often it is resumed: the longest row, and the share of the last window."""
    limits = TrainConfig(images=64, batch=64, skips=7, skipped_share=0.6)
    one, many = Stability(limits), Stability(limits)
    for step, done in enumerate(applied, start=1):
        for each in (one, many):
            each.stepped(torch.tensor(done))
        if step % attempts == 0:
            kept = json.loads(json.dumps(many.plain()))
            many = Stability(limits)
            many.load(kept, 0)
        if step % every == 0:
            row = "".join("." if each else "x" for each in applied[step - every : step])
            before = applied[: step - every]
            while before and not before[-1]:
                row, before = "x" + row, before[:-1]
            verdicts = [each.judge(1.0, last=False) for each in (one, many)]
            assert (verdicts[0] is not None and "in a row" in verdicts[0]) == ("x" * 7 in row)
            assert verdicts[0] == verdicts[1]
