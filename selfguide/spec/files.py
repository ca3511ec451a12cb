"""A config as YAML and JSON hold it, and back: what submit writes, the trainer reads and a snapshot carries."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from selfguide.spec.config import Config, build
from shards.errors import UserError

# libyaml's safe loader where PyYAML has it: six times faster, and a list of runs reads hundreds of configs
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
    """What `to_yaml` wrote.

    Raises:
        UserError: another version wrote it, with other fields.
    """
    try:
        return build(Config, yaml.load(path.read_text(), Loader=_LOADER))
    except UserError as error:
        raise UserError(
            f"{path} was written by another version: {error}; run the code copy that its attempt keeps, or train anew"
        ) from error
