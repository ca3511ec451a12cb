"""Whether an attempt hangs, and which rank is to blame: pure, over what is known of each rank at one moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from selfguide.spec.config import ClusterConfig

# a step that takes as many median steps is none any more
STEPS = 10
# a rank that misses as many heartbeats says nothing any more
BEATS = 3
# sections of a start, in their order; None of a rank that has not said anything yet
_BEFORE = (None, "loading", "joining", "starting")
# heartbeats within the limit of a step
BEATS_OF_LIMIT = 6


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds without progress after which an attempt hangs, by what its ranks do."""

    step: float
    start: float
    data: float
    save: float
    evaluation: float

    @classmethod
    def of(cls, cluster: ClusterConfig) -> Limits | None:
        """The limits of a config; None where nothing is to be watched."""
        if cluster.hang_step_s is None:
            return None
        return cls(
            step=cluster.hang_step_s,
            start=cluster.hang_start_s,
            data=cluster.hang_data_s,
            save=cluster.hang_save_s,
            evaluation=cluster.hang_evaluation_s,
        )

    @property
    def beat_s(self) -> float:
        """Seconds between heartbeats that tell within the limit of a step who is silent."""
        return min(10.0, self.step / BEATS_OF_LIMIT)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of one rank that has not ended."""

    rank: int
    # as its last heartbeat has it; None where there was none
    section: str | None = None
    images: int | None = None
    # that it has entered
    collectives: int | None = None
    # of its last step, 0 before the first
    step_s: float = 0.0
    # since it last made progress, and since it last said anything
    quiet_s: float
    silent_s: float
    # by a signal, as the kernel says; of other nodes' ranks nobody knows
    stopped: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The rank to blame, and where it was."""

    # hang: all others wait for it; killed: it was cut off from its scheduler
    kind: Literal["hang", "killed"] = "hang"
    rank: int
    section: str | None
    images: int | None
    message: str


def judge(ranks: Collection[Seen], limits: Limits, median_step_s: float = 0.0) -> Verdict | None:
    """Returns who is to blame where no rank makes progress for longer than is allowed; None where all may be well.

    Args:
        ranks: all that have not ended.
        median_step_s: of the steps so far, 0 before the first.
    """
    if not ranks or min(each.quiet_s for each in ranks) <= _step(limits, median_step_s):
        return None
    suspect = _behind(ranks, limits)
    others = [each for each in ranks if each is not suspect]
    speaking = [each for each in others if speaks(each, limits)]
    # one that went silent may have begun something else since; those that wait for it say what
    witnesses = speaking if speaking and not speaks(suspect, limits) else [suspect]
    # whatever a stopped process was at, it does not do it any more
    look = [suspect] if suspect.stopped else witnesses
    if suspect.quiet_s <= max(allowed(each, limits, median_step_s) for each in look):
        return None
    section = Counter(each.section for each in witnesses).most_common(1)[0][0]
    images = max((each.images for each in ranks if each.images is not None), default=None)
    return Verdict(
        rank=suspect.rank,
        section=section,
        images=images,
        message=_sentence(suspect, others, section, limits),
    )


def allowed(seen: Seen, limits: Limits, median_step_s: float) -> float:
    """Returns how many seconds a rank may make no progress in what it does."""
    step = _step(limits, median_step_s)
    if seen.stopped or (seen.section == "train" and seen.step_s):
        return step
    limit = {
        "data": limits.data,
        "snapshot": limits.save,
        "checkpoint": limits.save,
        "done": limits.save,
        "evaluate": limits.evaluation,
    }
    # loading, joining, starting, compile, and a first step, which compiles
    return max(limit.get(seen.section or "", limits.start), step)


def _step(limits: Limits, median_step_s: float) -> float:
    return max(limits.step, STEPS * median_step_s)


def speaks(seen: Seen, limits: Limits) -> bool:
    """Whether a rank's process is alive enough to say what it is at."""
    return not seen.stopped and seen.silent_s <= BEATS * limits.beat_s


def _behind(ranks: Collection[Seen], limits: Limits) -> Seen:
    """The rank that has come least far.

    A process that says nothing any more is behind whatever it last said. Of the others the one is that entered the
    fewest collectives: those who wait for it are in the next. Where that does not tell them apart, as before ranks are
    joined, section, images and time do.
    """
    counted = all(each.collectives is not None for each in ranks if each.section is not None)

    def place(seen: Seen) -> tuple[bool, bool, int, int, int, float, int]:
        collectives = (seen.collectives or 0) if counted and seen.section is not None else -1
        begun = _BEFORE.index(seen.section) if seen.section in _BEFORE else len(_BEFORE)
        images = -1 if seen.images is None else seen.images
        silent = not speaks(seen, limits)
        return not seen.stopped, not silent, collectives, begun, images, -seen.quiet_s, seen.rank

    return min(ranks, key=place)


def _sentence(suspect: Seen, others: Sequence[Seen], section: str | None, limits: Limits) -> str:
    parts = [f"no progress for {suspect.quiet_s:.0f} s in section {section}"]
    if suspect.section is None:
        parts.append("it has not said anything since the job began")
    elif suspect.stopped:
        parts.append("it is stopped by a signal (SIGSTOP)")
    elif not speaks(suspect, limits):
        parts.append(
            f"it has not said anything for {suspect.silent_s:.0f} s: its process is stopped, C code holds the "
            "interpreter's lock, or its node is gone"
        )
    waiting = [
        each.rank
        for each in others
        if None not in (each.collectives, suspect.collectives)
        and (each.collectives or 0) > (suspect.collectives or 0)
    ]
    if waiting:
        wait = f"rank {waiting[0]} waits" if len(waiting) == 1 else f"{len(waiting)} ranks wait"
        parts.append(f"it did not enter the collective in which {wait}")
    elif len(parts) == 1 and others:
        parts.append("no rank is behind the others")
    return "; ".join(parts)
