"""States of runs and rows in one or two words: what has a final score, what still trains, waits, failed or was skipped.

They are those under one protocol, in whose table a run stands, or under all that score it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.board.read import Run
from selfguide.spec.records import EvaluationRecord


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A state in one or two words, and what there is to say about it."""

    kind: str  # final | pending | training | failed | skipped
    text: str
    count: int | None = None  # of snapshots, or of the row's runs
    detail: str = ""

    @property
    def label(self) -> str:
        return self.text if self.count is None else f"{self.count} {self.text}"


def chips(run: Run, protocol: str | None = None) -> tuple[Chip, ...]:
    """The state of the run, then what its evaluations still owe: under one protocol, or under all that score it."""
    waits = run.waits(protocol)
    found = [_training(run, _scored(_under(run, protocol)), waits)]
    if waits:
        found.append(Chip(kind="pending", text="to score", count=len(waits), detail=_at(waits)))
    elsewhere: dict[str, list[EvaluationRecord]] = defaultdict(list)
    for record in unscored(run, protocol):
        own = protocol is None or record.protocol_key in ("", protocol)
        # one that is tried again waits
        if not own or record.images not in waits:
            elsewhere["" if own else f" by {record.metric}"].append(record)
    for where, failed in sorted(elsewhere.items()):
        found.append(_left("failed", f"not scored{where}", failed))
    if skipped := _without_score(run, protocol, "skipped"):
        found.append(_left("skipped", "skipped", skipped))
    return tuple(found)


def _left(kind: str, text: str, records: Sequence[EvaluationRecord]) -> Chip:
    """A chip that counts snapshots, and says for each reason of which."""
    reasons: dict[str, set[int]] = defaultdict(set)
    for record in records:
        reasons[record.message].add(record.images)
    details = (f"{_at(images)}: {why}" for why, images in reasons.items())
    count = len({(record.images, record.protocol_key) for record in records})
    return Chip(kind=kind, text=text, count=count, detail="; ".join(details))


def badge(words: str) -> Chip:
    """What a net did for the model before, by which the row has no rank."""
    return Chip(kind="failed", text=words, detail="not ranked: the score is measured in that net")


def unscored(run: Run, protocol: str | None = None) -> tuple[EvaluationRecord, ...]:
    """The failed evaluations of snapshots that no attempt could score, by one protocol or by all that score the run.

    With those of other protocols under which nothing of the run is scored, whose tables it does not stand in.
    """
    found = _without_score(run, protocol, "failed")
    if protocol is None or all(r.status != "failed" for r in run.own):
        return found
    tables = {r.protocol_key for r in run.own if r.done} | {"", protocol}
    return (
        *found,
        *(r for r in _without_score(run, None, "failed") if r.protocol_key not in tables),
    )


def _without_score(run: Run, protocol: str | None, status: str) -> tuple[EvaluationRecord, ...]:
    """The newest record of that status of each snapshot, by each protocol where several score the run."""
    own = _under(run, protocol)
    if all(r.status != status for r in own):
        return ()
    several = run.config is not None and len(run.config.scored_by) > 1
    every, scored = _scored(own), {(r.images, r.protocol_key) for r in own if r.done}
    found = {
        (r.images, r.protocol_key if several else ""): r
        for r in sorted(own, key=lambda r: (r.images, r.attempt, r.time))
        if r.status == status
    }
    return tuple(
        r
        for (images, key), r in found.items()
        # earlier records name no protocol where they failed
        if ((images, key) not in scored if key else images not in every)
    )


def _under(run: Run, protocol: str | None) -> tuple[EvaluationRecord, ...]:
    return tuple(r for r in run.own if protocol is None or r.protocol_key in ("", protocol))


def _scored(records: Iterable[EvaluationRecord]) -> set[int]:
    return {r.images for r in records if r.done}


def _at(images: Iterable[int]) -> str:
    return "at " + ", ".join(f"{n:,}" for n in sorted(images)) + " images"


# colour of the words that `launcher.runs` says, too
_KINDS = {
    "running": "training",
    "evaluating": "training",
    "finished": "training",
    "failed": "failed",
}


def _training(run: Run, scored: set[int], waits: Sequence[int]) -> Chip:
    share = f"{run.seen:,} of {run.images:,} images"
    if run.images in scored:
        return Chip(kind="final", text="final", detail=share)
    # how many snapshots wait, or cannot be scored, is in chips of their own
    final = run.state.word == "finished"
    reason = "no final score yet" if run.images in waits else ""
    detail = "; ".join(filter(None, [share, reason if final else run.state.reason]))
    kind = _KINDS.get(run.state.word, "pending")
    return Chip(kind=kind, text=run.state.word, detail=detail)


def of_row(runs: Sequence[Run], protocol: str) -> tuple[Chip, ...]:
    """The chips of a row: those of its only run, else how many runs or snapshots are in each state."""
    if len(runs) == 1:
        return chips(runs[0], protocol)
    found: dict[str, list[tuple[Run, Chip]]] = defaultdict(list)
    for run in runs:
        for chip in chips(run, protocol):
            found[chip.text].append((run, chip))
    return tuple(
        Chip(
            kind=of[0][1].kind,
            text=text,
            count=sum(chip.count or 1 for _, chip in of),
            detail="; ".join(f"seed {run.seed}: {chip.detail}" for run, chip in of),
        )
        for text, of in found.items()
    )
