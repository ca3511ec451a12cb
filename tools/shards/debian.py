"""Files out of Debian's packages, fetched by this machine's own apt as any user: nothing is installed.

apt keeps its lists in a folder of ours, checks their signatures, and fetches one version of a package, whose sha256 is
compared before it is unpacked. What was fetched stays in the user's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards import storage
from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Package:
    """One version of a package, and the file that is wanted of it."""

    name: str
    version: str
    sha256: str
    file: str  # below the root folder of an installed system


@contextmanager
def files(packages: Sequence[Package], instead: str) -> Iterator[list[Path]]:
    """The file of each package, unpacked until the block ends.

    Args:
        instead: what a user may give where no apt can fetch them, for the error.

    Raises:
        UserError: no apt here, no network, or another package than the one whose sha256 is known.
    """
    found = [_package(package, instead) for package in packages]
    with tempfile.TemporaryDirectory() as unpacked:
        for deb in found:
            _call(["dpkg", "-x", str(deb), unpacked], deb.name, instead)
        yield [Path(unpacked, package.file) for package in packages]


def cached(packages: Sequence[Package]) -> bool:
    """Whether all of them were fetched before."""
    return all(_holds(package) for package in packages)


def _kept(package: Package) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfguide"
    return cache / "debian" / f"{package.name}_{package.version}.deb"


def _holds(package: Package) -> bool:
    kept = _kept(package)
    return kept.is_file() and storage.sha256(str(kept)) == package.sha256


def _package(package: Package, instead: str) -> Path:
    """The package's file in the cache, fetched where it is not there or no longer what it was."""
    kept = _kept(package)
    if _holds(package):
        return kept
    with tempfile.TemporaryDirectory() as scratch:
        fetched = _fetch(package, Path(scratch), instead)
        sha256 = storage.sha256(str(fetched))
        if sha256 != package.sha256:
            raise UserError(
                f"apt fetched {fetched.name} with sha256 {sha256[:12]}, and the one known here has "
                f"{package.sha256[:12]}: {instead}"
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        storage.publish_file(str(kept), fetched, replace=True)
    return kept


def _fetch(package: Package, scratch: Path, instead: str) -> Path:
    lists, archives = scratch / "lists", scratch / "archives"
    for folder in (lists, archives):
        (folder / "partial").mkdir(parents=True)
    # as root apt would fetch as a user that may not write here
    options = {"Dir::State::Lists": lists, "Dir::Cache": scratch, "APT::Sandbox::User": "root"}
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    wanted = f"{package.name}={package.version}"
    for command in ([*apt, "update"], [*apt, "download", wanted]):
        _call(command, wanted, instead, at=scratch)
    return next(scratch.glob("*.deb"))


def _call(command: Sequence[str], of: str, instead: str, at: Path | None = None) -> None:
    if shutil.which(command[0]) is None:
        raise UserError(f"{of}: this machine has no {command[0]}: {instead}")
    done = subprocess.run(command, cwd=at, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " ".join(done.stderr.split("\n")[-3:]).strip() or f"exit code {done.returncode}"
        raise UserError(f"{of}: {command[0]} could not get it ({last}): {instead}")
