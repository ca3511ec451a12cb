"""Whether a file of statistics was made for a protocol, as far as it says: known before anything is queued.

Only the mean and the note of how it was made are read here; `evaluation.scores` checks the whole file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfguide.spec.config import EvaluationConfig
from selfguide.spec.metrics import FEATURES
from shards.errors import UserError
from shards.sources.arrays import members, read_array


def check_file(field: str, path: Path, evaluation: EvaluationConfig) -> None:
    """Returns when the statistics in a .npz may be of the features in which this protocol of images measures.

    Args:
        field: the setting that names it.

    Raises:
        UserError: it is no such file, or names what differs, or is of an unconditional run that it does not name.
    """
    there = members(str(path))
    if missing := [name for name in ("mu", "sigma") if name not in there]:
        raise UserError(f"{path} is no reference: it holds no array {' or '.join(missing)}")
    try:
        about = json.loads(str(read_array(str(path), "about"))) if "about" in there else {}
        width = len(read_array(str(path), "mu"))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no reference: {error}") from error
    about = about if isinstance(about, dict) else {}
    features = FEATURES[evaluation.protocol]
    # as nets say theirs, however it was typed
    sha256 = (features.sha256 or evaluation.sha256 or "").lower()
    known = {"sha256": sha256, "width": features.width}
    if features.weights is not None:
        known["resize"] = features.resize
    net = features.nets[0] if features.nets else str(evaluation.net)
    stated = about.get("features") or {}
    check_made_with(stated, width, {name: value for name, value in known.items() if value}, net)
    if field == "unconditional":
        check_names_run(about)


def check_made_with(
    stated: Mapping[str, Any], width: int, known: Mapping[str, Any], net: str
) -> None:
    """Returns when statistics of `width` features were made as a net sees images.

    Args:
        stated: what the file says of that; others' files say nothing.
        known: the same of the net.
        net: its name.

    Raises:
        UserError: names what differs.
    """
    if width != known.get("width", width):
        raise UserError(
            f"the reference has {width} features and {net} has {known['width']}: it is of another protocol"
        )
    for name, ours in known.items() if stated else ():
        if stated.get(name) != ours:
            raise UserError(
                f"the reference was made with {name}={stated.get(name)}, and this protocol has {name}={ours}"
            )


def check_names_run(about: Mapping[str, Any]) -> None:
    """Raises UserError where statistics of samples do not say of which run these are."""
    if not about.get("run"):
        raise UserError("these statistics name no run, so that nobody could say what uFID means")


def made_by(field: str, protocol: str = "P") -> str:
    """The command that makes the file that this setting names."""
    what = {"reference": "make SHARDS", "unconditional": "samples RUN"}[field]
    return f"`python -m tools.reference {what} --protocol {protocol} --out FILE.npz`"
