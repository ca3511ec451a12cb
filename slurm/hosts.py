"""The names of the nodes in /etc/hosts, in one marked block per cluster that goes away with it.

Node names reach programs that know nothing of Slurm's NodeAddr (a rendezvous resolves the first name
of the node list), so they must resolve for everyone. Two clusters may hold the same names: each owns
its block, and both say 127.0.0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from shards.lock import lock

HOSTS = Path("/etc/hosts")


def add(state: Path, names: Sequence[str], *, hosts: Path = HOSTS) -> None:
    """Makes the names mean this machine. OSError when the file may not be written."""
    begin, end = _marks(state)
    block = f"{begin}\n127.0.0.1 {' '.join(names)}\n{end}\n"
    _rewrite(hosts, lambda text: _without(text, state) + block)


def remove(state: Path, *, hosts: Path = HOSTS) -> None:
    """Takes the block of this cluster out again; nothing is written where there is none."""
    if present(state, hosts=hosts):
        _rewrite(hosts, lambda text: _without(text, state))


def present(state: Path, *, hosts: Path = HOSTS) -> bool:
    """Whether the block of this cluster is there."""
    return hosts.exists() and _marks(state)[0] in hosts.read_text().splitlines()


def _marks(state: Path) -> tuple[str, str]:
    return f"# begin of selfguide devcluster {state}", f"# end of selfguide devcluster {state}"


def _without(text: str, state: Path) -> str:
    begin, end = _marks(state)
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        if line.rstrip("\n") == begin:
            inside = True
        elif inside and line.rstrip("\n") == end:
            inside = False
        elif not inside:
            kept.append(line if line.endswith("\n") else line + "\n")
    return "".join(kept)


def _rewrite(hosts: Path, change: Callable[[str], str]) -> None:
    # In place and not by rename: in a container /etc/hosts is a mount point, which cannot be
    # replaced. The lock is on the file itself, so that it leaves nothing behind.
    with lock(hosts, create=False), hosts.open("r+") as file:
        text = change(file.read())
        file.seek(0)
        file.write(text)
        file.truncate()
