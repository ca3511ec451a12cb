"""What of a run somebody who does not look wants to hear of: three things, each once."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from launcher.reconcile.attempts import ASKED, cause, training_state
from launcher.reconcile.evaluations import newest_score, unscored
from launcher.reconcile.restart import next_attempt
from launcher.reconcile.state import state
from launcher.reconcile.view import RunView


@dataclass(frozen=True)
class News:
    """A message; no second one of its key is sent."""

    key: str
    title: str
    text: str


def news(view: RunView, goes_on: bool = True) -> News | None:
    """Returns what there is to say of a run whose view was read with its history; None where there is nothing.

    It has finished and nothing more is scored, it goes no further by itself, or it has failed for the first time and
    goes on. Preemptions, time limits and cancellations are nothing new.

    Args:
        goes_on: whether a next attempt is started here by anybody; on one machine it is not.
    """
    at, name = view.newest, f"{view.experiment} {view.folder.root.name}"
    if at is None or at.cancelled:
        return None
    if view.finished:
        return None if unscored(view) else _finished(view, name)
    following = next_attempt(view)
    given_up = following.action == "stop" and following.kind
    if given_up or (not goes_on and training_state(view) == "gone"):
        why = following.reason or state(view).reason
        command = f"python -m launcher.why {shlex.quote(str(view.folder.root))}"
        text = f"{why}\nIt goes no further by itself: see `{command}`."
        return News(f"stopped-{at.number}", f"{name} stopped after {_attempts(view)}", text)
    over = view.attempts if following.action == "start" else view.attempts[:-1]
    causes = [(each.number, cause(each)) for each in over]
    fell = [each for each in causes if each[1].kind not in (*ASKED, "ok")]
    if not fell:
        return None
    number, first = fell[0]
    text = f"Attempt {number} ended ({first.kind}): {first.message}\nThe run goes on by itself."
    return News("failed-once", f"{name} failed, and goes on", text)


def _finished(view: RunView, name: str) -> News:
    score, about = newest_score(view), state(view).reason
    lines = [f"{score.metric} {score.score:.4g} at {score.images:,} images"] if score else []
    lines += [about] if about else []
    lines.append(f"{view.images:,} images in {_attempts(view)}; {view.folder.root}")
    return News(f"finished-{view.images}", f"{name} finished", "\n".join(lines))


def _attempts(view: RunView) -> str:
    return f"{view.tries} attempt{'s' if view.tries > 1 else ''}"
