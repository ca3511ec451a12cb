"""`cluster=`: where jobs run. Experiments never name a partition: this profile does. No part of it is identity."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from selfguide.spec.config.laws import AtLeast, Minutes, Positive
from shards.errors import UserError

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "SELFGUIDE_NOTIFY")

# options of sbatch that a key of its own decides
_KEYS = {
    "account": "cluster.account",
    "comment": "cluster.comment",
    "constraint": "cluster.constraint",
    "cpus-per-gpu": "cluster.cpus_per_task",
    "cpus-per-task": "cluster.cpus_per_task",
    "exclude": "cluster.exclude",
    "exclusive": "cluster.exclusive",
    "export": "cluster.environment",
    "export-file": "cluster.environment",
    "gpus": "cluster.gpus_per_node",
    "gpus-per-node": "cluster.gpus_per_node",
    "gpus-per-task": "cluster.gpus_per_node",
    "gres": "cluster.gres",
    "mem": "cluster.mem_gb",
    "mem-per-cpu": "cluster.mem_gb",
    "mem-per-gpu": "cluster.mem_gb",
    "no-requeue": "cluster.restart",
    "nodelist": "cluster.nodelist",
    "nodes": "nodes",
    "ntasks": "cluster.gpus_per_node",
    "ntasks-per-gpu": "cluster.gpus_per_node",
    "ntasks-per-node": "cluster.gpus_per_node",
    "partition": "cluster.partition",
    "qos": "cluster.qos",
    "requeue": "cluster.restart",
    "reservation": "cluster.reservation",
    "signal": "cluster.warn_s",
    "time": "cluster.timeout_min",
}
# and those by which the launcher finds, orders and follows its jobs
_OURS = {
    "array": "each job is one; `tools.shards encode --tasks` makes arrays",
    "begin": "submit later",
    "chdir": "jobs run in their code copy",
    "clusters": "SLURM_CONF says which cluster",
    "dependency": "it puts a run's jobs in order",
    "error": "logs are in the run's folder",
    "hold": "submit later",
    "input": "jobs read nothing",
    "job-name": "it names the run",
    "kill-on-invalid-dep": "it puts a run's jobs in order",
    "open-mode": "logs are in the run's folder",
    "output": "logs are in the run's folder",
    "parsable": "the answer of sbatch is read",
    "quiet": "the answer of sbatch is read",
    "test-only": "dry_run=true and `launcher.doctor` ask",
    "time-min": "the warning before the limit is reckoned from cluster.timeout_min",
    "wait": "follow=true waits",
    "wrap": "the batch script is the launcher's; lines for it are cluster.setup",
}
# options of srun by which a job's ranks are found and end together
_OUR_SRUN = (
    "cpus-per-task", "error", "kill-on-bad-exit", "label", "nodes", "ntasks", "ntasks-per-node", "output",
    "unbuffered", "wait",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Resources of each job, and how to ask the cluster for them."""

    kind: Literal["auto", "local", "slurm", "devcluster"]
    account: str | None = None
    # what a site wants to read in a job's comment; behind it stands the run's folder, by which jobs are found
    comment: str | None = None
    # features that training's nodes must have, as sbatch --constraint takes them
    constraint: str | None = None
    # what stands before Python on every rank, for the shell: `apptainer exec --nv --bind /project image.sif`
    container: str | None = None
    cpus_per_task: Annotated[int | None, AtLeast(1)] = None
    environment: dict[str, str] = field(default_factory=dict)
    # where jobs without a GPU run: watchers, and evaluations whose net needs none; none: where training does
    evaluation_partition: str | None = None
    evaluation_timeout_min: Annotated[int, AtLeast(1), Minutes()] = 120
    # nodes that no job may get
    exclude: str | None = None
    # whole nodes for training
    exclusive: bool = False
    # which kind of GPU, as the site calls it: --gpus-per-node=TYPE:N
    gpu_type: str | None = None
    # also the ranks per node; processes where there are no GPUs
    gpus_per_node: Annotated[int, AtLeast(1)] = 8
    # what is asked in place of --gpus-per-node, where a site wants that: gpu:h100:8
    gres: str | None = None
    # an attempt counts as hung, and is ended, where nothing moved for so many seconds. In a step: or for ten median
    # steps, where that is longer; null watches nothing
    hang_step_s: Annotated[float | None, Positive()] = 60.0
    # before the first step: joining, reading a checkpoint; and compiling
    hang_start_s: Annotated[float, Positive()] = 1800.0
    # waiting for images
    hang_data_s: Annotated[float, Positive()] = 1800.0
    # writing a snapshot or a checkpoint
    hang_save_s: Annotated[float, Positive()] = 1800.0
    # an evaluation that makes no samples
    hang_evaluation_s: Annotated[float, Positive()] = 1800.0
    mem_gb: Annotated[float | None, Positive()] = None
    # environment modules that jobs load first
    modules: tuple[str, ...] = ()
    # nodes that training must get; it may get others beside them
    nodelist: str | None = None
    partition: str | None = None
    # on a cluster, nodes are checked before an attempt trains, and one that is not well is refused
    preflight: bool = True
    # the Python of jobs where it is not the one that submits: a container's
    python: str | None = None
    qos: str | None = None
    request_gpus: bool = True
    reservation: str | None = None
    # what goes on with a run by itself when its job ends early. successor: a second job, which waits behind it;
    # requeue: the same job once more, which Slurm holds for two minutes; watcher: the run's watcher submits the next,
    # which is the only way on one machine; none: nothing does
    restart: Literal["successor", "requeue", "watcher", "none"] = "successor"
    # seconds that a run with min_nodes waits for all of its nodes before it goes on with fewer, and for which it trains
    # on these before it stops to go on with more
    fewer_nodes_after_s: Annotated[int, AtLeast(1)] = 60
    more_nodes_after_s: Annotated[int, AtLeast(1)] = 1800
    # any other long options of sbatch, for all jobs: {licenses: "scratch:1", mail-user: me@here, spread-job: true}
    sbatch: dict[str, str] = field(default_factory=dict)
    # a folder that each node has for itself, for temporary files: TMPDIR; the job's variables may stand in it
    scratch: str | None = None
    # lines of shell after the modules, before everything else of a batch script
    setup: tuple[str, ...] = ()
    # more options of srun, as pyxis has them: [--container-image=/images/sg.sqsh, "--container-mounts=/project"]
    srun: tuple[str, ...] = ()
    # in minutes, or as Slurm writes a time: 1-12:00:00
    timeout_min: Annotated[int, AtLeast(1), Minutes()] = 24 * 60
    # at least so many seconds before its time limit Slurm warns training; none: twice a save and a minute
    warn_s: Annotated[int | None, AtLeast(1)] = None

    @property
    def watcher_timeout_min(self) -> int:
        """Minutes of a watcher; it starts the next one itself.

        No longer than the other jobs of its partition, whose limit is often all that the partition allows.
        """
        return self.evaluation_timeout_min if self.evaluation_partition else self.timeout_min

    @property
    def sbatch_options(self) -> dict[str, str | bool]:
        """The free options of sbatch, True for one without a value; what is false or null is not given."""
        given = {name.replace("_", "-"): value for name, value in self.sbatch.items()}
        words = {name: value.lower() for name, value in given.items()}
        return {
            name: True if words[name] == "true" else value
            for name, value in given.items()
            if words[name] not in ("false", "none", "null")
        }

    @property
    def one_machine(self) -> bool:
        """Whether jobs run here, on disks that this process sees; the nodes of a cluster have disks of their own."""
        return self.kind == "local"

    @property
    def checks_nodes(self) -> bool:
        """Whether an attempt looks at its nodes first; on one machine there is no other to take."""
        return self.preflight and not self.one_machine

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
                f"{name} in the shell that submits, from which jobs inherit it, or keep it in your home: "
                "~/.aws, ~/.config/selfguide/notify"
            )
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(
                f"cluster.environment.{name} is no name of a variable; give letters, digits and _"
            )
    threads = cluster.environment.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch("[1-9][0-9]*", threads):
        raise UserError(
            f"cluster.environment.OMP_NUM_THREADS={threads} must be a whole number, 1 or more"
        )
    if cluster.comment and re.search(r"[|\n]", cluster.comment):
        raise UserError(
            f"cluster.comment={cluster.comment!r} holds what divides squeue's answers; give it without | and new lines"
        )
    _check_lines(cluster)
    _check_options(cluster)
    _check_gpus(cluster)


