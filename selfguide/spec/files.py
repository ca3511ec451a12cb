"""A config as YAML and JSON hold it, and back: what submit writes, the trainer reads and a snapshot carries."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from selfguide.spec.config import Config, build
from selfguide.spec.config.build import built
from selfguide.spec.config.laws import Neutral, fields_of
from shards.errors import UserError

# libyaml's safe loader where PyYAML has it: six times faster, and a list of runs reads hundreds of configs
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


# where a key of the top level begins; and an anchor or its use, which may be in two groups
_GROUP = re.compile(r"^(?=[A-Za-z_])", re.MULTILINE)
_SHARED = re.compile(r"(?<![^\s,\[{])[&*]\w")


def plain(config: Config) -> dict[str, Any]:
    """As JSON holds it: nested mappings and lists, tuples are lists."""
    return json.loads(json.dumps(asdict(config)))


def to_yaml(config: Config, *, unset: bool = True) -> str:
    """YAML that `read_config` reads; without `unset` what is left open (null) is not shown."""
    values = plain(config)
    return yaml.safe_dump(values if unset else _set(values), sort_keys=False)


def _set(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _set(inner) for key, inner in value.items() if inner is not None}
    return value


def read_config(path: Path) -> Config:
    """What `to_yaml` wrote; fields that did not exist then have their neutral values (`laws.Neutral`).

    Raises:
        UserError: another version wrote it, with other fields.
    """
    try:
        return build(Config, _loaded(path.read_text()))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except UserError as error:
        raise UserError(
            f"{path} was written by another version: {error}; run the code copy that its attempt keeps, or train anew"
        ) from error


def _loaded(text: str) -> Any:
    """What YAML holds. Groups that the configs of many runs have in common are parsed and built once."""
    if not _SHARED.search(text):
        groups = [_group(part) for part in _GROUP.split(text) if part]
        if groups and all(isinstance(group, dict) and len(group) == 1 for group in groups):
            return {key: value for group in groups for key, value in group.items()}
    values = yaml.load(text, Loader=_LOADER)
    return _of_then(values) if isinstance(values, dict) else values


def _of_then(values: dict[str, Any]) -> dict[str, Any]:
    """Groups of a config with what fields meant before they existed, where their defaults mean something else now."""
    groups = {each.name: each.type for each in fields_of(Config)}
    made = {}
    for key, value in values.items():
        group = groups.get(key)
        if isinstance(value, dict) and isinstance(group, type) and is_dataclass(group):
            laws = {each.name: (each.law(Neutral), each.default) for each in fields_of(group)}
            later = {n: law.value for n, (law, now) in laws.items() if law and law.value != now}
            value = later | value
        made[key] = value
    return made


@functools.lru_cache(maxsize=10_000)
def _group(text: str) -> Any:
    """One key of a config and what is below it, built; None where it is no YAML by itself. Nobody changes it."""
    try:
        found = yaml.load(text, Loader=_LOADER)
        # what cannot be built is reported with the rest
        with contextlib.suppress(UserError):
            return {key: built(Config, key, value) for key, value in _of_then(found).items()}
    except (yaml.YAMLError, AttributeError):
        return None
    return found
