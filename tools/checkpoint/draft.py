"""New files and folders that are whole when they have their names, and of which nothing is left where they fail."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """A hidden path beside `out`, for a new file or folder, which is given that name at the end."""
    draft = out.with_name(f".{out.name}.draft")
    # of a command that was killed
    _delete(draft)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.rename(out)
    finally:
        _delete(draft)


def _delete(draft: Path) -> None:
    if draft.is_dir():
        shutil.rmtree(draft)
    else:
        draft.unlink(missing_ok=True)
