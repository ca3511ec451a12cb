"""What cells leave for `launcher why`: small files of their runs with a label, and what it must say of each (U5).

Where SELFGUIDE_CORPUS names a folder, each cell leaves its run in it, as `tests/launcher/corpus` has them: records,
heartbeats and the ends of logs, with the scheduler's words, and without names of this machine.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.reconcile.attempts import Cause
from launcher.reconcile.timeline import verdict
from launcher.reconcile.view import RunView, ending_path, read
from selfguide.spec.run import RunFolder

ROOT = Path(__file__).parents[2]
# of a log; Slurm's lines are in that of rank 0
_END, _END_0 = 400, 1500
# where runs of the corpus say that they are
_ROOT = "/runs/digits_dit/run"
# the files of an attempt that say what became of it
_KEPT = re.compile(r"(start|exit|heartbeat)-|(job|submission|progress|cancelled|ended-job)\.json")


@dataclass(frozen=True)
class Fault:
    """What was done to an attempt: the class of cause that `why` must name, and the rank where it hits one."""

    kind: str
    rank: str | None = None
    attempt: int = 1


# by the name of a cell's run
LABELS: dict[str, list[Fault]] = {
    "a1": [Fault("killed", "1")],
    "a2": [Fault("error", "1")],
    "a3": [Fault("error", "1")],
    "a4": [Fault("crash", "1"), Fault("crash", "1", 2)],
    "a5": [Fault("hang", "1")],
    "a6": [Fault("hang", "0")],
    "loop": [Fault("hang", "1")],
    "a7": [Fault("memory", "1")],
    "b1": [Fault("node", "1")],
    "b1-stray": [Fault("node", "1"), Fault("killed", "0", 2)],
    "b2": [Fault("killed", "1")],
    "b2-first": [Fault("killed", "0")],
    "b4": [Fault("killed", "0")],
    "b5": [Fault("killed", "1")],
    "c1": [Fault("preempted")],
    "c2": [Fault("limit")],
    "c3": [Fault("preempted")],
    "c4": [Fault("outside")],
    "c5": [Fault("preempted")],
    "c7-compile": [Fault("preempted")],
    "c7-data": [Fault("preempted")],
    "c8": [Fault("preempted")],
    "c9": [Fault("preempted")],
    "d1": [Fault("storage")],
    "d2": [Fault("killed", str(attempt % 2), attempt) for attempt in range(1, 11)],
    "d3": [Fault("killed", "0")],
    "d4": [Fault("killed", "0"), Fault("killed", "0", 2)],
    "d6": [Fault("killed", "1")],
    "d7-tar": [Fault("storage")],
    "d8": [Fault("numeric")],
    "e1": [Fault("cancelled")],
    "e3": [Fault("killed", "1")],
    "e4": [Fault("killed", "1")],
    "f1": [Fault("user")],
    "f2": [Fault("error", "1"), Fault("error", "1", 2)],
    "f3": [Fault("node", "0")],
    "f4": [Fault("killed", "1"), Fault("killed", "1", 2)],
    # nothing happens to these, but around them
    **{name: [] for name in ("unharmed", "b3", "b6", "c5-kept", "d5", "d7", "e2", "e5", "e6")},
}


def explained(run: RunFolder) -> None:
    """U5: what was done to the run is named, with the rank it was done to; and nothing where nothing was."""
    faults = LABELS.get(run.root.name)
    if faults is None:
        return
    view = read(run, evidence=True)
    keep(run, view, faults)
    check(view, faults)


def check(view: RunView, faults: Sequence[Fault]) -> None:
    """The same of a view."""
    wanted = {fault.attempt: fault for fault in faults}
    last = None
    for at in view.attempts:
        if at is view.newest and view.finished:
            wanted.pop(at.number, None)
        last = wanted.get(at.number, last)
        _agrees(verdict(view, at.number), wanted.get(at.number))
    assert (last is None) == (not faults), "the run ended before its fault"
    _agrees(verdict(view), last)


def _agrees(found: Cause | None, wanted: Fault | None) -> None:
    kind, rank = (wanted.kind, wanted.rank) if wanted else (None, None)
    assert (found and found.kind) == kind, found
    assert rank is None or (found and found.rank) == rank, found


def keep(run: RunFolder, view: RunView, faults: Sequence[Fault], name: str = "") -> None:
    """Leaves the run in the corpus, as one file, where a corpus is asked for."""
    corpus = os.environ.get("SELFGUIDE_CORPUS")
    if not corpus:
        return
    files: dict[str, Any] = {}
    for path in _small(run):
        text = _anonymous(run, path.read_text(errors="replace"))
        content = _end(path, text) if path.suffix == ".out" else json.loads(text)
        if path.name.startswith("exit-") and content.get("peer_gone"):
            content["traceback"] = ""
        files[str(path.relative_to(run.root))] = content
    # what was learned says nothing of why it stopped
    files["run.json"]["identity"] = {}
    for at in view.attempts:
        if at.job is not None and at.job.ending:
            text = _anonymous(run, json.dumps(dict(at.job.ending)))
            files[str(ending_path(at.files.job).relative_to(run.root))] = json.loads(text)
    for images in view.snapshots:
        # complete, and nothing in it
        manifest = run.snapshot(images) / "MANIFEST.json"
        files[str(manifest.relative_to(run.root))] = {"files": [], "images": images}
    done = [fault for fault in faults if fault.attempt in run.attempt_numbers()]
    name = name or run.root.name
    about = {"cell": name, "faults": [asdict(fault) for fault in done], "files": files}
    (Path(corpus) / f"{name}.json").write_text(f"{json.dumps(about, indent=1)}\n")


def restore(entry: Path, run: RunFolder, *, endings: bool = True) -> list[Fault]:
    """Lays a run of the corpus out as a run folder; returns what was done to it.

    Args:
        endings: with what the scheduler has said of its jobs.
    """
    about = json.loads(entry.read_text())
    for name, content in about["files"].items():
        text = content if isinstance(content, str) else json.dumps(content)
        if endings or "ended-" not in name:
            path = run.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(_ROOT, str(run.root)))
    return [Fault(**each) for each in about["faults"]]


def _end(log: Path, text: str) -> str:
    return text[-(_END_0 if log.name.endswith("_0_log.out") else _END) :]


def _small(run: RunFolder) -> list[Path]:
    paths = [run.run_json]
    for number in run.attempt_numbers():
        paths += [p for p in run.attempt(number).glob("*.json") if _KEPT.match(p.name)]
        # of a successor the folder before holds them
        paths += [p for p in run.attempt(number).glob("*/*_log.out") if not p.parent.is_symlink()]
    return sorted(paths)


def _anonymous(run: RunFolder, text: str) -> str:
    """Text of the run without the names of this machine."""
    names = {
        str(run.root.resolve()): _ROOT,
        str(run.root.parents[2]): "/test",
        str(ROOT): "/code",
        str(Path(sys.prefix)): "/env",
        f"{getpass.getuser()}@{socket.gethostname()}": "user@login",
        f'"{socket.gethostname()}"': '"login"',
    }
    for name, other in names.items():
        text = text.replace(name, other)
    # of the test's cluster, and addresses
    text = re.sub(r"/[\w/]*/(?=slurm\.conf)", "/cluster/", text)
    return re.sub(r"\d+\.\d+\.\d+\.\d+", "192.0.2.1", text)
