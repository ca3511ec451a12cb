"""What the two stores share while they start: a folder, its ports and secrets, and programs that run out of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template

from slurm import processes

PATIENCE = 60.0  # seconds until a program has done its work, or the servers answer
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8"}
BUCKET = "selfguide"

Say = Callable[[str], None]


class StartError(RuntimeError):
    """A server did not come up; the message holds the end of its log."""


@dataclass(frozen=True, kw_only=True)
class StoreFolder:
    """A store's folder while it is being filled. `secrets` maps access keys to their secrets."""

    state: Path
    ports: Mapping[str, int]
    secrets: Mapping[str, str] = field(repr=False)
    started: Callable[[str, processes.Process], None]  # called with each server

    def fill(self, template: str, **values: object) -> Path:
        """Writes templates/<template> into the folder, for its owner's eyes only."""
        path = self.state / template
        path.touch(mode=0o600)
        text = (resources.files("tools.s3") / "templates" / template).read_text()
        path.write_text(Template(text).substitute(values))
        return path

    def run(self, name: str, command: Sequence[str]) -> None:
        """A program, to its end.

        Raises:
            StartError: it failed, or does not end.
        """
        with (self.state / "log" / f"{name}.out").open("w") as log:
            try:
                code = subprocess.run(
                    command, env=ENVIRONMENT, stdout=log, stderr=log, timeout=PATIENCE
                ).returncode
            except subprocess.TimeoutExpired:
                raise StartError(
                    f"{name}: not within {PATIENCE:.0f} s\n{tail(self.state, name)}"
                ) from None
        if code:
            raise StartError(f"{name}: left with {code}\n{tail(self.state, name)}")

    def serve(self, name: str, command: Sequence[str]) -> None:
        """A server, which stays.

        Raises:
            StartError: it ended at once.
        """
        try:
            found = processes.start([*command], ENVIRONMENT, self.state / "log" / f"{name}.out")
        except ChildProcessError as error:
            raise StartError(f"{error}\n{tail(self.state, name)}") from error
        self.started(name, found)


def tail(state: Path, name: str) -> str:
    """The end of what a program of a store said."""
    log = state / "log" / f"{name}.out"
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
