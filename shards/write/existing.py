"""Finds the data set that a place already holds; none is ever overwritten."""

from __future__ import annotations

from pathlib import Path

from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest


def find_existing(root: storage.Url) -> Manifest | None:
    """The manifest of the data set at `root`, or None.

    Raises:
        UserError: `root` is a file.
    """
    if not storage.is_remote(root) and Path(root).is_file():
        raise UserError(f"{root} is a file: name a folder to write the shards to")
    if not storage.exists(storage.join(root, manifests.LATEST)):
        return None
    return manifests.load(root)


def other_data_set(root: storage.Url, found: Manifest) -> UserError:
    """The refusal to write over a data set."""
    return UserError(
        f"{root} holds another data set ({found.source['name']}, {found.count:,} samples, "
        f"manifest {found.hash[:12]}): choose another folder, or delete it first"
    )
