"""What a run says while it works: scalars as JSON lines, and one small file that commands read progress from."""

from __future__ import annotations

import functools
import logging
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.distributed import RankInfo, gather, on_rank_0
from selfguide.networks.student import Student
from selfguide.spec.config import Config
from selfguide.spec.nodes import node_name
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.run import RunFolder, append_record, write_record
from selfguide.training.advisor import Advisor
from selfguide.training.engine.protocol import Step
from selfguide.training.flops import Flops, Peak, count_flops, peak_of
from selfguide.training.spectrum import Spectrum
from selfguide.training.trackers import Trackers
from selfguide.training.wall import SECTIONS, WallTime

log = logging.getLogger(__name__)

# what a device computes in
_COMPUTE = ("forward_backward", "communication", "optimiser")
# what the sentence says in words of its own
_SHOWN = ("images", "images_per_s", "flops", "tflops")
# by which share more than the median a rank works before the sentence names it
_SLOW = 0.1
_KEPT = ("images_per_s", "loss", "data_share")  # while something else than training is done


class Telemetry:
    """Adds up scalars where they are and speaks once per `log_every` images."""

    # checkpoints that this attempt found damaged, as `training.resume` describes them
    damaged: Sequence[Mapping[str, Any]] = ()
    # of the checkpoint that this attempt goes on from; None from scratch
    resumed_from: int | None = None
    # training goes on without what finds no room, which was said
    _goes_on = _told = False
    _flops: Flops | None = None
    _peak: Peak | None = None
    _teacher: Student | None = None
    _trackers: Trackers | None = None

    def __init__(
        self,
        run: RunFolder,
        attempt: int,
        rank_info: RankInfo,
        total: int,
        status: RankStatus | None = None,
    ) -> None:
        """`status` is what this rank is at, which others read and ask to stop."""
        self.status = status or RankStatus()
        self._save_s: float | None = None  # of the slowest checkpoint
        self._run, self._rank_info, self._total = run, rank_info, total
        self._progress = run.attempt(attempt) / "progress.json"
        self._scalars = run.metrics / f"train-{attempt:04d}.jsonl"
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}
        self._stepped = 0
        self.spectrum = Spectrum(rank_info.device)
        # of this rank's data: so far, and at the last report
        self._waited, self._substituted, self._steps = 0.0, 0, 0
        self._reported = (0.0, 0)
        self._rates: dict[str, Any] = {}  # of the last report, for those who wait for a checkpoint
        self._since = time.monotonic()
        self._images: int | None = None
        if rank_info.rank == 0:
            run.metrics.mkdir(parents=True, exist_ok=True)
            self._advisor = Advisor(run.metrics, attempt)

    @functools.cached_property
    def wall(self) -> WallTime:
        """Made when it is first asked for: by then the rank has its device."""
        return WallTime(self._rank_info.device)

    @functools.cached_property
    def _nodes(self) -> list[str]:
        """All ranks call: the node of each."""
        return gather(node_name())

    def begin(self, config: Config, teacher: Student | None, images: int) -> None:
        """All ranks call: from now on lines state FLOPs, those of `teacher` included, and MFU, and go to the trackers.

        What cannot be written stops training or not, as `train.save_failed` has it.
        """
        self._goes_on = config.train.save_failed == "go_on"
        self._write(lambda: self._advisor.begin(images))
        if self._rank_info.rank:
            return
        self._trackers = Trackers(self._run, config, images)
        self._teacher = teacher
        self._peak = peak_of(self._rank_info.device, config.train.peak_tflops)
        self._flops = count_flops(config)

    def add(self, **scalars: Tensor | float) -> None:
        """Scalars of a step or micro-batch; means are taken over calls and ranks, of those that are finite.

        One that is not finite is of a step that is skipped: it would hide the others until the next report.
        """
        for name, value in scalars.items():
            each = torch.as_tensor(value, dtype=torch.float32).detach()
            finite = each.isfinite()
            self._add(name, torch.where(finite, each, 0.0), finite.long())

    def _add(self, name: str, value: Tensor, count: Tensor | int) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts[name] + count if name in self._counts else count

    def stepped(self, step: Step) -> None:
        """Of an optimiser step, unread: its norm counts where it was applied."""
        norm = torch.where(step.applied, step.grad_norm, 0.0)
        self._add("grad_norm", norm.float(), step.applied.long())
        self._stepped += 1

    def read(self, waited: float, substituted: int) -> None:
        """After a step: of the stream so far, seconds this rank waited, and images that stood in for damaged ones."""
        self._waited, self._substituted = waited, substituted
        self.status.waited_s = waited
        self._steps += 1

    def report(self, images: int, **extra: Any) -> dict[str, Any]:
        """All ranks call: reduces, writes the line, starts the next window.

        Raises:
            OSError: as `say`.
        """
        means: dict[str, Any] = self._means()
        spectrum = self.spectrum.take()
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        measured = self._ranks(elapsed)
        trained = None if self._images is None else images - self._images
        rate = trained / elapsed if trained is not None else None
        line = {"images": images, "images_per_s": rate, **means, **measured}
        line |= self._speed(trained or 0, elapsed, measured.get("seconds", {}))
        line |= extra
        if spectrum:
            line["spectrum"] = spectrum
        self._sums, self._counts, self._stepped = {}, {}, 0
        self._since, self._images = now, images
        self._rates = {name: line[name] for name in _KEPT if name in line}
        self.say("train", **line)
        if self._rank_info.rank == 0:
            log.info(_sentence(line, self._total))
            if self._trackers is not None:
                self._trackers.add(line)
        self._write(
            lambda: append_record(self._scalars, line),
            lambda: self._advisor.hear(line),
        )
        return line

    def _means(self) -> dict[str, float | int]:
        """All ranks call: means over what was added since the last report, each device read once.

        skipped  steps whose gradients were not finite; left out where there is none, as is the norm where none was
                 applied. A scalar that was never finite is NaN
        """
        names, device = sorted(self._sums), self._rank_info.device
        sums = torch.stack([self._sums[n].to(device) for n in names]).cpu()
        counts = torch.stack(
            [torch.as_tensor(self._counts[n], dtype=torch.float32, device=device) for n in names]
        ).cpu()
        applied = dict(zip(names, counts.tolist(), strict=True)).get("grad_norm", 0)
        skipped = self._stepped - int(applied)
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        means = (sums / counts).tolist()
        columns = zip(names, means, counts.tolist(), strict=True)
        found = {n: m for n, m, count in columns if count or n != "grad_norm"}
        return found | ({"skipped": skipped} if skipped else {})

    def _ranks(self, elapsed: float) -> dict[str, Any]:
        """All ranks call: what only each rank knows of itself since the last report, in one gathering of numbers.

        data_wait     seconds a step waited for data, a mean over steps and ranks
        data_wait_max the same of the rank that waited longest
        data_share    of all time, what that rank waited: steps end together, so all ranks lose it
        substituted   images of all ranks that stood in for damaged ones; left out where there is none
        seconds       of wall time by what they went into, a mean over ranks
        slowest       the rank that worked longest by itself, its node, and by which share more than the ranks' median;
                      left out on one rank
        memory        bytes at the highest, of the rank that had most, and that rank: the GPU's, or the process's
        """
        if not self._steps:
            return {}
        wall = self.wall.take()
        mine = [self._waited - self._reported[0], self._substituted - self._reported[1]]
        mine += [_memory(self._rank_info.device), *wall.values()]
        rows = [torch.tensor(mine, dtype=torch.float64)]
        if dist.is_initialized():
            rows = [torch.zeros_like(rows[0]) for _ in range(self._rank_info.world)]
            dist.all_gather(rows, torch.tensor(mine, dtype=torch.float64))
        table = torch.stack(rows)
        waited, substituted, memory = table[:, :3].T.tolist()
        sections = table[:, 3:]
        found: dict[str, Any] = {
            "data_wait": sum(waited) / (self._steps * self._rank_info.world),
            "data_wait_max": max(waited) / self._steps,
            "data_share": max(waited) / elapsed,
            "seconds": dict(zip(SECTIONS, sections.mean(0).tolist(), strict=True)),
            "memory": {"bytes": int(max(memory)), "rank": memory.index(max(memory))},
        }
        if len(rows) > 1:
            own = [each["forward_backward"] + each["optimiser"] for each in _named(sections)]
            rank = own.index(max(own))
            more = own[rank] / max(median(own), 1e-9) - 1
            found["slowest"] = {"rank": rank, "node": self._nodes[rank], "more": more}
        if substituted := sum(substituted):
            found["substituted"] = int(substituted)
        self._reported, self._steps = (self._waited, self._substituted), 0
        return found

    def _speed(self, images: int, elapsed: float, seconds: Mapping[str, float]) -> dict[str, Any]:
        """FLOP/s of one device and their share of its peak, since the last report; nothing where none are counted.

        flops  of the images since then: the student's forward and backward, and its teacher's extraction
        tflops TFLOP/s of one device
        mfu    of the peak that `peak` names; `mfu_compute` is that of the time without data, checkpoints and the rest
        """
        if self._flops is None or not images:
            return {}
        world = self._rank_info.world
        flops = images * self._flops.training
        if self._teacher is not None:
            # every rank extracts as much
            flops += self._teacher.extracted * world * self._flops.extraction
            self._teacher.extracted = 0
        tflops = flops / elapsed / world / 1e12
        found: dict[str, Any] = {"flops": flops, "tflops": tflops}
        if self._peak is not None:
            compute = sum(seconds.get(name, 0.0) for name in _COMPUTE)
            found["mfu"] = tflops / self._peak.tflops
            found["mfu_compute"] = found["mfu"] * elapsed / compute if compute else None
            found["peak"] = f"{self._peak.tflops:g} TFLOP/s ({self._peak.name})"
        return found

    def say(self, section: str, images: int, **extra: Any) -> None:
        """All ranks call: what the run is doing now, for those who wait for it.

        Raises:
            OSError: on all ranks alike, it cannot be written, unless train.save_failed=go_on.
        """
        self.status.enter(section)
        facts = self._rates | extra
        rate = facts.get("images_per_s")
        eta = (self._total - images) / rate if rate else None
        record = {"section": section, "images": images, "of": self._total, "eta_s": eta}
        record |= {"resumed_from": self.resumed_from, "save_s": self._save_s, **facts}
        if self.damaged:
            record["damaged"] = self.damaged
        self._write(lambda: write_record(self._progress, record, replace=True))

    def _write(self, *writes: Callable[[], None]) -> None:
        """All ranks call: rank 0 alone writes, and the others hear of a disk that takes nothing."""

        def work() -> None:
            for write in writes:
                try:
                    write()
                except OSError as error:
                    if not self._goes_on:
                        raise
                    if not self._told:
                        log.warning(
                            f"what the run says of itself is not written, or not read: {error}. Training goes on, "
                            "since train.save_failed=go_on, and this is not said again"
                        )
                    self._told = True

        # before the ranks are joined each is alone
        if dist.is_initialized() or self._rank_info.rank == 0:
            on_rank_0(work)

    def picture(self, images: int, png: bytes) -> None:
        """A grid of samples, for those trackers that show pictures."""
        if self._trackers is not None:
            self._trackers.picture(images, png)

    def go_back(self, images: int) -> None:
        """All ranks call: the run goes on from a checkpoint at `images`, which it was beyond before."""
        if self._trackers is not None:
            self._trackers.go_back(images)
        self.say("train", images)

    def close(self) -> None:
        """Lets trackers write what they hold back."""
        if self._trackers is not None:
            self._trackers.close()

    def saved(self, images: int, seconds: float) -> None:
        """A checkpoint took so long."""
        self._save_s = max(seconds, self._save_s or 0.0)
        self.status.saved = images

    def restart(self, images: int) -> None:
        """Forgets the time since the last report: the rate should be of training alone."""
        self.wall.restart()
        self._since, self._images = time.monotonic(), images
        # the stream of a run that went back counts from 0
        self._reported = (0.0, 0)


