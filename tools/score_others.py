"""Keeps the scores of somebody's samples beside the runs (`tools.score --as NAME`), for the board to show."""

from __future__ import annotations

import argparse
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.folder import check_level
from selfguide.spec.config import EvaluationConfig
from selfguide.spec.data_fit import part_seed
from selfguide.spec.identity import digest
from selfguide.spec.others import (
    FOLDER,
    TYPED_NOTE,
    OtherRecord,
    check_name,
    check_note,
    measured,
)
from selfguide.spec.records import measuring
from shards.errors import UserError
from shards.format import manifest as manifests


def name_of(options: argparse.Namespace) -> str | None:
    """The name to keep the scores under, without blanks around it; None where they are only printed."""
    # a keyword of Python
    given = getattr(options, "as")
    return None if given is None else given.strip()


def check(options: argparse.Namespace) -> None:
    """Returns where the scores can be kept as asked, or are only printed; reads no images.

    Raises:
        UserError: a name or a note that no board could show, or a folder of runs that may not be written.
    """
    name = name_of(options)
    if name is None:
        if options.note:
            raise UserError(
                f"--note {options.note!r} is kept with the scores: give --as NAME as well"
            )
        return
    try:
        check_name(name)
    except ValueError as error:
        raise UserError(f"--as {name!r}: {error}; give a name such as ADM-G") from error
    try:
        check_note(options.note, TYPED_NOTE)
    except ValueError as error:
        raise UserError(
            f"--note {options.note!r}: {error}; give a shorter or plainer one"
        ) from error
    runs = Path(options.runs)
    check_level(runs)
    place = (runs / FOLDER).absolute()
    there = next(each for each in (place, *place.parents) if os.path.lexists(each))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"--runs {options.runs}: nothing can be written in {there}; name a folder of runs that you may write"
        )


def keep(
    options: argparse.Namespace,
    evaluation: EvaluationConfig,
    *,
    scores: Mapping[str, float],
    left_out: Sequence[float],
    stamp: Sequence[object],
    chosen: Mapping[str, Any] | None,
) -> Path:
    """Writes the scores beside the runs and returns the file.

    Args:
        evaluation: what was measured, as `as_submitted` has it.
        stamp: what tells the samples' files from others.
        chosen: what the samples were chosen by, where they were.
    """
    name = name_of(options)
    assert name is not None
    note = options.note
    if chosen:
        # whatever else is said of them: such a score is no model's own
        note = "; ".join(filter(None, [note, chosen_words(chosen)]))
    # names of files need be no text
    samples = Path(options.samples).resolve().name.encode(errors="replace").decode()
    return OtherRecord(
        name=name,
        note=note,
        protocol=measured(measuring(evaluation, str(evaluation.manifest))),
        # as in a run's record: a missing score and NaN are the same to a reader
        scores={name: float(value) for name, value in scores.items() if math.isfinite(value)},
        left_out=tuple(map(float, left_out)) if all(map(math.isfinite, left_out)) else (),
        when=time.time(),
        host=socket.gethostname(),
        samples=samples,
        stamp=digest(stamp),
    ).publish(Path(options.runs))


def as_submitted(
    evaluation: EvaluationConfig,
    reference_sha256: str | None,
    unconditional_sha256: str | None,
    net_sha256: str,
) -> EvaluationConfig:
    """`evaluation` with what `launcher.references.pinned` fills in at a run's submission, of the same files and shards.

    Args:
        reference_sha256, unconditional_sha256, net_sha256: of the files that were read, as far as there were any.
    """
    found: dict[str, Any] = {}
    if evaluation.reference:
        found["reference_sha256"] = reference_sha256
    if evaluation.unconditional:
        found["unconditional_sha256"] = unconditional_sha256
    if evaluation.protocol == "fd_timm":
        found["sha256"] = net_sha256
    if evaluation.shards:
        manifest = manifests.load(evaluation.shards)
        found["manifest"] = manifest.hash
        if evaluation.reference_count is not None and evaluation.reference_seed is None:
            found["reference_seed"] = part_seed(manifest)
    return replace(evaluation, **found)


def chosen_words(chosen: Mapping[str, Any]) -> str:
    """What `tools.confidence` chose samples by, in words."""
    return f"of {chosen['kept']:,} samples chosen out of {chosen['of']:,}: {chosen['by']}"
