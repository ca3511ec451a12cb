"""Names of the human labels that a snapshot was conditioned on, as the manifest of its shards has them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, tensor

from selfguide.snapshot import Snapshot
from selfguide.spec.suggest import nearest
from shards.errors import UserError
from shards.format import manifest as manifests


def class_names(snapshot: Snapshot) -> tuple[str, ...]:
    """The name of each label, in their order; () where the data have none, or are gone from an old snapshot."""
    if "class_names" in snapshot.data:
        return tuple(snapshot.data["class_names"])
    # snapshots of before this was kept
    try:
        found = manifests.load(snapshot.data["root"])
    except (OSError, UserError):
        return ()
    known = found.hash == snapshot.data["manifest"]
    return tuple(found.plain.get("class_names", ())) if known else ()


def label_ids(snapshot: Snapshot, labels: Iterable[int | str]) -> Tensor:
    """(B,) int64 of labels by number, or by the name of their class.

    Raises:
        UserError: no class has this name, or a text is the number of one class and the name of another.
    """
    asked = [*labels]
    # numbers need no names, and so no data
    names = class_names(snapshot) if any(isinstance(each, str) for each in asked) else ()
    return tensor([_id(each, names) for each in asked])


def _id(label: int | str, names: tuple[str, ...]) -> int:
    if isinstance(label, int):
        return label
    number = int(label) if label.isdecimal() else None
    if label in names:
        found = names.index(label)
        if number is not None and number != found:
            raise UserError(
                f"label {label} is the name of class {found}, and class {number} is called "
                f"{names[number]!r}; give {found} to a function as a number"
                if number < len(names)
                else f"label {label} is the name of class {found}; give {found} as a number"
            )
        return found
    if number is not None:
        return number
    known = ", ".join(names[:20]) or "none"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    raise UserError(
        f"no class is called {label!r}{nearest(label, names)}; the data have: {known}{more}"
    )
