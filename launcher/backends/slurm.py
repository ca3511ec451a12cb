"""Slurm as a backend: Submitit writes and hands in the batch scripts, `squeue` and `scancel` do the rest.

Which Slurm is meant is a `Profile`: the one that this shell's commands reach, or the development cluster of this
machine. A site's partition, account and limits are facts of its file in `configs/cluster/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.backends import accounting, endings, history
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
from selfguide.spec.config import ClusterConfig
from shards.errors import UserError
from shards.wait import wait_until

# a controller that needs longer is not the one to wait for
PING_S = 2.0
# patience with sbatch, squeue and scancel
ANSWER_S = 20.0
# until cancelled jobs have left the queue
GONE_S = 60.0
# what sbatch --test-only says of a job that no nodes fit, also where they are only out of service for now
_NO_NODES = "Requested node configuration is not available"
# what sinfo says of nodes; it cuts what is wider
_FREE = ("NodeList", "StateCompact", "CPUsState", "Memory", "AllocMem", "Gres", "GresUsed", "Partition")  # fmt: skip
_WIDE = 200
_GPUS = re.compile(r"gpu(?::[^:,()]+)?:(\d+)")
# of sbatch's failures, those after which it may have taken the job
_NO_ANSWER = re.compile(r"timed out|[Uu]nable to contact|Zero Bytes|[Cc]onnection")
# sinfo's short words for nodes that get no job
_OUT_OF_SERVICE = ("boot", "down", "drain", "drng", "err", "fail", "inval", "maint", "resv", "unk")
# keys of a config that do what a variable of the shell would, by the end of its name
_KEYS = {
    "ACCOUNT": "cluster.account",
    "CLUSTERS": "SLURM_CONF",
    "CONSTRAINT": "cluster.constraint",
    "CPUS_PER_TASK": "cluster.cpus_per_task",
    "EXCLUSIVE": "cluster.exclusive",
    "EXPORT": "cluster.environment",
    "GPUS_PER_NODE": "cluster.gpus_per_node",
    "GRES": "cluster.gres",
    "MEM_PER_NODE": "cluster.mem_gb",
    "NNODES": "nodes",
    "NO_REQUEUE": "cluster.restart",
    "NTASKS_PER_NODE": "cluster.gpus_per_node",
    "PARTITION": "cluster.partition",
    "QOS": "cluster.qos",
    "REQUEUE": "cluster.restart",
    "RESERVATION": "cluster.reservation",
    "SIGNAL": "cluster.warn_s",
    "TIMELIMIT": "cluster.timeout_min",
}
# reasons that are more than the state of a job which still completes
_ENDED_BY = {"NodeDown": "NODE_FAIL", "TimeLimit": "TIMEOUT"}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One Slurm that submissions can mean."""

    # how a submission reaches its controller: variables beside this shell's; UserError where there is none
    variables: Callable[[], Mapping[str, str]]
    # between two looks at a job; a site's controller serves many users
    poll_s: float
    # taken down with its configuration file and all its jobs
    temporary: bool = False


def _devcluster() -> Mapping[str, str]:
    from slurm import devcluster

    found = devcluster.find()
    if found is None:
        raise UserError(
            "cluster=devcluster: no development cluster is up; start it with `make cluster-up`"
        )
    return found.environment()


PROFILES = {
    "slurm": Profile(variables=dict, poll_s=5.0),
    "devcluster": Profile(variables=_devcluster, poll_s=1.0, temporary=True),
}


