"""What a report says of a run's speed and of its loss: against counts of torch, and against plain sums."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from launcher.compose import compose
from selfguide.diffusion.conditions import CONDITIONED, NULL, UNCONDITIONAL
from selfguide.distributed import RankInfo
from selfguide.spec.drift import BINS
from selfguide.spec.run import RunFolder
from selfguide.spec.sizes import architecture
from selfguide.training.flops import PEAKS, Peak, count_flops, peak_of
from selfguide.training.loop import advance
from selfguide.training.spectrum import KINDS, Spectrum
from selfguide.training.telemetry import Telemetry
from selfguide.training.wall import SECTIONS, WallTime
from tests.selfguide.test_loop import BATCH, SWITCH, begun

CPU = torch.device("cpu")


@pytest.mark.parametrize("images", [0, SWITCH])
def test_flops_of_a_step_are_those_that_torch_counts(tmp_path: Path, images: int) -> None:
    """Before and after the switch. Backward computes no gradients of images and features, and naming groups is free."""
    job = begun(tmp_path, images)
    job.telemetry.begin(job.config, job.state.teaching, images)
    job.telemetry.restart(images)
    with FlopCounterMode(display=False) as counter:
        advance(job)
    line = job.telemetry.report(job.state.images)
    assert line["flops"] == pytest.approx(counter.get_total_flops(), rel=0.04)
    assert line["tflops"] > 0 and "mfu" not in line, "nobody knows a CPU's peak"
    advance(job)
    assert job.telemetry.report(job.state.images)["flops"] == line["flops"]


@pytest.mark.parametrize("model", ["dit_s_2", "uvit_s_2", "unet_ddpm"])
def test_flops_of_a_network_are_its_closed_formula(model: str) -> None:
    config = compose(["experiment=digits_uncond", "cluster=local", f"model={model}"])
    found = count_flops(config)
    assert found.training == 6 * architecture(config).forward_macs() and found.extraction == 0


def test_mfu_is_of_the_peak_that_was_given(tmp_path: Path) -> None:
    job = begun(tmp_path, 0)
    train = replace(job.config.train, peak_tflops=0.5)
    job.telemetry.begin(replace(job.config, train=train), None, 0)
    job.telemetry.restart(0)
    advance(job)
    line = job.telemetry.report(BATCH)
    assert (
        line["mfu"] == pytest.approx(line["tflops"] / 0.5) and "train.peak_tflops" in line["peak"]
    )
    assert line["mfu_compute"] > line["mfu"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA RTX A1000", None),
        ("NVIDIA H200 NVL", 835.0), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ],
)  # fmt: skip
def test_peak_of_a_gpu_is_that_of_its_whole_name(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_of(torch.device("cuda", 0))
    assert (found and found.tflops) == peak
    assert peak_of(torch.device("cuda", 0), 1.5) == Peak(1.5, "train.peak_tflops")
    assert peak_of(CPU) is None and all(value > 0 for value in PEAKS.values())


class Clock:
    """A clock that only its owner moves."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def passed(self, moment: float) -> bool:
        return moment < self.time  # as an event of a GPU, which is behind

    def seconds(self, start: float, end: float) -> float:
        return end - start


