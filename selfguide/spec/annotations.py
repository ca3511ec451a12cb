"""What a run is conditioned on from sidecars, checked without torch: each by itself, and that it fits the run.

The annotations themselves, not where they lie, belong to what a run is: the sha256 of their rows is promised when a
run is submitted, and asked for again when its job begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfguide.spec.config import Config
from selfguide.spec.config.guidance import Guidance
from selfguide.spec.config.sidecar import ROLES
from shards import storage
from shards.errors import UserError

if TYPE_CHECKING:
    from shards.sidecar import Sidecar


def check_annotations(config: Config, manifest: str) -> dict[str, Sidecar]:
    """The configured sidecars by field, once they fit the settings and the shards whose manifest is `manifest`.

    Raises:
        UserError: no sidecar there, one of other shards or of another kind, or other sizes than configured.
        DamagedError: one is not what was published.
    """
    from shards import sidecar  # needs NumPy, and a dry run does not

    guidance = config.guidance
    found = {}
    for field, folder in guidance.folders.items():
        try:
            found[field] = sidecar.read(folder, manifest=manifest)
        except UserError as error:
            raise UserError(f"guidance.{field}: {error}") from error
        _check(guidance, field, found[field])
    if config.evaluation.prior != "empirical" and "ids" in found and found["ids"].kind != "id":
        raise UserError(
            f"evaluation.prior={config.evaluation.prior} draws one group an image, and "
            f"guidance.ids={guidance.folders.get('ids')} holds several; take evaluation.prior=empirical"
        )
    return found


def _check(guidance: Guidance, field: str, found: Sidecar) -> None:
    role, folder = ROLES[field], getattr(guidance, field)
    if found.kind not in role.kinds:
        fits = next(name for name, other in ROLES.items() if found.kind in other.kinds)
        raise UserError(
            f"guidance.{field}={folder} is a sidecar of kind {found.kind}, not {' or '.join(role.kinds)}; give it as "
            f"guidance.{fits}, or make one with `python -m tools.annotate {role.made_by}`"
        )
    size, configured = size_of(found), getattr(guidance, role.size)
    if size != configured:
        raise UserError(
            f"guidance.{role.size}={configured}, and guidance.{field}={folder} has {size}; set "
            f"guidance.{role.size}={size}"
        )
    groups = guidance.network_inputs(0)["classes"]
    if found.kind == "box" and "ids" not in guidance.folders and groups:
        raise UserError(
            f"guidance.groups={groups} and boxes have no groups; give guidance.ids=FOLDER, or drop it"
        )


def size_of(found: Sidecar) -> int | None:
    """What the network's input for a sidecar is as large as: its groups, its channels, or the width of a feature."""
    sizes = {"box": 1, "dense": found.shape[0] if found.shape else 0}
    return sizes.get(found.kind, found.groups)


def promises(sidecars: dict[str, Sidecar]) -> dict[str, Any]:
    """What a run's identity holds of its annotations."""
    hashes: dict[str, Any] = {field: found.sha256 for field, found in sidecars.items()}
    return hashes | {"saw_labels": any(found.saw_labels for found in sidecars.values())}


def check_promises(
    sidecars: dict[str, Sidecar], promised: dict[str, Any], *, bytes_too: bool
) -> None:
    """Annotations that changed since the run was submitted would make another run of it.

    `bytes_too` reads every row; without it the sidecars' own records are believed.

    Raises:
        UserError: a sidecar is not the one that was promised.
    """
    for field, found in sidecars.items():
        sha256 = storage.sha256(found.folder / "rows.npy") if bytes_too else found.sha256
        if sha256 != promised[field]:
            raise UserError(
                f"guidance.{field}={found.folder} has sha256 {sha256[:12]}, and this run was begun with "
                f"{str(promised[field])[:12]}; put those annotations back, or submit a new run"
            )
