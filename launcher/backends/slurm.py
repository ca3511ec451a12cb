"""Slurm as a backend: Submitit writes and hands in the batch scripts, `squeue` and `scancel` do the rest.

Which Slurm is meant is a `Profile`: the one that this shell's commands reach, or the development cluster of this
machine. A site's partition, account and limits are facts of its file in `configs/cluster/`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.backends import (
    accounting,
    endings,
    history,
    slurm_nodes,
    slurm_queue,
    slurm_script,
    submitit_names,
)
from launcher.backends.protocol import (
    Ending,
    Job,
    Node,
    Record,
    Span,
    State,
    Waiting,
    clean,
    ignored,
    new_record,
    settled,
)
from launcher.backends.slurm_client import (
    ANSWER_S,
    PROFILES,
    Profile,
    answers,
    environment_of_process,
    run,
)
from selfguide.spec.config import ClusterConfig
from shards.errors import UserError
from shards.wait import wait_until

__all__ = ["PROFILES", "Profile", "Slurm", "answers"]

# until cancelled jobs have left the queue
GONE_S = 60.0
# what sbatch --test-only says of a job that no nodes fit, also where they are only out of service for now
_NO_NODES = "Requested node configuration is not available"
# of sbatch's failures, those after which it may have taken the job
_NO_ANSWER = re.compile(r"timed out|[Uu]nable to contact|Zero Bytes|[Cc]onnection")
# keys of a config that do what a variable of the shell would, by the end of its name
_KEYS = {
    "ACCOUNT": "cluster.account",
    "CLUSTERS": "SLURM_CONF",
    "COMMENT": "cluster.comment",
    "CONSTRAINT": "cluster.constraint",
    "CPUS_PER_TASK": "cluster.cpus_per_task",
    "EXCLUSIVE": "cluster.exclusive",
    "EXPORT": "cluster.environment",
    "GPUS_PER_NODE": "cluster.gpus_per_node",
    "GRES": "cluster.gres",
    "MEM_PER_NODE": "cluster.mem_gb",
    "NNODES": "nodes",
    "NODELIST": "cluster.nodelist",
    "NO_REQUEUE": "cluster.restart",
    "NTASKS_PER_NODE": "cluster.gpus_per_node",
    "PARTITION": "cluster.partition",
    "QOS": "cluster.qos",
    "REQUEUE": "cluster.restart",
    "RESERVATION": "cluster.reservation",
    "SIGNAL": "cluster.warn_s",
    "TIMELIMIT": "cluster.timeout_min",
}


@dataclass(frozen=True)
class Slurm:
    """Implements `Backend` for one Slurm: to submit by `cluster`, or to ask after jobs given to the one of `conf`."""

    kind: str
    cluster: ClusterConfig | None
    # the SLURM_CONF of the jobs' records; None where Slurm finds its configuration itself
    conf: str | None = None

    @property
    def profile(self) -> Profile:
        return PROFILES[self.kind]

    # a job may wait for the end of another
    queues = True

    @property
    def poll_s(self) -> float:
        return self.profile.poll_s

    def script(self, job: Job) -> str:
        command = submitit_names.command(slurm_script.python(self._site), job.folder)
        parameters = slurm_script.parameters(self._site, job)
        return submitit_names.script(command, job.folder, **parameters)

    def check(self, job: Job) -> list[str]:
        client = self._client()
        if shutil.which("sbatch", path=client.get("PATH")) is None:
            raise UserError(
                f"cluster={self.kind}: no sbatch on this machine; submit from a login node, or take cluster=local"
            )
        done = run(["sbatch", "--test-only"], client, stdin=self.script(job))
        if done is None:
            raise UserError(
                f"cluster={self.kind}: Slurm did not answer within {ANSWER_S:.0f} s; try again later"
            )
        if done.returncode:
            waits = ""
            if _NO_NODES in done.stderr:
                waits = slurm_nodes.waits_for(job, self._partitions(job), client)
            if waits:
                return [waits]
            reason = re.sub(r"(sbatch: |error: |allocation failure: )", "", done.stderr)
            reason = reason.strip().replace("\n", "; ")
            asked = slurm_script.requested(self._site, job)
            raise UserError(
                f"Slurm would refuse this job ({asked}): {reason}{slurm_nodes.partitions(client)}"
            )
        return []

    def free_nodes(self, job: Job) -> int:
        # `sbatch --test-only` would count the run's own waiting job as one that goes before
        return slurm_nodes.free(job, self._partitions(job), self._client())

    def submit(self, job: Job) -> Record:
        return self.submit_array([job])[0]

    def submit_array(self, jobs: Sequence[Job]) -> list[Record]:
        from submitit.core.utils import FailedJobError
        from submitit.slurm.slurm import SlurmExecutor

        class Executor(SlurmExecutor):
            """Submitit's, for any folder."""

            @property
            def _submitit_command_str(self) -> str:
                return submitit_names.command(self.python, self.folder)

        submitit_names.install()
        first, client = jobs[0], self._client()
        if shutil.which("sbatch", path=client.get("PATH")) is None:
            raise UserError(f"cluster={self.kind}: no sbatch on this machine")
        if inherited := client.get("PYTHONPATH"):
            # of the job that submits this one, where it runs from the same code
            paths = [path for path in inherited.split(os.pathsep) if path != str(first.code)]
            client["PYTHONPATH"] = os.pathsep.join(paths)
        first.folder.mkdir(parents=True, exist_ok=True)
        with environment_of_process(client):
            executor = Executor(
                first.folder, max_num_timeout=0, python=slurm_script.python(self._site)
            )
            executor.update_parameters(**slurm_script.parameters(self._site, first))
            conf = client.get("SLURM_CONF")
            record = new_record(self.kind, first) | {"conf": conf}
            try:
                try:
                    done = executor.map_array(first.function, [job.argument for job in jobs])
                except FailedJobError as error:
                    if not _NO_ANSWER.search(str(error)):
                        raise
                    self._withdraw(first)
                    done = executor.map_array(first.function, [job.argument for job in jobs])
            except FailedJobError as error:
                raise UserError(f"sbatch refused {first.name}: {error}") from error
            except BaseException:  # Ctrl-C, say, after Slurm took them and before it said so
                given = dataclasses.replace(self, cluster=None, conf=conf)
                given.cancel(given.strays(first.comment, first.name))
                raise
        return [record | {"id": each.job_id} for each in done]

    def _withdraw(self, job: Job) -> None:
        """Ends what Slurm took although it did not say so: such a job is known by the folder of its logs.

        Raises:
            UserError: it does not answer.
        """
        client, found = self._client(), {}

        def answers() -> bool:
            done = run(["squeue", "--me", "--noheader", "--Format=JobID:32,STDOUT:1024"], client)
            if done is None or done.returncode:
                return False
            rows = (line.split(None, 1) for line in done.stdout.splitlines())
            found.update({id: rest[0] for id, *rest in rows if rest})
            return True

        if not wait_until(answers, timeout_s=GONE_S, poll_s=1.0):
            raise UserError(
                f"cluster={self.kind}: Slurm does not say whether it took {job.name}: look at `squeue --me`, and "
                "submit again when it answers"
            )
        folders = (f"{job.folder}/", f"{submitit_names.escaped(job.folder)}/")
        taken = [id for id, log in found.items() if log.startswith(folders)]
        if taken:
            run(["scancel", *taken], client)

    def states(self, records: Sequence[Record], patience_s: float | None = None) -> list[State]:
        if self._taken_down:
            return ["gone"] * len(records)
        queue = slurm_queue.jobs(self._client(), patience_s, users=slurm_queue.users(records))
        return [slurm_queue.state(record, queue) for record in records]

    def endings(
        self, records: Sequence[Record], patience_s: float | None = None, *, deep: bool = False
    ) -> list[Ending]:
        logs = [endings.read_log(_log(record)) for record in records]
        if self._taken_down:
            return logs
        # a controller forgets jobs some minutes after their end
        users = slurm_queue.users(records)
        queue = slurm_queue.jobs(self._client(), patience_s, ended=True, users=users) or {}
        reported = [slurm_queue.ending(record, queue) for record in records]
        if deep and (missing := [i for i, each in enumerate(reported) if not settled(each)]):
            client = self._client()
            asked = history.by_accounting(
                [records[i] for i in missing], client, patience_s or ANSWER_S
            )
            reported = [
                each | asked.get(record["id"], {})
                for record, each in zip(records, reported, strict=True)
            ]
        return [log | each for log, each in zip(logs, reported, strict=True)]

    def waiting(self, records: Sequence[Record], patience_s: float | None = None) -> list[Waiting]:
        asked = ["squeue", "--me", "--array", "--noheader", "--states=PENDING", "--format=%i|%r|%S"]
        rows = (
            [] if self._taken_down else slurm_queue.fields(asked, self._client(), patience_s) or []
        )
        known = {
            id: {"reason": reason, "start": history.moment(start)} for id, reason, start in rows
        }
        return [known.get(record["id"], {}) for record in records]

    def spans(
        self, records: Sequence[Record], patience_s: float | None = None
    ) -> list[tuple[Span, ...]]:
        if self._taken_down:
            return [()] * len(records)
        return accounting.spans(
            records,
            lambda command: run(command, self._client() | accounting.CLOCK, None, patience_s),
        )

    @property
    def _taken_down(self) -> bool:
        return self.profile.temporary and not Path(self.conf or "").exists()

    def cancel(self, records: Sequence[Record]) -> int:
        states = dict(zip([each["id"] for each in records], self.states(records), strict=True))
        there = [record for record in records if states[record["id"]] != "gone"]
        if there:
            ids = [record["id"] for record in there]
            if "unknown" in states.values():
                raise UserError(f"Slurm did not cancel job {', '.join(ids)}: no answer; try again")
            done = run(["scancel", *ids], self._client())
            if done is None or done.returncode:
                reason = done.stderr.strip() if done else "no answer"
                raise UserError(f"Slurm did not cancel job {', '.join(ids)}: {reason}; try again")
            wait_until(lambda: {*self.states(there)} == {"gone"}, timeout_s=GONE_S, poll_s=0.2)
        return len(there)

    def warn(self, record: Record) -> None:
        # the ranks, not the batch script
        done = run(["scancel", "--signal=USR2", record["id"]], self._client())
        if done is None or done.returncode:
            reason = done.stderr.strip() if done else "no answer"
            raise UserError(f"Slurm did not warn job {record['id']}: {reason}; try again")

    def strays(self, comment: str, name: str | None = None) -> list[Record]:
        """Returns the jobs of this user with this comment, and with this name where one is given."""
        record = {"kind": self.kind, "conf": self.conf, "comment": comment}
        return [
            {**record, "id": id, "name": job.name}
            for id, job in (slurm_queue.jobs(self._client()) or {}).items()
            if slurm_queue.said(job.comment, comment) and name in (None, job.name)
        ]

    def nodes(self, patience_s: float | None = None) -> list[Node]:
        if self._taken_down:
            return []
        named = None if self.cluster is None else (self.cluster.partition or "").split(",")
        return slurm_nodes.known(named, self._client(), patience_s)

    def notes(self, ranks: int) -> list[str]:
        names = ignored(os.environ)
        if not names:
            return []
        keys = {name: _KEYS.get(name.partition("_")[2]) for name in names}
        dropped = [f"{name} ({key} does the same)" if key else name for name, key in keys.items()]
        return [f"variables of this shell that are ignored: {', '.join(dropped)}"]

    def ask(self, command: Sequence[str]) -> str:
        """Returns what one of Slurm's commands says; "" where it is not here, fails, or does not answer."""
        done = run([*command], self._client())
        return done.stdout if done is not None and done.returncode == 0 else ""

    def cancel_command(self, records: Sequence[Record]) -> str:
        ids = {record["id"].partition("_")[0] for record in records}
        return f"scancel {' '.join(sorted(ids))}"

    def _client(self) -> dict[str, str]:
        """The environment in which sbatch and its like speak to this Slurm."""
        environment = clean(os.environ)
        if self.cluster is not None:
            return {**environment, **self.profile.variables()}
        # the Slurm that the jobs were given to, whatever this shell means now
        environment.pop("SLURM_CONF", None)
        return environment | ({"SLURM_CONF": self.conf} if self.conf else {})

    def _partitions(self, job: Job) -> list[str]:
        return (slurm_script.requirements(self._site, job)["partition"] or "").split(",")

    @property
    def _site(self) -> ClusterConfig:
        assert self.cluster is not None, "submitting needs a cluster config"
        return self.cluster


def _log(record: Record) -> Path:
    """Where srun writes of a job: the log of rank 0."""
    return Path(record["folder"]) / f"{record['id']}_0_log.out"
