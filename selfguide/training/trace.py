"""A trace of some steps, as Chrome and Perfetto show it: what the host did, and on a GPU each kernel."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)


class Trace:
    """Of one rank; it costs nothing while no trace is asked for."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._left = 0
        self._profile: profile | None = None

    def begin(self, steps: int) -> None:
        """Traces the next `steps` steps; one that is under way goes on for as many."""
        self._left = steps
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            made = profile(activities=activities)
            try:
                made.start()
            except RuntimeError as error:  # another profiler has the device
                log.warning(f"no trace: {error}")
                return
            self._profile = made

    def stepped(self, images: int) -> Path | None:
        """After a step that ended at `images`: returns the file, where that was the last one to trace."""
        if self._profile is None:
            return None
        self._left -= 1
        return None if self._left > 0 else self.end(images)

    def end(self, images: int) -> Path | None:
        """Writes what was traced; None where there is nothing, or no room for it, which stops no training."""
        traced, self._profile = self._profile, None
        if traced is None:
            return None
        path = self._folder / f"img-{images:012d}-rank-{self._rank}.json.gz"
        try:
            traced.stop()
            path.parent.mkdir(parents=True, exist_ok=True)
            # a reader never sees half of it
            begun = path.with_name(f".{path.name}")
            traced.export_chrome_trace(str(begun))
            begun.rename(path)
        except (OSError, RuntimeError) as error:
            log.warning(f"a trace could not be written to {path}: {error}")
            return None
        log.info(f"traced steps until {images:,} images: {path}; open it at ui.perfetto.dev")
        return path
