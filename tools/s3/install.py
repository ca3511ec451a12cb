"""Swift in an environment of its own: it pins libraries that are none of ours (eventlet, requests)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

from tools import environments
from tools.environments import InstallError

__all__ = ["InstallError", "install"]


def install(say: Callable[[str], None]) -> Path:
    """The server's Python. Installs it where it is not (20 seconds); two callers wait for each other.

    Raises:
        InstallError: venv or pip failed.
    """
    wanted = (resources.files("tools.s3") / "requirements.txt").read_text()
    return environments.install("swift", wanted, say)
