"""`python -m launcher.nodes`: the nodes of the cluster, what stands against them, and which of them runs do without."""

from __future__ import annotations

import argparse
import getpass
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launcher import backends, folder
from launcher.backends import Backend, Node, Record
from launcher.folder import Attempt
from launcher.reconcile import health
from launcher.reconcile import nodes as known
from launcher.reconcile.health import Evidence, Exclusion
from launcher.reconcile.view import LOOK_S
from selfguide.spec.run import read_record
from selfguide.spec.suggest import nearest
from shards import cli, storage
from shards.errors import UserError

# a larger cluster's nodes that are well are only counted
SHOWN = 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of a node."""

    node: str
    # Slurm's word; "unknown" where no Slurm answers or none has this node
    state: str
    reason: str
    # failures by class, and the last of them
    evidence: dict[str, int]
    last: Evidence | None
    excluded: bool
    # seconds since 1970; None where it is not excluded, or until a person forgives it
    until: float | None
    why: str


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.nodes",
        "Lists the nodes of the cluster with the failures of runs on them. A node that failed twice within a\n"
        "day gets no more jobs until that has faded; a quarter of all nodes is left out at most.",
        '--forgive node7 --note "new memory"',
    )
    parser.add_argument(
        "--runs", type=storage.place, default="runs", metavar="DIR", help="where runs are (runs)"
    )
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of a table")
    by_hand = parser.add_mutually_exclusive_group()
    by_hand.add_argument(
        "--forgive", metavar="NODE", help="what it did counts no more, and jobs may run on it"
    )
    by_hand.add_argument(
        "--exclude", metavar="NODE", help="it gets no jobs of these runs until it is forgiven"
    )
    parser.add_argument(
        "--note",
        default="",
        help="the reason of --forgive or --exclude, for those who read the table (none)",
    )
    options = parser.parse_args(arguments)
    root = Path(options.runs).resolve()
    now, found = time.time(), _ask(root)
    if node := options.forgive or options.exclude:
        evidence = known.read_all(root)
        _decide(root, node, options, now, {*(each.name for each in found), *_named(evidence)})
    rows = table(found, known.read_all(root), time.time())
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif rows:
        _print(rows)
    else:
        print(f"no node is known: no Slurm answers here, and no run in {options.runs} had one")
    return 0


def table(nodes: Sequence[Node], evidence: Sequence[Evidence], now: float) -> list[Row]:
    """Returns a row for each node that Slurm has or that something stands against, by name."""
    states = {node.name: node for node in nodes}
    names = sorted({*states, *_named(evidence)}, key=_natural)
    failing = {each.node: each for each in health.failing(evidence, names, now)}
    barred = {each.node for each in health.excluded(evidence, names, now)}
    rows = []
    for name in names:
        its, bad = [each for each in evidence if each.node == name], failing.get(name)
        row = _row(name, states.get(name), its, bad if name in barred else None)
        if bad is not None and name not in barred:
            row = replace(row, why=f"not excluded, as {health.SHARE:.0%} of the nodes are already")
        rows.append(row)
    return rows


def _row(
    name: str, node: Node | None, evidence: Sequence[Evidence], barred: Exclusion | None
) -> Row:
    failures = [each for each in evidence if each.kind in health.WEIGHTS]
    return Row(
        node=name,
        state=node.state if node else "unknown",
        reason=node.reason if node else "",
        evidence=dict(health.counted(failures)),
        last=failures[-1] if failures else None,
        excluded=barred is not None,
        until=barred.until if barred else None,
        why=barred.why if barred else "",
    )


def _decide(
    root: Path, node: str, options: argparse.Namespace, now: float, names: set[str]
) -> None:
    """Writes down what a person decided about a node."""
    if node not in names:
        raise UserError(f"{node!r} is no node that is known here{nearest(node, sorted(names))}")
    kind = "forgiven" if options.forgive else "excluded"
    what = f"{options.note or 'no note'} ({getpass.getuser()})"
    known.add(root, Evidence(node=node, time=now, kind=kind, what=what))


def _ask(root: Path) -> list[Node]:
    """The nodes of every Slurm that the newest attempts of runs were given to, or of this shell's."""
    records: dict[tuple[str, str | None], Record] = {}
    for run in folder.runs(root):
        at = Attempt.newest(run)
        record = read_record(at.job) if at else None
        if record and record["kind"] != "local":
            records[record["kind"], record.get("conf")] = record
    asked: list[Backend] = [backends.of_record(record) for record in records.values()]
    asked = asked or [backends.of_record({"kind": "slurm"})]
    return [node for backend in asked for node in backend.nodes(LOOK_S)]


def _named(evidence: Sequence[Evidence]) -> set[str]:
    return {each.node for each in evidence}


def _natural(name: str) -> tuple[str, int, str]:
    """node9 before node10."""
    letters = name.rstrip("0123456789")
    return letters, int(name[len(letters) :] or 0), name


def _print(rows: Sequence[Row]) -> None:
    from rich.table import Table

    shown = rows
    if len(rows) > SHOWN:
        shown = [row for row in rows if row.evidence or row.excluded or row.reason]
    printed = Table(box=None, header_style="bold")
    for name in ("node", "state", "failures", "last", "excluded", "why"):
        printed.add_column(name, overflow="fold")
    for row in shown:
        counts = ", ".join(f"{count} {kind}" for kind, count in row.evidence.items())
        last = f"{_when(row.last.time)} {row.last.run}" if row.last else ""
        excluded = ""
        if row.excluded:
            excluded = f"[red]until {_when(row.until) if row.until else 'forgiven'}[/]"
        about = row.why or row.reason or (row.last.what if row.last else "")
        printed.add_row(row.node, row.state, counts, last, excluded, about)
    console = cli.console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no edge at which to break lines
    console.print(printed)
    if len(shown) < len(rows):
        print(f"and {len(rows) - len(shown)} nodes that nothing stands against")


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


if __name__ == "__main__":
    cli.run(main)
