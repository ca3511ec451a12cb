"""The three jobs of a run: training on all ranks, the evaluation of one snapshot, the watcher that starts those.

Pure: a config and folders in, a `Job` out. A dry run shows the same jobs that a submission queues.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from launcher import attempt
from launcher.backends import Job
from launcher.backends.local import gpus
from launcher.folder import Attempt
from selfguide.spec.config import ClusterConfig, Config

NICE = 10  # training keeps its cores


def training(config: Config, at: Attempt, run_id: str) -> Job:
    cluster = config.cluster
    return Job(
        function=attempt.train,
        argument=str(at.root),
        folder=at.logs,
        code=at.code,
        name=f"sg-{run_id}-train",
        comment=str(at.run.root),
        nodes=config.nodes,
        tasks=cluster.gpus_per_node,
        gpus=cluster.gpus_per_node if cluster.request_gpus else 0,
        devices=training_devices(cluster),
        cpus_per_task=cluster.cpus_per_task,
        mem_gb=cluster.mem_gb,
        timeout_min=cluster.timeout_min,
        threads=_threads(cluster),
        environment=cluster.environment,
    )


def evaluation(config: Config, at: Attempt, run_id: str, request: Path) -> Job:
    """One rank that scores the snapshot named in `request`, on the code of attempt `at`."""
    cluster = config.cluster
    return Job(
        function=attempt.evaluate,
        argument=str(request),
        folder=request.parent,
        code=at.code,
        name=f"sg-{run_id}-eval",
        comment=str(at.run.root),
        gpus=0,  # fd_digits runs on the CPU, and would wait for a card that training holds
        cpus_per_task=cluster.cpus_per_task,
        mem_gb=cluster.mem_gb / cluster.gpus_per_node if cluster.mem_gb else None,
        timeout_min=cluster.evaluation_timeout_min,
        threads=_threads(cluster),
        nice=NICE,
        environment=cluster.environment,
    )


def watcher(
    config: Config, at: Attempt, run_id: str, entry: Callable[[str], None], after: str | None
) -> Job:
    """One CPU from the start of training, for as long as that may take; Slurm starts one at a time.

    No longer than training's own limit, which is often all that a partition allows. What is unscored when it ends
    is picked up by the next submission of the run.
    """
    cluster = config.cluster
    return Job(
        function=entry,
        argument=str(at.run.root),
        folder=at.root / "watch",
        code=at.code,
        name=f"sg-{run_id}-watch",
        comment=str(at.run.root),
        cpus_per_task=1,
        mem_gb=1 if cluster.mem_gb else None,
        timeout_min=cluster.timeout_min,
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
    return max(1, len(os.sched_getaffinity(0)) // cluster.gpus_per_node)