def answers() -> bool:
    """Returns whether a Slurm controller answers from here within 2 s."""
    if shutil.which("scontrol") is None:
        return False
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=PING_S)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and " UP" in done.stdout


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
        from submitit.slurm import slurm

        run = f"{self._python} -u -m submitit.core._submit {shlex.quote(str(job.folder))}"
        return slurm._make_sbatch_string(command=run, folder=job.folder, **self._parameters(job))

    def check(self, job: Job) -> list[str]:
        client = self._client()
        if shutil.which("sbatch", path=client.get("PATH")) is None:
            raise UserError(
                f"cluster={self.kind}: no sbatch on this machine; submit from a login node, or take cluster=local"
            )
        done = _run(["sbatch", "--test-only"], client, stdin=self.script(job))
        if done is None:
            raise UserError(
                f"cluster={self.kind}: Slurm did not answer within {ANSWER_S:.0f} s; try again later"
            )
        if done.returncode:
            waits = self._waits_for_nodes(job, client) if _NO_NODES in done.stderr else ""
            if waits:
                return [waits]
            reason = re.sub(r"(sbatch: |error: |allocation failure: )", "", done.stderr)
            reason = reason.strip().replace("\n", "; ")
            raise UserError(
                f"Slurm would refuse this job ({self._requested(job)}): {reason}{_partitions(client)}"
            )
        return []

    def free_nodes(self, job: Job) -> int:
        # `sbatch --test-only` would count the run's own waiting job as one that goes before
        widths = ",".join(f"{name}:{_WIDE}|" for name in _FREE)
        done = _run(["sinfo", "--noheader", "--Node", f"--Format={widths}"], self._client())
        if done is None or done.returncode:
            return 0
        rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
        named = (self._requirements(job)["partition"] or "").split(",")
        free = {
            name
            for name, word, cpus, memory, used, gres, gres_used, partition, *_ in rows
            if word in ("idle", "mix") and _of_partition(partition, named)
            if int(cpus.split("/")[1]) >= job.tasks * (job.cpus_per_task or 1)
            if int(memory) - int(used) >= 1024 * (job.mem_gb or 0)
            if _gpus(gres) - _gpus(gres_used) >= job.gpus
        }
        return len(free - set(job.exclude))

    def submit(self, job: Job) -> Record:
        return self.submit_array([job])[0]

    def submit_array(self, jobs: Sequence[Job]) -> list[Record]:
        from submitit.core.utils import FailedJobError
        from submitit.slurm.slurm import SlurmExecutor

        first, client = jobs[0], self._client()
        if shutil.which("sbatch", path=client.get("PATH")) is None:
            raise UserError(f"cluster={self.kind}: no sbatch on this machine")
        if inherited := client.get("PYTHONPATH"):
            # of the job that submits this one, where it runs from the same code
            paths = [path for path in inherited.split(os.pathsep) if path != str(first.code)]
            client["PYTHONPATH"] = os.pathsep.join(paths)
        first.folder.mkdir(parents=True, exist_ok=True)
        with _environment(client):
            executor = SlurmExecutor(first.folder, max_num_timeout=0, python=self._python)
            executor.update_parameters(**self._parameters(first))
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
            done = _run(["squeue", "--me", "--noheader", "--Format=JobID:32,STDOUT:1024"], client)
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
        taken = [id for id, log in found.items() if log.startswith(f"{job.folder}/")]
        if taken:
            _run(["scancel", *taken], client)

    def states(self, records: Sequence[Record], patience_s: float | None = None) -> list[State]:
        if self._taken_down:
            return ["gone"] * len(records)
        queue = self._queue(patience_s, users=_users(records))
        return [_state(record, queue) for record in records]

    def endings(
        self, records: Sequence[Record], patience_s: float | None = None, *, deep: bool = False
    ) -> list[Ending]:
        logs = [endings.read_log(_log(record)) for record in records]
        if self._taken_down:
            return logs
        # a controller forgets jobs some minutes after their end
        queue = self._queue(patience_s, ended=True, users=_users(records)) or {}
        told = [_ending(record, queue) for record in records]
        if deep and (missing := [i for i, each in enumerate(told) if not settled(each)]):
            client = self._client()
            asked = history.by_accounting(
                [records[i] for i in missing], client, patience_s or ANSWER_S
            )
            told = [
                each | asked.get(record["id"], {})
                for record, each in zip(records, told, strict=True)
            ]
        return [log | each for log, each in zip(logs, told, strict=True)]

    def waiting(self, records: Sequence[Record], patience_s: float | None = None) -> list[Waiting]:
        asked = ["squeue", "--me", "--array", "--noheader", "--states=PENDING", "--format=%i|%r|%S"]
        rows = [] if self._taken_down else self._squeue(asked, patience_s) or []
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
            lambda command: _run(command, self._client() | accounting.CLOCK, None, patience_s),
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
            done = _run(["scancel", *ids], self._client())
            if done is None or done.returncode:
                reason = done.stderr.strip() if done else "no answer"
                raise UserError(f"Slurm did not cancel job {', '.join(ids)}: {reason}; try again")
            wait_until(lambda: {*self.states(there)} == {"gone"}, timeout_s=GONE_S, poll_s=0.2)
        return len(there)

    def warn(self, record: Record) -> None:
        # the ranks, not the batch script
        done = _run(["scancel", "--signal=USR2", record["id"]], self._client())
        if done is None or done.returncode:
            reason = done.stderr.strip() if done else "no answer"
            raise UserError(f"Slurm did not warn job {record['id']}: {reason}; try again")

    def strays(self, comment: str, name: str | None = None) -> list[Record]:
        """Returns the jobs of this user with this comment, and with this name where one is given."""
        record = {"kind": self.kind, "conf": self.conf, "comment": comment}
        return [
            {**record, "id": id, "name": job.name}
            for id, job in (self._queue() or {}).items()
            if job.comment == comment and name in (None, job.name)
        ]

    def nodes(self, patience_s: float | None = None) -> list[Node]:
        if self._taken_down:
            return []
        asked = ["sinfo", "--noheader", "--Node", "--format=%N|%t|%P|%E"]
        done = _run(asked, self._client(), patience_s=patience_s)
        rows = [line.split("|", 3) for line in done.stdout.splitlines()] if done else []
        named = None
        if self.cluster is not None:
            named = (self.cluster.partition or "").split(",")
        # a line for each partition of a node
        found = {
            name: Node(
                name=name,
                state=word,
                reason="" if reason == "none" else reason,
                in_service=not _out_of_service(word),
                reachable=not (word.endswith("*") or word.startswith("down")),
            )
            for name, word, partition, reason in rows
            if named is None or _of_partition(partition, named)
        }
        return list(found.values())

    def notes(self, ranks: int) -> list[str]:
        names = ignored(os.environ)
        if not names:
            return []
        keys = {name: _KEYS.get(name.partition("_")[2]) for name in names}
        told = [f"{name} ({key} does the same)" if key else name for name, key in keys.items()]
        return [f"variables of this shell that are ignored: {', '.join(told)}"]

    def ask(self, command: Sequence[str]) -> str:
        """Returns what one of Slurm's commands says; "" where it is not here, fails, or does not answer."""
        done = _run([*command], self._client())
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

    @property
    def _site(self) -> ClusterConfig:
        assert self.cluster is not None, "submitting needs a cluster config"
        return self.cluster

    @property
    def _python(self) -> str:
        """What starts Python in a job, for the shell."""
        python = shlex.quote(self._site.python or sys.executable)
        return f"{self._site.container} {python}" if self._site.container else python

    def _parameters(self, job: Job) -> dict[str, Any]:
        """In sbatch's own names, as Submitit's generator takes them; what is None is not written."""
        site = self._site
        # a dead rank ends the others, which would wait for it
        srun = ["--kill-on-bad-exit=1", "--wait=60"]
        exports = {name: shlex.quote(value) for name, value in job.environment.items()}
        exports["PYTHONPATH"] = f"{shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}"
        if job.cpus_per_task:
            # since 22.05 srun does not take the job's
            srun.append(f"--cpus-per-task={job.cpus_per_task}")
            exports.setdefault("OMP_NUM_THREADS", str(job.cpus_per_task))
        gpus = f"{site.gpu_type}:{job.gpus}" if site.gpu_type else job.gpus
        singleton, after = job.singleton and "singleton", job.after and f"after:{job.after}"
        parameters = {
            "job_name": job.name,
            "comment": job.comment,
            **self._requirements(job),
            "time": job.timeout_min,
            "nodes": job.nodes,
            "ntasks_per_node": job.tasks,
            "gpus_per_node": gpus if job.gpus and not site.gres else None,
            "gres": site.gres if job.gpus else None,
            "exclusive": True if job.exclusive else None,
            "cpus_per_task": job.cpus_per_task,
            "mem": f"{int(job.mem_gb * 1024)}MB" if job.mem_gb else None,
            "signal_delay_s": job.warn_s,
            "dependency": ",".join(each for each in (singleton, after) if each) or None,
            "stderr_to_stdout": True,
            # where one job is followed by another, only that one may go on with the run
            "additional_parameters": {
                **site.sbatch_options,
                **self._place(job),
                "requeue" if job.requeue else "no-requeue": True,
            },
            "setup": _setup(site)
            + [f"export {name}={value}" for name, value in exports.items()]
            + [f"cd {shlex.quote(str(job.code))}"],
            "srun_args": [*srun, *site.srun],
            "teardown": self._teardown(job),
        }
        given = {key: value for key, value in parameters.items() if value is not None}
        return {**given, "wckey": None}  # Submitit's default is a key that a site may not know

    def _teardown(self, job: Job) -> list[str] | None:
        """Has Slurm start the job once more where the run goes on; a requeue ends this script."""
        if not job.requeue:
            return None
        # in the container that ranks of pyxis run in, or before which Python another one stands
        alone = ["srun", "--nodes=1", "--ntasks=1", *self._site.srun] if self._site.srun else []
        words = [shlex.join(alone), self._python, shlex.join(job.requeue)]
        return [
            "code=$?",
            f"{' '.join(word for word in words if word)} && scontrol requeue $SLURM_JOB_ID",
            "exit $code",
        ]

    def _waits_for_nodes(self, job: Job, client: Mapping[str, str]) -> str:
        """Why the job waits for nodes that are out of service; "" where no nodes of its partition would do."""
        done = _run(["sinfo", "--noheader", "--Node", "--format=%N|%t|%c|%m|%G|%P"], client)
        rows = (line.split("|") for line in done.stdout.splitlines()) if done else ()
        named = (self._requirements(job)["partition"] or "").split(",")
        fit = {
            name: word
            for name, word, cpus, megabytes, gres, partition in rows
            if _of_partition(partition, named)
            and name not in job.exclude
            and int(cpus) >= job.tasks * (job.cpus_per_task or 1)
            and int(megabytes) >= 1024 * (job.mem_gb or 0)
            and _gpus(gres) >= job.gpus
        }
        out = {name: word for name, word in fit.items() if _out_of_service(word)}
        if not len(fit) - len(out) < job.nodes <= len(fit):
            return ""
        states = ", ".join(f"{name} is {word}" for name, word in sorted(out.items())[:8])
        return (
            f"the job waits for nodes: {len(fit) - len(out)} of the {len(fit)} that could run it are in service and it "
            f"takes {job.nodes} ({states}{' ...' if len(out) > 8 else ''})"
        )

    def _requirements(self, job: Job) -> dict[str, str | None]:
        """Where a job may run and who pays, in Submitit's names."""
        site = self._site
        apart = site.evaluation_partition if job.small else None
        return {
            "partition": apart or site.partition,
            "account": site.account,
            "qos": site.qos,
            "exclude": ",".join(each for each in (site.exclude, *job.exclude) if each) or None,
            # of the nodes that train
            "constraint": None if apart else site.constraint,
        }

    def _place(self, job: Job) -> dict[str, str]:
        """The same where Submitit has no name for it."""
        site = self._site
        apart = job.small and site.evaluation_partition
        return {"reservation": site.reservation} if site.reservation and not apart else {}

    def _requested(self, job: Job) -> str:
        asked: dict[str, Any] = {f"cluster.{k}": v for k, v in self._requirements(job).items()}
        asked["cluster.reservation"] = self._place(job).get("reservation")
        asked |= {
            "nodes": job.nodes,
            "ranks per node": job.tasks,
            "GPUs per node": job.gpus or None,
        }
        return ", ".join(f"{key}={value}" for key, value in asked.items() if value is not None)

    def _queue(
        self, patience_s: float | None = None, ended: bool = False, users: str = ""
    ) -> dict[str, _Queued] | None:
        """This user's jobs by id, or those of some users; None when nobody answers.

        Args:
            ended: also those that ended lately.
        """
        # a line a task
        asked = ["squeue", f"--user={users}" if users else "--me", "--array", "--noheader"]
        asked += (
            ["--states=all", "--format=%i|%T %e %l %r|%j|%k"] if ended else ["--format=%i|%T|%j|%k"]
        )
        rows = self._squeue(asked, patience_s)
        if rows is None and shutil.which("squeue", path=self._client().get("PATH")) is None:
            done = _run(history.SHOW, self._client(), patience_s=patience_s)
            rows = history.shown(done.stdout, ended) if done and not done.returncode else None
        if rows is None:
            return None
        return {
            id: _Queued(state=state, name=name, comment=comment.strip())
            for id, state, name, comment in rows
        }

    def _squeue(self, command: list[str], patience_s: float | None) -> list[list[str]] | None:
        """The fields of each line; None when nobody answers."""
        fields = command[-1].count("|")
        done = _run(command, self._client(), patience_s=patience_s)
        if done is None or done.returncode:
            return None
        lines = done.stdout.splitlines()
        return [line.split("|", fields) for line in lines if line.count("|") >= fields]


