"""Programs in an environment of their own, installed once per version of their requirements, in the user's cache.

What pins libraries that are none of ours never enters our environment: a store to test against, other readers to
compare with.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from shards.lock import lock

MARK = "installed"


class InstallError(RuntimeError):
    """pip could not install something; the message holds the end of what it said."""


def folder(name: str, requirements: str) -> Path:
    """Where this version is or would be installed, by the hash of its requirements."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    version = hashlib.sha256((requirements + sys.version).encode()).hexdigest()[:12]
    return Path(base).expanduser().resolve() / "selfguide" / f"{name}-{version}"


def install(
    name: str, requirements: str, say: Callable[[str], None], *, beside: bool = False
) -> Path:
    """The Python of the environment, made where it is not; two callers wait for each other.

    Args:
        requirements: the text of a requirements file, everything pinned.
        beside: it also sees our packages where it has none of its own, which saves another torch. Then
            `requirements` are taken as they are, without what they require themselves.

    Raises:
        InstallError: venv or pip failed.
    """
    home = folder(name, requirements)
    python = home / "bin" / "python"
    home.parent.mkdir(parents=True, exist_ok=True)
    with lock(home.parent / f".{home.name}.lock"):
        if (home / MARK).exists():
            return python
        say(f"installing {name} into {home}")
        shutil.rmtree(home, ignore_errors=True)  # an install that was killed
        _call(sys.executable, "-m", "venv", str(home))
        wanted = home / "requirements.txt"
        wanted.write_text(requirements)
        pip = (str(python), "-m", "pip", "--disable-pip-version-check", "--no-input")
        alone = ("--no-deps",) if beside else ()
        _call(*pip, "install", "--quiet", *alone, "-r", str(wanted))
        if beside:
            own = sysconfig.get_path("purelib", vars={"base": str(home)})
            # a .pth is appended to the path: what was installed there comes first
            Path(own, "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (home / MARK).touch()
    return python


def _call(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise InstallError(
            f"{' '.join(command[:4])} ... left with {done.returncode}:\n{done.stdout[-2000:]}"
        )
