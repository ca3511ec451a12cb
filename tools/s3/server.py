"""A real S3 store on this machine: Swift's four servers with one ring each, in one folder, without root.

Nothing outside the folder is touched, so `down` leaves no trace, also after a crash half-way up.
Swift checks signatures, conditions and Content-MD5 like the stores that runs train from, which
mocks do not; it keeps what it knows of an object in extended attributes of its file.

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
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from string import Template

from shards.errors import UserError
from slurm import processes
from slurm.layout import boot_id, free_ports
from tools.s3.install import install

RECORD = "s3.json"
SERVERS = ("object", "container", "account", "proxy")
USERS = ("dev", "spare")  # two credentials of one account: what expires must have a successor
BUCKET = "selfguide"
PATIENCE = 60.0  # seconds until the servers answer; on an idle machine 3
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8"}
Say = Callable[[str], None]


class StartError(RuntimeError):
    """A server did not come up; the message holds the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A store and how to reach it. `secrets` maps the two access keys to their secrets."""

    state: Path
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
            and len(self.servers) == len(SERVERS)
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


def up(state: Path | None = None, *, say: Say = lambda line: None) -> Server:
    """Starts a store with one empty bucket and returns when it answers; a live one is returned as it is.

    Raises:
        UserError: the folder holds other things, or its file system has no extended attributes.
        InstallError: pip could not install Swift.
        StartError: a server failed. Nothing of it is left behind.
    """
    state = default_state() if state is None else state.expanduser().resolve()
    with _locked(state):
        if server := find(state):
            say(f"already up in {state}")
            return server
        _clear(state)
        _check_attributes(state)
        python = install(say)
        try:
            return _start(state, python, say)
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
    return Server(state=state, endpoint=f"http://127.0.0.1:{record.port}", secrets=record.secrets)


def _read(state: Path) -> _Record | None:
    try:
        found = json.loads((state / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"state={state}: {RECORD} is no record of ours ({error})") from error
    return _Record(**found)


def _start(state: Path, python: Path, say: Say) -> Server:
    began = time.monotonic()
    for name in ("log", "recon", "devices/disk"):
        (state / name).mkdir(parents=True)
    with free_ports(len(SERVERS)) as ports:
        at = dict(zip(SERVERS, ports, strict=True))
        known = {f"selfguide:{user}": secrets.token_hex(16) for user in USERS}
        record = _Record(boot=boot_id(), port=at["proxy"], secrets=known)
        record.write(state)
        _write_config(state, at, known)
        places = [str(at[name]) for name in ("account", "container", "object")]
        rings = str(resources.files("tools.s3") / "rings.py")
        _run_to_end(state, [str(python), rings, str(state), "disk", *places])
        for name in SERVERS:
            program = str(python.parent / f"swift-{name}-server")
            command = [str(python), program, str(state / f"{name}.conf"), "-v"]
            try:
                found = processes.start(command, ENVIRONMENT, state / "log" / f"{name}.out")
            except ChildProcessError as error:
                raise StartError(f"{error}\n{_tail(state, name)}") from error
            record.servers[name] = (found.pid, found.started)
            record.write(state)
        server = _server(state, record)
        _make_bucket(server, record)
    record.ready = True
    record.write(state)
    say(f"{time.monotonic() - began:.1f} s: Swift answers at {server.endpoint}")
    return server


def _write_config(state: Path, ports: dict[str, int], known: dict[str, str]) -> None:
    # Its log goes to our files; the machine's syslog must not notice us, so its copy goes nowhere.
    common = {
        "swift_dir": state,
        "devices": state / "devices",
        "recon_cache_path": state / "recon",
        "bind_ip": "127.0.0.1",
        "workers": 0,
        "mount_check": "false",
        "fallocate_reserve": 0,
        "log_level": "WARNING",
        "log_udp_host": "127.0.0.1",
        "log_udp_port": 9,
    }
    users = (f"user_{key.replace(':', '_')} = {secret} .admin" for key, secret in known.items())
    values = {
        "common": "\n".join(f"{name} = {value}" for name, value in common.items()),
        "users": "\n".join(users),
        **{f"{name}_port": str(port) for name, port in ports.items()},
    }
    templates = resources.files("tools.s3") / "templates"
    for name in ("swift", *SERVERS):
        path = state / f"{name}.conf"
        path.touch(mode=0o600)  # the proxy's holds the secrets
        path.write_text(Template((templates / path.name).read_text()).substitute(values))


def _run_to_end(state: Path, command: list[str]) -> None:
    with (state / "log" / "rings.out").open("w") as log:
        done = subprocess.run(command, env=ENVIRONMENT, stdout=log, stderr=log, timeout=PATIENCE)
    if done.returncode:
        raise StartError(f"rings: left with {done.returncode}\n{_tail(state, 'rings')}")


def _make_bucket(server: Server, record: _Record) -> None:
    """Creates the bucket, which all four servers must answer for; until then they are starting."""
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
                    reason = f"{name} ended while it started.\n{_tail(server.state, name)}"
                    raise StartError(reason) from error
            if time.monotonic() > deadline:
                reason = f"not within {PATIENCE:.0f} s: {error}\n{_tail(server.state, 'proxy')}"
                raise StartError(reason) from error
        time.sleep(0.05)


def _check_attributes(state: Path) -> None:
    probe = state / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift.probe", b"1" * 1024)
    except OSError as error:
        raise UserError(
            f"state={state}: its file system keeps no extended attributes ({error.strerror}), which "
            "Swift needs; name a folder on ext4 or xfs with --state or $SELFGUIDE_S3"
        ) from error
    finally:
        probe.unlink()


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
    """Live servers of this folder: those whose command line names its configuration."""
    configs = {os.fsencode(state / f"{name}.conf") for name in SERVERS}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's: either way not ours to end
            continue
        if configs & set(line) and (process := processes.look(int(entry.name))):
            found.append(process)
    return found


def _tail(state: Path, name: str) -> str:
    log = state / "log" / f"{name}.out"
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
