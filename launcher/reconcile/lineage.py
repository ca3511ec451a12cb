"""What a run came from: a snapshot or official weights that it began with, sidecars, the autoencoder of its latents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.reconcile.view import RunView

Kind = Literal["snapshot", "official", "sidecar", "autoencoder"]


@dataclass(frozen=True, kw_only=True)
class Parent:
    """One thing that a run was made from."""

    kind: Kind
    # a path, a folder, or the name of an autoencoder
    name: str
    # of weights or rows; "" where nobody wrote it down
    sha256: str = ""
    # of a snapshot
    images: int | None = None
    # the config's field that names a sidecar
    field: str = ""
    # runs of this board behind it: the one whose snapshot it is, or those whose snapshots found a sidecar's groups
    runs: tuple[str, ...] = ()
    # sha256 of the nets that a sidecar was made with
    nets: tuple[str, ...] = ()


def parents(view: RunView) -> tuple[Parent, ...]:
    """What the newest snapshot's manifest says, and before there is one, what the identity and the config say."""
    manifest: Mapping[str, Any] = {}
    if view.snapshots:
        manifest = view.snapshots[max(view.snapshots)]
    return (*_weights(view, manifest), *_sidecars(view, manifest), *_encoder(manifest))


def _weights(view: RunView, manifest: Mapping[str, Any]) -> Iterable[Parent]:
    init = view.identity.get("init", {})
    if init.get("source", "scratch") == "scratch":
        return
    origin = manifest.get("origin", {})
    configured = view.config.init.path if view.config else None
    path = origin.get("path") or configured or ""
    yield Parent(
        kind="snapshot" if init["source"] == "snapshot" else "official",
        name=str(path),
        sha256=str(origin.get("sha256") or init.get("sha256") or ""),
        images=origin.get("images"),
    )


def _sidecars(view: RunView, manifest: Mapping[str, Any]) -> Iterable[Parent]:
    sidecars = manifest.get("guidance", {}).get("sidecars", {})
    for field, about in sidecars.items():
        yield Parent(
            kind="sidecar",
            name=str(about.get("folder", "")),
            sha256=str(about.get("sha256", "")),
            field=field,
            nets=tuple(net["sha256"] for net in about.get("nets", ()) if net.get("sha256")),
        )
    guidance = view.identity.get("guidance", {})
    folders = getattr(view.config.guidance, "folders", {}) if view.config and not sidecars else {}
    for field, folder in folders.items():
        yield Parent(
            kind="sidecar", name=str(folder), sha256=str(guidance.get(field) or ""), field=field
        )


def _encoder(manifest: Mapping[str, Any]) -> Iterable[Parent]:
    header = manifest.get("data", {}).get("header", {})
    if header.get("kind") == "latent":
        yield Parent(
            kind="autoencoder",
            name=str(header.get("encoder", "")),
            sha256=str(header.get("encoder_sha256", "")),
        )


def weights(view: RunView) -> tuple[str, ...]:
    """The sha256 of the weights of the run's snapshots, those that were scored and are gone included."""
    there = (part for manifest in view.snapshots.values() for part in manifest["files"])
    found = [part["sha256"] for part in there if str(part["name"]).endswith(".safetensors")]
    return (*found, *(r.snapshot_sha256 for r in view.records if r.snapshot_sha256))


class Known:
    """Runs by their folders and by the weights of their snapshots."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}
        self._weights: dict[str, str] = {}

    def add(self, run: str, root: Path, weights: Iterable[str]) -> None:
        """Adds a run, its folder, and the sha256 of its `weights`."""
        self._folders[os.path.abspath(root)] = run  # noqa: PTH100 - of a thousand, without asking the disk
        self._weights |= dict.fromkeys(weights, run)

    def resolved(self, parent: Parent) -> Parent:
        """The parent with the runs of ours behind it."""
        found = [self._weights.get(sha256) for sha256 in (parent.sha256, *parent.nets)]
        if parent.kind == "snapshot" and parent.name and not any(found):
            # RUN/snapshots/img-...
            root = os.path.abspath(Path(parent.name).parent.parent)  # noqa: PTH100
            found.append(self._folders.get(root))
        return replace(parent, runs=tuple(dict.fromkeys(run for run in found if run)))
