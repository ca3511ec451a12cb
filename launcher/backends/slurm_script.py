"""What a batch script of Slurm says of a job: where it may run, what it asks for, how its node is prepared."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Any

from launcher.backends.protocol import Job
from selfguide.spec.config import ClusterConfig


def python(site: ClusterConfig) -> str:
    """Returns what starts Python in a job, for the shell."""
    found = shlex.quote(site.python or sys.executable)
    return f"{site.container} {found}" if site.container else found


def parameters(site: ClusterConfig, job: Job) -> dict[str, Any]:
    """Returns what a job asks for in sbatch's own names, as Submitit's generator takes them, and no None."""
    # a dead rank ends the others, which would wait for it
    srun = ["--kill-on-bad-exit=1", "--wait=60"]
    exports = {name: shlex.quote(value) for name, value in job.environment.items()}
    # a user's own comes behind the job's code, and before what is inherited
    paths = [str(job.code), *filter(None, [job.environment.get("PYTHONPATH")])]
    exports["PYTHONPATH"] = f"{shlex.quote(':'.join(paths))}${{PYTHONPATH:+:$PYTHONPATH}}"
    if job.cpus_per_task:
        # since 22.05 srun does not take the job's
        srun.append(f"--cpus-per-task={job.cpus_per_task}")
        exports.setdefault("OMP_NUM_THREADS", str(job.cpus_per_task))
    gpus = f"{site.gpu_type}:{job.gpus}" if site.gpu_type else job.gpus
    singleton, after = job.singleton and "singleton", job.after and f"after:{job.after}"
    parameters = {
        "job_name": job.name,
        # the launcher finds its jobs by the end of it
        "comment": f"{site.comment} {job.comment}" if site.comment else job.comment,
        **requirements(site, job),
        "time": job.timeout_min,
        "nodes": job.nodes,
        "ntasks_per_node": job.tasks,
        "gpus_per_node": gpus if job.gpus and not site.gres else None,
        "gres": _gres(site, job) if job.gpus else None,
        "exclusive": True if job.exclusive else None,
        "cpus_per_task": job.cpus_per_task,
        "mem": f"{int(job.mem_gb * 1024)}MB" if job.mem_gb else None,
        "signal_delay_s": job.warn_s,
        "dependency": ",".join(each for each in (singleton, after) if each) or None,
        "stderr_to_stdout": True,
        # where one job is followed by another, only that one may go on with the run
        "additional_parameters": {
            **site.sbatch_options,
            **_place(site, job),
            "requeue" if job.requeue else "no-requeue": True,
        },
        "setup": _setup(site)
        + [f"export {name}={value}" for name, value in exports.items()]
        + [f"cd {shlex.quote(str(job.code))}"],
        "srun_args": [*srun, *site.srun],
        "teardown": _teardown(site, job),
    }
    given = {key: value for key, value in parameters.items() if value is not None}
    return {**given, "wckey": None}  # Submitit's default is a key that a site may not know


def _gres(site: ClusterConfig, job: Job) -> str | None:
    """What a site wants in place of --gpus-per-node, for as many GPUs as this job has: an evaluation has fewer."""
    if site.gres is None or job.gpus == site.gpus_per_node:
        return site.gres
    parts = (
        re.sub(r"(:\d+)?$", f":{job.gpus}", part, count=1) if part.startswith("gpu") else part
        for part in site.gres.split(",")
    )
    return ",".join(parts)


def _teardown(site: ClusterConfig, job: Job) -> list[str] | None:
    """Has Slurm start the job once more where the run goes on; a requeue ends this script."""
    if not job.requeue:
        return None
    # in the container that ranks of pyxis run in, or before which Python another one stands
    alone = ["srun", "--nodes=1", "--ntasks=1", *site.srun] if site.srun else []
    words = [shlex.join(alone), python(site), shlex.join(job.requeue)]
    return [
        "code=$?",
        f"{' '.join(word for word in words if word)} && scontrol requeue $SLURM_JOB_ID",
        "exit $code",
    ]


def requirements(site: ClusterConfig, job: Job) -> dict[str, str | None]:
    """Returns where a job may run and who pays, in Submitit's names."""
    apart = site.evaluation_partition if job.small else None
    return {
        "partition": apart or site.partition,
        "account": site.account,
        "qos": site.qos,
        "exclude": ",".join(each for each in (site.exclude, *job.exclude) if each) or None,
        # of the nodes that train
        "constraint": None if apart else site.constraint,
    }


def _place(site: ClusterConfig, job: Job) -> dict[str, str]:
    """The same where Submitit has no name for it."""
    apart = job.small and site.evaluation_partition
    asked = {
        "reservation": None if apart else site.reservation,
        # more nodes than a small job takes
        "nodelist": None if job.small else site.nodelist,
    }
    return {name: value for name, value in asked.items() if value}


def requested(site: ClusterConfig, job: Job) -> str:
    """Returns what a job asks for in the words of a config, for whoever reads why it was refused."""
    asked: dict[str, Any] = {f"cluster.{k}": v for k, v in requirements(site, job).items()}
    asked |= {f"cluster.{name}": value for name, value in _place(site, job).items()}
    asked |= {
        "nodes": job.nodes,
        "ranks per node": job.tasks,
        "GPUs per node": job.gpus or None,
    }
    return ", ".join(f"{key}={value}" for key, value in asked.items() if value is not None)


def _setup(site: ClusterConfig) -> list[str]:
    """Lines of a batch script by which a site prepares its nodes."""
    lines = []
    if site.modules:
        # a shell that is no login shell may not know the command
        lines.append("type module >/dev/null 2>&1 || . /etc/profile")
        lines.append(f"module load {shlex.join(site.modules)} || exit 1")
    lines += site.setup
    return [*lines, f'export TMPDIR="{site.scratch}"'] if site.scratch else lines
