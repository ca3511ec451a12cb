"""Downloads published weights, or a published reference, on a machine with a network. The only command that does.

The sha256 is checked before the file takes its name, so a download that was cut or changed is never there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from selfguide.spec.suggest import nearest
from selfguide.spec.weight_files import FOLDER, REFERENCES, WEIGHT_FILES, torch_cache
from shards import storage
from shards.errors import UserError
from tools import flags

KNOWN = (*(n for n, each in WEIGHT_FILES.items() if each.url), *REFERENCES)


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("name", str, None, f"one of {', '.join(KNOWN)}"),
        ("--out DIR", str, None, f"a folder (the one that {FOLDER} names, or torch's cache)"),
        ("--url URL", str, None, "a mirror to read it from"),
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    url, file, sha256 = _known(options.name)
    folder = Path(options.out or os.environ.get(FOLDER) or torch_cache()).expanduser()
    target = folder / file
    if not target.is_file():
        _download(options.url or url, target, sha256)
    found = storage.sha256(str(target))
    if sha256 is not None and found != sha256:
        raise UserError(f"{target} is there with sha256 {found}, not {sha256}: remove it")
    return {"file": str(target), "sha256": found}, f"{target}, sha256 {found}"


def _known(name: str) -> tuple[str, str, str | None]:
    """The address, the file's name, and its sha256 where that is known."""
    weights = WEIGHT_FILES.get(name)
    if weights is not None and weights.url:
        return weights.url, weights.files[0], weights.sha256
    if weights is not None:
        raise UserError(f"{name} is no download: `{weights.fetch}` installs it")
    if name not in REFERENCES:
        raise UserError(f"{name!r} is unknown{nearest(name, KNOWN)}; known: {', '.join(KNOWN)}")
    return REFERENCES[name], name, None


def _download(url: str, target: Path, sha256: str | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url) as answer, draft.open("wb") as out:
            shutil.copyfileobj(answer, out, 1 << 20)
        found = storage.sha256(str(draft))
        if sha256 is not None and found != sha256:
            raise UserError(
                f"{url} answered with a file of sha256 {found}, not {sha256}: it was cut or changed"
            )
        draft.replace(target)
    # a ValueError where it is no address
    except (urllib.error.URLError, ValueError) as error:
        raise UserError(
            f"{url} does not answer from here ({error}): call this on a machine with a network, or give --url"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