def _of_partition(name: str, wanted: Sequence[str]) -> bool:
    """Whether sinfo's name of a partition, with * behind the default's, is wanted; [""] is the default."""
    return name.rstrip("*") in wanted or (list(wanted) == [""] and name.endswith("*"))


def _out_of_service(word: str) -> bool:
    """Whether a node of this state gets no job; * is behind the word of one that does not answer."""
    return word.startswith(_OUT_OF_SERVICE) or word.endswith("*")


@dataclass(frozen=True, kw_only=True)
class _Queued:
    """A line of squeue."""

    # Slurm's own word, and a reason behind it where that was asked for
    state: str
    name: str
    comment: str


def _setup(site: ClusterConfig) -> list[str]:
    """Lines of a batch script by which a site prepares its nodes."""
    lines = []
    if site.modules:
        # a shell that is no login shell may not know the command
        lines.append("type module >/dev/null 2>&1 || . /etc/profile")
        lines.append(f"module load {shlex.join(site.modules)} || exit 1")
    lines += site.setup
    return [*lines, f'export TMPDIR="{site.scratch}"'] if site.scratch else lines


def _users(records: Sequence[Record]) -> str:
    """Whose run folders these are, for squeue; "" where all are this user's."""
    found = set()
    for folder in {str(record["comment"]) for record in records}:
        # of a folder that is gone nobody knows
        with contextlib.suppress(OSError):
            found.add(Path(folder).stat().st_uid)
    others = sorted(found | {os.getuid()}) if found - {os.getuid()} else ()
    return ",".join(map(str, others))


