"""What a run loses where its jobs are ended: by a preemption, its time limit, a lost node.

A job that is preempted has GraceTime and KillWait until SIGKILL. Its ranks stop at SIGTERM as they do at the signal of
--signal, so it matters little which of them comes. The step under way is finished, and so is a save under way; then
they save. What does not fit in is lost, back to the newest checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from launcher.attempt.finding import Finding, Verdict
from launcher.backends.slurm_site import Site

# lost nodes are rare: so much of training may be done again
NODE_LOSS_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What of a run decides what it loses."""

    # seconds that a checkpoint takes, and how that is known
    save_s: float | None
    source: str = ""
    # seconds of a step, where it has trained
    step_s: float | None = None
    # steps between two checkpoints; None where no run is meant
    every: int | None = None
    batch: int = 1
    # cluster.restart
    restart: str = "successor"
    # a watcher looks after it
    watched: bool = True
    timeout_min: int = 0
    # seconds before the limit at which training is warned
    warn_s: int = 0


def preemption(site: Site, plan: Plan) -> Finding:
    """Returns whether a preemption costs steps, or the run."""
    if not site.preempt_mode:
        return _finding(
            "preemption",
            "warning",
            "nobody here says whether and how jobs are preempted",
            "ask on a login node",
        )
    if site.preempt_mode == "OFF":
        return _finding("preemption", "ok", "lossless: jobs of this partition are not preempted")
    if site.preempt_mode == "SUSPEND":
        return _finding("preemption", "ok", "lossless: a preempted job is suspended, and goes on")
    over = _ends(site, plan)
    if over:
        return over
    grace, wait = site.grace_s or 0, site.kill_wait_s or 0
    first = "the warning signal" if site.user_signal and grace else "SIGTERM"
    time = f"{grace + wait} s from {first} to SIGKILL (GraceTime {grace} s, KillWait {wait} s)"
    needed = math.ceil(2 * (plan.save_s or 0.0) + (plan.step_s or 0.0)) - wait
    return _fits(
        "preemption", grace + wait, time, plan, f"ask the site for a GraceTime of {needed} s, or "
    )


def outside(site: Site, plan: Plan) -> Finding:
    """Returns what an scancel or requeue by somebody costs, which leaves KillWait and no grace."""
    if site.kill_wait_s is None:
        return _finding(
            "scancel",
            "warning",
            "nobody here says how long an scancel leaves",
            "ask on a login node",
        )
    time = f"an scancel leaves {site.kill_wait_s} s (KillWait)"
    found = _fits("scancel", site.kill_wait_s, time, plan, "")
    # nobody's mistake: what it costs is bounded, and known
    return replace(found, verdict="ok", cure="")


def _fits(check: str, left_s: int, time: str, plan: Plan, ask: str) -> Finding:
    """Whether the step under way and two saves fit into the time that is left: one may have begun."""
    figures = {"left_s": left_s, "save_s": plan.save_s, "step_s": plan.step_s}
    if plan.save_s is None:
        text = f"lossless where a save takes less than {left_s / 2:.0f} s: {time}"
        return Finding(check=check, verdict="ok", text=text, figures=figures)
    step, takes = plan.step_s or 0.0, f"a save takes {plan.save_s:.1f} s ({plan.source})"
    if left_s >= 2 * plan.save_s + step:
        text = f"lossless: {time}, {takes}"
        return Finding(check=check, verdict="ok", text=text, figures=figures)
    text = f"{_loss(plan)}: {time}, {takes}"
    if left_s >= plan.save_s + step:
        text = f"lossless, but {_loss(plan)} where it comes while a checkpoint is being written: {time}, {takes}"
    cure = f"{ask}{_more_often(plan)}"
    return Finding(check=check, verdict="warning", text=text, cure=cure, figures=figures)


def _ends(site: Site, plan: Plan) -> Finding | None:
    """Where nothing follows a preempted job."""
    if plan.restart == "none":
        text = "loses the run: nothing goes on with it (cluster.restart=none)"
        return _finding("preemption", "bad", text, "give cluster.restart=successor")
    if plan.restart == "requeue" and site.preempt_mode == "CANCEL" and not plan.watched:
        text = "loses the run: a preempted job is cancelled here, not requeued, and no watcher starts another"
        return _finding("preemption", "bad", text, "give cluster.restart=successor")
    return None


