"""Which models were chosen among others, and by the scores of which feature net: small files in the chosen run.

A choice may come after the score that it makes less of, and records are written once. So whoever reads records of a
run adds its selections to them, and an evaluation that comes later writes them into its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfguide.spec.contamination import NetUse
from selfguide.spec.identity import digest
from selfguide.spec.recipe import selector
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.run import RunFolder, names_in, read_record, write_record

# of one snapshot among those of its run, by scores against the training images; the others were passed over
BEST_ON_TRAIN = "best_on_train"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """One choice of a snapshot, or of a run with all of its snapshots."""

    net: str
    # of its weights
    sha256: str
    # the command that chose
    by: str
    # of the snapshot that was chosen; None stands for all of the run's
    images: int | None = None
    # names of what it was chosen among
    among: tuple[str, ...] = ()

    @property
    def use(self) -> NetUse:
        return NetUse(net=self.net, sha256=self.sha256, use="selected")

    def holds_for(self, images: int) -> bool:
        """Whether the snapshot at so many images was chosen, or goes on from the one that was.

        Of a run's snapshots the best one alone is chosen: those behind it were there to be chosen too.
        """
        if self.by == BEST_ON_TRAIN:
            return images == self.images
        return self.images is None or images >= self.images


def selected_folder(run: RunFolder) -> Path:
    """Where a run keeps the choices that it, or one of its snapshots, was chosen by."""
    return run.root / "selected"


def select(
    run: RunFolder,
    protocol: Mapping[str, Any],
    *,
    by: str,
    images: int | None = None,
    among: Iterable[str] = (),
) -> Selection:
    """Writes down that a run was chosen by a score under `protocol`, as records hold it; the same choice once."""
    found = Selection(
        **selector(protocol),
        by=by,
        images=images,
        among=tuple(sorted(among)),
    )
    values = {
        "net": found.net,
        "sha256": found.sha256,
        "by": found.by,
        "images": found.images,
        "among": list(found.among),
    }
    path = selected_folder(run) / f"{digest(values)}.json"
    if read_record(path) is None:
        write_record(path, values, replace=True)
    return found


def read_selection(path: Path) -> Selection:
    """One selection.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is none that this version can read.
    """
    values = json.loads(path.read_text())
    images = values["images"]
    return Selection(
        net=str(values["net"]),
        sha256=str(values["sha256"]),
        by=str(values["by"]),
        images=None if images is None else int(images),
        among=tuple(map(str, values["among"])),
    )


def selection_files(run: RunFolder) -> list[Path]:
    """Every selection of the run, by name."""
    folder = selected_folder(run)
    return [folder / name for name in sorted(names_in(folder)) if name.endswith(".json")]


def selections(run: RunFolder) -> tuple[Selection, ...]:
    """The same, read."""
    return tuple(map(read_selection, selection_files(run)))


def nets_that_selected(run: RunFolder, images: int) -> list[dict[str, str]]:
    """Name and sha256 of the nets by whose scores the snapshot at so many images was chosen."""
    named = {(each.net, each.sha256) for each in selections(run) if each.holds_for(images)}
    return [{"net": net, "sha256": sha256} for net, sha256 in sorted(named)]


def with_selections(record: EvaluationRecord, found: Iterable[Selection]) -> EvaluationRecord:
    """The record with the nets that selected its snapshot, whenever they did."""
    uses = {each.use for each in found if each.holds_for(record.images)}
    if uses <= set(record.nets or ()):
        return record
    return replace(record, nets=tuple(sorted({*(record.nets or ()), *uses})))
