"""What the board reads of a run only when somebody opens it: the end of a log, the newest picture."""

from __future__ import annotations

from pathlib import Path

from launcher.board.read import Run
from launcher.folder import Attempt, tail
from selfguide.spec.run import names_in


def log_tail(run: Run, lines: int = 20) -> str:
    """The last lines that rank 0 of the newest attempt wrote; "" where it has no log yet, or none that may be read."""
    at = Attempt.newest(run.folder)
    if at is None:
        return ""
    try:
        logs = sorted(at.logs / name for name in names_in(at.logs) if name.endswith("_log.out"))
        first = [path for path in logs if path.name.endswith("_0_log.out")]
        return tail((first or logs)[-1], lines) if logs else ""
    except OSError:
        return ""


def newest_grid(run: Run) -> tuple[int, Path] | None:
    """The newest picture of samples, and the images that it is of: an evaluation's, a sweep's last, or training's."""
    scored, previewed = _newest_scored(run), run.folder.newest_preview()
    if previewed is not None and (scored is None or previewed > scored[0]):
        return previewed, run.folder.preview(previewed)
    return scored


def _newest_scored(run: Run) -> tuple[int, Path] | None:
    order = sorted(run.records, key=lambda r: (r.images, not r.sweep, r.time), reverse=True)
    for record in order:
        picture = record.grid(run.folder) if record.done else None
        if picture is not None:
            return record.images, picture
    return None
