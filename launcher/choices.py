"""What can be chosen: experiments and the files of other groups, the package's and a user's, and the values of keys."""

from __future__ import annotations

import typing
from importlib import resources
from typing import Literal

from launcher import sites
from launcher.keys import types_of
from selfguide.spec.sizes import TABLE

GROUPS = (
    "experiment",
    "model",
    "path",
    "sampler",
    "guidance",
    "data",
    "engine",
    "evaluation",
    "init",
    "augment",
    "cluster",
)


def experiments() -> dict[str, str]:
    """Every experiment that is no paper's, and its one line, the comment below `# @package`."""
    found = {}
    own, ours = sites.files("experiment"), resources.files("configs") / "experiment"
    for name in sorted({*shipped("experiment"), *own}):
        text = (own.get(name) or ours / f"{name}.yaml").read_text(encoding="utf-8")
        comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
        found[name] = next((line for line in comments if not line.startswith("@")), "")
    return found


def options(group: str) -> list[str]:
    """The choices of a group: names of YAML files, ours and others', and for `model` rows of the table of sizes.

    Behind the experiments stand those of papers, as PAPER/NAME.
    """
    more = {"model": {*TABLE, *sites.files(group)}, "cluster": set(sites.found())}.get(
        group, set(sites.files(group))
    )
    names = sorted({*shipped(group), *more})
    return [*names, *of_papers()] if group == "experiment" else names


def of_papers() -> list[str]:
    """The experiments that rows of papers' tables are made of, as PAPER/NAME."""
    folder = resources.files("configs") / "experiment"
    papers = sorted(each.name for each in folder.iterdir() if each.is_dir())
    return [
        f"{paper}/{name}"
        for paper in papers
        if not paper.startswith("_")
        for name in shipped(f"experiment/{paper}")
    ]


def folder_name(choice: str) -> str:
    """What `experiment=choice` is called where a folder has its name: sgdm_in32_none of sgdm/in32_none."""
    return choice.replace("/", "_")


def shipped(group: str) -> list[str]:
    """The names of the YAML files of a group that come with the package."""
    folder = resources.files("configs") / group
    files = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def values(key: str) -> list[str]:
    """The values that a group or key can have, where they can be listed."""
    if key in GROUPS:
        return options(key)
    kinds = [kind for hint in types_of(key) for kind in (hint, *typing.get_args(hint))]
    if bool in kinds:
        return ["true", "false"]
    literals = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal]
    return sorted({str(value) for each in literals for value in each})
