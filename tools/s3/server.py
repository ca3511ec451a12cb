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
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Protocol

from shards.errors import UserError
from slurm import processes
from slurm.service import Record, Say, Service, StartError, free_ports
from tools.s3 import rgw, swift

__all__ = ["Server", "StartError", "down", "find", "up"]

BUCKET = "selfguide"
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

    def start(self, folder: Service, record: Record, programs: Path) -> None:
        """Starts all servers, at the ports and with the secrets of the record's facts."""


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


def service(state: Path | None) -> Service:
    """Returns the folder of a store: $SELFGUIDE_S3, else one of the user's own, where `state` is None."""
    return Service(
        state=Service.folder(state, "SELFGUIDE_S3", "s3"),
        file="s3.json",
        format="selfguide s3 2",
        templates=resources.files("tools.s3") / "templates",
        environment={"PATH": os.defpath, "LANG": "C.UTF-8"},
    )


def find(state: Path | None = None) -> Server | None:
    """The live store in this folder, or None. Starts nothing."""
    folder = service(state)
    record = folder.read()
    if record is None or not record.alive(*record.servers):
        return None
    return _server(folder.state, record)


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
    folder = service(state)
    state = folder.state
    with folder.claim(say) as made:
        if server := find(state):
            if server.store != store:
                raise UserError(
                    f"state={state}: {STORES[server.store].TITLE} is up there; take it down first, or name "
                    "another folder with --state"
                )
            say(f"already up in {state}")
            return server
        made += _clear(folder)
        try:
            return _start(folder, store, made, say)
        except BaseException:  # also Ctrl-C: half a store is of use to nobody
            folder.remove(made + _clear(folder))
            raise


def down(state: Path | None = None, *, say: Say = lambda line: None) -> None:
    """Ends the store in this folder, or what is left of one, and deletes all that it held."""
    folder = service(state)
    there = folder.state.exists()
    with folder.claim(say) as made:
        folder.remove(made + _clear(folder))
    say(
        f"down: nothing is left of {folder.state}"
        if there
        else f"nothing to take down in {folder.state}"
    )


def _server(state: Path, record: Record) -> Server:
    facts = record.facts
    port = facts["ports"][STORES[facts["store"]].FRONT]
    endpoint = f"http://127.0.0.1:{port}"
    return Server(state=state, store=facts["store"], endpoint=endpoint, secrets=facts["secrets"])


def _start(folder: Service, store: str, made: list[str], say: Say) -> Server:
    programs = STORES[store].prepare(folder.state, say)
    began, kind = time.monotonic(), STORES[store]
    (folder.state / "log").mkdir()
    with free_ports(len(kind.PORTS)) as free:
        ports = dict(zip(kind.PORTS, free, strict=True))
        users = {f"selfguide:{user}": secrets.token_hex(16) for user in USERS}
        facts = {"store": store, "ports": ports, "secrets": users}
        record = Record(format=folder.format, facts=facts, made=made)
        folder.write(record)
        kind.start(folder, record, programs)
        server = _server(folder.state, record)
        _make_bucket(folder, record, server)
    record.ready = True
    folder.write(record)
    say(f"{time.monotonic() - began:.1f} s: {kind.TITLE} answers at {server.endpoint}")
    return server


def _make_bucket(folder: Service, record: Record, server: Server) -> None:
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

    def created() -> bool:
        try:
            client.create_bucket(Bucket=server.bucket)
        except (BotoCoreError, ClientError):
            return False
        return True

    folder.wait(record, "a bucket is made", created)


def _clear(folder: Service) -> list[str]:
    """Kills what runs out of the folder and empties it; returns the parents it once made."""
    record = folder.read()
    processes.end(lambda: members(folder.state), grace=0.0, patience=60.0)
    folder.empty()
    return record.made if record else []


def members(state: Path) -> list[processes.Process]:
    """Live programs of this folder: those whose command line names a configuration in it."""
    folder = os.fsencode(state) + b"/"

    def ours(process: processes.Process) -> bool:
        words = processes.read(process.pid, "cmdline").split(b"\0")
        return any(word.startswith(folder) and word.endswith(b".conf") for word in words)

    return [process for process in processes.table() if ours(process)]
