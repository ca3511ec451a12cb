"""What may stand beside a field's type: its range, when it is read, and its part in a run's identity.

A field of a config class is written `name: Annotated[type, law, ...] = default`. `check` holds a group to the laws of
its fields, `identity_of` makes the group's part of the identity, and neither needs a table of fields kept elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shards.errors import UserError

_TIME = re.compile(r"(?:(\d+)-(?=\d)|(?=\d+:))(\d+)(?::(\d+))?(?::(\d+))?")


class Range:
    """A law of the value alone."""

    def broken(self, value: Any) -> str | None:
        """Why `value` is refused and what to take instead; None where it is allowed."""
        raise NotImplementedError


@dataclass(frozen=True)
class AtLeast(Range):
    """A whole number from `low` on."""

    low: int
    cure: str = "is too small; take {low} or more"

    def broken(self, value: Any) -> str | None:
        return self.cure.format(low=self.low) if value < self.low else None


@dataclass(frozen=True)
class Seed(Range):
    """A whole number of 64 bits, or of fewer where others are counted on from it."""

    high: int = 2**64 - 1

    def broken(self, value: Any) -> str | None:
        return None if 0 <= value <= self.high else f"is a seed: take 0 to {self.high}"


@dataclass(frozen=True)
class Positive(Range):
    """A finite number above 0."""

    cure: str = "must be a positive number"

    def broken(self, value: Any) -> str | None:
        return None if math.isfinite(value) and value > 0 else self.cure


@dataclass(frozen=True)
class Within(Range):
    """A finite number in [low, high], less `high` with `below` and less `low` with `above`."""

    low: float = -math.inf
    high: float = math.inf
    below: bool = False
    above: bool = False

    def broken(self, value: Any) -> str | None:
        inside = math.isfinite(value) and self.low <= value <= self.high
        excluded = (self.below and value == self.high) or (self.above and value == self.low)
        if inside and not excluded:
            return None
        end = ")" if self.below or math.isinf(self.high) else "]"
        return f"must be a number in {'(' if self.above else '['}{self.low}, {self.high}{end}"


@dataclass(frozen=True)
class Share(Range):
    """A share of training, neither none nor all of it."""

    def broken(self, value: Any) -> str | None:
        law = "is a share of training: take a value between 0 and 1, both excluded"
        return None if 0 < value < 1 else law


@dataclass(frozen=True)
class Span(Range):
    """Two ascending numbers from 0 to `high`."""

    what: str = "noise-times"
    high: float = 1.0

    def broken(self, value: Any) -> str | None:
        low, high = value
        if 0 <= low <= high <= self.high:
            return None
        if 0 <= high < low <= self.high:
            return f"is a span of {self.what}, 0 <= low <= high: swap the two"
        top = "" if math.isinf(self.high) else f" <= {self.high:g}"
        return f"is a span of {self.what}: take two numbers with 0 <= low <= high{top}"


@dataclass(frozen=True)
class Images(AtLeast):
    """A count of images, which must be a multiple of the global batch."""

    low: int = 1


@dataclass(frozen=True)
class ReadWith:
    """Another field decides whether this one is read; elsewhere only its default is allowed.

    `conditions` are 'field=value', any of which is enough; 'field=SOMETHING' in capitals stands for any value but None,
    and a list has each of its values.
    """

    conditions: tuple[str, ...]

    def __init__(self, *conditions: str) -> None:
        object.__setattr__(self, "conditions", conditions)

    def holds(self, group: Any) -> bool:
        for condition in self.conditions:
            name, _, wanted = condition.partition("=")
            value = getattr(group, name)
            values = value if isinstance(value, tuple) else (value,)
            if value is not None and (wanted.isupper() or wanted in map(str, values)):
                return True
        return False


@dataclass(frozen=True)
class NotIdentity:
    """Changes where, how or how loudly a run works, never its result."""


@dataclass(frozen=True)
class Neutral:
    """A field that came later: at this value it leaves no trace in the identity, so older runs keep their id.

    The value is that of the runs before the field existed, whatever becomes of the default.
    """

    value: Any


@dataclass(frozen=True)
class Minutes:
    """A length of time, which may also be given as Slurm writes one: days-hours:minutes:seconds and shorter forms."""

    def read(self, value: Any) -> Any:
        """The minutes of a text such as 1-00:00:00, rounded up; anything else as it is.

        Without days, one colon divides minutes and seconds, as it does for sbatch --time.
        """
        found = _TIME.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            return value
        days, *rest = (int(part) if part else None for part in found.groups())
        parts = [part for part in rest if part is not None]
        if days is not None:
            hours, minutes, seconds = [*parts, 0, 0][:3]
        else:
            hours, minutes, seconds = [0, *parts] if len(parts) < 3 else parts
        return ((days or 0) * 24 + hours) * 60 + minutes + (seconds > 0) + max(0, seconds - 1) // 60


@dataclass(frozen=True)
class Formerly:
    """The name, and the values by their new spelling, under which the identity and older configs know a field."""

    name: str
    values: Mapping[Any, Any] = field(default_factory=dict, hash=False)

    def old(self, value: Any) -> Any:
        """`value` as it was spelled before."""
        return self.values.get(value, value)

    def new(self, value: Any) -> Any:
        """The new spelling of a value that was given under the old name."""
        return next((new for new, old in self.values.items() if old == value), value)


@dataclass(frozen=True)
class Field:
    """One field of a config class with the laws beside its type."""

    name: str
    type: Any
    default: Any
    laws: tuple[Any, ...]

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    def law(self, kind: type) -> Any:
        """The law of that kind, or None."""
        return next((law for law in self.laws if isinstance(law, kind)), None)


def fields_of(cls: type[Any]) -> tuple[Field, ...]:
    """The fields of a config class in order."""
    return _fields_of(typing.cast(Hashable, cls))


@functools.cache
def _fields_of(cls: Any) -> tuple[Field, ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for each in dataclasses.fields(cls):
        hint = hints[each.name]
        laws = getattr(hint, "__metadata__", ())
        plain = typing.get_args(hint)[0] if laws else hint
        default = each.default
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        found.append(Field(each.name, plain, default, laws))
    return tuple(found)


def check(group: Any, where: str) -> None:
    """Holds every field of `group`, whose keys begin with `where`, to its range.

    Raises:
        UserError: the first that does not hold; names the field, its value and the cure.
    """
    for each in fields_of(type(group)):
        value, limits = getattr(group, each.name), each.law(Range)
        if limits is None or value is None:
            continue
        key = f"{where}.{each.name}" if where else each.name
        whole = isinstance(limits, Span) or not isinstance(value, tuple)
        parts = [(key, value)] if whole else [(f"{key}[{i}]", v) for i, v in enumerate(value)]
        for name, part in parts:
            why = limits.broken(part)
            if why is not None:
                raise UserError(f"{name}={as_typed(part)} {why}")


def check_read(group: Any, where: str) -> None:
    """A setting that nothing reads would still make another run of the same training: only its default is allowed.

    Raises:
        UserError: names the field, its value and the setting it is read with.
    """
    for each in fields_of(type(group)):
        value, reader = getattr(group, each.name), each.law(ReadWith)
        if reader is not None and value != each.default and not reader.holds(group):
            wanted = " or ".join(f"{where}.{_typed(group, each)}" for each in reader.conditions)
            raise UserError(
                f"{where}.{each.name}={as_typed(value)} is read with {wanted} only; drop it, take that, or set "
                f"{where}.{each.name}={'null' if each.default is None else as_typed(each.default)}"
            )


def _typed(group: Any, condition: str) -> str:
    """A condition as a user types it: a list in brackets."""
    name, _, wanted = condition.partition("=")
    return f"{name}=[{wanted}]" if isinstance(getattr(group, name), tuple) else condition


def as_typed(value: Any) -> Any:
    """A value as a user types it."""
    return list(value) if isinstance(value, tuple) else value


def image_counts(group: Any, where: str) -> Iterator[tuple[str, int]]:
    """(key, value) of every field of `group` that counts images in whole batches."""
    for each in fields_of(type(group)):
        if each.law(Images) is not None:
            yield f"{where}.{each.name}", getattr(group, each.name)


def identity_of(group: Any) -> dict[str, Any]:
    """What of `group` changes a run's result, under the names that the identity froze.

    A field is in it by its value, so a changed default never merges two runs that differ; a field that came later is
    left out at its neutral value, so it renames no run.
    """
    made = {}
    for each in fields_of(type(group)):
        value, neutral, former = getattr(group, each.name), each.law(Neutral), each.law(Formerly)
        if each.law(NotIdentity) is not None or (neutral is not None and value == neutral.value):
            continue
        made[former.name if former else each.name] = former.old(value) if former else value
    return made
