"""The launcher's part of a run folder: an attempt's files, an evaluation's, and which run a user means.

`selfguide.spec.run` knows what the trainer shares with us; these are the names that only the launcher uses.
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

from selfguide.spec import find as finding
from selfguide.spec.find import find
from selfguide.spec.run import CANCELLED, RunFolder
from shards import storage
from shards.errors import UserError

__all__ = ["Attempt", "evaluation_asked", "evaluations", "find", "runs", "tail", "takes_run"]


@dataclass(frozen=True)
class Attempt:
    """Paths of one attempt's folder; `progress.json` and `rendezvous.json` there are the trainer's."""

    root: Path

    @classmethod
    def newest(cls, run: RunFolder) -> Attempt | None:
        numbers = run.attempt_numbers()
        return cls(run.attempt(numbers[-1])) if numbers else None

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.root.parent.parent)

    @property
    def number(self) -> int:
        return int(self.root.name)

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def code(self) -> Path:
        return self.root / "code"

    @property
    def configs(self) -> Path:
        """The configs outside of the package that its settings could name, a folder each; absent without any."""
        return self.root / "configs"

    @property
    def submission(self) -> Path:
        """What was asked for, written before the job exists: nodes, tasks, world."""
        return self.root / "submission.json"

    @property
    def job(self) -> Path:
        """The training job's record, written once it exists."""
        return self.root / "job.json"

    @property
    def successor(self) -> Path:
        """The record of the job that is queued behind the training job."""
        return self.root / "successor.json"

    @property
    def watcher(self) -> Path:
        return self.root / "watcher.json"

    def former_watcher(self, number: int | str) -> Path:
        """The record of a watcher that another one has followed; they are counted from 1."""
        return self.root / f"watcher-{number}.json"

    @property
    def watch_log(self) -> Path:
        return self.root / "watch.log"

    @property
    def cancelled(self) -> Path:
        return self.root / CANCELLED

    @property
    def logs(self) -> Path:
        """Submitit's folder: pickles, script and one log per rank."""
        return self.root / "job"


def runs(root: Path) -> list[RunFolder]:
    """Every run below a runs folder once, by experiment and id: links such as `latest` are names of one, and no run."""
    found = finding.runs(root)
    above = {place for place in {run.root.parent for run in found} if place.is_symlink()}
    linked = [run for run in found if run.root.parent in above or run.root.is_symlink()]
    if not linked:
        return found
    # a run that lies elsewhere has the link alone, or several
    known = {run.root.resolve() for run in found if run not in linked}
    again = set()
    for run in linked:
        place = run.root.resolve()
        if place in known:
            again.add(run)
        known.add(place)
    return [run for run in found if run not in again]


def evaluations(run: RunFolder) -> Path:
    """Folder of evaluation jobs, `<key>.<attempt>/`; each publishes a record beside it, in `evals/`."""
    return run.evals / "jobs"


def evaluation_arrays(run: RunFolder) -> Path:
    """Folder of the logs of evaluation jobs that were submitted together."""
    return run.evals / "arrays"


def evaluation_asked(run: RunFolder) -> Path:
    """When somebody last asked for missing scores (`time`), and for those of failed evaluations (`retry`)."""
    return run.evals / "asked.json"


def takes_run(parser: ArgumentParser, nargs: str | None = None, what: str = "run") -> None:
    """Adds the argument `run`, by which a user means one, and what every command about runs takes beside it."""
    text = f"id, beginning of an id, name, or folder of a {what}"
    shown = "RUN or KEY=VALUE" if nargs == "*" else None
    parser.add_argument("run", nargs=nargs, metavar=shown, help=text)
    parser.add_argument(
        "--runs", type=_runs_place, default="runs", metavar="DIR", help="where runs are (runs)"
    )
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of sentences")


def _runs_place(text: str) -> str:
    place = storage.place(text)
    if storage.is_remote(place):
        raise ArgumentTypeError(f"{text} is on S3, and runs are read from folders: copy it here")
    return place


def runs_folder(text: str) -> Path:
    """The type of an argument that is a folder of runs."""
    return Path(_runs_place(text))


def check_level(root: Path) -> None:
    """Raises UserError where `root`, which is to hold runs, is the folder of one run or of one experiment."""
    place = root.resolve()
    if (place / "run.json").is_file():
        above, what = place.parent.parent, "one run"
    elif next(place.glob("*/run.json"), None) is not None:
        above, what = place.parent, "the runs of one experiment"
    else:
        return
    if not runs(root):
        raise UserError(f"{root} is the folder of {what}; give --runs {shlex.quote(str(above))}")


def tail(path: Path, lines: int = 20) -> str:
    """Returns the last lines of a log; "" where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64_000))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
