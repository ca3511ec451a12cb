"""What the services for development share (a Slurm cluster, an S3 store): a folder, a lock, a start and a clean end.

A service is a set of programs that run out of one folder. Its record, a JSON file in there, is written before the first
program starts and again after each, so that a crash at any moment leaves enough for `down` to find everything.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import UserError
from shards.lock import lock
from shards.wait import wait_until
from slurm import processes

T = TypeVar("T")

PATIENCE = 60.0  # seconds for each step; on an idle machine every one takes less than 3
Say = Callable[[str], None]


class StartError(RuntimeError):
    """A program did not come up; the message holds the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A kind of service and what tells its folder and its programs from others."""

    name: str  # of its folder in the user's state folder
    variable: str  # of the environment, that names another folder
    record: str  # the file that marks a folder as its own
    end: Callable[[Path], None]  # ends its programs, and takes back what it changed elsewhere
    outside: Callable[[Path], bool]  # whether programs run, or anything of it is elsewhere

    def folder(self, state: Path | None) -> Path:
        """`state`, else what the environment names, else the user's state folder."""
        if state is None:
            base = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
            chosen = os.environ.get(self.variable)
            state = Path(chosen) if chosen else base / "selfguide" / self.name
        return state.expanduser().resolve()

    def up(
        self, state: Path, say: Say, find: Callable[[], T | None], start: Callable[[list[str]], T]
    ) -> T:
        """What `find` says is live, else what `start` brings up in an emptied folder; nothing is left of a failure.

        Args:
            start: is given the parents of the folder that were made for it.
        """
        with self._locked(state, say) as made:
            if found := find():
                say(f"already up in {state}")
                return found
            if self._left(state):
                say(f"clearing what is left in {state}: it ended badly")
            made += self._clear(state)
            try:
                return start(made)
            except BaseException:  # also Ctrl-C: half a service is of use to nobody
                self._remove(state, made + self._clear(state))
                raise

    def down(self, state: Path, say: Say) -> None:
        """Ends the service in this folder, or what is left of one, and removes every trace of it."""
        with self._locked(state, say) as made:
            there = self._left(state)
            self._remove(state, made + self._clear(state))
        say(f"down: nothing is left of {state}" if there else f"nothing to take down in {state}")

    def write(self, state: Path, values: Mapping[str, Any]) -> None:
        """Replaces the record in one step, for its owner's eyes only."""
        draft = state / self._draft
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(values, indent=1))
        draft.replace(state / self.record)

    def read(self, state: Path) -> dict[str, Any] | None:
        """The record of the service in this folder, or None when it holds none."""
        try:
            found: dict[str, Any] = json.loads((state / self.record).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as error:
            raise UserError(
                f"state={state}: this folder is another user's; choose your own"
            ) from error
        except ValueError as error:
            raise UserError(
                f"state={state}: {self.record} is not readable ({error}); remove the folder"
            ) from error
        return found

    @property
    def _draft(self) -> str:
        return f".{self.record}.draft"

    @contextmanager
    def _locked(self, state: Path, say: Say) -> Iterator[list[str]]:
        """One command at a time on a folder. Makes the folder; yields the parents it had to make.

        The lock is on the folder itself, so it leaves no file, and goes with its holder. Who waited may hold the lock
        on a folder that was removed meanwhile: then it begins anew.
        """
        made: list[str] = []
        seconds: float | None = 0.0
        while True:
            made += self._make(state)
            with lock(state, create=False, seconds=seconds) as held:
                if held:
                    yield made
                    return
            if seconds is not None:
                say(f"another command is at work in {state}: waiting for it")
            seconds = None

    def _make(self, state: Path) -> list[str]:
        absent = [str(parent) for parent in state.parents if not parent.exists()]
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            held = {entry.name for entry in state.iterdir()}
        except OSError as error:
            raise UserError(
                f"state={state}: {error.strerror}; name another folder with --state"
            ) from error
        if held and not held & {self.record, self._draft}:
            raise UserError(
                f"state={state}: holds other files, and `down` would delete them; name another"
            )
        return absent

    def _left(self, state: Path) -> bool:
        """Whether anything of a service is here: files, programs, or changes elsewhere."""
        return any(state.iterdir()) or self.outside(state)

    def _clear(self, state: Path) -> list[str]:
        """Empties the folder, which stays because the lock is on it; returns the parents it once made.

        Programs go first, as they would write into the folder, and the record last: without it nobody would know the
        folder as ours.
        """
        record = self.read(state) or {}
        self.end(state)
        for entry in sorted(state.iterdir(), key=lambda entry: entry.name == self.record):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        return list(record.get("made", ()))

    def _remove(self, state: Path, made: list[str]) -> None:
        """Removes the folder, and the parents that were made for it unless others use them."""
        state.rmdir()
        for parent in sorted(set(made), key=len, reverse=True):
            with suppress(OSError):  # not empty, or gone
                Path(parent).rmdir()


@dataclass(kw_only=True)
class Programs:
    """The programs of a service while it starts; each has a log of its own in the folder `log`."""

    state: Path
    environment: dict[str, str]
    changed: Callable[
        [dict[str, tuple[int, int]]], None
    ]  # hears of all that runs, after each start
    running: dict[str, tuple[int, int]] = field(default_factory=dict)  # to pid and start time

    def run(self, name: str, command: Sequence[str]) -> None:
        """Runs a program to its end.

        Raises:
            StartError: it failed, or does not end.
        """
        with self._log(name).open("w") as log:
            try:
                code = subprocess.run(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    timeout=PATIENCE,
                ).returncode
            except subprocess.TimeoutExpired:
                reason = f"{name}: not within {PATIENCE:.0f} s\n{self.tail(name)}"
                raise StartError(reason) from None
        if code:
            raise StartError(f"{name}: left with {code}\n{self.tail(name)}")

    def serve(self, name: str, command: Sequence[str]) -> None:
        """Starts a program that stays.

        Raises:
            StartError: it ended at once.
        """
        try:
            found = processes.start([*command], self.environment, self._log(name))
        except ChildProcessError as error:
            raise StartError(f"{name}: {error}\n{self.tail(name)}") from error
        self.running[name] = (found.pid, found.started)
        self.changed(self.running)

    def wait(self, what: str, holds: Callable[[], bool]) -> None:
        """Waits until `holds()`.

        Raises:
            StartError: a program ended, or it does not hold in time.
        """

        def done() -> bool:
            if holds():
                return True
            for name, at in self.running.items():
                if not processes.alive(*at):
                    raise StartError(f"{name} ended while it started.\n{self.tail(name)}")
            return False

        if not wait_until(done, timeout_s=PATIENCE, poll_s=0.02):
            newest = list(self.running)[-1]
            raise StartError(f"not within {PATIENCE:.0f} s: {what}.\n{self.tail(newest)}")

    def tail(self, name: str) -> str:
        """The end of what a program said."""
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-15:])

    def _log(self, name: str) -> Path:
        return self.state / "log" / f"{name}.out"


def exports(environment: Mapping[str, str]) -> str:
    """The lines that a shell evaluates to reach a service."""
    return "\n".join(f"export {n}={shlex.quote(value)}" for n, value in environment.items())
