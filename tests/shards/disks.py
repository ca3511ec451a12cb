"""Disks that are full in earnest: small file systems in memory, gone with the test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A tmpfs of some bytes at `path`, with room for some files and folders."""

    def __init__(self, path: Path, size: int, files: int) -> None:
        self.path = path
        options = f"size={size},nr_inodes={files}"
        _call("mount", "-t", "tmpfs", "-o", options, "selfguide-test", str(path))

    def fill(self) -> None:
        """Takes what room is left."""
        free = os.statvfs(self.path)
        with (self.path / "filler").open("ab") as file:
            file.write(bytes(free.f_bavail * free.f_frsize))

    def resize(self, size: int) -> None:
        """Another number of bytes."""
        _call("mount", "-o", f"remount,size={size}", str(self.path))

    def leave(self, size: int) -> None:
        """Room for so many bytes more."""
        disk = os.statvfs(self.path)
        self.resize((disk.f_blocks - disk.f_bfree) * disk.f_frsize + size)

    def read_only(self) -> None:
        """Nothing can be written any more."""
        _call("mount", "-o", "remount,ro", str(self.path))

    def end(self) -> None:
        """Takes it off, also while a file of it is still mapped."""
        _call("umount", "--lazy", str(self.path))


@contextmanager
def disk(path: Path, size: int, files: int = 1000) -> Iterator[Disk]:
    """Skips the test where this user may not mount; an error with CI=true."""
    path.mkdir()
    try:
        made = Disk(path, size, files)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        told = getattr(error, "stderr", "") or str(error)
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(f"CI must run the tests of full disks. {told}")
        pytest.skip(f"a small disk cannot be mounted here: {told.strip()}")
    try:
        yield made
    finally:
        made.end()


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
