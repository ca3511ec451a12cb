"""Applies what is asked of a run while it trains (`selfguide.spec.tuning`), on all ranks at one image count."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from selfguide.distributed import RankInfo, on_rank_0
from selfguide.spec import tuning
from selfguide.spec.files import read_config
from selfguide.spec.run import Lease, RunFolder
from selfguide.training.trace import Trace

log = logging.getLogger(__name__)

# seconds between two looks into the folder
LOOK_S = 1.0


class Tuning:
    """What is asked of one attempt; `log_every` outlives it, and the rest is for the attempt that it was asked of."""

    def __init__(self, lease: Lease, rank_info: RankInfo, log_every: int) -> None:
        """All ranks call; what was asked of attempts before this one is settled.

        So is what this one applied before it went back to a checkpoint: a request is applied once.
        """
        self._lease, self._rank = lease, rank_info.rank
        self.trace = Trace(lease.run.root / "traces", rank_info.rank)
        self._looked = -float("inf")
        self._newest = 0
        self._denied = ""
        asked = on_rank_0(self._requests) or []
        settled = [each for each in asked if each["attempt"] < lease.number or each["applied"]]
        self._say_what_came_too_late(settled)
        self.log_every = on_rank_0(lambda: _last(lease.run, settled, log_every))
        self.settled = max((each["number"] for each in settled), default=0)

    def _say_what_came_too_late(self, settled: Sequence[Mapping[str, Any]]) -> None:
        for each in settled:
            # a cadence holds from now on
            lost = sorted(each["settings"].keys() - {"log_every"})
            before = each["attempt"] == self._lease.number - 1
            if self._rank == 0 and lost and before and not each["applied"]:
                log.warning(
                    f"request {each['number']} ({', '.join(lost)}) is not applied, since attempt {each['attempt']} "
                    "ended before it came to it: ask again with launcher.tune"
                )

    def newest(self) -> int:
        """Number of the newest request; of rank 0, which alone looks."""
        if self._rank == 0 and time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            with self._going_on():
                self._newest = tuning.newest(self._lease.run)
        return self._newest

    def _requests(self, after: int = 0) -> list[dict[str, Any]] | None:
        """Those behind a number; None where they cannot be read now."""
        with self._going_on():
            return tuning.requests(self._lease.run, after)
        return None

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Says once why a folder cannot be read or written, as one that another account made; that ends no training."""
        try:
            yield
        except OSError as error:
            if str(error) != self._denied:
                self._denied = str(error)
                log.warning(f"what is asked of the run cannot be read, or not answered: {error}")

    def apply(self, newest: int, images: int, save: Callable[[], object]) -> bool:
        """All ranks call after the step that ended at `images`, with the same `newest`; returns whether to stop.

        Args:
            save: writes a checkpoint of this step.
        """
        if newest <= self.settled:
            return False
        run, attempt = self._lease.run, self._lease.number
        asked = on_rank_0(lambda: self._requests(self.settled))
        if asked is None:
            return False
        stop = False
        for each in (each for each in asked if each["number"] <= newest):
            settings: dict[str, Any] = each["settings"]
            self.log_every = settings.get("log_every", self.log_every)
            if "trace" in settings and self._rank == 0:
                self.trace.begin(settings["trace"])
            if settings.get("save", False):
                save()
            stop |= settings.get("stop", False)
            number = each["number"]
            if self._rank == 0 and each["refused"]:
                log.warning(
                    f"request {number} at {images:,} images asks for nothing: {each['refused']}. "
                    "launcher.tune writes those that do"
                )
            elif self._rank == 0:
                log.info(f"request {number} at {images:,} images: {_typed(settings)}")
            if self._rank == 0:
                with self._going_on():
                    tuning.record_applied(run, number, attempt, images)
        self.settled = newest
        if stop:
            self.trace.end(images)
        return stop


def _last(run: RunFolder, asked: list[dict[str, Any]], log_every: int) -> int:
    """The cadence that was asked for last, of any attempt, unless a later one was given another by its config."""
    found = [each for each in asked if "log_every" in each["settings"]]
    if not found:
        return log_every
    config = run.attempt(found[-1]["attempt"]) / "config.yaml"
    given = read_config(config).train.log_every if config.is_file() else log_every
    cadence: int = found[-1]["settings"]["log_every"]
    return cadence if given == log_every else log_every


def _typed(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())
