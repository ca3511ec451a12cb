"""What submitting a run does to it: begin, join, resume or extend it, or nothing because it may not."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.reconcile.attempts import training_state
from launcher.reconcile.evaluations import startable, watched
from launcher.reconcile.state import State, state
from launcher.reconcile.view import RunView
from selfguide.spec.identity import digest
from selfguide.spec.schedules import switch_after


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a submission does to its run."""

    # new: the first attempt; resume: the next one; join: nothing, the run works or has finished; refuse: `reason`
    action: Literal["new", "resume", "join", "refuse"]
    reason: str = ""
    # the new target, where it extends the run
    extends_to: int | None = None
    # of a finished run: its watcher has to be started
    evaluate: bool = False


def submission(view: RunView | None, identity: Mapping[str, Any]) -> Submission:
    """Returns what submitting a run of this identity does; `view` is the run of its name, None where there is none."""
    if view is None:
        return Submission(action="new")
    if not same_but_images(view.identity, identity):
        return _refuse(
            f"run {view.folder.root.name} was begun with other settings: "
            f"{difference(view.identity, identity)}; set these back, or give name= another name"
        )
    asked = int(identity["train"]["images"])
    # the command that made the run goes on meaning it after an extension
    extends = asked not in (view.images, int(view.identity["train"]["images"]))
    current = state(view)
    if extends:
        return _extension(view, current, asked)
    if view.finished:
        return Submission(action="join", evaluate=startable(view) and not watched(view))
    if current.word == "unknown":
        return _refuse(f"run {view.id}: {_nobody_knows(view)}")
    # an attempt without a job: its submitter still holds the run's lock, which we take next, or it died
    if current.word in ("queued", "running") and view.newest and view.newest.job:
        return Submission(action="join")
    return Submission(action="resume")


def _extension(view: RunView, current: State, images: int) -> Submission:
    """Training on to more images, where nothing that was trained depends on how many there would be."""
    run = view.folder.root.name
    if images < view.images:
        return _refuse(
            f"train.images={images} is less than the {view.images} of run {run}, and a run can only be extended; "
            "choose another name for a shorter one"
        )
    # also of a run that has finished: its job may be writing the last checkpoint
    training = training_state(view) if view.newest and view.newest.job else "gone"
    if training == "unknown" and current.word != "cancelled":
        return _refuse(f"run {view.id}: {_nobody_knows(view)}")
    if training in ("queued", "running"):
        return _refuse(
            f"run {run} is {training} on its way to {view.images} images: extend it once its job has ended, or end it "
            f"first: python -m launcher.cancel {shlex.quote(str(view.folder.root))}"
        )
    if share := applied_share(view):
        return _refuse(
            f"run {run} cannot be extended to train.images={images}: {share}, so the longer run would have differed "
            "before; submit it as a new run, under another name or none"
        )
    return Submission(action="resume", extends_to=images)


def applied_share(view: RunView) -> str:
    """Returns which share of training has already decided something, in words; "" where none has.

    A share means another image count in a longer run: what was trained since would be another run's.
    """
    reached = max((*view.checkpoints, *view.published), default=0)
    batch, guidance = view.identity["train"]["batch"], view.identity["guidance"]
    if guidance["source"] == "online":
        switch = switch_after(guidance["switch"], view.images, batch)
        share = f"guidance.switch={guidance['switch']:g} of {view.images} images"
        if reached >= switch:
            return f"{share} was passed at {switch}"
        # the weight of L_SK grows linearly from 0 at the first step to the switch
        if reached > batch and guidance["weight"]:
            return f"{share} has set the weight of L_SK since the second step"
    train = view.identity["train"]
    if train.get("rate_decay") == "cosine":
        begin = train.get("decay_images") or train["warmup_images"]
        # the step that began there had the full rate in a run of any length
        if reached - batch > begin:
            return f"train.rate_decay=cosine has set the rate since {begin} of {view.images} images"
    late = view.identity.get("path", {}).get("uniform_after")
    # the last step began one batch before
    if late is not None and (reached - batch) / view.images >= late:
        return f"path.uniform_after={late:g} of {view.images} images was passed at {late * view.images:.0f}"
    return ""


def extendable(views: Sequence[RunView], identity: Mapping[str, Any]) -> RunView | None:
    """Returns the run, of those given, that differs from this identity in being shorter only and can be extended."""
    images = identity["train"]["images"]
    able = [
        view
        for view in views
        if same_but_images(view.identity, identity)
        and view.identity["train"]["images"] != images
        and (view.images == images or submission(view, identity).action == "resume")
    ]
    return max(able, key=lambda view: view.images, default=None)


def same_but_images(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities differ in the length of training at most."""
    first, second = (
        digest({**each, "train": {**each["train"], "images": None}}) for each in (one, other)
    )
    return first == second


def difference(old: Any, new: Any) -> str:
    """Returns "key was a and is b" for every leaf that differs, as both are in JSON; "" where none does."""
    return ", ".join(f"{key} was {before} and is {now}" for key, before, now in leaves(old, new))


def leaves(old: Any, new: Any, where: str = "") -> list[tuple[str, str, str]]:
    """Returns (key, before, now) of every leaf that differs, both in JSON."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(set(old) | set(new))
        below = [leaves(old.get(k), new.get(k), f"{where}.{k}" if where else k) for k in keys]
        return [leaf for each in below for leaf in each]
    before, now = (json.dumps(value, default=str) for value in (old, new))
    return [] if before == now else [(where, before, now)]


def _refuse(reason: str) -> Submission:
    return Submission(action="refuse", reason=reason)


def _nobody_knows(view: RunView) -> str:
    at = view.newest
    job = f" ({at.job.label})" if at and at.job else ""
    return (
        f"nobody can say whether attempt {view.tries}{job} still works; "
        "try again when its cluster or machine answers"
    )
