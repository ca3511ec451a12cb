"""`cluster=`: where jobs run. Experiments never name a partition: this profile does. No part of it is identity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from selfguide.spec.config.laws import AtLeast, Positive
from shards.errors import UserError

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Resources of each job, and how to ask the cluster for them."""

    kind: Literal["auto", "local", "slurm", "devcluster"]
    # also the ranks per node; processes where there are no GPUs
    gpus_per_node: Annotated[int, AtLeast(1)] = 8
    request_gpus: bool = True
    cpus_per_task: Annotated[int | None, AtLeast(1)] = None
    mem_gb: Annotated[float | None, Positive()] = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    timeout_min: Annotated[int, AtLeast(1)] = 24 * 60
    evaluation_timeout_min: Annotated[int, AtLeast(1)] = 120
    # Slurm: what goes on with a run by itself when its job ends early. successor: a second job, which waits behind it;
    # requeue: the same job once more, which Slurm holds for two minutes; none: nothing does
    restart: Literal["successor", "requeue", "none"] = "successor"
    # seconds that a run with min_nodes waits for all of its nodes before it goes on with fewer, and for which it trains
    # on these before it stops to go on with more
    fewer_nodes_after_s: Annotated[int, AtLeast(1)] = 60
    more_nodes_after_s: Annotated[int, AtLeast(1)] = 1800
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def one_machine(self) -> bool:
        """Whether jobs run here, on disks that this process sees; the nodes of a cluster have disks of their own."""
        return self.kind == "local"

    @property
    def promises_gpus(self) -> bool:
        """Whether every rank has a GPU for itself. The development cluster's may be made up."""
        return self.kind == "slurm" and self.request_gpus


def check_cluster(cluster: ClusterConfig, nodes: int) -> None:
    """Raises UserError where this cluster has no such nodes, or a secret would be written into the run folder."""
    if cluster.kind == "auto":
        raise UserError(
            "cluster=auto must be resolved first; choose cluster=local or cluster=slurm"
        )
    if cluster.one_machine and nodes > 1:
        raise UserError(
            f"nodes={nodes} with cluster=local: this is one machine; take cluster=slurm, or nodes=1"
        )
    for name in _SECRETS:
        if name in cluster.environment:
            raise UserError(
                f"cluster.environment.{name} would be written into the run's folder, where others read it; export "
                f"{name} in the shell that submits, from which jobs inherit it, or keep a profile in ~/.aws"
            )