def test_wall_time_is_parted_without_a_gap_and_collectives_count_once(
    single: RankInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall, clock = WallTime(CPU), Clock()
    wall._clock = clock  # type: ignore[assignment]
    wall.restart()
    whole = dist.all_reduce

    def slow(*args: Any, **kwargs: Any) -> Any:
        clock.time += 0.25
        return whole(*args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", slow)
    monkeypatch.setattr(WallTime, "_here", lambda self: True)
    with wall.hears_collectives():
        for _ in range(2):
            clock.time += 1
            wall.mark("data")
            clock.time += 3
            dist.all_reduce(torch.ones(3))
            dist.all_reduce(torch.ones(3), async_op=True).wait()
            wall.mark("forward_backward")
            clock.time += 0.5
    assert dist.all_reduce is slow, "as it was found"
    found = wall.take()
    assert found == {
        "data": 2.5, "forward_backward": 6.5, "communication": 0.5, "optimiser": 0.0, "checkpoint": 0.0, "other": 0.5,
    }  # fmt: skip
    assert tuple(found) == SECTIONS and sum(found.values()) == clock.time
    assert set(wall.take().values()) == {0.0}


def test_a_step_is_parted_into_what_it_did(tmp_path: Path) -> None:
    job = begun(tmp_path, 0)
    advance(job)
    seconds = job.telemetry.report(BATCH)["seconds"]
    assert tuple(seconds) == SECTIONS
    assert min(seconds[n] for n in ("data", "forward_backward", "optimiser")) > 0
    assert seconds["checkpoint"] == seconds["communication"] == 0


def images_of(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(count)
    losses, tau = torch.rand(count, generator=draw), torch.rand(count, generator=draw)
    return losses, tau, torch.randint(0, 3, (count,), generator=draw)


def test_spectrum_is_the_mean_of_each_bin_and_kind(tmp_path: Path) -> None:
    spectrum = Spectrum(CPU)
    parts = [images_of(count) for count in range(1, 50)]
    for part in parts:
        spectrum.add(*part)
    found = spectrum.take()
    losses, tau, state = (torch.cat(each) for each in zip(*parts, strict=True))
    for name, of in {
        "all": torch.ones_like(state).bool(),
        **{k: state == n for n, k in enumerate(KINDS)},
    }.items():
        for bin_ in range(BINS):
            inside = of & (tau * BINS >= bin_) & (tau * BINS < bin_ + 1)
            assert found[name]["images"][bin_] == inside.sum()
            if inside.any():
                assert found[name]["loss"][bin_] == pytest.approx(
                    losses[inside].mean().item(), rel=1e-5
                )
            else:
                assert found[name]["loss"][bin_] is None
    assert spectrum.take() == {}


def test_spectrum_has_both_ends_and_leaves_out_what_is_not_finite() -> None:
    spectrum = Spectrum(CPU)
    losses = torch.tensor([1.0, 2.0, float("nan"), float("inf"), 5.0])
    tau = torch.tensor([0.0, 1.0, 0.5, 0.01, float("nan")])
    spectrum.add(losses, tau, torch.full((5,), NULL))
    found = spectrum.take()
    assert set(found) == {"all", "null"}
    assert found["null"]["loss"][0] == 1.0 or found["null"]["images"][0] == 2
    assert found["null"]["loss"][-1] == 2.0 and found["null"]["images"][-1] == 1


def test_spectrum_of_patches_takes_the_share_of_each_kind() -> None:
    spectrum = Spectrum(CPU)
    state = torch.tensor([[CONDITIONED] * 4, [CONDITIONED, NULL, NULL, NULL], [UNCONDITIONAL] * 4])
    spectrum.add(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0.1, 0.1, 0.9]), state)
    found = spectrum.take()
    first = int(0.1 * BINS)
    assert found["conditioned"]["images"][first] == 1.25
    assert found["conditioned"]["loss"][first] == pytest.approx((1 + 0.25 * 3) / 1.25)
    assert found["null"]["loss"][first] == pytest.approx(3)
    assert sum(found["all"]["images"]) == pytest.approx(3)


def means_with_nan(rank_info: RankInfo, folder: str) -> list[dict[str, Any]]:
    """Two windows of two losses a rank: in the first one of four is not finite, in the second all are."""
    telemetry = Telemetry(RunFolder(Path(folder)), 1, rank_info, 100)
    lines = []
    for window in ([(1.0, math.nan), (3.0, 5.0)], [(math.inf, math.nan)] * 2):
        for loss in window[rank_info.rank]:
            telemetry.add(loss=torch.tensor(loss), code_loss=1.0)
        lines.append(telemetry.report(20))
    return lines


def test_mean_loss_with_a_loss_that_is_not_finite_is_that_of_the_others(
    ranks: Any, tmp_path: Path
) -> None:
    (tmp_path / "attempts" / "0001").mkdir(parents=True)
    for some, none in ranks(2, means_with_nan, str(tmp_path)):
        assert some["loss"] == 3.0 and some["code_loss"] == none["code_loss"] == 1.0
        assert math.isnan(none["loss"])
    kept = (tmp_path / "metrics" / "train-0001.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in kept] == [3.0, None]


def reported(rank_info: RankInfo, folder: str) -> dict[str, Any]:
    telemetry = Telemetry(RunFolder(Path(folder)), 1, rank_info, 100)
    telemetry.restart(0)
    telemetry.add(loss=1.0)
    tau = torch.tensor([0.0, 0.99])
    state = torch.tensor([CONDITIONED, NULL])
    telemetry.spectrum.add(torch.tensor([1.0, 2.0]) + rank_info.rank, tau, state)
    clock = Clock()
    telemetry.wall._clock = clock  # type: ignore[assignment]
    telemetry.wall.restart()
    clock.time += 1 + rank_info.rank
    telemetry.wall.mark("forward_backward")
    telemetry.read(0.0, 0)
    return telemetry.report(20)


def test_a_line_of_several_ranks_names_the_slowest_and_holds_all_images(
    ranks: Any, tmp_path: Path
) -> None:
    (tmp_path / "attempts" / "0001").mkdir(parents=True)
    for line in ranks(2, reported, str(tmp_path)):
        assert line["seconds"]["forward_backward"] == pytest.approx(1.5)
        assert line["slowest"]["rank"] == 1 and line["slowest"]["node"]
        assert line["slowest"]["more"] == pytest.approx(1 / 3)
        assert line["memory"]["bytes"] > 1e6 and line["memory"]["rank"] in (0, 1)
        assert line["spectrum"]["conditioned"]["loss"][0] == 1.5
        assert line["spectrum"]["null"]["loss"][-1] == 2.5
        assert line["spectrum"]["all"]["images"] == [2.0, *[0.0] * (BINS - 2), 2.0]
    (kept,) = (tmp_path / "metrics" / "train-0001.jsonl").read_text().splitlines()
    assert json.loads(kept)["spectrum"] == line["spectrum"]
