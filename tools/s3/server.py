"""A real S3 store on this machine, OpenStack Swift or Ceph's gateway, as servers that run out of one folder.

Nothing outside the folder is touched, so `down` leaves no trace, also after a crash half-way up.

    server = up()                       # some seconds; installs Swift first, once
    os.environ.update(server.environment())
    down()
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from shards.errors import UserError
from slurm import processes
from slurm.layout import boot_id, free_ports
from tools.s3 import rgw, swift
from tools.s3.folder import BUCKET, PATIENCE, Say, StartError, StoreFolder, tail

RECORD = "s3.json"
USERS = ("dev", "spare")  # two credentials of one account: what expires must have a successor


class Store(Protocol):
    """What a kind of store has to know; a module each."""

    @property
    def TITLE(self) -> str: ...
    @property
    def SERVERS(self) -> tuple[str, ...]: ...
    @property
    def PORTS(self) -> tuple[str, ...]: ...
    @property
    def FRONT(self) -> str:
        """The port that clients speak to, among PORTS."""

    def prepare(self, state: Path, say: Say) -> Path:
        """Where its programs are, installed where they were not."""

    def start(self, folder: StoreFolder, programs: Path) -> None:
        """Starts all servers."""


STORES: dict[str, Store] = {"swift": swift, "rgw": rgw}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A store and how to reach it. `secrets` maps the two access keys to their secrets."""

    state: Path
    store: str
    endpoint: str
    secrets: dict[str, str] = field(repr=False)
    bucket: str = BUCKET

    def environment(self, user: int = 0) -> dict[str, str]:
        """What every S3 client reads, ours and others; `user` picks one of the two credentials."""
        key = list(self.secrets)[user]
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": self.secrets[key],
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@dataclass(kw_only=True)
class _Record:
    """What s3.json holds; `servers` maps a name to [pid, start time in ticks]."""

    boot: str
    store: str
    port: int
    secrets: dict[str, str]
    servers: dict[str, tuple[int, int]] = field(default_factory=dict)
    ready: bool = False

    def write(self, state: Path) -> None:
        draft = state / f".{RECORD}.draft"
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(asdict(self), indent=1))
        draft.replace(state / RECORD)

    def alive(self) -> bool:
        return (
            self.ready
            and self.boot == boot_id()
            and len(self.servers) == len(STORES[self.store].SERVERS)
            and all(processes.alive(*at) for at in self.servers.values())
        )


def default_state() -> Path:
    """$SELFGUIDE_S3, else the user's state folder."""
    if chosen := os.environ.get("SELFGUIDE_S3"):
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return (Path(base).expanduser() / "selfguide" / "s3").resolve()


def find(state: Path | None = None) -> Server | None:
    """The live store in this folder, or None. Starts nothing."""
    state = default_state() if state is None else state.expanduser().resolve()
    record = _read(state)
    return _server(state, record) if record is not None and record.alive() else None


def up(state: Path | None = None, *, store: str = "swift", say: Say = lambda line: None) -> Server:
    """Starts a store with one empty bucket and returns when it answers; a live one is returned as it is.

    Args:
        store: `swift` or `rgw`.

    Raises:
        UserError: the folder holds other things or another store, or its file system has no extended
            attributes.
        InstallError: pip could not install Swift, or apt-get the gateway.
        StartError: a server failed. Nothing of it is left behind.
    """
    if store not in STORES:
        raise UserError(f"store={store!r}: there are {' and '.join(STORES)}")
    state = default_state() if state is None else state.expanduser().resolve()
    with _locked(state):
        if server := find(state):
            if server.store != store:
                raise UserError(
                    f"state={state}: {STORES[server.store].TITLE} is up there; take it down first, or name "
                    "another folder with --state"
                )
            say(f"already up in {state}")
            return server
        _clear(state)
        programs = STORES[store].prepare(state, say)
        try:
            return _start(state, store, programs, say)
        except BaseException:  # also Ctrl-C: half a store is of use to nobody
            _clear(state)
            raise


