"""What the schema says of a dotted key, such as `cluster.partition`: which there are, and what they hold."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from launcher import typed
from selfguide.spec.config import Config
from selfguide.spec.config.laws import Minutes, fields_of


def known_keys() -> list[str]:
    """Every dotted key of the schema; a union of configs contributes the keys of each."""
    found = [
        each.name for each in fields_of(Config) if each.name not in {name for name, _ in sections()}
    ]
    for part, cls in sections():
        found += [key for each in fields_of(cls) if (key := f"{part}.{each.name}") not in found]
    return found


def sections() -> list[tuple[str, type]]:
    """(group, config class), each source of a union by itself."""
    found = []
    for each in fields_of(Config):
        options = (
            typing.get_args(each.type) if isinstance(each.type, types.UnionType) else (each.type,)
        )
        found += [(each.name, option) for option in options if dataclasses.is_dataclass(option)]
    return typing.cast("list[tuple[str, type]]", found)


def types_of(key: str) -> list[Any]:
    """The types of a key, one for each class that has it; of a name in a mapping, that of its values."""
    part, _, name = key.rpartition(".")
    found = [
        each.type
        for section, cls in [("", Config), *sections()]
        for each in fields_of(cls)
        if (section, each.name) == (part, name)
    ]
    return [str] if not found and name and names_anything(part) else found


def names_anything(key: str) -> bool:
    """Whether any name may stand below a key."""
    return bool(key) and typed.shape(types_of(key)) == "mapping"


def holds_text(key: str) -> bool:
    """Whether a key's value is text, and so is what was typed."""
    return typed.shape(types_of(key)) == "text"


def is_time(key: str) -> bool:
    """Whether a key's value may be written as Slurm writes a time."""
    part, _, name = key.rpartition(".")
    found = [cls for section, cls in sections() if section == part]
    return any(each.name == name and each.law(Minutes) for cls in found for each in fields_of(cls))


def as_typed(values: dict[str, Any], texts: dict[str, Any], part: str) -> dict[str, Any]:
    """Returns what a YAML file holds for `part` of the config, with what stands there wherever a field holds text.

    YAML makes 9.1 of 9.10, true of `on`, 8 of 010 and 5400 of 1:30:00. `${NAME}` is text, as on the command line,
    unless it names a setting or a resolver.

    Args:
        values: as YAML reads the file.
        texts: the same with each scalar as it is written.
    """
    made = {}
    roots = [each.name for each in fields_of(Config)]
    for name, value in values.items():
        key, text = f"{part}.{name}" if part else str(name), texts.get(name)
        kind = typed.shape(types_of(key))
        held = {"mapping": dict, "texts": list, None: dict}.get(kind, str | int | float)
        if not isinstance(value, held):
            timed = kind is None and isinstance(text, str) and ":" in text and is_time(key)
            made[name] = text if timed else value
        elif kind is None:
            made[name] = as_typed(value, texts[name], key)
        elif kind == "mapping":
            own = {n: v for n, v in value.items() if not _is_text(key, v)}
            made[name] = typed.written(texts[name], roots) | own
        else:
            made[name] = typed.written(text, roots)
    return made


def _is_text(key: str, value: Any) -> bool:
    """Whether a value of a mapping is text; a free option of sbatch may be one without a value, or taken back."""
    if isinstance(value, dict | list):
        return False
    return key != "cluster.sbatch" or not (value is None or isinstance(value, bool))
