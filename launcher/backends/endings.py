"""How a job ended, by what Slurm wrote into its log: no accounting keeps the signal that killed a rank, nor for whom.

Where neither the controller nor the accounting knows a job any more, the log is all there is.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

from launcher.backends.protocol import Ending

# of the end of a log, where srun's lines are
_BYTES = 64_000
# of Slurm's lines, and of each, what is kept
_LINES, _LONGEST = 20, 300
# node, which ranks, and what happened to them
_TASKS = re.compile(r"^srun: error: (\S+): tasks? (\d+[\d,-]*): (.+)$", re.MULTILINE)
_RANKS = re.compile(r"(\d+)(?:-(\d+))?")
_CODE = re.compile(r"Exited with exit code (\d+)")
_LOST = re.compile(r"^srun: error: Node failure on (\S+)", re.MULTILINE)
# of the step's nodes, counted from 0
_NO_STEP = re.compile(
    r"^srun: error: (?:Aborting, .*missing step on|Cannot communicate with) node (\d+)",
    re.MULTILINE,
)
# what a person wants to read of it: errors, and steps and jobs that were ended; and the kernel's, where it is there
_SAID = re.compile(
    r"^(?:(?:srun|slurmstepd)[\w-]*: error: .+|.*\b[Oo]ut of memory: Killed process .+)$",
    re.MULTILINE,
)
_SIGNALS = {signal.strsignal(each): int(each) for each in signal.valid_signals()}
# of a rank whose control group had no memory left
_SIGNALS["Out Of Memory"] = int(signal.SIGKILL)
# words of `Ending.state` by what says so. A step that is cancelled is no sign: srun does it for a rank that failed
_WORDS = {
    "NODE_FAIL": r"DUE TO NODE FAILURE|^srun: error: Node failure on ",
    "PREEMPTED": r"DUE TO PREEMPTION",
    "TIMEOUT": r"DUE TO TIME LIMIT",
    "REQUEUED": r"DUE TO JOB REQUEUE",
    "OUT_OF_MEMORY": r"oom[-_]kill event|xceeded (?:job |step )?memory limit|tasks? [\d,-]+: Out Of Memory"
    r"|[Oo]ut of memory: Killed process",
    "CANCELLED": r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ (?:DUE to SIGNAL [\w ]+ )?\*\*\*",
}
_FIRST_WORD = [(word, re.compile(text, re.MULTILINE)) for word, text in _WORDS.items()]


def read_log(path: Path) -> Ending:
    """Returns `said_in` the end of a log; nothing where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _BYTES))
            return said_in(file.read().decode(errors="replace"))
    except OSError:
        return {}


def said_in(log: str) -> Ending:
    """Returns what Slurm's lines in a log say of the end, such as "srun: error: n1: task 3: Killed".

    `signals`, `codes`, `nodes` (of the ranks that failed), `first`, `lost_nodes`, `log_state` and `said`, the lines;
    what is not known is left out.
    """
    signals: dict[str, int] = {}
    codes: dict[str, int] = {}
    nodes: dict[str, str] = {}
    failed: list[str] = []
    for node, ranks, what in _TASKS.findall(log):
        named = [
            str(rank)
            for low, high in _RANKS.findall(ranks)
            for rank in range(int(low), int(high or low) + 1)
        ]
        failed += named
        nodes = dict.fromkeys(named, node) | nodes
        if number := _SIGNALS.get(what.removesuffix(" (core dumped)").strip()):
            signals = dict.fromkeys(named, number) | signals
        elif exited := _CODE.fullmatch(what.strip()):
            code = int(exited[1])
            if code - 128 in _SIGNALS.values():
                # by a shell or a container between
                signals = dict.fromkeys(named, code - 128) | signals
            else:
                codes = dict.fromkeys(named, code) | codes
    found: Ending = {}
    if failed:
        found = {"signals": signals, "codes": codes, "nodes": nodes, "first": failed[0]}
    if lost := list(dict.fromkeys(_LOST.findall(log))):
        found["lost_nodes"] = lost
    if steps := [int(each) for each in _NO_STEP.findall(log)]:
        found["lost_steps"] = steps
    said = "\n".join(dict.fromkeys(line[:_LONGEST] for line in _SAID.findall(log)))
    if word := next((word for word, text in _FIRST_WORD if text.search(said)), None):
        found["log_state"] = word
    if said:
        found["said"] = said.split("\n")[:_LINES]
    return found
