"""Command lines of tools: a parser for each command, its flags as a table, and what flags have in common."""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path
from typing import Any

from shards import cli, storage
from shards.errors import UserError


def here(text: str) -> str:
    """The type of a file or folder that is written on this machine, with ~ as `storage.place` reads it.

    Raises:
        ArgumentTypeError: it is on S3, and would become a folder here that is called s3:.
    """
    place = storage.place(text)
    if storage.is_remote(place):
        raise argparse.ArgumentTypeError(f"{text} is on S3: name a place here, and copy it there")
    return place


Flag = tuple[str, Any, Any, str]  # as it is typed, its type, default and help
REQUIRED = object()
# metavars of what a shell would expand a ~ of
_PLACES = ("DIR", "FILE", "PATH", "ROOT", "FOLDER", "RUN", "SHARDS", "SAMPLES", "IMAGE")
# what a picture's name may end in
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")
JSON: Flag = ("--json", bool, False, "print one JSON object")
RUNS: Flag = ("--runs DIR", str, "runs", "where runs are (runs)")
OUT: Flag = ("--out DIR", here, REQUIRED, "the sidecar's folder")
RUN = "id, name or folder of a run, or a snapshot's folder"


def command(
    module: str, about: str | None, *flags: Flag, epilog: str | None = None
) -> argparse.ArgumentParser:
    """The parser of `python -m <module>`; the help shows `about` and `epilog` as they are written."""
    parser = cli.parser(module, about)
    parser.epilog = epilog
    add(parser, *flags)
    return parser


def add(to: argparse._ActionsContainer, *flags: Flag) -> None:
    """Adds flags and arguments to a parser or to a group of one.

    `--count N` takes a value, `--size A B` two; `run RUN` is an argument without a flag. At the end of a value, `+`
    stands for one or more, `*` for any number, `?` for one or none. The type bool takes no value, and a tuple lists the
    values there are. What has the default `REQUIRED` must be given.
    """
    for typed, kind, default, text in flags:
        name, *values = typed.split()
        settings: dict[str, Any] = {"help": text}
        if default is REQUIRED:
            settings["required"] = True
        else:
            settings["default"] = default
        if kind is bool:
            settings["action"] = "store_true"
        else:
            settings["choices" if isinstance(kind, tuple) else "type"] = _reader(name, kind, values)
        if len(values) > 1:
            settings |= {"nargs": len(values), "metavar": tuple(values)}
        elif values:
            shown = values[0].rstrip("+*?")
            settings |= {"metavar": shown} if shown else {}
            settings |= {"nargs": values[0][-1]} if values[0] != shown else {}
        to.add_argument(name, **settings)


def _reader(name: str, kind: Any, values: list[str]) -> Any:
    """What reads a value: of kinds that have values no command can use, one that refuses these."""
    if name == "--figure":
        return picture
    if kind is str and values and values[0].rstrip("+*?") in _PLACES:
        return storage.place
    if kind is Path:
        return storage.expanded
    if kind is int and name.startswith("--seed"):
        return seed
    return finite if kind is float else kind


def picture(text: str) -> str:
    """The type of a picture's file: it is written when all else is done, so what it cannot be is said before.

    Raises:
        ArgumentTypeError: no kind of picture has this ending, or no file can be written there.
    """
    place = storage.place(text)
    if storage.is_remote(place):
        raise argparse.ArgumentTypeError(f"{text}: give a file of this machine")
    file = Path(place).absolute()
    if file.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text}: give a file that ends in {', '.join(PICTURES)}")
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: give a file")
    nearest = next(above for above in file.parents if above.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: nothing can be written in {nearest}")
    return place


def seed(text: str) -> int:
    """The type of a seed: whole, and of 64 bits.

    Raises:
        ArgumentTypeError: it is not.
    """
    if not re.fullmatch(r"[+-]?[\d_]+", text) or not -(2**63) <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 0 to {2**64 - 1}")
    return int(text)


def finite(text: str) -> float:
    """The type of a number.

    Raises:
        ArgumentTypeError: it is none, or not a finite one.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: give a finite number")
    return value


def check_image_seed(options: argparse.Namespace, count: int) -> None:
    """Returns where each of `count` images from --seed on has a seed of its own.

    Raises:
        UserError: of `count` images, whose seeds are --seed and those that follow, one has no signed 64-bit seed.
    """
    if options.seed + count > 2**63:
        raise UserError(f"--seed {options.seed}: take {2**63 - count} or less, for {count} images")


def moved(net: Any, device: Any, *more: Any) -> Any:
    """A network on the device that --device names.

    Raises:
        UserError: there is no such device, or no room on it.
    """
    try:
        return net.to(device, *more)
    # torch's, which knows neither from the other
    except RuntimeError as error:
        raise UserError(
            f"--device {device}: {error}; give cpu, or cuda where there is a GPU"
        ) from error


def check_least(options: argparse.Namespace, least: int, *names: str) -> None:
    """Returns where the options called `names` are `least` or more, or not given.

    Raises:
        UserError: one of these options is given, and below `least`.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: take {least} or more")
