"""The jobs of a run: training on all ranks, its successor, the evaluation of a snapshot, the watcher that starts those.

Pure: a config and folders in, a `Job` out. A dry run shows the same jobs that a submission queues.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launcher import attempt
from launcher.backends import Job
from launcher.backends.local import gpus
from launcher.folder import Attempt
from selfguide.spec.config import ClusterConfig, Config
from selfguide.spec.metrics import FEATURES
from selfguide.spec.sizes import footprint
from shards.errors import UserError

# end of the name of a watcher's job
WATCHER = "-watch"
NICE = 10  # training keeps its cores
# between the warning of a time limit and the end, beside the time to save: Slurm looks at limits now and then only
MARGIN_S = 60
# what a node writes of a first checkpoint, a guess
BYTES_PER_S = 200e6


def training(
    config: Config,
    at: Attempt,
    run_id: str,
    save_s: float | None = None,
    nodes: int | None = None,
) -> Job:
    """All ranks of an attempt.

    Args:
        save_s: seconds that the run's slowest checkpoint has taken so far; estimated from its size where there is none.
        nodes: on fewer than the config asks for.
    """
    cluster = config.cluster
    return Job(
        function=attempt.train,
        argument=str(at.root),
        folder=at.logs,
        code=at.code,
        name=f"sg-{run_id}-train",
        comment=str(at.run.root),
        nodes=nodes or config.nodes,
        tasks=cluster.gpus_per_node,
        gpus=cluster.gpus_per_node if cluster.request_gpus else 0,
        devices=training_devices(cluster),
        cpus_per_task=cluster.cpus_per_task,
        mem_gb=cluster.mem_gb,
        exclusive=cluster.exclusive,
        timeout_min=cluster.timeout_min,
        warn_s=warning(config, save_s),
        requeue=successor_command(at, "--requeue") if cluster.restart == "requeue" else (),
        threads=_threads(cluster),
        environment=cluster.environment,
    )


def successor(
    config: Config,
    at: Attempt,
    run_id: str,
    save_s: float | None = None,
    nodes: int | None = None,
) -> Job:
    """The job that waits behind the training job of attempt `at`, and goes on with the run where it ends early."""
    return replace(
        training(config, at, run_id, save_s, nodes),
        function=attempt.succeed,
        argument=str(at.run.root),
        folder=at.root / "successor",
        code=at.code.resolve(),
        singleton=True,
    )


def successor_command(at: Attempt, *options: str) -> tuple[str, ...]:
    """What Python is to do in a job of attempt `at` that wants to know whether its run goes on."""
    return ("-m", "launcher.successor", str(at.run.root), *options)


def warning(config: Config, save_s: float | None) -> int:
    """Returns how many seconds before its time limit Slurm has to warn a training job, so that it can save.

    Twice the time of a save, which may have begun when the warning comes, and a margin, or what the site wants where
    that is more; half of the limit at most.
    """
    return min(_wanted(config, expected_save_s(config, save_s)), 30 * config.cluster.timeout_min)


def check_limit(config: Config, save_s: float | None) -> None:
    """Raises UserError where the time limit of training on Slurm is not longer than its warning and one save more."""
    took = expected_save_s(config, save_s)
    warn_s = _wanted(config, took)
    needed, limit = warn_s + took, config.cluster.timeout_min
    if config.cluster.kind != "local" and 60 * limit <= needed:
        what = "may take" if save_s is None else "took"
        raise UserError(
            f"cluster.timeout_min={limit} leaves no time to train: a checkpoint {what} {took:.0f} s, and the job is "
            f"warned {warn_s} s before its end; give at least {int(needed // 60) + 1}"
        )


def _wanted(config: Config, took: float) -> int:
    return max(math.ceil(2 * took + MARGIN_S), config.cluster.warn_s or 0)


def expected_save_s(config: Config, measured: float | None) -> float:
    """Returns how long a checkpoint takes: as measured, else by its size."""
    if measured is not None:
        return measured
    return footprint(config).checkpoint / (BYTES_PER_S * (config.min_nodes or config.nodes))


def evaluation(
    config: Config,
    at: Attempt,
    run_id: str,
    request: Path,
    *,
    idle: bool = False,
    final: bool = False,
) -> Job:
    """The ranks that score the snapshot named in `request`, on the code of attempt `at`.

    fd_digits takes a CPU: it would wait for a card that training holds. Others take a GPU a rank.

    Args:
        idle: nothing trains on this machine, so that all of its GPUs are free; otherwise those beyond training's.
        final: of the run's last snapshot, which is scored when training has ended: its cores are free, unless
            cluster.environment.OMP_NUM_THREADS says otherwise.
    """
    cluster, ranks = config.cluster, config.evaluation.ranks
    features = FEATURES.get(config.evaluation.protocol)
    on_gpus = features is not None and features.on_gpus and cluster.request_gpus
    free = tuple(gpus())[0 if idle else cluster.gpus_per_node :]
    requested = ranks if on_gpus else 0
    return Job(
        function=attempt.evaluate,
        argument=str(request),
        folder=request.parent,
        code=at.code,
        name=f"sg-{run_id}-eval",
        comment=str(at.run.root),
        tasks=ranks,
        gpus=requested,
        devices=free[:ranks] if on_gpus and len(free) >= ranks else (),
        cpus_per_task=cluster.cpus_per_task,
        mem_gb=ranks * cluster.mem_gb / cluster.gpus_per_node if cluster.mem_gb else None,
        small=not requested,
        timeout_min=cluster.evaluation_timeout_min,
        threads=_cores() if final else _threads(cluster),
        nice=NICE,
        environment=cluster.environment,
    )


def watcher(
    config: Config, at: Attempt, run_id: str, entry: Callable[[str], None], after: str | None
) -> Job:
    """One CPU from the start of training; Slurm starts one at a time. Before its limit it starts the next one."""
    cluster = config.cluster
    return Job(
        function=entry,
        argument=str(at.run.root),
        folder=at.root / "watch",
        code=at.code,
        name=f"sg-{run_id}{WATCHER}",
        comment=str(at.run.root),
        cpus_per_task=1,
        mem_gb=1 if cluster.mem_gb else None,
        small=True,
        timeout_min=cluster.watcher_timeout_min,
        singleton=True,
        after=after,
        environment=cluster.environment,
        command=(sys.executable, "-m", "launcher.watch", str(at.run.root)),
    )


def training_devices(cluster: ClusterConfig) -> tuple[str, ...]:
    """GPUs of this machine for a local training: one a rank, or none where they do not suffice."""
    found = gpus()
    return tuple(found[: cluster.gpus_per_node]) if len(found) >= cluster.gpus_per_node else ()


def _threads(cluster: ClusterConfig) -> int:
    """Cores per local rank."""
    return max(1, _cores() // cluster.gpus_per_node)


def _cores() -> int:
    """Cores that this machine's jobs may use."""
    return len(os.sched_getaffinity(0))
