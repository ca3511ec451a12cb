"""`python -m launcher.notify`: messages about runs, to the URLs of apprise that are in SELFGUIDE_NOTIFY; off without.

Such a URL holds a password or a token, so no setting, file or log of a run has it: it is a variable of the shell that
submits, which jobs inherit, or a line of `~/.config/selfguide/notify`, a file that only its owner may read. The run's
own jobs send, in a process of its own that is given up after some seconds, and no failure of it is one of the run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from launcher import sites
from launcher.reconcile.news import news
from launcher.reconcile.view import RunView
from selfguide.spec.run import write_record
from shards import cli
from shards.errors import UserError
from shards.lock import lock

VARIABLE = "SELFGUIDE_NOTIFY"
SEND_S = 20.0

log = logging.getLogger(__name__)


def tell(view: RunView, goes_on: bool = True) -> None:
    """Sends what there is to say of a run, where somebody wants to hear of it and nobody has said it before.

    Nothing is raised for a message that cannot be sent: the log says so, and no second try is made.
    """
    if not urls():
        return
    found = news(view, goes_on)
    if found is None:
        return
    folder = view.folder.root / "notified"
    record = folder / f"{found.key}.json"
    try:
        folder.mkdir(exist_ok=True)
        # one that another process sends now is waited for
        with lock(folder, create=False, seconds=SEND_S, required=False):
            if not record.exists():
                sent = _send_apart(found.title, found.text)
                write_record(record, {"title": found.title, "sent": sent}, replace=True)
    except OSError as error:  # a full disk is no reason to end what looks after the run
        log.warning(f"a message was not sent: {found.title}: {error}")


def urls() -> list[str]:
    """Returns where messages go: the words of the variable, or else the lines of the file."""
    given = os.environ.get(VARIABLE, "").split()
    path = sites.home() / "notify"
    if given or not path.is_file():
        return given
    if path.stat().st_mode & 0o077:
        log.warning(f"{path} is not used, since others may read or write it: chmod 600 {path}")
        return []
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def send(title: str, text: str) -> int:
    """Sends a message to every URL; returns how many took it.

    Raises:
        UserError: apprise is not installed.
    """
    try:
        from apprise import Apprise, AppriseAsset
    except ImportError:
        raise UserError("messages need apprise: pip install 'selfguide[notify]'") from None
    # its messages name URLs
    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
    taken = 0
    for number, url in enumerate(urls(), start=1):
        target = Apprise(asset=AppriseAsset(async_mode=False))
        if not target.add(url):
            log.warning(f"URL {number} is none that apprise knows")
        elif target.notify(title=title, body=text):
            taken += 1
        else:
            log.warning(f"URL {number} did not take the message")
    return taken


def _send_apart(title: str, text: str) -> bool:
    command = [sys.executable, "-m", "launcher.notify", "--title", title, "--text", text]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SEND_S)
    except subprocess.TimeoutExpired:
        log.warning(f"a message was not sent within {SEND_S:.0f} s: {title}")
        return False
    if done.returncode:
        log.warning(f"a message was not sent: {title}: {done.stderr.strip()}")
    return done.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0 where every URL took the message, else 1."""
    parser = argparse.ArgumentParser(
        prog=cli.program("launcher.notify"),
        description="Sends a message to the URLs of apprise in SELFGUIDE_NOTIFY, or in ~/.config/selfguide/notify: a "
        "test of what runs will do when they finish, stop, or fail for the first time.",
        epilog="example: SELFGUIDE_NOTIFY=json://localhost:8080 python -m launcher.notify",
    )
    parser.add_argument("--title", default="selfguide", help="of the message (%(default)s)")
    parser.add_argument(
        "--text", default="Runs will write here.", help="of the message (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    wanted = urls()
    if not wanted:
        raise UserError(
            f"nobody is to be notified: export {VARIABLE}=URL in the shell that submits, or write the URL into "
            f"{sites.home()}/notify, readable by you alone"
        )
    taken = send(given.title, given.text)
    outcome = {"taken": taken, "of": len(wanted)}
    print(json.dumps(outcome) if given.json else f"{taken} of {len(wanted)} took the message")
    return 0 if taken == len(wanted) else 1


if __name__ == "__main__":
    cli.run(main)
