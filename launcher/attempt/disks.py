"""Whether a file system keeps the promises that a run folder lives on, asked by one process, or by two nodes at once.

A manifest appears by a hard link to a finished file, records by exclusive create or by a rename over the older one, and
submissions take turns by flock. Two nodes have to agree on all of it, and to see what the other one did.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.attempt.finding import Finding
from shards import storage
from shards.lock import lock
from shards.wait import wait_until

MIB = 1 << 20
# an fsync that takes longer makes each record of a run wait
SLOW_FSYNC_S = 1.0
# after so long a node that waits for a file gives up; Submitit's patience with a file that it knows of is 60 s
LATE_S = 5.0
PATIENCE_S = 90.0
ROUNDS = 20
FILES = 200


def alone(folder: Path, needed: int | None = None) -> list[Finding]:
    """Tests `folder`, which is new and empty, as one process; leaves files in it.

    Args:
        needed: bytes that a run would write here before it deletes any; None where nobody knows.
    """
    return [
        *_promises(
            "file system",
            [
                ("exclusive create", lambda: _exclusive(folder), "no run folder can be here"),
                ("rename over a file", lambda: _rename(folder), "no run folder can be here"),
                ("hard links", lambda: _link(folder), ""),
                ("flock", lambda: _flock(folder), ""),
            ],
        ),
        _speed(folder),
        *([_room(folder, needed)] if needed else []),
    ]


def _promises(check: str, tests: list[tuple[str, Callable[[], bool], str]]) -> Iterator[Finding]:
    """One finding for all that holds, and one for each that does not; with a text it is bad, else a warning."""
    held = []
    for what, test, bad in tests:
        why = "does not hold"
        try:
            if test():
                held.append(what)
                continue
        except OSError as error:
            why = error.strerror or str(error)
        yield Finding(
            check=check,
            verdict="bad" if bad else "warning",
            text=f"{what}: {why}" + (f"; {bad}" if bad else "; a run does without, more slowly"),
            cure="give runs= on another file system, or have it mounted with POSIX locks and links",
        )
    if held:
        yield Finding(check=check, verdict="ok", text=", ".join(held))


def _exclusive(folder: Path) -> bool:
    (folder / "exclusive").open("x").close()
    try:
        (folder / "exclusive").open("x").close()
    except FileExistsError:
        return True
    return False


def _rename(folder: Path) -> bool:
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    new.write_text("new")
    new.replace(old)
    return old.read_text() == "new" and not new.exists()


def _link(folder: Path) -> bool:
    source = folder / "linked"
    source.write_text("x")
    os.link(source, folder / "link")
    try:
        os.link(source, folder / "link")
    except FileExistsError:
        return source.stat().st_nlink == 2
    return False


def _flock(folder: Path) -> bool:
    with lock(folder / "lock") as first, lock(folder / "lock", seconds=0) as second:
        return first and not second


def _speed(folder: Path) -> Finding:
    """How long one small record takes to be safe, and how fast a checkpoint may be written."""
    syncs = [_write(folder / f"sync-{i}", 4096) for i in range(5)]
    took, size = statistics.median(syncs), 64 * MIB
    rate = size / _write(folder / "large", size) / 1e6
    slow = took > SLOW_FSYNC_S
    return Finding(
        check="disk speed",
        verdict="warning" if slow else "ok",
        text=f"fsync {1e3 * took:.1f} ms, {rate:,.0f} MB/s for {size // MIB} MiB from here",
        cure="records of a run wait for it: give runs= on a faster file system" if slow else "",
        figures={"fsync_s": took, "megabytes_per_s": rate},
    )


def _write(path: Path, size: int) -> float:
    """Seconds in which so many bytes are on the disk."""
    block = os.urandom(min(size, MIB))
    began = time.monotonic()
    with path.open("xb") as file:
        for _ in range(max(1, size // MIB)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return max(time.monotonic() - began, 1e-9)


def _room(folder: Path, needed: int) -> Finding:
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    return Finding(
        check="room",
        verdict="ok" if free >= needed else "bad",
        text=f"{free / 1e9:,.1f} GB are free, and a run takes {needed / 1e9:,.2f} GB for checkpoints and snapshots",
        cure=""
        if free >= needed
        else "make room, give another runs=, or keep fewer snapshots (train.keep_snapshots=4)",
        figures={"free": free, "needed": needed},
    )


@dataclass
class Pair:
    """Two processes on two nodes that know of each other by files in one folder."""

    folder: Path
    # 0 or 1
    me: int
    # longest that this one waited for what the other one had done already, as far as it can know
    timeout_s: float = PATIENCE_S

    def say(self, what: str, text: str = "") -> None:
        """Makes a file that the other one waits for."""
        storage.publish(str(self.folder / f"{what}.{self.me}"), text.encode())

    def heard(self, what: str, listing: bool = True) -> str:
        """Waits for a file of the other one; returns what it holds.

        Args:
            listing: look for it in the listing of the folder, which refreshes what a network file system remembers.

        Raises:
            TimeoutError: it did not come.
        """
        path = self.folder / f"{what}.{1 - self.me}"

        def there() -> bool:
            return path in set(self.folder.iterdir()) if listing else path.exists()

        if not wait_until(there, timeout_s=self.timeout_s, poll_s=0.001):
            raise TimeoutError(
                f"{path.name} of the other node was not seen in {self.timeout_s:.0f} s"
            )
        return path.read_text()

    def meet(self, what: str) -> None:
        """Returns when both are here."""
        self.say(what)
        self.heard(what)


def together(folder: Path, me: int, timeout_s: float = PATIENCE_S) -> list[Finding]:
    """Tests `folder` as one of two processes on two nodes, of which both call this; returns what 0 has found.

    It takes seconds where the nodes see each other at once, and up to some minutes where they do not.
    """
    pair = Pair(folder, me, timeout_s)
    try:
        pair.meet("here")
        seen, skew = _seen(pair)
        findings = [seen, skew, _winners(pair), _locked(pair), _replaced(pair)]
        pair.meet("done")
    except TimeoutError as error:
        findings = [
            Finding(
                check="two nodes",
                verdict="bad",
                text=str(error),
                cure="give runs= on a file system that all nodes share",
            )
        ]
    return [] if me else findings


def _seen(pair: Pair) -> tuple[Finding, Finding]:
    """How late a node sees what the other one made, and how far apart their clocks are."""
    trips: dict[bool, list[float]] = {True: [], False: []}
    skews: list[tuple[float, float]] = []
    began = time.monotonic()
    for listing in (True, False):
        for turn in range(ROUNDS):
            name = f"ping-{listing}-{turn}"
            if pair.me:
                if pair.heard(name, listing) == "enough":
                    break
                pair.say(name, repr(time.time()))
                continue
            # a slow file system has shown it after a few
            enough = turn > 2 and time.monotonic() - began > PATIENCE_S
            left, sent = time.monotonic(), time.time()
            pair.say(name, "enough" if enough else "")
            if enough:
                break
            there = float(pair.heard(name, listing))
            trip = time.monotonic() - left
            trips[listing].append(trip)
            skews.append((trip, there - (sent + trip / 2)))
    if pair.me:
        empty = Finding(check="two nodes", verdict="ok", text="")
        return empty, empty
    latest = {how: max(found) for how, found in trips.items()}
    late = max(latest.values()) > LATE_S
    trip, skew = min(skews)
    apart = abs(skew) > trip / 2 + 1.0
    return (
        Finding(
            check="two nodes",
            verdict="warning" if late else "ok",
            text=f"a node sees what another one made within {latest[True]:.3f} s in a listing, "
            f"{latest[False]:.3f} s by its name (there and back)",
            cure="commands wait for it; a mount with actimeo=1 or lookupcache=positive is faster"
            if late
            else "",
            figures={"listing_s": latest[True], "name_s": latest[False], "rounds": len(skews)},
        ),
        Finding(
            check="clocks",
            verdict="warning" if apart else "ok",
            text=f"the clocks of two nodes are {abs(skew):.3f} s apart (known to {trip / 2:.3f} s)",
            cure="have the site synchronise them: times in timelines are each node's own"
            if apart
            else "",
            figures={"skew_s": skew, "known_to_s": trip / 2},
        ),
    )


def _winners(pair: Pair) -> Finding:
    """Both make the same files at the same time, each file by the one way or the other: one of them must succeed."""
    mine = pair.folder / f"draft-{pair.me}"
    mine.write_text(str(pair.me))
    pair.meet("race")
    won = []
    for number in range(FILES):
        target = pair.folder / f"won-{number}"
        with contextlib.suppress(FileExistsError):
            if number % 2:
                os.link(mine, target)
            else:
                target.open("x").close()
            won.append(number)
    pair.say("won", ",".join(map(str, won)))
    theirs = {int(each) for each in pair.heard("won").split(",") if each}
    both, nobody = theirs & {*won}, FILES - len(theirs | {*won})
    well = not both and not nobody
    return Finding(
        check="one winner",
        verdict="ok" if well else "bad",
        text=f"of {FILES} files that two nodes made at once, {len(won)} and {len(theirs)} were won"
        + ("" if well else f", {len(both)} by both and {nobody} by nobody"),
        cure=""
        if well
        else "exclusive create must hold between nodes: give runs= on another file system",
        figures={"won": [len(won), len(theirs)], "both": len(both), "nobody": nobody},
    )


def _locked(pair: Pair) -> Finding:
    """One node holds a lock: the other must not get it before it is let go."""
    path = pair.folder / "lock-of-two"
    if pair.me:
        pair.heard("holds")
        with lock(path, seconds=0, required=False) as got:
            pair.say("tried", str(int(not got)))
        pair.heard("let go")
        with lock(path, seconds=10, required=False) as kept:
            pair.say("tried again", str(int(kept)))
    else:
        with lock(path, required=False) as kept:
            pair.say("holds")
            kept = pair.heard("tried") == "1" and kept
        pair.say("let go")
        kept = pair.heard("tried again") == "1" and kept
    return Finding(
        check="locks",
        verdict="ok" if kept else "warning",
        text="flock of one node holds against the other"
        if kept
        else "flock of one node does not hold against the other",
        cure=""
        if kept
        else "submit a run from one machine at a time, or have the file system mounted with flock",
    )


def _replaced(pair: Pair) -> Finding:
    """How late a node reads what another one has put in the place of a file that it had read."""
    path = pair.folder / "value"
    if not pair.me:
        storage.publish(str(path), b"1")
        pair.say("first")
        pair.heard("read")
        storage.publish(str(path), b"2", replace=True)
        pair.say("second")
        late = float(pair.heard("read again"))
    else:
        pair.heard("first")
        path.read_text()
        pair.say("read")
        pair.heard("second")
        began = time.monotonic()
        wait_until(lambda: path.read_text() == "2", timeout_s=pair.timeout_s, poll_s=0.001)
        late = time.monotonic() - began
        pair.say("read again", repr(late))
    slow = late > LATE_S
    return Finding(
        check="fresh reads",
        verdict="warning" if slow else "ok",
        text=f"a node reads what another one put in the place of a file after {late:.3f} s",
        cure="progress is shown late; a mount with actimeo=1 is faster" if slow else "",
        figures={"late_s": late},
    )
