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
from dataclasses import dataclass
from pathlib import Path

from launcher.reconcile.timeline import verdict
from launcher.reconcile.view import ending_path, read
from selfguide.spec.run import RunFolder, image_folder

ROOT = Path(__file__).parents[2]
# of a log
_END = 2500


@dataclass(frozen=True)
class Label:
    """What was done to a run: the class of cause that `why` must name; None where nothing was."""

    cell: str
    kind: str | None
    # None where the fault hits no rank in particular
    rank: str | None = None
    # of which attempt; the last that failed by default
    attempt: int | None = None


HEALTHY = Label("healthy", None)

# by the beginning of a test's name
LABELS = {
    "test_a1_": Label("a1", "killed", "1"),
    "test_a2_": Label("a2", "error", "1"),
    "test_b1_": Label("b1", "node", "1"),
    "test_c1_": Label("c1", "preempted"),
    "test_c2_": Label("c2", "limit"),
    "test_c3_": Label("c3", "preempted"),
    "test_c4_": Label("c4", "outside"),
    "test_c5_a_requeue": Label("c5", "preempted"),
    "test_c5_a_job": Label("c5-refused", None),
    "test_c8_": Label("c8", "preempted"),
    "test_e1_": Label("e1", "cancelled"),
    "test_f1_": Label("f1", "user"),
    "test_f2_": Label("f2", "error", "1"),
}


def label_of(test: str) -> Label | None:
    """The label of a test's run, if it has one."""
    return next((label for name, label in LABELS.items() if test.startswith(name)), None)


def explained(run: RunFolder, label: Label) -> None:
    """U5: what happened to the run is named, with the rank it happened to; and nothing where nothing did."""
    keep(run, label)
    view = read(run, evidence=True)
    found = verdict(view, label.attempt)
    assert (found and found.kind) == label.kind, found
    assert label.rank is None or (found and found.rank) == label.rank, found


def keep(run: RunFolder, label: Label) -> None:
    """Leaves the run in the corpus, where one is asked for."""
    corpus = os.environ.get("SELFGUIDE_CORPUS")
    if not corpus:
        return
    to = Path(corpus) / label.cell
    view = read(run, evidence=True)
    for path in _small(run):
        text = path.read_text(errors="replace")
        _write(run, to, path, text[-_END:] if path.suffix == ".out" else text)
    for at in view.attempts:
        if at.job is not None and at.job.ending:
            _write(run, to, ending_path(at.files.job), json.dumps(dict(at.job.ending), indent=1))
    for images in view.snapshots:
        # complete, and nothing in it
        manifest = run.snapshots / image_folder(images) / "MANIFEST.json"
        _write(run, to, manifest, json.dumps({"files": [], "images": images}))
    about = {"kind": label.kind, "rank": label.rank, "cell": label.cell, "attempt": label.attempt}
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
