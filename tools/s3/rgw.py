"""Ceph's object gateway over one monitor and one OSD that keeps all in memory: a second opinion on what S3 is.

The code that large installations run, from Debian's packages, in one folder and on loopback only. Without a manager
daemon and without replicas.
"""

from __future__ import annotations

import subprocess
import uuid
from importlib import resources
from pathlib import Path

from slurm.service import Say
from tools.environments import InstallError
from tools.s3.folder import StoreFolder

TITLE = "Ceph's gateway"
SERVERS = ("mon", "osd", "rgw")
PORTS = ("mon", "rgw")
FRONT = "rgw"
_BIN = Path("/usr/bin")
_ENTITIES = {"mon.": ("mon",), "client.admin": ("mon", "osd"), "osd.0": ("mon", "osd")}


def prepare(state: Path, say: Say) -> Path:
    """Where the programs are; installs them where this user may."""
    script = resources.files("tools.s3") / "install.sh"
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise InstallError(done.stderr.strip() or f"{script} left with {done.returncode}")
    for line in done.stdout.splitlines():
        say(line)
    return _BIN


def start(folder: StoreFolder, programs: Path) -> None:
    """Starts monitor, OSD and gateway, and makes one user with all keys."""
    for name in ("mon", "osd", "run"):
        (folder.state / name).mkdir()
    keyring = folder.state / "keyring"
    keyring.touch(mode=0o600)
    cluster, disk = str(uuid.uuid4()), str(uuid.uuid4())
    values = {f"{name}_port": port for name, port in folder.ports.items()}
    config = folder.fill("ceph.conf", state=folder.state, cluster=cluster, **values)

    def command(program: str, *arguments: str) -> list[str]:
        return [str(programs / program), "-c", str(config), *arguments]

    for name, caps in _ENTITIES.items():
        allowed = [word for daemon in caps for word in ("--cap", daemon, "allow *")]
        tool = [str(programs / "ceph-authtool"), str(keyring), "--gen-key", "-n", name, *allowed]
        folder.run("keys", tool)
    monmap = str(folder.state / "monmap")
    at = f"[v1:127.0.0.1:{folder.ports['mon']}]"
    new = [str(programs / "monmaptool"), "--create", "--fsid", cluster, "--addv", "a", at, monmap]
    folder.run("monmap", new)
    folder.run(
        "mon-mkfs",
        command("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", str(keyring)),
    )
    folder.serve("mon", command("ceph-mon", "-i", "a", "--foreground"))
    folder.run("osd-new", command("ceph", "osd", "new", disk))
    folder.run("osd-mkfs", command("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk))
    folder.serve("osd", command("ceph-osd", "-i", "0", "--foreground"))
    admin = command("radosgw-admin", "--uid=dev")
    for number, (key, secret) in enumerate(folder.secrets.items()):
        what = ("key", "create") if number else ("user", "create", "--display-name=dev")
        # an argument, for it has no other way in: these keys open a folder that is gone tomorrow
        folder.run("user", [*admin, *what, f"--access-key={key}", f"--secret-key={secret}"])
    folder.serve("rgw", command("radosgw", "-n", "client.admin", "--foreground"))