def _check_lines(cluster: ClusterConfig) -> None:
    """Refuses new lines in what becomes a line of a batch script: sbatch would read a directive in the next one."""
    given = {name: value for name, value in vars(cluster).items() if isinstance(value, str)}
    given |= {f"sbatch.{name}": value for name, value in cluster.sbatch.items()}
    for name, value in given.items():
        if re.search(r"[\n\r\0]", value):
            raise UserError(f"cluster.{name}={value!r} holds a new line: give it in one")


def _check_options(cluster: ClusterConfig) -> None:
    for name, value in cluster.sbatch_options.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
            raise UserError(
                f"cluster.sbatch.{name}: give a long option of sbatch without its dashes, such as mail-user"
            )
        if name in _OURS:
            raise UserError(f"cluster.sbatch.{name} is the launcher's own: {_OURS[name]}; drop it")
        key = _KEYS.get(name)
        # nodes that only others of this user may share: the key knows whole nodes alone
        if name == "exclusive" and value is not True and not cluster.exclusive:
            key = None
        if key:
            raise UserError(f"cluster.sbatch.{name} is decided by {key}; give that in its place")
    for option in cluster.srun:
        name = option.removeprefix("--").partition("=")[0]
        if not option.startswith("--") or name in _OUR_SRUN:
            why = "is the launcher's own" if name in _OUR_SRUN else "is no long option of srun"
            raise UserError(
                f"cluster.srun: {option!r} {why}; give such as 'cluster.srun=[--container-image=/images/sg.sqsh]'"
            )
    if cluster.scratch and re.search(r"[\"`\\\n]|\$\(", cluster.scratch):
        raise UserError(
            f"cluster.scratch={cluster.scratch!r} is a folder, in which variables such as $SLURM_JOB_ID may stand"
        )


def _check_gpus(cluster: ClusterConfig) -> None:
    for name in ("gpu_type", "gres"):
        if getattr(cluster, name) and not cluster.request_gpus:
            raise UserError(
                f"cluster.{name}={getattr(cluster, name)} is read with cluster.request_gpus=true only; drop it or take "
                "that"
            )
    if cluster.gpu_type and cluster.gres:
        raise UserError(
            f"cluster.gpu_type={cluster.gpu_type} and cluster.gres={cluster.gres} both ask for GPUs; drop one"
        )
    counts = re.findall(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)(?=,|$)", cluster.gres or "")
    if cluster.gres and sum(map(int, counts)) != cluster.gpus_per_node:
        raise UserError(
            f"cluster.gres={cluster.gres} does not ask for the {cluster.gpus_per_node} GPUs of cluster.gpus_per_node, "
            f"one a rank; give such as cluster.gres=gpu:{cluster.gpus_per_node}"
        )
