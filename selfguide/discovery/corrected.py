"""Settings that were corrected to their source's value when annotations made under another one existed already.

An annotation that was begun before is continued under the old values, and an earlier record is read by them: a field
that came with a correction has `Neutral(old)`, as in a run's config, and leaves no trace there; one whose default moved
has `Was(old)`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from selfguide.spec.config.laws import Neutral, fields_of, identity_of

Config = TypeVar("Config")


@dataclass(frozen=True)
class Was:
    """A field that records have always named, and the default that it had."""

    value: Any


def plain(config: Any) -> dict[str, Any]:
    """Returns its fields for a record or a hash, as they were written before where they are as they were before."""
    found = asdict(config)
    return {name: found[name] for name in identity_of(config)}


def before(config: Config, typed: Collection[str] = ()) -> Config:
    """Returns it with the old value of every corrected field, but for those that a user has `typed`."""
    corrected = [(f, f.law(Neutral) or f.law(Was)) for f in fields_of(type(config))]
    old = {f.name: law.value for f, law in corrected if law and f.name not in typed}
    return replace(config, **old)  # type: ignore[type-var]
