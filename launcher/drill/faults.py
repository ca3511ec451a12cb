"""The faults themselves: what a node, a disk, a scheduler or a person does to a run that trains.

Those of a rank are Python that the rank runs itself, so they need no root and no way to its node. Those of daemons are
for the development cluster, whose daemons are this user's.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launcher.drill.bench import Bench, until
from selfguide.spec.run import RunFolder
from shards import storage
from slurm import layout, processes
from slurm.crew import SEARCH, program_path
from slurm.devcluster import Cluster

# what a rank does before anything else may be patched: it waits for the trainer's loop
_LOOP = """
import sys, time
while not hasattr(sys.modules.get("selfguide.training.loop"), "publish_what_is_due"):
    time.sleep(0.01)
loop = sys.modules["selfguide.training.loop"]
"""
_SLOW = (
    _LOOP
    + """
step = loop.advance
def advance(job):
    time.sleep({seconds})
    step(job)
loop.advance = advance
"""
)
_RAISE = (
    _LOOP
    + """
step = loop.advance
def advance(job):
    if {condition}:
        loop.advance = step
        raise {error}
    step(job)
loop.advance = advance
"""
)
_SPOIL = (
    _LOOP
    + """
import torch
step = loop.advance
def advance(job):
    if job.state.images >= {images}:
        loop.advance = step
        with torch.no_grad():
            next(job.state.engine.module.parameters()).fill_(float("nan"))
    step(job)
loop.advance = advance
"""
)
# counts the lines of the attempt's next save, and dies so far into the one after that, which may have fewer
_IN_A_SAVE = (
    _LOOP
    + """
