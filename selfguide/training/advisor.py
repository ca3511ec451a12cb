"""Gives advice while a run trains: once a run, in the log and beside the telemetry."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from selfguide.spec.advice import REMEMBERED, Line, advise, recorded
from selfguide.spec.lines import ascending
from selfguide.spec.run import append_record

log = logging.getLogger(__name__)


class Advisor:
    """Gives each advice once in a run; rank 0 only."""

    def __init__(self, metrics: Path, attempt: int) -> None:
        self._given = {advice.name for advice in recorded(metrics)}
        self._file = metrics / f"advice-{attempt:04d}.jsonl"
        self._history: list[Line] = []

    def hear(self, line: Line) -> None:
        """Judges the run with one more line of its telemetry, without those of images that it trains again."""
        self._history = ascending([*self._history, line])[-REMEMBERED:]
        for advice in advise(self._history):
            if advice.name not in self._given:
                self._given.add(advice.name)
                log.info("advice at %s images: %s", f"{advice.images:,}", advice.text)
                append_record(self._file, asdict(advice))
