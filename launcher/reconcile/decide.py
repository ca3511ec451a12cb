"""What a run's view means and what should be done next: everything that the commands ask, in one place.

Pure functions: no file, no scheduler and no clock, so that every command gives the same answer about the same view.
They stand in a module an idea: one attempt (`attempts`), what follows it (`restart`), the scores that are missing
(`evaluations`), the run in words (`state`), and what a submission does (`submission`).
"""

from launcher.reconcile.attempts import Cause, attempt_state, cause, failure, training_state
from launcher.reconcile.elastic import resize
from launcher.reconcile.evaluations import (
    Plan,
    Point,
    best_score,
    ending_of,
    evaluating,
    evaluations_stopped,
    evaluations_wanted,
    jobs_of,
    newest_score,
    point_of,
    points,
    protocol,
    skipped,
    unscorable,
    unscored,
    unscored_points,
    watched,
    watcher_missing,
)
from launcher.reconcile.restart import BUDGETS, Next, ended, next_attempt, seen_by
from launcher.reconcile.state import (
    ENDED,
    Progress,
    State,
    Summary,
    Word,
    counted,
    minutes,
    progress,
    state,
    summary,
)
from launcher.reconcile.submission import (
    Submission,
    applied_share,
    difference,
    extendable,
    same_but_images,
    submission,
)

__all__ = [
    "BUDGETS",
    "ENDED",
    "Cause",
    "Next",
    "Plan",
    "Point",
    "Progress",
    "State",
    "Submission",
    "Summary",
    "Word",
    "applied_share",
    "attempt_state",
    "best_score",
    "cause",
    "counted",
    "difference",
    "ended",
    "ending_of",
    "evaluating",
    "evaluations_stopped",
    "evaluations_wanted",
    "extendable",
    "failure",
    "jobs_of",
    "minutes",
    "newest_score",
    "next_attempt",
    "point_of",
    "points",
    "progress",
    "protocol",
    "resize",
    "same_but_images",
    "seen_by",
    "skipped",
    "state",
    "submission",
    "summary",
    "training_state",
    "unscorable",
    "unscored",
    "unscored_points",
    "watched",
    "watcher_missing",
]
