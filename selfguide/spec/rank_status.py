"""What one rank is at: the trainer writes it, and threads beside it read it and ask it to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class RankStatus:
    """Of one process, shared by its threads; each field is written by one of them."""

    # joining, starting, train, data (a step waits for its images), snapshot, checkpoint, done; None outside training
    section: str | None = None
    # seen so far, None before training
    images: int | None = None
    # of the newest checkpoint, the one that this attempt resumed from included; 0 where there is none
    saved: int = 0
    # a step may be done: what is not saved would be lost
    begun: bool = False
    # number of the signal that asked this rank to stop, 0 where none did; the one field that others write
    stop: int = 0
    # the exit record is being written: no signal matters any more
    ending: bool = False
    # when it last made progress, in seconds since 1970: a step, or another section
    progressed: float = field(default_factory=time.time)
    # seconds that the last step took
    step_s: float = 0.0
    # when the main thread last came by, by the monotonic clock
    moved: float = field(default_factory=time.monotonic)
    # returns how many collectives this rank has entered (`selfguide.distributed`); None before ranks are joined
    collectives: Callable[[], int] | None = None
    # seconds between heartbeats, and what asks for one before its time
    beat_s: float = 10.0
    due: threading.Event = field(default_factory=threading.Event)

    def start(self, images: int) -> None:
        """Training goes on from so many images, all of them saved."""
        self.images = self.saved = images
        self.enter("train")

    def enter(self, section: str) -> None:
        """The main thread begins something else."""
        # between steps and waits for images it may change in every step
        if not {section, self.section} <= {"train", "data"}:
            self.due.set()
        self.section, self.progressed = section, time.time()
        self.touch()

    def touch(self) -> None:
        """The main thread came by."""
        self.moved = time.monotonic()

    def advance(self, images: int) -> None:
        """A step is done."""
        before = self.moved
        self.touch()
        self.step_s, self.progressed, self.images = self.moved - before, time.time(), images


class Preempted(Exception):
    """All ranks stopped at one step because one was asked to; nothing is lost."""

    def __init__(self, signal: str, saved: int | None) -> None:
        self.saved = saved
        what = "nothing new to save" if saved is None else f"saved at {saved:,} images"
        super().__init__(f"stopped by {signal}, {what}")
