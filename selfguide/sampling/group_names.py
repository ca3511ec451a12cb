"""Names and bans of a run's groups, written by hand in `groups.yaml` of its folder; sampling honours them.

    names: {3: zeros, 12: "sevens with a bar"}
    banned: [7]

Names stand for numbers wherever a group is asked for. Banned groups are never drawn and refused where they are asked
for. Prototypes drift while they are learned: names belong to the snapshots that they were given for, and the atlas
shows whether they still fit. Evaluation honours neither: a score's protocol draws from p(k).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from selfguide.snapshot import Snapshot
from selfguide.spec.suggest import nearest
from shards.errors import UserError

FILE = "groups.yaml"


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What a run's groups are called, and which are not to be drawn."""

    groups: int
    names: Mapping[int, str] = field(default_factory=dict)
    banned: frozenset[int] = frozenset()
    path: Path | None = None  # where it was read

    def called(self, group: int) -> str:
        """'3 (zeros)', or '3' where it has no name."""
        name = self.names.get(group)
        return f"{group} ({name})" if name else str(group)

    def number(self, text: str) -> int:
        """The group that a user means by a number or a name.

        Raises:
            UserError: no such name.
        """
        if text.lstrip("-").isdigit():
            return int(text)
        for group, name in self.names.items():
            if name == text:
                return group
        known = ", ".join(self.names.values()) or "none"
        raise UserError(
            f"no group is called {text!r} in {self.path or FILE}, and it is no number; names are: {known}"
            f"{nearest(text, self.names.values())}"
        )

    def refuse_banned(self, groups: Iterable[int]) -> None:
        """
        Raises:
            UserError: one of them is banned.
        """
        for group in groups:
            if group in self.banned:
                raise UserError(
                    f"group {self.called(group)} is banned in {self.path}; ask for another, or take it off `banned`"
                )

    def allowed(self, p: Sequence[float]) -> list[float]:
        """p(k) of the groups that are not banned, summing to 1.

        Raises:
            UserError: nothing is left.
        """
        kept = [0.0 if k in self.banned else share for k, share in enumerate(p)]
        if not sum(kept) > 0:
            raise UserError(
                f"every group that occurs is banned in {self.path}; take one off `banned`"
            )
        return [share / sum(kept) for share in kept]


def without_banned(snapshot: Snapshot, naming: Naming) -> Snapshot:
    """The snapshot as sampling draws from it; itself where nothing is banned."""
    p = snapshot.guidance["p"]
    if not naming.banned or p is None:
        return snapshot
    return replace(snapshot, guidance={**snapshot.guidance, "p": naming.allowed(p)})


def naming_of(folder: Path, snapshot: Snapshot) -> Naming:
    """What the groups of the snapshot in `folder` are called: `groups.yaml` lies in its run's folder."""
    p = snapshot.guidance["p"]
    if p is None:
        return Naming(groups=0)
    found = read_naming(folder.resolve().parents[1], len(p))
    # names that a user gave go before those of the data
    return replace(found, names={**dict(enumerate(snapshot.class_names)), **found.names})


def read_naming(run: Path, groups: int) -> Naming:
    """From a run's folder; without a file nothing is named or banned.

    Raises:
        UserError: the file cannot be read, an unknown key, a group beyond 0 to `groups` - 1, one name for two groups.
    """
    path = run / FILE
    if not path.is_file():
        return Naming(groups=groups)
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {found!r}; give `names:` and `banned:`")
    for key in found:
        if key not in ("names", "banned"):
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), ('names', 'banned'))}")
    names, banned = found.get("names") or {}, found.get("banned") or []
    if not isinstance(names, dict):
        raise UserError(f"{path}: names={names!r} must be a mapping such as {{3: zeros}}")
    if not isinstance(banned, list):
        raise UserError(f"{path}: banned={banned!r} must be a list such as [7]")
    for group in (*names, *banned):
        if not isinstance(group, int) or isinstance(group, bool) or not 0 <= group < groups:
            raise UserError(f"{path}: group {group!r} is not one of 0 to {groups - 1}")
    _check_names(path, names)
    return Naming(groups=groups, names=names, banned=frozenset(banned), path=path)


def _check_names(path: Path, names: Mapping[int, Any]) -> None:
    owners: dict[str, int] = {}
    for group, name in names.items():
        if not isinstance(name, str) or not name.strip() or name.lstrip("-").isdigit():
            raise UserError(
                f"{path}: the name {name!r} of group {group} must be a word, so that it is no number; put quotes "
                "around words such as yes and no"
            )
        if name in owners:
            raise UserError(
                f"{path}: groups {owners.get(name)} and {group} are both called {name!r}; give each its own name"
            )
        owners[name] = group
