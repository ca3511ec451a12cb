"""Configs that users and administrators keep outside of this package: folders that are laid out as `configs/` is.

The folders of `SELFGUIDE_CONFIGS`, and before them that of `--config-dir`, are searched before `configs/`: an
experiment there may begin from one of ours (`defaults: [digits_dit]`) and choose its own files of groups, or ours.

`cluster=NAME` is also a file `cluster/NAME.yaml` in one of the folders of `SELFGUIDE_CONFIGS` or in
`~/.config/selfguide`, and `cluster=FOLDER/NAME.yaml` is that file. They read as those of `configs/cluster/` do: Hydra
composes them, and `defaults: [slurm]` begins from one of those, or from another file beside.
"""

from __future__ import annotations

import os
import shutil
from argparse import Action, ArgumentParser, Namespace, _ActionsContainer
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from launcher import keys
from selfguide.spec.suggest import nearest
from shards.errors import UserError

# folders, with a colon between two, each with folders of groups such as `experiment` or `cluster`
VARIABLE = "SELFGUIDE_CONFIGS"
OPTION = "--config-dir"
HELP = (
    f"a folder of configs of yours, searched before the package's; or {VARIABLE}, several with ':'"
)


def folders() -> list[Path]:
    """Returns the folders of configs outside of this package, the first to be searched first."""
    return [Path(each).expanduser() for each in os.environ.get(VARIABLE, "").split(":") if each]


def absent() -> str:
    """Returns what to say of folders that the variable names and that are not there; nothing where all are."""
    gone = [str(each) for each in folders() if not each.is_dir()]
    return f"; {VARIABLE} names {', '.join(gone)}, where no folder is" if gone else ""


def search_first(folder: str) -> None:
    """Puts a folder before those of `SELFGUIDE_CONFIGS`, for this process and those that it starts.

    Raises:
        UserError: there is no such folder.
    """
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise UserError(f"{OPTION} {folder}: there is no such folder")
    if ":" in str(path):
        raise UserError(f"{OPTION} {folder}: a colon stands between two folders; rename it")
    others = [each for each in folders() if each.absolute() != path]
    os.environ[VARIABLE] = ":".join(map(str, (path, *others)))


class _SearchFirst(Action):
    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None
    ) -> None:
        search_first(values)


def takes_config_dir(parser: _ActionsContainer) -> None:
    """Adds `--config-dir DIR` to a command that composes."""
    parser.add_argument(OPTION, action=_SearchFirst, metavar="DIR", help=HELP)


def without_config_dir(words: Sequence[str]) -> list[str]:
    """Does what `--config-dir DIR` among the words of a command asks for; returns the others.

    Raises:
        UserError: no folder behind it, or none of that name.
    """
    left, rest = [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != OPTION:
            left.append(word)
        elif folder := value if equals else next(rest, ""):
            search_first(folder)
        else:
            raise UserError(f"{OPTION}: give a folder behind it")
    return left


def files(group: str) -> dict[str, Path]:
    """Returns name -> file of a group's choices outside of this package; of two with one name the first counts."""
    found = [path for root in folders() for path in sorted((root / group).glob("*.yaml"))]
    return {path.stem: path for path in reversed(found)}


def copy(groups: Iterable[str], target: Path) -> None:
    """Copies the files of these groups, for whoever wants to know what was composed; nothing where there are none."""
    for number, root in enumerate(folders()):
        for group in groups:
            for path in sorted((root / group).glob("*.yaml")):
                to = target / str(number) / group / path.name
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, to)


def home() -> Path:
    """Returns the folder of a user's own settings."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "selfguide"


def found() -> dict[str, Path]:
    """Returns name -> file of all profiles outside of this package; of two with one name the first counts."""
    own = {path.stem: path for path in sorted((home() / "cluster").glob("*.yaml"))}
    return own | files("cluster")


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
    others = found()
    if value not in shipped and value not in others:
        known = sorted({*shipped, *others})
        raise UserError(
            f"cluster={value} does not exist{nearest(value, known)}; known: {', '.join(known)}, or the file of a "
            f"site: cluster=FOLDER/NAME.yaml, {home()}/cluster/NAME.yaml for a name"
        )
    if value in shipped and value in others:
        raise UserError(
            f"cluster={value} is a profile of this package and {others[value]}; rename that file"
        )
    return others.get(value)


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

    values = read(path, "cluster")
    for each in values.get("defaults") or ():
        if isinstance(each, str) and each != "_self_" and each not in shipped:
            _store(path.with_name(f"{each}.yaml"), each, shipped)
    ConfigStore.instance().store(group="cluster", name=name, node=values)


def searched_by_hydra() -> None:
    """Has Hydra look into these folders before it looks into ours, and keep text as it stands there."""
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.config_source import ConfigResult
    from hydra.plugins.search_path_plugin import SearchPathPlugin
    from omegaconf import OmegaConf

    class Sites(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for folder in reversed(folders()):
                search_path.prepend(provider="selfguide", path=f"selfguide://{folder.absolute()}")

    class Source(FileConfigSource):
        @staticmethod
        def scheme() -> str:
            return "selfguide"

        def load_config(self, config_path: str) -> ConfigResult:
            # read here and not by Hydra, which refuses `${}` in text
            path = Path(self.path, self._normalize_file_name(config_path))
            head = path.read_bytes()[:512].decode(errors="replace")
            try:
                header = self._get_header_dict(head)
            except ValueError as error:
                raise UserError(f"{path}: {error}: give `# @package _global_`") from None
            group = config_path.rpartition("/")[0].replace("/", ".")
            package = (header["package"] or "_group_").replace("_global_", "")
            values = read(path, package.replace("_group_", group).strip("."))
            return ConfigResult(
                config=OmegaConf.create(values),
                path=f"{self.scheme()}://{self.path}",
                provider=self.provider,
                header=header,
            )

    known = Plugins.instance()
    if not any(
        each.__qualname__ == Sites.__qualname__ for each in known.discover(SearchPathPlugin)
    ):
        known.register(Sites)
        known.register(Source)


def read(path: Path, part: str) -> dict[str, Any]:
    """What a file of configs holds for `part` of the config, empty for all of it; text is as it stands there.

    Raises:
        UserError: it is no YAML mapping.
    """
    import yaml
    from omegaconf._utils import get_yaml_loader

    try:
        written = path.read_text(encoding="utf-8")
        values, texts = yaml.load(written, get_yaml_loader()), yaml.load(written, _texts())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if values is None:
        # an empty file says nothing
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping, such as `kind: slurm`")
    return keys.as_typed(values, texts, part)


def _texts() -> Any:
    """A loader of YAML that leaves each scalar as it is written."""
    import yaml

    class Texts(yaml.SafeLoader):
        pass

    Texts.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}
    return Texts