def down(state: Path | None = None, *, say: Say = lambda line: None) -> None:
    """Ends the store in this folder, or what is left of one, and deletes all that it held."""
    state = default_state() if state is None else state.expanduser().resolve()
    if not state.exists():
        say(f"nothing to take down in {state}")
        return
    with _locked(state):
        _clear(state)
        state.rmdir()
    say(f"down: nothing is left of {state}")


def _server(state: Path, record: _Record) -> Server:
    return Server(
        state=state,
        store=record.store,
        endpoint=f"http://127.0.0.1:{record.port}",
        secrets=record.secrets,
    )


def _read(state: Path) -> _Record | None:
    try:
        return _Record(**json.loads((state / RECORD).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"state={state}: {RECORD} is no record of ours ({error})") from error


def _start(state: Path, store: str, programs: Path, say: Say) -> Server:
    began, kind = time.monotonic(), STORES[store]
    (state / "log").mkdir()
    with free_ports(len(kind.PORTS)) as free:
        ports = dict(zip(kind.PORTS, free, strict=True))
        known = {f"selfguide:{user}": secrets.token_hex(16) for user in USERS}
        record = _Record(boot=boot_id(), store=store, port=ports[kind.FRONT], secrets=known)
        record.write(state)

        def started(name: str, process: processes.Process) -> None:
            record.servers[name] = (process.pid, process.started)
            record.write(state)

        kind.start(StoreFolder(state=state, ports=ports, secrets=known, started=started), programs)
        server = _server(state, record)
        _make_bucket(server, record)
    record.ready = True
    record.write(state)
    say(f"{time.monotonic() - began:.1f} s: {kind.TITLE} answers at {server.endpoint}")
    return server


def _make_bucket(server: Server, record: _Record) -> None:
    """Creates the bucket, which all servers must answer for; until then they are starting."""
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    key, secret = next(iter(server.secrets.items()))
    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=Config(retries={"total_max_attempts": 1}),
    )
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            client.create_bucket(Bucket=server.bucket)
            return
        except (BotoCoreError, ClientError) as error:
            for name, at in record.servers.items():
                if not processes.alive(*at):
                    reason = f"{name} ended while it started.\n{tail(server.state, name)}"
                    raise StartError(reason) from error
            if time.monotonic() > deadline:
                reason = f"not within {PATIENCE:.0f} s: {error}\n{tail(server.state, STORES[server.store].FRONT)}"
                raise StartError(reason) from error
        time.sleep(0.05)


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """One command at a time on a folder, which is made if absent. The lock goes with its holder."""
    while True:
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            held = {entry.name for entry in state.iterdir()}
            handle = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            reason = f"state={state}: {error.strerror}; name another folder with --state"
            raise UserError(reason) from error
        try:
            if held and not held & {RECORD, f".{RECORD}.draft"}:
                raise UserError(
                    f"state={state}: holds other files, and `down` would delete them; name another"
                )
            fcntl.flock(handle, fcntl.LOCK_EX)
            # who waited may hold the lock on a folder that was removed meanwhile: then begin anew
            if state.exists() and state.stat().st_ino == os.fstat(handle).st_ino:
                yield
                return
        finally:
            os.close(handle)


def _clear(state: Path) -> None:
    """Kills what runs out of the folder and empties it, the record last: it marks the folder as ours."""
    deadline = time.monotonic() + PATIENCE
    while running := _members(state):
        for process in running:
            if processes.alive(process.pid, process.started):
                os.kill(process.pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"these do not end, even when killed: {[p.pid for p in running]}")
        time.sleep(0.02)
        for process in running:
            processes.bury(process.pid)
    for entry in sorted(state.iterdir(), key=lambda entry: entry.name == RECORD):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _members(state: Path) -> list[processes.Process]:
    """Live programs of this folder: those whose command line names a configuration in it."""
    folder = os.fsencode(state) + b"/"
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's: either way not ours to end
            continue
        ours = any(word.startswith(folder) and word.endswith(b".conf") for word in line)
        if ours and (process := processes.look(int(entry.name))):
            found.append(process)
    return found
