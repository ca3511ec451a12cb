"""python -m slurm up | down | status: a real Slurm cluster on this machine.

Exit codes: 0 done or healthy, 1 degraded or a daemon failed, 2 a user error, 3 status found none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from shards import cli
from slurm import devcluster
from slurm.service import exports

EPILOG = """
examples:
  python -m slurm up                          four nodes with two stand-in GPUs each
  eval "$(python -m slurm env)"               let sbatch, squeue, sacct of this shell reach it
  python -m launcher.submit experiment=digits_dit cluster=devcluster nodes=2
  python -m slurm down                        ends its jobs and leaves no trace

It needs Debian's munge, mariadb-server, slurm-wlm and slurmdbd (slurm/install.sh installs them).
Root is needed only for the names of the nodes in /etc/hosts.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(argv)
    state = Path(options.state) if options.state else None
    try:
        return int(options.command(state, options))
    except (devcluster.StartError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _up(state: Path | None, options: argparse.Namespace) -> int:
    began = time.monotonic()
    cluster = devcluster.up(state, nodes=options.nodes, gpus=options.gpus, say=_say(options))
    seconds = time.monotonic() - began
    if options.json:
        print(json.dumps({**asdict(cluster), "seconds": round(seconds, 2)}, default=str))
        return 0
    print(
        f"{seconds:.1f} s: {len(cluster.nodes)} nodes with {cluster.gpus} stand-in GPUs each, "
        f"partitions {cluster.partition} and debug\n"
        f"{exports(cluster.environment())}\n"
        "python -m launcher.submit experiment=digits_dit cluster=devcluster nodes=2"
    )
    return 0


def _down(state: Path | None, options: argparse.Namespace) -> int:
    devcluster.down(state, say=_say(options))
    if options.json:
        print(json.dumps({"up": False}))
    return 0


def _status(state: Path | None, options: argparse.Namespace) -> int:
    found = devcluster.status(state)
    if options.json:
        print(json.dumps(asdict(found), default=str))
    else:
        print(f"{found.word}: {found.state}")
        for name, alive in found.daemons.items():
            node = found.nodes.get(name, "")
            print(f"  {name:10} {'runs' if alive else 'is not running':15} {node}".rstrip())
        if found.daemons and not found.names_resolve:
            print("  the names of the nodes do not resolve on this machine (it takes root)")
    return {"up": 0, "degraded": 1, "down": 3}[found.word]


def _env(state: Path | None, options: argparse.Namespace) -> int:
    cluster = devcluster.find(state)
    if cluster is None:
        print("error: no cluster is up: python -m slurm up", file=sys.stderr)
        return 3
    print(json.dumps(cluster.environment()) if options.json else exports(cluster.environment()))
    return 0


def _say(options: argparse.Namespace) -> devcluster.Say:
    """Progress goes to stderr where stdout holds JSON."""
    return lambda line: print(line, file=sys.stderr if options.json else sys.stdout, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slurm",
        description="A real Slurm cluster on this machine, for development and tests.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="up | down | status | env")
    for name, command, summary in (
        ("up", _up, "start a cluster and wait until its nodes are idle; a live one is kept"),
        ("down", _down, "end it, its jobs too, and remove every trace"),
        ("status", _status, "what runs, and the state of each node"),
        ("env", _env, "print the export line that Slurm's commands need"),
    ):
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
        sub.add_argument(
            "--state",
            metavar="DIR",
            help="the cluster's folder (default: $SELFGUIDE_DEVCLUSTER, else "
            "$XDG_STATE_HOME/selfguide/devcluster, else ~/.local/state/selfguide/devcluster)",
        )
        if name == "up":
            sub.add_argument("--nodes", type=int, default=4, help="how many (default %(default)s)")
            sub.add_argument("--gpus", type=int, default=2, help="per node (default %(default)s)")
    return parser


if __name__ == "__main__":
    cli.run(main)
