"""OpenStack Swift with its s3api filter: four servers with one ring each, without root.

Swift checks signatures, conditions and Content-MD5 like the stores that runs train from, which mocks do not; it keeps
what it knows of an object in extended attributes of its file.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from shards.errors import UserError
from slurm.service import Say
from tools import environments
from tools.s3.folder import StoreFolder

TITLE = "Swift"
SERVERS = ("object", "container", "account", "proxy")
PORTS = SERVERS
FRONT = "proxy"  # the port that clients speak to


def prepare(state: Path, say: Say) -> Path:
    """Swift's Python, installed where it is not (20 s): it pins libraries that are none of ours (eventlet, requests).

    Raises:
        UserError: the folder's file system will not do.
        InstallError: venv or pip failed.
    """
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
    wanted = (resources.files("tools.s3") / "requirements.txt").read_text()
    return environments.install("swift", wanted, say)


def start(folder: StoreFolder, python: Path) -> None:
    """Starts the servers; they answer a little later."""
    for name in ("recon", "devices/disk"):
        (folder.state / name).mkdir(parents=True)
    _write_config(folder)
    ports = [str(folder.ports[name]) for name in ("account", "container", "object")]
    rings = str(resources.files("tools.s3") / "rings.py")
    # -I: beside the program lies this module, which has the name of the package that it imports
    folder.run("rings", [str(python), "-I", rings, str(folder.state), "disk", *ports])
    for name in SERVERS:
        program = str(python.parent / f"swift-{name}-server")
        folder.serve(name, [str(python), program, str(folder.state / f"{name}.conf"), "-v"])


def _write_config(folder: StoreFolder) -> None:
    # Its log goes to our files; the machine's syslog must not notice us, so its copy goes nowhere.
    common = {
        "swift_dir": folder.state,
        "devices": folder.state / "devices",
        "recon_cache_path": folder.state / "recon",
        "bind_ip": "127.0.0.1",
        "workers": 0,
        "mount_check": "false",
        "fallocate_reserve": 0,
        "log_level": "WARNING",
        "log_udp_host": "127.0.0.1",
        "log_udp_port": 9,
    }
    users = (
        f"user_{k.replace(':', '_')} = {secret} .admin" for k, secret in folder.secrets.items()
    )
    values = {
        "common": "\n".join(f"{name} = {value}" for name, value in common.items()),
        "users": "\n".join(users),
        **{f"{name}_port": str(port) for name, port in folder.ports.items()},
    }
    for name in ("swift", *SERVERS):
        folder.fill(f"{name}.conf", **values)
