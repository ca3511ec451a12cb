"""From a plain mapping, as Hydra composes it or YAML holds it, to config classes with their types checked."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, Literal, TypeVar

from selfguide.spec.config.laws import Field, Formerly, Minutes, fields_of
from selfguide.spec.suggest import nearest
from shards.errors import UserError

T = TypeVar("T")


def build(cls: type[T], values: Any, where: str = "") -> T:
    """`cls` from a plain mapping, types checked.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type; names the field, the value, the cure.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where or 'the config'} must be a mapping, not {values!r}")
    fields = {each.name: each for each in fields_of(cls)}
    values = _renamed(values, fields, where)
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key '{_dotted(where, key)}'{nearest(str(key), fields)}")
    made = {}
    for name, field in fields.items():
        dotted = _dotted(where, name)
        if name in values and values[name] != "???":
            law = field.law(Minutes)
            value = law.read(values[name]) if law else values[name]
            if law and isinstance(value, str):
                raise UserError(
                    f"{dotted}={value} is no length of time: give minutes, or days-hours:minutes:seconds as sbatch "
                    "--time takes it, such as 1-12:00:00"
                )
            made[name] = _convert(field.type, value, dotted)
        elif field.required:
            raise UserError(f"'{dotted}' has no value: give {dotted}=...")
    return cls(**made)


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else str(name)


def _renamed(values: dict[str, Any], fields: dict[str, Field], where: str) -> dict[str, Any]:
    """`values` with former names and spellings replaced by today's.

    Raises:
        UserError: a field is given under both names.
    """
    former = {law.name: f.name for f in fields.values() if (law := f.law(Formerly)) is not None}
    made = {}
    for key, value in values.items():
        name = former.get(key, key)
        if name != key and name in values:
            raise UserError(
                f"{_dotted(where, key)} is the former name of {_dotted(where, name)}, and both are given; drop one"
            )
        made[name] = fields[name].law(Formerly).new(value) if name != key else value
    return made


def built(cls: type[Any], name: str, value: Any) -> Any:
    """`value` as the field `name` of `cls`, which `build` takes as it is; of no such field the value itself.

    Raises:
        UserError: as `build`.
    """
    hints = {each.name: each.type for each in fields_of(cls)}
    return _convert(hints[name], value, name) if name in hints and value != "???" else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`, or a UserError that names `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            known = ", ".join(str(a) for a in args)
            raise UserError(
                f"{where}={value!r} is not one of: {known}{nearest(str(value), map(str, args))}"
            )
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if dataclasses.is_dataclass(value) and isinstance(value, tuple(options)):
            return value
        if len(options) > 1:  # a union of configs is discriminated by its `source`
            return build(_by_source(options, value, where), value, where)
        return _convert(options[0], value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            count = 1 if args[-1] is Ellipsis else len(args)
            words = "a list" if args[-1] is Ellipsis else f"a list of {count}"
            values = ",".join([str(value)] * count)
            raise UserError(f"{where}={value!r} must be {words}; give '{where}=[{values}]'")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise UserError(f"{where}={list(value)!r} must have {len(args)} values")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(
            _convert(h, v, f"{where}[{i}]")
            for i, (h, v) in enumerate(zip(inner, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}={value!r} must be a mapping")
        # of YAML, where true is no text
        return {str(k): str(v).lower() if isinstance(v, bool) else str(v) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        return build(typing.cast(type, hint), value, where)
    return _scalar(hint, value, where)


def _by_source(options: list[Any], value: Any, where: str) -> Any:
    sources = _sources(tuple(options))
    source = value.get("source") if isinstance(value, dict) else None
    if source not in sources:
        raise UserError(f"{where}.source={source!r} is not one of: {', '.join(sources)}")
    return sources[source]


@functools.cache
def _sources(options: tuple[Any, ...]) -> dict[str, Any]:
    return {typing.get_args(typing.get_type_hints(o)["source"])[0]: o for o in options}


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 2e6 is how people write two million
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint)
    cure = f"; give {wanted}" if wanted else ""
    raise UserError(f"{where}={value!r} must be {hint.__name__}, not {type(value).__name__}{cure}")
