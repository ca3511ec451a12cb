"""Nodes of a Slurm, as sinfo tells of them: which there are, which are free, and which a job waits for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from launcher.backends.protocol import Job, Node
from launcher.backends.slurm_client import run

# what sinfo says of nodes; it cuts what is wider
_FREE = ("NodeList", "StateCompact", "CPUsState", "Memory", "AllocMem", "Gres", "GresUsed", "Partition")  # fmt: skip
_WIDE = 200
_GPUS = re.compile(r"gpu(?::[^:,()]+)?:(\d+)")
# sinfo's short words for nodes that get no job
_OUT_OF_SERVICE = ("boot", "down", "drain", "drng", "err", "fail", "inval", "maint", "resv", "unk")


def free(job: Job, partitions: Sequence[str], client: Mapping[str, str]) -> int:
    """Returns how many nodes of these partitions, [""] for the default, have room for a node's share of a job."""
    widths = ",".join(f"{name}:{_WIDE}|" for name in _FREE)
    done = run(["sinfo", "--noheader", "--Node", f"--Format={widths}"], client)
    if done is None or done.returncode:
        return 0
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
    free = {
        name
        for name, word, cpus, memory, used, gres, gres_used, partition, *_ in rows
        if word in ("idle", "mix") and _of_partition(partition, partitions)
        if int(cpus.split("/")[1]) >= job.tasks * (job.cpus_per_task or 1)
        if int(memory) - int(used) >= 1024 * (job.mem_gb or 0)
        if _gpus(gres) - _gpus(gres_used) >= job.gpus
    }
    return len(free - set(job.exclude))


def known(
    partitions: Sequence[str] | None, client: Mapping[str, str], patience_s: float | None = None
) -> list[Node]:
    """Returns the nodes of these partitions, or of all."""
    asked = ["sinfo", "--noheader", "--Node", "--format=%N|%t|%P|%E"]
    done = run(asked, client, patience_s=patience_s)
    rows = [line.split("|", 3) for line in done.stdout.splitlines()] if done else []
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
        if partitions is None or _of_partition(partition, partitions)
    }
    return list(found.values())


def waits_for(job: Job, partitions: Sequence[str], client: Mapping[str, str]) -> str:
    """Returns why a job waits for nodes that are out of service; "" where no nodes of its partitions would do."""
    done = run(["sinfo", "--noheader", "--Node", "--format=%N|%t|%c|%m|%G|%P"], client)
    rows = (line.split("|") for line in done.stdout.splitlines()) if done else ()
    fit = {
        name: word
        for name, word, cpus, megabytes, gres, partition in rows
        if _of_partition(partition, partitions)
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


def partitions(client: Mapping[str, str]) -> str:
    """Returns '; partitions here: a, b', which is what one needs most often."""
    done = run(["sinfo", "--noheader", "--format=%R"], client)
    names = sorted(set(done.stdout.split())) if done and done.returncode == 0 else []
    return f"; partitions here: {', '.join(names)}" if names else ""


def _of_partition(name: str, wanted: Sequence[str]) -> bool:
    """Whether sinfo's name of a partition, with * behind the default's, is wanted; [""] is the default."""
    return name.rstrip("*") in wanted or (list(wanted) == [""] and name.endswith("*"))


def _out_of_service(word: str) -> bool:
    """Whether a node of this state gets no job; * is behind the word of one that does not answer."""
    return word.startswith(_OUT_OF_SERVICE) or word.endswith("*")


def _gpus(gres: str) -> int:
    """How many there are in what sinfo says of generic resources."""
    return sum(map(int, _GPUS.findall(gres)))
