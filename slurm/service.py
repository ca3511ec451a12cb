"""What the Slurm cluster here and the S3 store of `tools.s3` share: servers that run out of one folder.

The record in that folder is written before the first process starts and again after each, so that a crash at any
moment leaves enough for `down` to find everything. The lock is on the folder itself: it leaves no file, and goes with
its holder.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template
from typing import Any

from shards.errors import UserError
from shards.lock import lock
from shards.wait import wait_until
from slurm import processes

PATIENCE = 60.0  # seconds for each step; on an idle machine every one takes less than 3
PORTS = (20000, 32000)  # below the range from which Linux draws the ports of outgoing connections
Say = Callable[[str], None]


class StartError(RuntimeError):
    """A server did not come up; the message holds the end of its log."""


def boot_id() -> str:
    """Start times count from the boot, so a process number means something only within one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(kw_only=True)
class Record:
    """What the file in a service's folder holds."""

    # which service, and which version of this file
    format: str
    # the service's own
    facts: dict[str, Any]
    boot: str = field(default_factory=boot_id)
    # a name to [pid, start time in ticks]
    servers: dict[str, tuple[int, int]] = field(default_factory=dict)
    # parent folders that did not exist before
    made: list[str] = field(default_factory=list)
    ready: bool = False

    def alive(self, *names: str) -> bool:
        """Whether the service was started in this boot, and these servers still run."""
        return (
            self.ready
            and self.boot == boot_id()
            and all(processes.alive(*self.servers[name]) for name in names)
        )


@dataclass(frozen=True, kw_only=True)
class Service:
    """A folder of one service, whatever is in it by now."""

    state: Path
    # name of the record's file, which marks the folder as ours
    file: str
    # `format` of the record
    format: str
    templates: Traversable
    # of all its programs
    environment: Mapping[str, str]

    @staticmethod
    def folder(state: Path | None, variable: str, name: str) -> Path:
        """Returns `state`, else what the environment variable says, else a folder of the user's own."""
        base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        usual = os.environ.get(variable) or Path(base) / "selfguide" / name
        return Path(state or usual).expanduser().resolve()

    def read(self) -> Record | None:
        """Returns the record; None where there is none.

        Raises:
            UserError: another user's folder, or a record of another version.
        """
        try:
            found = json.loads((self.state / self.file).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as error:
            raise UserError(
                f"state={self.state}: this folder is another user's; choose your own"
            ) from error
        except ValueError as error:
            raise UserError(
                f"state={self.state}: {self.file} is not readable ({error}); remove the folder"
            ) from error
        if not isinstance(found, dict) or found.get("format") != self.format:
            raise UserError(
                f"state={self.state}: {self.file} is of another version; remove the folder"
            )
        return Record(**found)

    def write(self, record: Record) -> None:
        draft = self.state / f".{self.file}.draft"
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(asdict(record), indent=1))
        draft.replace(self.state / self.file)

    @contextmanager
    def claim(self, say: Say) -> Iterator[list[str]]:
        """Lets one command at a time work on the folder, which it makes; yields the parents it had to make.

        Raises:
            UserError: the folder cannot be made, or holds other things than a service of this kind.
        """
        made: list[str] = []
        with ExitStack() as stack:
            held = False
            while not held:
                made += self._make()
                held = self._lock(stack, say)
            yield made

    def _lock(self, stack: ExitStack, say: Say) -> bool:
        """False where the folder was removed meanwhile, by the one who was waited for: then the caller begins anew."""
        try:
            if stack.enter_context(lock(self.state, create=False, seconds=0)):
                return True
            say("another command is at work here: waiting for it")
            return stack.enter_context(lock(self.state, create=False))
        except FileNotFoundError:
            return False

    def _make(self) -> list[str]:
        absent = [str(parent) for parent in self.state.parents if not parent.exists()]
        try:
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            there = {entry.name for entry in self.state.iterdir()}
        except OSError as error:
            raise UserError(
                f"state={self.state}: {error.strerror}; name another folder with --state"
            ) from error
        if there and not there & {self.file, f".{self.file}.draft"}:
            raise UserError(
                f"state={self.state}: holds other files, and `down` would delete them; name another"
            )
        return absent

    def empty(self) -> None:
        """Deletes what is in the folder, the record last: without it nobody would know the folder as ours."""
        for entry in sorted(self.state.iterdir(), key=lambda entry: entry.name == self.file):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def remove(self, made: Sequence[str] = ()) -> None:
        """Removes the empty folder, and the parents that the service had made unless others use them."""
        self.state.rmdir()
        for parent in sorted(set(made), key=len, reverse=True):
            with suppress(OSError):  # not empty, or gone
                Path(parent).rmdir()

    def fill(self, template: str, **values: object) -> Path:
        """Writes a template into the folder, for its owner's eyes only."""
        path = self.state / template
        path.touch(mode=0o600)
        path.write_text(Template((self.templates / template).read_text()).substitute(values))
        return path

    def run(self, name: str, command: Sequence[str]) -> None:
        """Runs a program to its end.

        Raises:
            StartError: it failed, or does not end.
        """
        with self._log(name).open("w") as log:
            try:
                code = subprocess.run(
                    command,
                    env=dict(self.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    timeout=PATIENCE,
                ).returncode
            except subprocess.TimeoutExpired:
                raise self._failed(f"{name}: not within {PATIENCE:.0f} s", name) from None
        if code:
            raise self._failed(f"{name} ended with {code}.", name)

    def serve(self, record: Record, name: str, command: Sequence[str]) -> None:
        """Starts a server, and writes it into the record.

        Raises:
            StartError: it ended at once.
        """
        try:
            found = processes.start([*command], dict(self.environment), self._log(name))
        except ChildProcessError as error:
            raise self._failed(f"{name}: {error}", name) from error
        record.servers[name] = (found.pid, found.started)
        self.write(record)

    def wait(self, record: Record, what: str, holds: Callable[[], bool]) -> None:
        """Waits until something holds.

        Raises:
            StartError: it does not within 60 s, or a server ended.
        """

        def settled() -> bool:
            for name, at in record.servers.items():
                if not processes.alive(*at):
                    raise self._failed(f"{name} ended while it started.", name)
            return holds()

        if not wait_until(settled, timeout_s=PATIENCE, poll_s=0.02):
            raise self._failed(f"not within {PATIENCE:.0f} s: {what}.", [*record.servers][-1])

    def _log(self, name: str) -> Path:
        return self.state / "log" / f"{name}.out"

    def _failed(self, reason: str, name: str) -> StartError:
        said = self._log(name).read_text(errors="replace").splitlines()
        return StartError("\n".join([reason, *said[-15:]]))


@contextmanager
def free_ports(count: int) -> Iterator[tuple[int, ...]]:
    """Ports that nobody else takes until the block ends.

    We stay bound to them without listening. Linux lets the daemons, which ask for SO_REUSEADDR,
    listen beside us, and refuses everyone who looks for a free port as we do.
    """
    with ExitStack() as stack:
        ports: list[int] = []
        for port in random.sample(range(*PORTS), 2000):
            if len(ports) == count:
                break
            taken = socket.socket()
            try:
                taken.bind(("", port))
            except OSError:  # in use: try another
                taken.close()
                continue
            stack.enter_context(taken)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            ports.append(port)
        if len(ports) < count:
            raise OSError(f"no {count} free TCP ports between {PORTS[0]} and {PORTS[1]}")
        yield tuple(ports)