def time_limit(site: Site, plan: Plan) -> Finding:
    """Returns whether training may run as long as it asks for, and is saved at its end."""
    limit, most = plan.timeout_min, site.max_time_min
    figures = {
        "timeout_min": limit,
        "max_time_min": most,
        "warn_s": plan.warn_s,
        "over_time_limit_min": site.over_time_limit_min,
    }
    if most is not None and limit > most:
        return Finding(
            check="time limit", verdict="bad", figures=figures,
            text=f"cluster.timeout_min={limit} is more than the {most} min that a job may have here",
            cure=f"give cluster.timeout_min={most}",
        )  # fmt: skip
    allowed = "without a limit of its own" if most is None else f"of at most {most} min"
    if plan.restart == "none":
        text = f"{limit} min in a partition {allowed}: it is saved, and ends there (cluster.restart=none)"
        return Finding(
            check="time limit",
            verdict="warning",
            text=text,
            cure="give cluster.restart=successor",
            figures=figures,
        )
    text = (
        f"lossless: warned {plan.warn_s} s before its end of {limit} min, in a partition {allowed}"
    )
    return Finding(check="time limit", verdict="ok", text=text, figures=figures)


def small_limit(site: Site, limit: int) -> Finding:
    """Returns whether evaluations and watchers may run as long as they ask for, on a partition of their own."""
    most = site.max_time_min
    figures = {"timeout_min": limit, "max_time_min": most}
    if most is None or limit <= most:
        text = f"evaluations and watchers have {limit} min, as their partition allows"
        return Finding(check="small jobs", verdict="ok", text=text, figures=figures)
    text = f"cluster.evaluation_timeout_min={limit} is more than the {most} min of cluster.evaluation_partition"
    cure = f"give cluster.evaluation_timeout_min={most}"
    return Finding(check="small jobs", verdict="bad", text=text, cure=cure, figures=figures)


def lost_node(site: Site, plan: Plan) -> Finding:
    """Returns what a lost node, or an end without any warning, costs."""
    notice = f", noticed after {site.node_timeout_s} s" if site.node_timeout_s is not None else ""
    if plan.every is None:
        text = f"a lost node loses what was trained since the newest checkpoint{notice}"
        return _finding("lost node", "ok", text)
    lost_s = plan.every * plan.step_s if plan.step_s else None
    text = f"a lost node {_loss(plan)}{notice}"
    figures = {"steps": plan.every, "seconds": lost_s, "node_timeout_s": site.node_timeout_s}
    if lost_s is not None and lost_s > NODE_LOSS_S:
        return Finding(
            check="lost node", verdict="warning", text=text, cure=_more_often(plan), figures=figures
        )
    return Finding(check="lost node", verdict="ok", text=text, figures=figures)


def limits(site: Site, plan: Plan) -> Finding:
    """Returns whether the jobs of one run may be queued together."""
    about = []
    if site.max_submit is not None:
        about.append(f"{site.max_submit} jobs of yours at a time")
    if site.max_array is not None:
        about.append(f"arrays of {site.max_array}")
    if site.submit_plugins:
        about.append(f"submissions go through {site.submit_plugins}")
    needed = 2 + 2 * plan.watched
    figures = {
        "max_submit": site.max_submit,
        "max_array": site.max_array,
        "submit_plugins": site.submit_plugins,
    }
    if site.max_submit is not None and site.max_submit < needed:
        cure = "give cluster.restart=requeue, which needs no second job, and evaluation=none, which needs no watcher"
        text = f"a run has up to {needed} jobs at a time (training, successor, watcher, evaluation): {'; '.join(about)}"
        return Finding(check="job limits", verdict="warning", text=text, cure=cure, figures=figures)
    return Finding(
        check="job limits",
        verdict="ok",
        text="; ".join(about) or "none that is known",
        figures=figures,
    )


def commands(site: Site) -> Finding:
    """Returns which of Slurm's commands answer, and what is not known without them."""
    version = f"Slurm {site.version}" if site.version else "Slurm"
    if "scontrol" in site.silent:
        text = "scontrol is not here or does not answer: limits and preemption are not known"
        return _finding("slurm", "warning", text, "run this on a login node")
    if not site.accounting or "sacctmgr" in site.silent:
        return _finding(
            "slurm",
            "ok",
            f"{version}, without accounting: causes and hours come from the run's own files",
        )
    return _finding("slurm", "ok", f"{version}, with accounting")


def _loss(plan: Plan) -> str:
    if plan.every is None:
        return "loses what was trained since the newest checkpoint"
    time = f" ({plan.every * plan.step_s / 60:.1f} min)" if plan.step_s else ""
    return f"loses up to {plan.every:,} steps{time}"


def _more_often(plan: Plan) -> str:
    if plan.every is None:
        return "save more often by train.checkpoint_every"
    return f"save more often: train.checkpoint_every={max(1, plan.every // 4) * plan.batch}"


def _finding(check: str, verdict: Verdict, text: str, cure: str = "") -> Finding:
    return Finding(check=check, verdict=verdict, text=text, cure=cure)
