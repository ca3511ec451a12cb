"""A run in a world of random faults, over the pure decisions: no Slurm, no files, a thousand lives a second.

What is real here: `next_attempt`, `seen_by`, `submission`, `state` and the trainer's `prune`. The world around them
is small: two ranks, six images, a scheduler that may be silent, lose nodes and leave their ranks alive, four who act
on what they see: the job that waits behind training, the watcher, a user and one who cancels.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.folder import Attempt
from launcher.reconcile import decide
from launcher.reconcile.view import AttemptView, JobView, RunView
from selfguide.spec.run import RunFolder
from selfguide.training import retention
from shards import storage

RUN = RunFolder(Path("/runs/e/abc"))
ATTEMPTS = [Attempt(RUN.attempt(number)) for number in range(1, 200)]
TARGET, EVERY, KEEP = 6, 2, 2
IDENTITY = {"train": {"images": TARGET, "batch": 1}, "guidance": {"source": "none"}}
BOTH = frozenset("01")
SIGTERM = {"code": 143, "class": "signal", "message": "ended by SIGTERM"}
SAVED = {"code": 75, "class": "preempted", "message": "Preempted: stopped by SIGTERM"}
NOTHING = {"code": 76, "class": "preempted", "message": "ended by SIGTERM"}
CLASSES = ("user", "error", "memory", "storage", "hang", "numeric")
INFRASTRUCTURE = ("killed", "crash", "silent", "preempted", "limit", "outside", "node")
# those that end the run at once are rarer
FAULTS = (*3 * (*CLASSES[1:], *INFRASTRUCTURE), "user", "stop")


class World:
    """One run, from its submission to where nothing follows any more."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now, self.ids = 1000.0, 0
        # attempts that are over, and the parts of the newest
        self.past: list[AttemptView] = []
        self.newest: dict[str, Any] = {}
        # Slurm: the training job and the one behind it; None where it is gone. Its answers may fail
        self.job: str | None = None
        self.successor: str | None = None
        self.silent = False
        # number of the attempt that began last, and of those whose ranks live on, on nodes that were lost
        self.begun, self.zombies = 0, set[int]()
        self.images = 0
        self.checkpoints: list[int] = []
        self.snapshots: dict[int, dict[str, Any]] = {}
        self.cancelled = False
        self.faults = self.chance.randrange(9)
        self.hands = self.chance.randrange(3)
        # sometimes no second job may wait
        self.limited = self.chance.random() < 0.2

    # ---- what is seen ----

    def view(self) -> RunView:
        attempts = (*self.past, self.attempt()) if self.newest else ()
        return RunView(
            folder=RUN,
            time=self.now,
            id="abc",
            experiment="e",
            name=None,
            hash="",
            identity=IDENTITY,
            images=TARGET,
            created=0.0,
            tries=len(attempts),
            attempts=attempts,
            snapshots=self.snapshots,
            checkpoints=tuple(self.checkpoints),
        )

    def attempt(self) -> AttemptView:
        facts = dict(self.newest)
        ending, second = facts.pop("ending"), facts.pop("second")
        record = {"kind": "slurm", "nodes": 1, "tasks": 2, "id": facts.pop("id")}
        job = JobView(record=record, state=self.seen(self.job), ending=ending)
        behind = (
            JobView(record=record | {"id": second}, state=self.seen(self.successor))
            if second
            else None
        )
        return AttemptView(job=job, successor=behind, world=2, **facts)

    def seen(self, state: str | None) -> Any:
        return "unknown" if self.silent else state or "gone"

    # ---- what is done ----

    def open(self, job: str | None, by_hand: bool) -> None:
        """The next attempt, in a job that runs already or in a new one."""
        assert self.job is None, "no second attempt beside one that works"
        if self.newest:
            self.past.append(self.attempt())
        self.ids += 2
        # one that waits behind an older attempt is ended
        second = None if self.limited and self.chance.random() < 0.5 else f"{self.ids}"
        self.job, self.successor = "queued", "queued" if second else None
        self.newest = {
            "files": ATTEMPTS[len(self.past)],
            "opened": self.now,
            "id": job or f"{self.ids - 1}",
            "second": second,
            "by_hand": by_hand,
            "ending": {},
            "starts": frozenset(),
            "exits": {},
            "resumed_from": None,
            "cancelled": False,
            "cancel_done": False,
        }

    def begin(self) -> None:
        self.job = "running"
        self.newest["starts"] = BOTH
        self.begun = self.newest["files"].number
        if self.chance.random() < 0.95:
            self.images = max(self.checkpoints, default=0)
            self.newest["resumed_from"] = self.images

    def step(self) -> None:
        """One image; what is due is published, which ends the job at the last."""
        if self.newest["resumed_from"] is None:
            return self.fall(SIGTERM, {"code": 1, "class": "error", "message": "OSError: no route"})
        self.may_publish(self.newest["files"].number)
        self.images += 1
        if self.images == TARGET:
            self.snapshots[TARGET] = {}
        if self.images % EVERY == 0 and self.images not in self.checkpoints:
            self.save()
        if self.images == TARGET:
            self.fall({"code": 0, "class": "ok"}, {"code": 0, "class": "ok"})
        return None

    def save(self) -> None:
        self.checkpoints = sorted({*self.checkpoints, self.images})
        resumable = self.checkpoints[-1]
        KEPT.images = self.checkpoints
        retention.prune(RUN.checkpoints, KEEP)
        assert resumable in self.checkpoints, "what an attempt would resume from was deleted"

    def may_publish(self, number: int) -> None:
        """Asserts that no other attempt has the right to publish that this one has."""
        able = {each for each in {*self.zombies, self.newest["files"].number} if each >= self.begun}
        assert able == {number}

    def fall(self, *exits: Mapping[str, Any] | None, **ending: Any) -> None:
        """The job ends; each rank leaves this record, or none."""
        where = {"time": self.now, "images": self.images, "section": "train"}
        self.newest["exits"] = {
            str(rank): {"message": "", **where, **record}
            for rank, record in enumerate(exits)
            if record is not None
        }
        self.newest["ending"] = ending
        self.job = None

    def fault(self, kind: str) -> None:
        self.faults -= 1
        trains = self.job == "running"
        if kind in CLASSES and trains:
            self.fall(SIGTERM, {"code": 1, "class": kind, "message": f"{kind}: it fell"})
        elif kind == "stop" and trains:
            self.fall(SIGTERM, {"code": 93, "class": "error", "message": "no more"})
        elif kind in ("killed", "crash", "silent") and trains:
            number = {"killed": 9, "crash": 11}.get(kind)
            self.fall(SIGTERM, None, **({"signals": {"1": number}} if number else {}))
        elif kind == "node" and trains:
            self.zombies.add(self.newest["files"].number)
            self.fall(SIGTERM, None, state="NODE_FAIL")
        elif kind in ("preempted", "limit", "outside"):
            word = {"preempted": "PREEMPTED", "limit": "TIMEOUT", "outside": "CANCELLED"}[kind]
            saved = trains and self.newest["resumed_from"] is not None
            if saved and self.images not in self.checkpoints and self.images:
                self.save()
            record = SAVED | {"saved": self.images} if saved else NOTHING
            self.fall(*([record, record] if trains else []), state=word if word else None)

    def cancel(self) -> None:
        """Recorded first; the jobs end where the scheduler answers, else when somebody comes by again."""
        self.cancelled = self.newest["cancelled"] = True
        self.newest["cancel_done"] = False
        self.complete_cancel()

    def complete_cancel(self) -> None:
        if not self.silent:
            if self.job == "running":
                self.fall(SAVED, SAVED, state="CANCELLED")
            self.job = self.successor = None
            self.newest["cancel_done"] = True

    def take_over(self) -> None:
        """The job behind training runs, once that is gone, and asks what follows."""
        seen = decide.seen_by(self.view(), self.newest["second"])
        assert seen is not None
        found = decide.next_attempt(seen)
        if found.action == "start":
            self.now = max(self.now, decide.ended(self.attempt()) + found.after_s)
            self.open(self.newest["second"], by_hand=False)
        elif found.action == "stop":
            self.successor = None

    def watch(self) -> None:
        """The watcher: what was cancelled ends, and what nobody waits for is followed."""
        view = self.view()
        if view.newest.cancelled and not view.newest.cancel_done:
            return self.complete_cancel()
        found, behind = decide.next_attempt(view), view.newest.successor
        if found.action == "start" and (behind is None or behind.state == "gone"):
            self.now = max(self.now, decide.ended(view.newest) + found.after_s)
            self.open(None, by_hand=False)
        return None

    def submit(self) -> None:
        self.hands -= 1
        if decide.submission(self.view(), IDENTITY).action == "resume":
            self.cancelled = False
            self.open(None, by_hand=True)

    # ---- life ----

    def live(self) -> str:
        """Plays until nothing follows; returns the last word."""
        self.open(None, by_hand=True)
        for _ in range(400):
            self.now += self.chance.random()
            self.happen()
            view = self.view()
            word = decide.state(view).word
            assert (word in ("finished", "evaluating")) <= (TARGET in self.snapshots)
            if self.cancelled:
                # followed by nothing but what a person asks for
                assert decide.next_attempt(view).action != "start"
            if not self.job and not self.successor and not self.silent and self.over(view):
                return self.ended(view)
        raise AssertionError("it never ends")

    def happen(self) -> None:
        dice = self.chance.random()
        if self.silent:
            # nobody's answer; ranks work on
            self.silent = dice < 0.7
        elif self.faults and dice < 0.1:
            self.faults -= 1
            self.silent = True
        if self.faults and 0.1 < dice < 0.35 and self.job:
            self.fault(self.chance.choice(FAULTS))
        elif self.faults and 0.35 < dice < 0.37:
            self.faults -= 1
            self.cancel()
        elif self.faults and 0.37 < dice < 0.42 and self.checkpoints:
            # found damaged when it is read, and set aside
            self.faults -= 1
            del self.checkpoints[self.chance.randrange(len(self.checkpoints))]
        elif self.hands and 0.42 < dice < 0.45:
            self.submit()
        elif self.zombies and 0.45 < dice < 0.5:
            self.zombies.pop()
        elif 0.5 < dice < 0.55:
            # it looks at any time, also at a run that works
            self.watch()
        elif self.job == "queued":
            self.begin()
        elif self.job == "running":
            self.step()
        elif self.successor and (not self.silent or dice < 0.6):
            self.take_over()
        else:
            self.watch()

    def over(self, view: RunView) -> bool:
        left = self.cancelled and not self.newest["cancel_done"]
        return decide.next_attempt(view).action == "stop" and not left

    def ended(self, view: RunView) -> str:
        word = decide.state(view).word
        assert word in decide.ENDED
        assert (word == "finished") == (TARGET in self.snapshots)
        assert (word == "cancelled") == (self.cancelled and word != "finished")
        return word


class Kept:
    """A folder of checkpoints without files, for the trainer's own `prune`."""

    def __init__(self) -> None:
        self.images: list[int] = []

    def list(self, folder: storage.Url) -> list[str]:
        mine = str(folder) == str(RUN.checkpoints)
        return [f"img-{images:09d}" for images in self.images] if mine else []

    def delete(self, folder: storage.Url) -> None:
        self.images.remove(int(Path(folder).name[4:]))


KEPT = Kept()


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "list", KEPT.list)
    monkeypatch.setattr(storage, "delete", KEPT.delete)
    monkeypatch.setattr(storage, "read_complete", lambda folder, **_: {"images": folder})


def lives(seeds: range) -> None:
    words = set()
    for seed in seeds:
        try:
            words.add(World(seed).live())
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert words == set(decide.ENDED)


def test_ten_thousand_lives_end_and_keep_every_law(no_files: None) -> None:
    lives(range(10_000))


@pytest.mark.faults
@pytest.mark.parametrize("start", range(0, 500_000, 100_000))
def test_a_hundred_thousand_lives_end_and_keep_every_law(no_files: None, start: int) -> None:
    lives(range(start, start + 100_000))
