"""Gives advice while a run trains: once a run, in the log and beside the telemetry."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from selfguide.spec.advice import REMEMBERED, Line, advise, recorded
from selfguide.spec.lines import ascending, before
from selfguide.spec.run import append_record

log = logging.getLogger(__name__)


class Advisor:
    """Gives each advice once in a run; rank 0 only."""

    def __init__(self, metrics: Path, attempt: int) -> None:
        self._metrics, self._attempt = metrics, attempt
        self._given = {advice.name for advice in recorded(metrics)}
        self._file = metrics / f"advice-{attempt:04d}.jsonl"
        self._history: list[Line] = []

    def begin(self, images: int) -> None:
        """The attempt goes on from `images`: what lasts over several attempts, each of them short, is heard as well.

        Raises:
            OSError: what attempts before this one reported cannot be read.
        """
        lines = before(self._metrics, self._attempt, images, REMEMBERED)
        self._history = [line for line in lines if _judged(line)]

    def hear(self, line: Line) -> None:
        """Judges the run with one more line of its telemetry, without those of images that it trains again."""
        self._history = ascending([*self._history, line])[-REMEMBERED:]
        for advice in advise(self._history):
            if advice.name not in self._given:
                self._given.add(advice.name)
                log.info("advice at %s images: %s", f"{advice.images:,}", advice.text)
                append_record(self._file, asdict(advice))


def _judged(line: Line) -> bool:
    """Whether a line has what advice asks of it; one of another version of the code may lack it."""
    try:
        advise([line])
    except (LookupError, TypeError, ValueError, AttributeError):
        return False
    return True
