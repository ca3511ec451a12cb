"""`guidance=sidecar`: what was found of each image before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from selfguide.spec.config.guidance import DROP, Guidance
from selfguide.spec.config.laws import (
    Within,
)
from selfguide.spec.sizes import row
from selfguide.spec.uvit import UViTArchitecture
from shards import storage
from shards.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

    from selfguide.spec.config import Config


class Role(NamedTuple):
    """What a field of `SidecarGuidance` may name."""

    # kinds of sidecar
    kinds: tuple[str, ...]
    # the field that says how large the network's input for it is
    size: str
    # the verbs of tools.annotate that make one
    made_by: str


ROLES = {
    "ids": Role(("id", "multi_hot"), "groups", "kmeans or temi"),
    "layout": Role(("box", "mask"), "channels", "lost or stego"),
    "dense": Role(("dense",), "width", "features"),
}


@dataclass(frozen=True, kw_only=True)
class SidecarGuidance(Guidance):
    """What was found of each image beforehand, read from annotation sidecars; see `shards.sidecar`.

    Any of them, together: SGDM (Hu et al. 2023, arXiv 2210.06462) conditions on a group and a box or mask.
    """

    source: Literal["sidecar"] = "sidecar"
    # folder of a sidecar of kind id or multi_hot
    ids: str | None = None
    # K of `ids`; without them, of a mask, whose groups are a multi-hot condition too
    groups: int = 0
    # of kind box or mask
    layout: str | None = None
    # of `layout`: 1 for boxes, the groups of a mask
    channels: int = 0
    # of kind dense
    dense: str | None = None
    # P of `dense`
    width: int = 0
    # one mask for all of them (SGDM)
    drop: Annotated[float, DROP] = 0.1
    # share of images conditioned on another image's row: a control
    shuffle: Annotated[float, Within(0.0, 1.0)] = 0.0

    @property
    def one_group(self) -> bool:
        """Where ids are all that is given."""
        return self.ids is not None and self.layout is None and self.dense is None

    @property
    def folders(self) -> dict[str, str]:
        """The configured sidecars by field."""
        named = {field: getattr(self, field) for field in ROLES}
        return {field: folder for field, folder in named.items() if folder is not None}

    def absolute(self) -> Self:
        resolved: dict[str, Any] = {
            field: str(storage.expanded(folder).resolve()) for field, folder in self.folders.items()
        }
        return replace(self, **resolved)

    def network_inputs(self, classes: int) -> dict[str, int]:
        return {"classes": self.groups, "dense": self.width, "spatial": self.channels}

    def check(self, config: Config) -> None:
        if not self.folders:
            raise UserError(
                "guidance.source=sidecar has no condition yet; give guidance.ids=FOLDER with guidance.groups=K, "
                "guidance.layout=FOLDER with guidance.channels=M, or guidance.dense=FOLDER with guidance.width=P"
            )
        for field, folder in self.folders.items():
            if not folder.strip() or storage.is_remote(folder):
                raise UserError(
                    f"guidance.{field}={folder!r}: rows are mapped into memory; give a folder on a file system that "
                    "all nodes share"
                )
        for field, role in ROLES.items():
            self._check_size(field, role)
        base = row(config.model.name)
        width = config.model.width or getattr(base, "width", 0)
        if isinstance(base, UViTArchitecture) and self.width not in (0, width):
            raise UserError(
                f"guidance.width={self.width}, and model.name={config.model.name} takes a dense condition as a token "
                f"of its own width, {width}; take features of that width, or a DiT or UNet, which project them"
            )

    def _check_size(self, field: str, role: Role) -> None:
        folder, size = getattr(self, field), getattr(self, role.size)
        if folder is not None and size < 1:
            raise UserError(
                f"guidance.{role.size}={size} is too small for guidance.{field}={folder}; give the number that its "
                "record names, 1 or more"
            )
        if folder is None and size and not (field == "ids" and self.layout is not None):
            raise UserError(
                f"guidance.{role.size}={size} is read with guidance.{field} only; give guidance.{field}=FOLDER, or "
                "drop it"
            )
        if field == "ids" and folder is None and size not in (0, self.channels):
            raise UserError(
                f"guidance.groups={size} without guidance.ids are the groups that guidance.layout holds; take "
                f"guidance.groups={self.channels}, or 0 to condition on the layout alone"
            )

    def identity(self, config: Config, promises: Mapping[str, Any]) -> dict[str, Any]:
        """What the sidecars hold, not where they lie."""
        return dict.fromkeys(self.folders) | dict(promises)
