"""`python -m launcher.attempt.monitor`: a process on each node of an attempt that ends it where it hangs.

A thread of a rank cannot do that: it stands still with a process that is stopped, and beside C code that holds the
interpreter's lock. The first rank of a node starts the monitor before it imports torch; it ends with the node's ranks.

It reads what its own ranks last said, and what all ranks said once its own do not move. So every node sees the same,
also where the rank to blame, its node or its monitor can do nothing any more; the first alone writes `hang.json`.
Ranks whose slurmstepd was killed do not hang, and nobody would end them: it ends the attempt in the same way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from launcher.attempt import logs, stacks, steps
from launcher.attempt.exits import CODES, Exit, exit_path, start_path, verdict_path
from launcher.attempt.hang import Limits, Seen, Verdict, allowed, judge, speaks
from launcher.attempt.heartbeat import heartbeat_path
from launcher.backends.local import process
from selfguide.spec.config import ClusterConfig
from selfguide.spec.nodes import node_name
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.run import RunFolder, read_record, write_record
from shards import storage
from shards.errors import UserError
from shards.wait import wait_until

# how often it looks whether its ranks are there; what they say it reads twice a heartbeat
LOOK_S = 0.5
# for the stacks of other nodes, and for ranks that wait to leave a record of it
PATIENCE_S = 15.0
END_S = 10.0
# step times that the median is taken of
_STEPS = 101
# asking the job to end is for its ranks: the monitor stays as long as they do
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# of a rank's own: what a child inherits must not look like another of it
_RANK = ("SLURM_PROCID", "SLURM_LOCALID", "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID")

log = logging.getLogger("launcher.attempt.monitor")


def begin(
    folder: Path, rank: int, local_rank: int, cluster: ClusterConfig, status: RankStatus
) -> None:
    """Called by each rank of a job before it imports torch; the first of a node starts its monitor.

    Args:
        folder: where the ranks leave their records.
    """
    limits = Limits.of(cluster)
    if limits is None:
        return
    status.beat_s = limits.beat_s
    if local_rank:
        return
    ranks = os.environ.get("SLURM_GTIDS") or str(rank)
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        ranks = ",".join(map(str, range(int(os.environ["SUBMITIT_LOCAL_NTASKS"]))))
    command = [sys.executable, "-m", "launcher.attempt.monitor", str(folder), ranks]
    environment = {name: value for name, value in os.environ.items() if name not in _RANK}
    # in the rank's group: a job that its scheduler suspends stands still with its monitors
    subprocess.Popen(
        [*command, str(os.getpid()), json.dumps(asdict(limits))],
        env=environment,
        stdin=subprocess.DEVNULL,
    )


class Monitor:
    """Of the ranks of one node."""

    def __init__(self, folder: Path, mine: Sequence[int], parent: int, limits: Limits) -> None:
        """`parent` is the rank that started it, which is there before any record of it is."""
        self._folder, self._mine, self._limits = folder, mine, limits
        world = int((read_record(folder / "submission.json") or {})["world"])
        self._others = [rank for rank in range(world) if rank not in mine]
        self._parent = (parent, process(parent))
        # rank -> process and its start
        self._processes: dict[int, tuple[int, int]] = {}
        # rank -> the slurmstepd above it and its start
        self._daemons: dict[int, tuple[int, int]] = {}
        # rank -> its last heartbeat, and when that was first seen
        self._heard: dict[int, tuple[Mapping[str, Any], float]] = {}
        self._steps: deque[float] = deque(maxlen=_STEPS)
        # seconds that it has watched: those in which it could not look, as on a disk that hangs, are none
        self._clock = 0.0
        # when it wrote something because no rank did
        self._proved: float | None = None

    def run(self) -> None:
        """Returns when its ranks have ended, or were ended."""
        looked, due = time.monotonic(), 0.0
        while self._there():
            now = time.monotonic()
            self._clock += min(now - looked, 4 * LOOK_S)
            looked = now
            verdict = self._cut_off()
            if verdict is None and self._clock >= due:
                due = self._clock + self._limits.beat_s / 2
                try:
                    verdict = self._look()
                except (OSError, ValueError) as error:
                    # a disk that does not answer may do so again
                    log.warning(f"the monitor could not look: {error}")
            if verdict is not None:
                self._end(verdict)
                return
            time.sleep(LOOK_S)

    def _there(self) -> bool:
        """Whether any of its ranks is there, as far as it knows them."""
        pid, found = self._parent
        return bool(self._alive()) or (found is not None and _same(pid, found[1]))

    def _meet(self) -> None:
        """Learns which processes its ranks are."""
        for rank in self._mine:
            record = None
            if rank not in self._processes:
                record = read_record(start_path(self._folder, rank))
            if record is not None and (found := process(record["pid"])) is not None:
                self._processes[rank] = (record["pid"], found[1])
                if (daemon := steps.daemon_above(record["pid"])) is not None:
                    self._daemons[rank] = daemon

    def _alive(self) -> dict[int, int]:
        """Rank -> process of those of its ranks that have not ended."""
        return {rank: pid for rank, (pid, began) in self._processes.items() if _same(pid, began)}

    # ---- looking

    def _cut_off(self) -> Verdict | None:
        """Whether its ranks lost the slurmstepd that had started them."""
        gone = {rank for rank, daemon in self._daemons.items() if not _same(*daemon)}
        # it ends after its ranks, so those that are there now have lost it
        lost = sorted(gone & set(self._alive())) if gone else []
        if not lost:
            return None
        with contextlib.suppress(OSError, ValueError):
            self._hear(lost)
        heard = [self._heard[rank][0] for rank in lost if rank in self._heard]
        last = max(heard, key=lambda each: each["images"] or 0, default={})
        ranks = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
        return Verdict(
            kind="killed",
            rank=lost[0],
            section=last.get("section"),
            images=last.get("images"),
            message=f"slurmstepd, Slurm's daemon that had started {ranks} on {node_name()}, was killed",
        )

    def _look(self) -> Verdict | None:
        if (verdict := _read_verdict(self._folder)) is not None:
            return verdict
        self._meet()
        self._hear(self._mine)
        median = statistics.median(self._steps) if self._steps else 0.0
        mine = [self._seen(rank) for rank in self._mine]
        # all ranks wait for the one that hangs: while one of these moves, the others' files need not be read
        if any(each.quiet_s <= allowed(each, self._limits, median) / 2 for each in mine):
            return None
        self._hear(self._others)
        # listed, not asked one by one: that refreshes what a network file system remembers
        names = {path.name for path in self._folder.iterdir()}
        ranks = [*mine, *(self._seen(rank) for rank in self._others)]
        working = [each for each in ranks if exit_path(self._folder, each.rank).name not in names]
        verdict = judge(working, self._limits, median)
        return verdict if verdict is None or self._sure(working) else None

    def _sure(self, ranks: Sequence[Seen]) -> bool:
        """Whether it is not the disk that keeps all ranks from saying anything: it took a file two heartbeats ago."""
        if any(speaks(each, self._limits) for each in ranks):
            return True
        if self._proved is None:
            probe = self._folder / f"monitor-{node_name()}.json"
            # it may take as long as the disk is away, which the clock does not count
            write_record(probe, {}, replace=True)
            probe.unlink()
            self._proved = self._clock
        return self._clock - self._proved > 2 * self._limits.beat_s

    def _hear(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            record = read_record(heartbeat_path(self._folder, rank))
            if record is None or record == self._heard.get(rank, (None,))[0]:
                continue
            self._heard[rank] = record, self._clock
            if rank in self._mine and record["step_s"]:
                self._steps.append(record["step_s"])

    def _seen(self, rank: int) -> Seen:
        state = process(self._processes[rank][0]) if rank in self._processes else None
        stopped = state is not None and state[0] == "T"
        if rank not in self._heard:
            return Seen(rank=rank, quiet_s=self._clock, silent_s=self._clock, stopped=stopped)
        record, since = self._heard[rank]
        silent_s = self._clock - since
        return Seen(
            rank=rank,
            section=record["section"],
            images=record["images"],
            collectives=record["collectives"],
            step_s=record["step_s"],
            # by the rank's own clock until it spoke, by ours since then
            quiet_s=max(0.0, record["time"] - record["progressed"]) + silent_s,
            silent_s=silent_s,
            stopped=stopped,
        )

    # ---- ending

    def _end(self, verdict: Verdict) -> None:
        """Has the rank to blame recorded once, with the stacks of all; ends its own ranks whatever comes of that."""
        if self._overtaken():
            # the run goes on elsewhere, for reasons that are known
            log.error("a newer attempt has begun")
            self._kill(verdict.rank)
            return
        try:
            first = self._accuse(verdict)
            verdict = _read_verdict(self._folder) or verdict
            log.error(f"rank {verdict.rank}: {verdict.message}")
            if verdict.kind == "hang":
                for rank, text in stacks.collect(self._alive()).items():
                    storage.publish(str(self._stacks(rank)), text.encode(), replace=True)
            if first:
                self._record(verdict)
            else:
                blamed = exit_path(self._folder, verdict.rank)
                wait_until(blamed.exists, timeout_s=2 * PATIENCE_S)
        except (OSError, UserError) as error:
            log.error(f"the monitor could not write down why it ends its ranks: {error}")
        # before this node's ranks have ended, and Slurm this process with them
        steps.end_srun(self._folder)
        self._kill(verdict.rank, others=verdict.kind == "hang")

    def _overtaken(self) -> bool:
        """Whether the run has a newer attempt, as where this node was lost and its processes live on."""
        run, name = RunFolder(self._folder.parent.parent), self._folder.name
        # an evaluation's folder is no number
        return name.isdigit() and int(name) < max(run.attempt_numbers(), default=0)

    def _accuse(self, verdict: Verdict) -> bool:
        """Whether this monitor is the first to say who is to blame."""
        record = {**asdict(verdict), "node": node_name()}
        try:
            write_record(verdict_path(self._folder), record)
        except FileExistsError:
            return False
        return True

    def _stacks(self, rank: int) -> Path:
        return self._folder / "stacks" / f"rank-{rank}.txt"

    def _record(self, verdict: Verdict) -> None:
        """Writes how the rank to blame ended; of a hang with where it stands, once all nodes had time to ask."""
        message, stack = verdict.message, self._stacks(verdict.rank)
        if verdict.kind == "hang":
            ranks = (*self._mine, *self._others)
            records = {each: exit_path(self._folder, each) for each in ranks}
            asked = [self._stacks(each) for each in ranks if not records[each].exists()]
            wait_until(lambda: all(map(Path.exists, asked)), timeout_s=PATIENCE_S)
        if stack.exists() and (where := stacks.innermost(stack.read_text())):
            message += f"; it is at {where}"
        if stack.parent.exists():
            # as seen from the run's folder
            message += f"; stacks of all ranks are in {'/'.join(stack.parts[-4:-1])}"
        record = Exit(
            code=CODES[verdict.kind],
            kind=verdict.kind,
            message=message,
            images=verdict.images,
            section=verdict.section,
        )
        record.write(exit_path(self._folder, verdict.rank))

    def _kill(self, blamed: int, *, others: bool = True) -> None:
        """Ends its ranks; those that only waited leave a record of it, before they lose the one that they wait for.

        Args:
            others: waits for the records of other nodes' ranks, too.
        """
        for rank, pid in self._alive().items():
            if rank != blamed:
                stacks.send(pid, signal.SIGTERM)
        # other nodes' may have ended without one
        waited = self._others if others else ()
        records = [exit_path(self._folder, each) for each in waited if each != blamed]

        def alone() -> bool:
            return set(self._alive()) <= {blamed} and all(map(Path.exists, records))

        wait_until(alone, timeout_s=END_S)
        for pid in self._alive().values():
            stacks.send(pid, signal.SIGKILL)


def _read_verdict(folder: Path) -> Verdict | None:
    found = read_record(verdict_path(folder))
    if found is None:
        return None
    return Verdict(**{each.name: found[each.name] for each in fields(Verdict)})


def _same(pid: int, began: int) -> bool:
    found = process(pid)
    return found is not None and found[1] == began


def main(arguments: Sequence[str]) -> None:
    """The command: folder of the ranks' records, ranks of this node, process that started it, limits."""
    for each in _IGNORED:
        signal.signal(each, signal.SIG_IGN)
    logs.configure(None)
    folder, ranks, parent = Path(arguments[0]), arguments[1], int(arguments[2])
    limits = Limits(**json.loads(arguments[3]))
    Monitor(folder, [int(rank) for rank in ranks.split(",")], parent, limits).run()


if __name__ == "__main__":
    main(sys.argv[1:])
