"""Profiles of clusters that users and administrators keep outside of this package, as `cluster=` finds them.

`cluster=NAME` is also a file `cluster/NAME.yaml` in one of the folders of `SELFGUIDE_CONFIGS` or in
`~/.config/selfguide`, and `cluster=FOLDER/NAME.yaml` is that file. They read as those of `configs/cluster/` do: Hydra
composes them, and `defaults: [slurm]` begins from one of those, or from another file beside.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from selfguide.spec.suggest import nearest
from shards.errors import UserError

# folders, with a colon between two, each with a folder `cluster`
VARIABLE = "SELFGUIDE_CONFIGS"


def home() -> Path:
    """Returns the folder of a user's own settings."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "selfguide"


def found() -> dict[str, Path]:
    """Returns name -> file of all profiles outside of this package; of two with one name the first counts."""
    given = [Path(each).expanduser() for each in os.environ.get(VARIABLE, "").split(":") if each]
    files = [
        path for root in (*given, home()) for path in sorted((root / "cluster").glob("*.yaml"))
    ]
    return {path.stem: path for path in reversed(files)}


def of(value: str, shipped: list[str]) -> Path | None:
    """Returns the file that `cluster=value` means; None for a profile of this package.

    Raises:
        UserError: there is none, or two things have this name.
    """
    if "/" in value or value.endswith((".yaml", ".yml")):
        path = Path(value).expanduser().absolute()
        if not path.is_file():
            raise UserError(f"cluster={value}: there is no such file")
        return path
    files = found()
    if value not in shipped and value not in files:
        known = sorted({*shipped, *files})
        raise UserError(
            f"cluster={value} does not exist{nearest(value, known)}; known: {', '.join(known)}, or the file of a "
            f"site: cluster=FOLDER/NAME.yaml, {home()}/cluster/NAME.yaml for a name"
        )
    if value in shipped and value in files:
        raise UserError(
            f"cluster={value} is a profile of this package and {files[value]}; rename that file"
        )
    return files.get(value)


def register(path: Path, shipped: list[str]) -> str:
    """Makes a file known to Hydra, with those beside it that its defaults name; returns its name there.

    Raises:
        UserError: one is no YAML mapping.
    """
    # one of this package would hide a file of its name
    name = f"file-{path.stem}"
    _store(path, name, shipped)
    return name


def _store(path: Path, name: str, shipped: list[str]) -> None:
    from hydra.core.config_store import ConfigStore

    values = _read(path)
    for each in values.get("defaults") or ():
        if isinstance(each, str) and each != "_self_" and each not in shipped:
            _store(path.with_name(f"{each}.yaml"), each, shipped)
    ConfigStore.instance().store(group="cluster", name=name, node=values)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values, typed = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping, such as `kind: slurm`")
    # variables are text, of which YAML would make 9.1 of 9.10 where it is not quoted
    variables = values.get("environment")
    return values | ({"environment": typed["environment"]} if isinstance(variables, dict) else {})
