"""Swift in an environment of its own, installed once per version of its requirements and kept in the user's cache.

Swift pins libraries that are none of ours (eventlet, requests), so it never enters our environment.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

MARK = "installed"


class InstallError(RuntimeError):
    """pip could not install the server; the message holds the end of what it said."""


def folder() -> Path:
    """Where this version of the server is or would be installed, by the hash of its requirements."""
    text = (resources.files("tools.s3") / "requirements.txt").read_bytes()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    version = hashlib.sha256(text + sys.version.encode()).hexdigest()[:12]
    return Path(base).expanduser().resolve() / "selfguide" / f"swift-{version}"


def install(say: Callable[[str], None]) -> Path:
    """The server's Python. Installs it where it is not (20 seconds); two callers wait for each other.

    Raises:
        InstallError: venv or pip failed.
    """
    home = folder()
    python = home / "bin" / "python"
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f".{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (home / MARK).exists():
            return python
        say(f"installing OpenStack Swift into {home}")
        shutil.rmtree(home, ignore_errors=True)  # an install that was killed
        with resources.as_file(resources.files("tools.s3") / "requirements.txt") as wanted:
            _call(sys.executable, "-m", "venv", str(home))
            pip = (str(python), "-m", "pip", "--disable-pip-version-check", "--no-input")
            _call(*pip, "install", "--quiet", "-r", str(wanted))
        (home / MARK).touch()
    return python


def _call(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise InstallError(
            f"{' '.join(command[:4])} ... left with {done.returncode}:\n{done.stdout[-2000:]}"
        )
