"""A user's own shards: `data.root` alone says where they are, and their manifest what is in them."""

from __future__ import annotations

from typing import Any, cast

from shards import storage
from shards.errors import UserError

Held = tuple[tuple[int, int, int], int]


def describe(values: dict[str, Any], given: set[str], frames: dict[Any, Any] | None) -> None:
    """Sets shape and classes of composed values to those of the shards, where `data.root` is given without them.

    Args:
        given: the keys that were typed: what somebody says of data is compared with them when a run is submitted.
        frames: keeps what is read, as `launcher.compose.compose` does.

    Raises:
        UserError: nothing says what the shape is, and there are no shards.
    """
    data = values["data"]
    shaped = "shape" in data
    wanted = {
        field
        for field in ("shape", "classes")
        if f"data.{field}" not in given and ("data.root" in given or not shaped)
    }
    if not wanted or not isinstance(data.get("root"), str):
        return
    # nobody waits for a store to see what a command would do
    if shaped and values["dry_run"] and storage.is_remote(data["root"]):
        return
    found = _held(data["root"], frames, required=not shaped)
    if found is None:
        return
    shape, classes = found
    # a crop is of the shape that its experiment says
    if "shape" in wanted and not (shaped and data.get("crop")):
        data["shape"] = [*shape]
    if "classes" in wanted:
        data["classes"] = classes


def _held(root: str, frames: dict[Any, Any] | None, *, required: bool) -> Held | None:
    """Shape and classes of the shards at `root`; None where there are none, which a submission refuses by itself."""
    # most commands compose without, and NumPy costs them a tenth of a second
    from shards.format import manifest

    key = ("data.root", root)
    if frames is not None and key in frames:
        return cast(Held, frames[key])
    try:
        found = manifest.load(root)
    except UserError as error:
        if required:
            raise UserError(f"nothing says what data.root={root} holds: {error}") from error
        return None
    held = found.model_shape, found.classes
    if frames is not None:
        frames[key] = held
    return held