import os, signal
shares = {shares}
save, ran = loop.checkpoint.save, []
def killed(folder, state, rank_info, lease):
    if lease.number not in shares:
        return save(folder, state, rank_info, lease)
    lines, last = 0, int(shares[lease.number] * ran[0]) if ran else -1
    def die():
        open({died!r} + str(lease.number), "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    def trace(*_):
        nonlocal lines
        if lines == last:
            die()
        lines += 1
        return trace
    sys.settrace(trace)
    save(folder, state, rank_info, lease)
    sys.settrace(None)
    if ran:
        die()
    ran.append(lines)
loop.checkpoint.save = killed
"""
)
_KILL_WRITER = """
import os, pathlib, signal
for task in pathlib.Path("/proc/self/task").iterdir():
    for child in map(int, (task / "children").read_text().split()):
        if b"selfguide.training.writer" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
"""
TAKEN_S = 30.0


# ---- ranks -------------------------------------------------------------------------------------------


def kill_rank(bench: Bench, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Has a rank die by a signal, or hear one."""
    code = f"import os; os.kill(os.getpid(), {int(number)})"
    bench.inside(rank, code, taken_s=TAKEN_S)


def kill_writer(bench: Bench, rank: int) -> None:
    """Kills the process that writes checkpoints beside a rank."""
    bench.inside(rank, _KILL_WRITER, taken_s=TAKEN_S)


def exit_rank(bench: Bench, rank: int, code: int) -> None:
    """Has a rank leave with an exit code, and without a word."""
    bench.inside(rank, f"import os; os._exit({code})", taken_s=TAKEN_S)


def raise_in_rank(
    bench: Bench, rank: int, error: str, *, at: int | None = None, always: bool = False
) -> None:
    """Has a rank raise `error`, a Python expression, in a step: the next one, or the one `at` so many images."""
    condition = "True" if at is None else f"job.state.images == {at}"
    code = _RAISE.format(error=error, condition=condition)
    bench.inside(rank, code, always=always, taken_s=None if always else TAKEN_S)


def spoil(bench: Bench, rank: int, images: int) -> None:
    """Has a rank compute with weights that are no numbers, from the first step after so many images."""
    bench.inside(rank, _SPOIL.format(images=images), taken_s=TAKEN_S)


def slow(
    bench: Bench, seconds: float, ranks: Sequence[int] = (0, 1), *, always: bool = False
) -> None:
    """Makes each step take so much longer, of the attempt that trains now or of every one."""
    for rank in ranks:
        bench.inside(rank, _SLOW.format(seconds=seconds), always=always)


def kill_in_saves(bench: Bench, rank: int, shares: Mapping[int, float]) -> None:
    """Has a rank die in the second save from now of each of these attempts, after a share of the lines of one."""
    bench.inside(rank, _in_a_save(bench, shares), always=True)


def kill_in_next_save(bench: Bench, run: RunFolder, rank: int, share: float = 0.5) -> float:
    """The same of the attempt that trains now; returns when the rank died, in seconds since 1970."""
    number = run.attempt_numbers()[-1]
    bench.inside(rank, _in_a_save(bench, {number: share}), taken_s=TAKEN_S)
    died = bench.faults / f"died-{number}"
    until(died.exists, f"rank {rank} dies in a save", TAKEN_S)
    return died.stat().st_mtime


def _in_a_save(bench: Bench, shares: Mapping[int, float]) -> str:
    return _IN_A_SAVE.format(shares=dict(shares), died=str(bench.faults / "died-"))


# ---- scheduler ---------------------------------------------------------------------------------------


def signal_job(bench: Bench, run: RunFolder, name: str = "USR2") -> None:
    """What Slurm does before a time limit, and some sites before a preemption."""
    bench.ask("scancel", f"--signal={name}", bench.job(run))


def scancel(bench: Bench, run: RunFolder) -> None:
    """What an administrator does: SIGTERM, and SIGKILL after KillWait."""
    bench.ask("scancel", bench.job(run))


def shorten(bench: Bench, run: RunFolder, minutes: int = 1) -> None:
    """Another time limit. Its warning is due at once, and Slurm looks every half minute."""
    bench.ask("scontrol", "update", f"JobId={bench.job(run)}", f"TimeLimit={minutes}")


def preempt(bench: Bench, where: str = "--nodes=4", seconds: float = 3) -> str:
    """A job that takes nodes from all others for so long; returns its id."""
    asked = [f"--partition={bench.urgent}", where, "--exclusive", "--output=/dev/null"]
    return bench.ask("sbatch", "--parsable", *asked, f"--wrap=sleep {seconds}").strip()


def preempt_run(bench: Bench, run: RunFolder) -> str:
    """The same on the nodes of the run."""
    return preempt(bench, f"--nodelist={','.join(bench.nodes(run))}")


def mute(bench: Bench, folder: Path, seconds: float) -> Bench:
    """A bench on which the first job of an sbatch is taken and then reported as failed, after so long.

    So a controller looks that took the request and was too busy to answer. From then on all of Slurm's commands that
    look or submit fail for as long.
    """
    folder.mkdir()
    for name in ("sbatch", "squeue"):
        wrapper = folder / name
        script = _MUTE.format(real=program_path(name), folder=folder, seconds=seconds, name=name)
        wrapper.write_text(script)
        wrapper.chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ.get("PATH", os.defpath)])
    return replace(bench, reach={**bench.reach, "PATH": path})


_MUTE = """#!/bin/bash
stamp={folder}/muted
if [ -e $stamp ]; then
    if [ $(date +%s) -lt $(cat $stamp) ]; then
        sleep 1
        echo "{name}: error: Unable to contact slurm controller (connect failure)" >&2
        exit 1
    fi
elif [ {name} = sbatch ] && [[ " $* " != *" --test-only "* ]]; then
    {real} "$@" > /dev/null
    sleep {seconds}
    echo $(($(date +%s) + {seconds})) > $stamp
    echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
    exit 1
fi
exec {real} "$@"
"""


# ---- daemons of the development cluster ----------------------------------------------------------------


def kill_daemon(cluster: Cluster, name: str) -> None:
    """SIGKILL to a daemon of the development cluster: slurmctld, slurmdbd, or the slurmd of the node of this name."""
    record = layout.read_record(cluster.state)
    assert record is not None
    pid, started = record.daemons[name]
    if processes.alive(pid, started):
        os.kill(pid, signal.SIGKILL)
        until(lambda: not processes.alive(pid, started), f"{name} is gone")