def _state(record: Record, queue: Mapping[str, _Queued] | None) -> State:
    if queue is None:
        return "unknown"
    job = queue.get(record["id"])
    # a fresh Slurm counts its jobs from 1 again
    if job is None or job.comment != record["comment"]:
        return "gone"
    return "queued" if job.state in history.QUEUED else "running"


def _ending(record: Record, queue: Mapping[str, _Queued]) -> Ending:
    """What the controller still says."""
    job = queue.get(record["id"])
    if job is None or job.comment != record["comment"]:
        return {}
    word, end, limit, reason = [*job.state.split(" ", 3), "", "", ""][:4]
    # a job of a lost node completes when the node is back
    return history.ending(_ENDED_BY.get(reason, word), end=end, limit=limit)


def _log(record: Record) -> Path:
    """Where srun writes of a job: the log of rank 0."""
    return Path(record["folder"]) / f"{record['id']}_0_log.out"


@contextlib.contextmanager
def _environment(environment: Mapping[str, str]) -> Iterator[None]:
    """Submitit hands sbatch its own process's environment, so that is what changes."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(
    command: list[str],
    environment: Mapping[str, str],
    stdin: str | None = None,
    patience_s: float | None = None,
) -> subprocess.CompletedProcess[str] | None:
    """None when it does not answer in time, or there is no such command here."""
    try:
        return subprocess.run(
            command,
            env=dict(environment),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=ANSWER_S if patience_s is None else patience_s,
        )
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return None


def _gpus(gres: str) -> int:
    """How many there are in what sinfo says of generic resources."""
    return sum(map(int, _GPUS.findall(gres)))


def _partitions(client: Mapping[str, str]) -> str:
    """'; partitions here: a, b', which is what one needs most often."""
    done = _run(["sinfo", "--noheader", "--format=%R"], client)
    names = sorted(set(done.stdout.split())) if done and done.returncode == 0 else []
    return f"; partitions here: {', '.join(names)}" if names else ""
