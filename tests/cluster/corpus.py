"""What cells leave for `launcher why`: small files of their runs with a label, and what it must say of each (U5).

Where SELFGUIDE_CORPUS names a folder, each cell leaves its run in it, as `tests/launcher/corpus` has them: records,
heartbeats and the ends of logs, with the scheduler's words, and without names of this machine.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.reconcile.attempts import Cause
from launcher.reconcile.timeline import verdict
from launcher.reconcile.view import RunView, ending_path, read
from selfguide.spec.run import RunFolder

ROOT = Path(__file__).parents[2]
# of a log
_END = 2500


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
    "b2": [Fault("killed", "1")],
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
    "e1": [Fault("cancelled")],
    "f1": [Fault("user")],
    "f2": [Fault("error", "1"), Fault("error", "1", 2)],
    # nothing happens to these, but around them
    **{name: [] for name in ("unharmed", "b3", "b6", "c5-kept", "d5", "d7", "e2", "e5")},
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
    _agrees(verdict(view), last)


def _agrees(found: Cause | None, wanted: Fault | None) -> None:
    kind, rank = (wanted.kind, wanted.rank) if wanted else (None, None)
    assert (found and found.kind) == kind, found
    assert rank is None or (found and found.rank) == rank, found


def keep(run: RunFolder, view: RunView, faults: Sequence[Fault]) -> None:
    """Leaves the run in the corpus, where one is asked for."""
    corpus = os.environ.get("SELFGUIDE_CORPUS")
    if not corpus:
        return
    to = Path(corpus) / run.root.name
    shutil.rmtree(to, ignore_errors=True)
    for path in _small(run):
        text = path.read_text(errors="replace")
        _write(run, to, path, text[-_END:] if path.suffix == ".out" else text)
    for at in view.attempts:
        if at.job is not None and at.job.ending:
            _write(run, to, ending_path(at.files.job), json.dumps(dict(at.job.ending), indent=1))
    for images in view.snapshots:
        # complete, and nothing in it
        manifest = run.snapshot(images) / "MANIFEST.json"
        _write(run, to, manifest, json.dumps({"files": [], "images": images}))
    done = [fault for fault in faults if fault.attempt in run.attempt_numbers()]
    about = {"cell": run.root.name, "faults": [asdict(fault) for fault in done]}
    (to / "label.json").write_text(json.dumps(about, indent=1))


def _small(run: RunFolder) -> list[Path]:
    newest = run.attempt_numbers()[-1]
    paths = [run.run_json, run.attempt(newest) / "config.yaml"]
    for number in run.attempt_numbers():
        paths += run.attempt(number).glob("*.json")
        paths += run.attempt(number).glob("*/*_log.out")
    seen = {path.resolve(): path for path in paths if path.is_file()}
    return sorted(seen)


def _write(run: RunFolder, to: Path, path: Path, text: str) -> None:
    root = str(run.root.resolve())
    names = {
        root: "/runs/digits_dit/run",
        str(run.root.parents[2]): "/test",
        str(ROOT): "/code",
        str(Path(sys.prefix)): "/env",
        socket.gethostname(): "login",
        f"{getpass.getuser()}@": "user@",
    }
    for name, other in names.items():
        text = text.replace(name, other)
    # of the test's cluster
    text = re.sub(r"/[\w/]*/sgc\w+", "/cluster", text)
    target = to / Path(os.path.relpath(path, root))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
