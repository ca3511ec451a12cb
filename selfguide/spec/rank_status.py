"""What one rank is at: the trainer writes it, and threads beside it read it and ask it to stop."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

# class of the GPU-hours (`launcher ledger`) that each section's seconds belong to
_CLASSES = {
    "compile": "compile",
    "train": "train",
    "data": "train",
    "snapshot": "checkpoint",
    "checkpoint": "checkpoint",
    "done": "idle",
}


def class_of(section: str | None) -> str:
    """Returns the class of time that a section belongs to; what comes before training is `start`."""
    return _CLASSES.get(section or "", "start")


@dataclass
class RankStatus:
    """Of one process, shared by its threads; each field is written by one of them."""

    # loading, joining, starting, compile (a first step that compiles, or a later one while it does), train, data (a
    # step waits for its images), snapshot, checkpoint, done; evaluate; None elsewhere
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
    # called with an error that ends this rank, before anything waits on the way out
    fails: Callable[[BaseException], object] | None = None
    # when it last made progress, in seconds since 1970: a step, or another section
    progressed: float = field(default_factory=time.time)
    # seconds that the last step took
    step_s: float = 0.0
    # seconds of each class of time, from the first moment to the last progress, by the monotonic clock; replaced and
    # never changed, so that another thread reads one moment
    seconds: Mapping[str, float] = field(default_factory=dict)
    # of those of class train, seconds that it waited for data
    waited_s: float = 0.0
    # when the main thread last came by, by the monotonic clock
    moved: float = field(default_factory=time.monotonic)
    # returns how many collectives this rank has entered (`selfguide.distributed`); None before ranks are joined
    collectives: Callable[[], int | None] | None = None
    # seconds between heartbeats, and what asks for one before its time
    beat_s: float = 10.0
    due: threading.Event = field(default_factory=threading.Event)
    _counted: float = field(default_factory=time.monotonic)

    def start(self, images: int, *, compiles: bool = False) -> None:
        """Training goes on from so many images, all of them saved; the first step may compile."""
        self.images = self.saved = images
        self.enter("compile" if compiles else "train")

    def enter(self, section: str) -> None:
        """The main thread begins something else."""
        # between steps and waits for images it may change in every step
        if not {section, self.section} <= {"train", "data"}:
            self.due.set()
        self._count()
        self.section, self.progressed = section, time.time()
        self.touch()

    @contextlib.contextmanager
    def within(self, section: str) -> Iterator[None]:
        """The main thread does something else, and then goes on with what it was at."""
        before = self.section
        self.enter(section)
        yield
        if before is not None:
            self.enter(before)

    def touch(self) -> None:
        """The main thread came by."""
        self.moved = time.monotonic()

    def advance(self, images: int) -> None:
        """A step is done."""
        before = self.moved
        self.touch()
        self._count()
        self.step_s, self.progressed, self.images = self.moved - before, time.time(), images
        if self.section == "compile":
            self.section = "train"

    def compiles(self, begins: bool) -> None:
        """The compiler begins or ends within a step, as where guidance sets in; the first step compiles anyway."""
        if self.step_s and self.section == ("train" if begins else "compile"):
            self.enter("compile" if begins else "train")

    def _count(self) -> None:
        """All time since the last progress belongs to the section that ends, or goes on, here."""
        now, name = time.monotonic(), class_of(self.section)
        spent = self.seconds.get(name, 0.0) + now - self._counted
        self.seconds, self._counted = {**self.seconds, name: spent}, now


class Preempted(Exception):
    """All ranks stopped at one step because one was asked to; nothing is lost."""

    def __init__(self, signal: str, saved: int | None) -> None:
        self.saved = saved
        what = "nothing new to save" if saved is None else f"saved at {saved:,} images"
        super().__init__(f"stopped by {signal}, {what}")
