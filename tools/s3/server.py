"""A real S3 store on this machine, OpenStack Swift or Ceph's gateway, as servers that run out of one folder.

Nothing outside the folder is touched, so `down` leaves no trace, also after a crash half-way up.

    server = up()                       # some seconds; installs Swift first, once
    os.environ.update(server.environment())
    down()
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from shards.errors import UserError
from slurm import processes
from slurm.layout import boot_id, free_ports
from slurm.service import Say, Service, StartError
from tools.s3 import rgw, swift
from tools.s3.folder import BUCKET, ENVIRONMENT, StoreFolder

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
    made: list[str] = field(default_factory=list)  # parent folders that did not exist before
    ready: bool = False

    def write(self, state: Path) -> None:
        STORE.write(state, asdict(self))

    def alive(self) -> bool:
        return (
            self.ready
            and self.boot == boot_id()
            and len(self.servers) == len(STORES[self.store].SERVERS)
            and all(processes.alive(*at) for at in self.servers.values())
        )


def _end(state: Path) -> None:
    processes.end(lambda: _members(state))


STORE = Service(
    name="s3",
    variable="SELFGUIDE_S3",
    record="s3.json",
    end=_end,
    outside=lambda state: bool(_members(state)),
)


def find(state: Path | None = None) -> Server | None:
    """The live store in this folder, or None. Starts nothing."""
    state = STORE.folder(state)
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
    state = STORE.folder(state)

    def live() -> Server | None:
        server = find(state)
        if server and server.store != store:
            raise UserError(
                f"state={state}: {STORES[server.store].TITLE} is up there; take it down first, or name "
                "another folder with --state"
            )
        return server

    def start(made: list[str]) -> Server:
        return _start(state, store, made, say)

    return STORE.up(state, say, live, start)


def down(state: Path | None = None, *, say: Say = lambda line: None) -> None:
    """Ends the store in this folder, or what is left of one, and deletes all that it held."""
    STORE.down(STORE.folder(state), say)


def _server(state: Path, record: _Record) -> Server:
    return Server(
        state=state,
        store=record.store,
        endpoint=f"http://127.0.0.1:{record.port}",
        secrets=record.secrets,
    )


def _read(state: Path) -> _Record | None:
    found = STORE.read(state)
    try:
        return None if found is None else _Record(**found)
    except TypeError as error:
        raise UserError(f"state={state}: {STORE.record} is no record of ours ({error})") from error


def _start(state: Path, store: str, made: list[str], say: Say) -> Server:
    kind = STORES[store]
    programs = kind.prepare(state, say)
    began = time.monotonic()
    (state / "log").mkdir()
    with free_ports(len(kind.PORTS)) as free:
        ports = dict(zip(kind.PORTS, free, strict=True))
        known = {f"selfguide:{user}": secrets.token_hex(16) for user in USERS}
        record = _Record(
            boot=boot_id(), store=store, port=ports[kind.FRONT], secrets=known, made=made
        )
        record.write(state)

        def changed(servers: dict[str, tuple[int, int]]) -> None:
            record.servers = servers
            record.write(state)

        folder = StoreFolder(
            state=state, environment=ENVIRONMENT, changed=changed, ports=ports, secrets=known
        )
        kind.start(folder, programs)
        server = _server(state, record)
        _make_bucket(server, folder)
    record.ready = True
    record.write(state)
    say(f"{time.monotonic() - began:.1f} s: {kind.TITLE} answers at {server.endpoint}")
    return server


def _make_bucket(server: Server, folder: StoreFolder) -> None:
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
    answer = ""

    def made() -> bool:
        nonlocal answer
        try:
            client.create_bucket(Bucket=server.bucket)
        except (BotoCoreError, ClientError) as error:
            answer = str(error)
            return False
        return True

    try:
        folder.wait("its bucket is made", made)
    except StartError as error:
        raise StartError(f"{error}\nthe last answer: {answer}") from error


def _members(state: Path) -> list[processes.Process]:
    """Live programs of this folder: those whose command line names a configuration in it."""
    folder = os.fsencode(state) + b"/"

    def ours(process: processes.Process) -> bool:
        words = processes.read(process.pid, "cmdline").split(b"\0")
        return any(word.startswith(folder) and word.endswith(b".conf") for word in words)

    return [process for process in processes.table() if ours(process)]
