"""Why a run stopped, in a sentence or two: the cause, what followed by itself, and what a person may do."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from launcher.reconcile.attempts import Cause
from launcher.reconcile.evaluations import unscorable
from launcher.reconcile.restart import next_attempt
from launcher.reconcile.state import Word, state
from launcher.reconcile.timeline import located, replayed_h, resumed
from launcher.reconcile.view import RunView

# kinds of causes that may well come again while nobody does anything
_TO_MEND = ("user", "stop", "memory", "storage", "numeric", "error")
_NOW: dict[Word, str] = {
    "new": "the run has no attempt yet",
    "queued": "the run waits for its turn",
    "running": "the run works",
    "evaluating": "the run waits for its scores",
    "finished": "the run has finished",
    "failed": "the run has stopped",
    "cancelled": "the run is cancelled",
}


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """A cause in a sentence or two."""

    # the cause, with its rank and node
    why: str
    # what followed by itself
    followed: str
    # what a person may do: a sentence, and a command where one helps
    advice: str
    command: str | None = None

    def __str__(self) -> str:
        return f"{self.why}; {self.followed}. {self.advice}"


def conclude(view: RunView, found: Cause | None) -> Conclusion:
    """Returns in words what `verdict` found, what followed by itself, and what a person may do."""
    run, whole = shlex.quote(str(view.folder.root)), state(view)
    word = whole.word
    why = "nothing went wrong" if found is None else _why(found)
    if word == "unknown":
        return Conclusion(
            why=why,
            followed="what it does now is unknown, since no cluster answers, or its jobs are on another machine",
            advice="Ask again where the cluster answers:",
            command=f"python -m launcher.why {run}",
        )
    followed = _followed(view, found, word)
    if word == "finished" and whole.reason:
        retry = " --retry" if unscorable(view) else ""
        return Conclusion(
            why=why,
            followed=f"{followed}, {whole.reason}",
            advice="To score what has no score:",
            command=f"python -m launcher.evaluate {run}{retry}",
        )
    if word in ("queued", "running", "evaluating", "finished"):
        return Conclusion(why=why, followed=followed, advice="There is nothing to do.")
    if word == "new":
        return Conclusion(why=why, followed=followed, advice="Submit it again.")
    onwards = "to go on from the newest checkpoint:" if view.checkpoints else "to begin once more:"
    mend = found is not None and found.kind in _TO_MEND
    advice = f"When that is mended, {onwards}" if mend else onwards.capitalize()
    return Conclusion(
        why=why, followed=followed, advice=advice, command=f"python -m launcher.resume {run}"
    )


def _followed(view: RunView, found: Cause | None, word: Word) -> str:
    """What followed by itself, or follows."""
    if found is None:
        return _NOW[word]
    newest = view.attempts[-1]
    if found.attempt < newest.number:
        after = next(at for at in view.attempts if at.number == found.attempt + 1)
        begun = "somebody submitted" if after.by_hand else "by itself followed"
        return f"{begun} attempt {after.number}{resumed(view, after, replayed_h(view))}, and {_NOW[word]}"
    following = next_attempt(view)
    if following.action == "stop":
        return f"nothing follows by itself: {following.reason}"
    if word == "queued":
        return f"attempt {newest.number + 1} waits for its turn"
    return "nothing follows by itself here"


def _why(found: Cause) -> str:
    place = f" (in section {found.section}" if found.section else ""
    place += f" at {found.images:,} images" if place and found.images is not None else ""
    place += ")" if place else ""
    return f"attempt {found.attempt} ended ({found.kind}): {located(found)}{place}"
