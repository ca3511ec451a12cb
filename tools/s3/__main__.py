"""python -m tools.s3 up | down | env: a real S3 store on this machine.

Exit codes: 0 done, 1 a server failed, 2 a user error, 3 none is up.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from shards import cli
from slurm.service import StartError, exports
from tools.environments import InstallError
from tools.s3 import server as servers

EPILOG = """
examples:
  eval "$(python -m tools.s3 up)"             start one; this shell's S3 clients use it from now on
  python -m tools.shards make digits --out s3://selfguide/digits
  python -m tools.shards verify s3://selfguide/digits
  eval "$(python -m tools.s3 env)"            the same for another shell
  python -m tools.s3 down                     ends it and deletes all that it held

OpenStack Swift is installed with pip into the user's cache, once. Root is not needed. Ceph's gateway (--store rgw), a
second opinion, comes from Debian's packages, which root installs; it keeps all in memory.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(argv)
    state = Path(options.state) if options.state else None
    try:
        return _run(options.command, state, options.store, options.json)
    except (StartError, InstallError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(command: str, state: Path | None, store: str, as_json: bool) -> int:
    if command == "down":
        servers.down(state, say=_say)
        if as_json:
            print(json.dumps({"up": False}))
        return 0
    up = command == "up"
    server = servers.up(state, store=store, say=_say) if up else servers.find(state)
    if server is None:
        print("error: no store is up: python -m tools.s3 up", file=sys.stderr)
        return 3
    variables = server.environment()
    if as_json:
        print(json.dumps({"store": server.store, "bucket": server.bucket, **variables}))
        return 0
    print(exports(variables))
    print(f"# an empty bucket: s3://{server.bucket}")
    return 0


def _say(line: str) -> None:
    """Progress goes to stderr: stdout is for the shell's eval."""
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.s3",
        description="A real S3 store on this machine, for development and tests.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("up", "down", "env"), help="start, end, print exports")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--store", default="swift", metavar="NAME", help="to start: swift or rgw (swift)"
    )
    parser.add_argument(
        "--state",
        metavar="DIR",
        help="the store's folder (default: $SELFGUIDE_S3, else $XDG_STATE_HOME/selfguide/s3, else "
        "~/.local/state/selfguide/s3)",
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
