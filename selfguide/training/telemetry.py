"""What a run says while it works: scalars as JSON lines, and one small file that commands read progress from."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.distributed import RankInfo
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.run import RunFolder, strict_json, write_record
from selfguide.training.advisor import Advisor
from selfguide.training.engine.protocol import Step

log = logging.getLogger(__name__)

_KEPT = ("images_per_s", "loss", "data_share")  # while something else than training is done


class Telemetry:
    """Adds up scalars where they are and speaks once per `log_every` images."""

    # checkpoints that this attempt found damaged, as `training.resume` describes them
    damaged: Sequence[Mapping[str, Any]] = ()
    # of the checkpoint that this attempt goes on from; None from scratch
    resumed_from: int | None = None

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
        self._rank_info, self._total = rank_info, total
        self._progress = run.attempt(attempt) / "progress.json"
        self._scalars = run.metrics / f"train-{attempt:04d}.jsonl"
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}
        self._stepped = 0
        # of this rank's data: so far, and at the last report
        self._waited, self._substituted, self._steps = 0.0, 0, 0
        self._reported = (0.0, 0)
        self._rates: dict[str, Any] = {}  # of the last report, for those who wait for a checkpoint
        self._since = time.monotonic()
        self._images: int | None = None
        if rank_info.rank == 0:
            run.metrics.mkdir(parents=True, exist_ok=True)
            self._advisor = Advisor(run.metrics, attempt)

    def add(self, **scalars: Tensor | float) -> None:
        """Scalars of a step or micro-batch; means are taken over calls and ranks."""
        for name, value in scalars.items():
            self._add(name, torch.as_tensor(value, dtype=torch.float32).detach(), 1)

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
        """All ranks call: reduces, writes the line, starts the next window."""
        means: dict[str, Any] = self._means()
        now = time.monotonic()
        means |= self._data(now - self._since)
        rate = (
            (images - (self._images or 0)) / max(now - self._since, 1e-9)
            if self._images is not None
            else None
        )
        line = {"images": images, "images_per_s": rate, **means, **extra}
        self._sums, self._counts, self._stepped = {}, {}, 0
        self._since, self._images = now, images
        self._rates = {name: line[name] for name in _KEPT if name in line}
        if self._rank_info.rank == 0:
            with self._scalars.open("a") as file:  # one writer a file: the attempt's rank 0
                file.write(strict_json({"time": time.time(), **line}) + "\n")
            self.say("train", **line)
            log.info(_sentence(line, self._total))
            self._advisor.hear(line)
        return line

    def _means(self) -> dict[str, float | int]:
        """All ranks call: means over what was added since the last report, each device read once.

        skipped  steps whose gradients were not finite; left out where there is none, as is a mean over nothing
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
        found = {n: m for n, m, c in zip(names, means, counts.tolist(), strict=True) if c}
        return found | ({"skipped": skipped} if skipped else {})

    def _data(self, elapsed: float) -> dict[str, float | int]:
        """All ranks call: what reading cost since the last report.

        data_wait     seconds a step waited for data, a mean over steps and ranks
        data_wait_max the same of the rank that waited longest
        data_share    of all time, what that rank waited: steps end together, so all ranks lose it
        substituted   images of all ranks that stood in for damaged ones; left out where there is none
        """
        if not self._steps:
            return {}
        mine = self._waited - self._reported[0]
        sums = torch.tensor([mine, self._substituted - self._reported[1]], dtype=torch.float64)
        longest = torch.tensor(mine, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        waited, substituted = sums.tolist()
        found: dict[str, float | int] = {
            "data_wait": waited / (self._steps * self._rank_info.world),
            "data_wait_max": longest.item() / self._steps,
            "data_share": longest.item() / max(elapsed, 1e-9),
        }
        self._reported, self._steps = (self._waited, self._substituted), 0
        return found | ({"substituted": int(substituted)} if substituted else {})

    def say(self, section: str, images: int, **extra: Any) -> None:
        """What the run is doing now, for those who wait for it."""
        self.status.enter(section)
        if self._rank_info.rank:
            return
        facts = self._rates | extra
        rate = facts.get("images_per_s")
        eta = (self._total - images) / rate if rate else None
        record = {"section": section, "images": images, "of": self._total, "eta_s": eta}
        record |= {"resumed_from": self.resumed_from, "save_s": self._save_s, **facts}
        if self.damaged:
            record["damaged"] = self.damaged
        write_record(self._progress, record, replace=True)

    def saved(self, images: int, seconds: float) -> None:
        """A checkpoint took so long."""
        self._save_s = max(seconds, self._save_s or 0.0)
        self.status.saved = images

    def restart(self, images: int) -> None:
        """Forgets the time since the last report: the rate should be of training alone."""
        self._since, self._images = time.monotonic(), images


def _sentence(line: dict[str, Any], total: int) -> str:
    parts = [f"{line['images']:>12,} / {total:,} images"]
    if line["images_per_s"]:
        parts.append(f"{line['images_per_s']:,.0f} images/s")
        parts.append(f"{(total - line['images']) / line['images_per_s']:,.0f} s left")
    for name, value in line.items():
        shown = name in ("images", "images_per_s") or name.startswith("data_")
        if not shown and isinstance(value, float):
            parts.append(f"{name} {value:.4g}")
    if "skipped" in line:
        parts.append(f"{line['skipped']:,} steps skipped: their gradients are not finite")
    if "data_share" in line:
        parts.append(f"waited for data {line['data_share']:.1%}")
    if "substituted" in line:
        parts.append(f"{line['substituted']:,} images substituted")
    return "  ".join(parts)
