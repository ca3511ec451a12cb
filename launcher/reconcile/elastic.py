"""Whether a run that may also train on fewer nodes should ask for fewer, or for more: pure, as all of `decide`.

Slurm is always asked for one number of nodes. A range would not do: with a number of tasks a node, sbatch derives the
number of tasks from the lower end, and then takes as many nodes, however many are idle (22.05).
"""

from __future__ import annotations

from typing import Literal

from launcher.reconcile.attempts import training_state
from launcher.reconcile.restart import ended, next_attempt
from launcher.reconcile.view import RunView


def resize(view: RunView) -> Literal["fewer", "more"] | None:
    """Returns whether to look for nodes for the job that waits, or for more than the newest attempt has.

    fewer: the attempt before is over, and the job that waits to follow it has found no nodes for a while. It takes what
    is there, all of them where that is possible by now.
    more: the newest attempt trains on fewer than the run asks for, and has done so for a while.
    """
    at, config = view.newest, view.config
    if at is None or config is None or not config.elastic or at.successor is None:
        return None
    if at.successor.state != "queued" or at.cancelled or view.finished:
        return None
    if training_state(view) == "running":
        began = at.began or view.time
        trains = at.progress.get("section") == "train" and at.node_count < config.nodes
        return "more" if trains and view.time > began + config.cluster.more_nodes_after_s else None
    following = next_attempt(view)
    since = max(
        ended(at) + following.after_s, float(at.successor.record.get("submitted", view.time))
    )
    waits = view.time - since > config.cluster.fewer_nodes_after_s
    return "fewer" if following.action == "start" and waits else None