def _named(sections: Tensor) -> list[dict[str, float]]:
    """Seconds by section of each row."""
    return [dict(zip(SECTIONS, row, strict=True)) for row in sections.tolist()]


def _memory(device: torch.device) -> float:
    """The most bytes that were taken at once: of a GPU since the last call, of this process since it began."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return float(most)


def _sentence(line: dict[str, Any], total: int) -> str:
    parts = [f"{line['images']:>12,} / {total:,} images"]
    if line["images_per_s"]:
        parts.append(f"{line['images_per_s']:,.0f} images/s")
        parts.append(f"{(total - line['images']) / line['images_per_s']:,.0f} s left")
    for name, value in line.items():
        shown = name in _SHOWN or name.startswith(("data_", "mfu"))
        if not shown and isinstance(value, float):
            parts.append(f"{name} {value:.4g}")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%} of {line['peak']}")
    slowest = line.get("slowest")
    if slowest and slowest["more"] > _SLOW:
        parts.append(f"rank {slowest['rank']} on {slowest['node']} is {slowest['more']:.0%} slower")
    if "skipped" in line:
        parts.append(f"{line['skipped']:,} steps skipped: their gradients are not finite")
    if "data_share" in line:
        parts.append(f"waited for data {line['data_share']:.1%}")
    if "substituted" in line:
        parts.append(f"{line['substituted']:,} images substituted")
    return "  ".join(parts)