def restart_daemon(cluster: Cluster, name: str) -> None:
    """As an administrator starts it again."""
    state, conf = cluster.state, str(cluster.conf)
    program = name if name in ("slurmctld", "slurmdbd") else "slurmd"
    options = {"slurmctld": ["-f", conf], "slurmdbd": []}.get(name, ["-N", name, "-f", conf])
    environment = {"PATH": SEARCH, "LANG": "C.UTF-8", "SLURM_CONF": conf}
    environment["MYSQL_UNIX_PORT"] = f"{state}/mariadb.socket"
    log = state / "log" / f"{name}.out"
    found = processes.start([program_path(program), "-D", *options], environment, log)
    record = layout.read_record(state)
    assert record is not None
    record.daemons[name] = (found.pid, found.started)
    layout.write_record(state, record)


def restart_node(bench: Bench, name: str) -> None:
    """The slurmd of a node again, until the node takes jobs."""
    assert bench.cluster is not None
    restart_daemon(bench.cluster, name)
    bench.ask("scontrol", "reconfigure")
    until(lambda: idle(bench, name), f"{name} is back")


def idle(bench: Bench, *nodes: str) -> bool:
    """Whether these nodes take jobs, or have some; without names, whether every node waits for one."""
    chosen = [f"--nodes={','.join(nodes)}"] if nodes else []
    states = bench.ask("sinfo", "--noheader", "--Node", "--format=%T", *chosen).split()
    return set(states) <= ({"idle", "mixed", "allocated"} if nodes else {"idle"})


@contextmanager
def impatient(bench: Bench, seconds: int = 10) -> Iterator[None]:
    """Has the controller of the development cluster give up a silent node after so long."""
    assert bench.cluster is not None
    conf = bench.cluster.conf
    before = conf.read_text()
    conf.write_text(before.replace("SlurmdTimeout=30", f"SlurmdTimeout={seconds}"))
    bench.ask("scontrol", "reconfigure")
    try:
        yield
    finally:
        conf.write_text(before)
        bench.ask("scontrol", "reconfigure")


def kill_step(bench: Bench, run: RunFolder, rank: int) -> None:
    """SIGKILL to the slurmstepd above a rank on this machine."""
    found = processes.look(bench.ranks(run)[rank])
    assert found is not None
    while found.name != "slurmstepd":
        found = processes.look(found.parent)
        assert found is not None, "a rank has a slurmstepd above it"
    os.kill(found.pid, signal.SIGKILL)


# ---- disks -------------------------------------------------------------------------------------------


def newest(run: RunFolder) -> Path:
    """The newest complete checkpoint."""
    return run.checkpoint(run.saved()[-1])


def flip(path: Path, at: int) -> None:
    """Turns one bit of the byte at this offset."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def flip_newest(run: RunFolder, rank: int = 1) -> Path:
    """Turns one bit in a rank's file of the newest checkpoint; returns the file."""
    path = newest(run) / f"rank-{rank:05d}.safetensors"
    flip(path, path.stat().st_size // 2)
    return path


def tear_manifest(run: RunFolder, *, delete: bool = False) -> Path:
    """Empties the manifest of the newest checkpoint, or deletes it; returns the checkpoint."""
    folder = newest(run)
    manifest = folder / storage.MANIFEST
    if delete:
        manifest.unlink()
    else:
        manifest.write_text("")
    return folder


def litter(run: RunFolder) -> list[Path]:
    """What attempts that were killed may leave: drafts, half a checkpoint, pointers to it, a lock; returns it.

    Names are those that a publisher gives.
    """
    half, attempt = run.checkpoint(1_000_000_000), run.attempt_numbers()[-1]
    draft = "0123456789ab.tmp"
    paths = [
        half / "rank-00000.safetensors",
        half / f".rank-00001.safetensors.{draft}",
        run.snapshots / "img-1000000000" / f".ema-20000.safetensors.{draft}",
        run.checkpoints / ".leases" / f"{attempt:04d}" / f".{storage.MANIFEST}.{draft}",
        newest(run) / f".replicated.safetensors.{draft}",
        run.checkpoints / "latest",
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"half": True}))
    return paths


@contextmanager
def hidden(attempt: Path, aside: Path) -> Iterator[None]:
    """Takes what a submission wrote into an attempt's folder out of sight; its logs' folder stays, without pickles."""
    moved = [path for path in attempt.iterdir() if path.name != "job"]
    moved += [path for path in (attempt / "job").iterdir() if path.suffix == ".pkl"]
    places = {path: aside / path.relative_to(attempt) for path in moved}
    for path, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    try:
        yield
    finally:
        for path, place in places.items():
            place.rename(path)
