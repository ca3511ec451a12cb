"""Weights at image 0: fresh, or from a published snapshot or an official checkpoint, with a record of where from.

The record travels with checkpoints into every later snapshot. `saw_labels` in it is true once anything that the
weights came from was trained with labels, the table dropped since or not: SGFM's published numbers (Hu et al. 2023)
begin from class-conditional weights, and a run that does so is not label-free.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from selfguide import snapshot
from selfguide.networks.official import adopt, token_names
from selfguide.networks.student import Student
from selfguide.spec.config import Config, InitConfig
from selfguide.spec.contamination import trained_by
from selfguide.spec.initial_weights import (
    SCRATCH,
    agree,
    begins_fresh,
    ema_sha256,
    official_training,
    read_snapshot,
    training_of,
)
from selfguide.spec.official import Training
from selfguide.spec.run import RunFolder
from selfguide.spec.selections import nets_that_selected
from selfguide.spec.uvit import UViTArchitecture
from selfguide.weights import copy_token_rows, read_weights
from shards import storage
from shards.errors import UserError

log = logging.getLogger(__name__)
_TABLES = (".labels.weight", ".rows")  # a row for each label, in transformers and in UNets


def initialise(student: Student, config: Config, promised: str | None) -> dict[str, Any]:
    """Fills a fresh `student` as `config.init` says; the record of where its weights come from.

    `promised` is the sha256 that the run was submitted with. Every rank calls and reads for itself.

    Raises:
        UserError: other weights than promised, or weights that do not fit.
    """
    init = config.init
    if init.source == "scratch":
        return dict(SCRATCH)
    take = _from_snapshot if init.source == "snapshot" else _from_official
    return take(student, config, promised)


def _from_official(student: Student, config: Config, promised: str | None) -> dict[str, Any]:
    init, path = config.init, Path(str(config.init.path))
    if not path.is_file():
        raise UserError(
            f"init.path={path} is not a file on this node; put it where all nodes see it"
        )
    sha256 = storage.sha256(path)
    _check_promise(init, sha256, promised)
    found = adopt(student.backbone, read_weights(path, f"init.path={path}"), config)
    trained = official_training(config, student.backbone.net)
    # a table of which nobody knows whether its last row is a class leaves null and unconditional fresh
    taken = found.null and config.guidance.takes_tokens
    more = {"null": "taken" if taken else "fresh"}
    return _record(init, sha256, found.saw_labels, trained) | more


def _from_snapshot(student: Student, config: Config, promised: str | None) -> dict[str, Any]:
    init, folder = config.init, Path(str(config.init.path))
    manifest, their_config = read_snapshot(folder, verify="sizes")
    _check_promise(init, ema_sha256(manifest, their_config), promised)
    agree(their_config, config)
    published = _load(folder)
    _check_promise(init, published.sha256, promised)
    for said in begins_fresh(config):
        log.warning(said)
    parts = transplant(published.student, student, keep_labels=init.labels == "keep")
    more = {"images": published.images, "parts": parts, "origin": published.origin}
    chosen = nets_that_selected(RunFolder(folder.parent.parent), published.images)
    if nets := trained_by(published.guidance, published.origin, chosen):
        more["nets"] = nets
    trained = training_of(published.config.path, published.student.backbone.net)
    return _record(init, published.sha256, published.saw_labels, trained) | more


def _load(folder: Path) -> snapshot.Snapshot:
    try:
        return snapshot.load(folder)  # hashes every file
    except FileNotFoundError as error:
        raise UserError(
            f"init.path={folder} holds other bytes than its manifest says; copy the snapshot again"
        ) from error


def _check_promise(init: InitConfig, sha256: str, promised: str | None) -> None:
    if sha256 != promised:
        raise UserError(
            f"init.path={init.path} holds weights {sha256[:12]}, and this run was begun on "
            f"{(promised or 'none')[:12]}; put those back, or submit a new run"
        )


def _record(init: InitConfig, sha256: str, saw_labels: bool, trained: Training) -> dict[str, Any]:
    return {
        "source": init.source,
        "form": init.form,
        "labels": init.labels,
        "path": init.path,
        "sha256": sha256,
        "saw_labels": saw_labels,
        "trained": trained._asdict(),
    }


def transplant(theirs: Student, ours: Student, *, keep_labels: bool) -> list[str]:
    """Puts `theirs` into `ours`: the backbone, and each other part whose shapes all agree. Names what was taken.

    What only ours has keeps its fresh initialisation; what only theirs has is left.

    Raises:
        UserError: a weight of the backbone that both have differs in shape.
    """
    given, own = theirs.state_dict(), ours.state_dict()
    made, taken = dict(own), []
    for name, tensor in _backbone(theirs, ours, keep_labels=keep_labels).items():
        made[name] = tensor
    taken.append("backbone")
    # a branch knows one layer, and another one's tokens say nothing to it
    branches = (
        f"branches.{name}"
        for name, branch in ours.branches.items()
        if name in theirs.branches and theirs.branches[name].layer == branch.layer
    )
    for part in ("head", "uncertainty", *branches):
        names = [name for name in own if name.startswith(f"{part}.")]
        theirs_too = {name for name in given if name.startswith(f"{part}.")} == set(names)
        if names and theirs_too and all(given[name].shape == own[name].shape for name in names):
            made |= {name: given[name] for name in names}
            taken.append(part)
    ours.load_state_dict(made)
    return taken


def _backbone(theirs: Student, ours: Student, *, keep_labels: bool) -> dict[str, Tensor]:
    given, own = theirs.state_dict(), ours.state_dict()
    made: dict[str, Tensor] = {}
    for name in (name for name in own if name.startswith("backbone.") and name in given):
        if name.endswith(_TABLES) and not keep_labels:
            continue
        tensor, mine, its = given[name], ours.backbone.net, theirs.backbone.net
        if isinstance(mine, UViTArchitecture) and name == "backbone.positions":
            assert isinstance(its, UViTArchitecture)  # `agree` compared the families
            tensor = copy_token_rows(own[name], token_names(mine), tensor, token_names(its))
        if _is_projection(name) and tensor.shape != own[name].shape:
            continue  # of prototypes or features of another width
        if tensor.shape != own[name].shape:
            raise UserError(
                f"the snapshot's {name} is {tuple(tensor.shape)} and this network's {tuple(own[name].shape)}; "
                "take a snapshot of this model"
            )
        made[name] = tensor
    return made


def _is_projection(name: str) -> bool:
    return ".dense." in name or name.endswith(".dense")
