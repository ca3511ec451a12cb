"""What is known of the nodes of clusters, in the folder of all runs: small files that nobody changes.

<runs>/.nodes/<node>/<experiment>.<run>.<attempt>.json   a failure (`health.Evidence`)
<runs>/.nodes/<node>/by-hand-<time>.json                 what a person decided
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from launcher import backends
from launcher.reconcile import decide, health
from launcher.reconcile.health import Evidence, Exclusion
from launcher.reconcile.view import LOOK_S, RunView
from selfguide.spec.config import Config
from selfguide.spec.nodes import FOLDER
from selfguide.spec.run import RunFolder, write_record

log = logging.getLogger(__name__)

# files of it that are no evidence
_MEASURED = "product-"


def read_all(runs: Path) -> list[Evidence]:
    """Returns all that stands against nodes, in the order of time."""
    found = []
    for path in (runs / FOLDER).glob("*/*.json"):
        if path.name.startswith(_MEASURED):
            continue
        # one that cannot be read is worth less than a job that cannot start
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_text())
            record["kind"] = record.pop("class")
            names = [each.name for each in fields(Evidence) if each.name in record]
            found.append(Evidence(**{name: record[name] for name in names}))
    return sorted(found, key=lambda each: each.time)


def add(runs: Path, evidence: Evidence) -> None:
    """Writes down one piece of evidence, unless somebody has done so before."""
    record = asdict(evidence)
    record["class"] = kind = record.pop("kind")
    name = f"by-hand-{kind}-{int(1000 * evidence.time)}"
    if evidence.run:
        name = f"{evidence.run.replace('/', '.')}.{evidence.attempt:04d}"
    with contextlib.suppress(FileExistsError):
        write_record(runs / FOLDER / evidence.node / f"{name}.json", record)


def keep_evidence(view: RunView) -> None:
    """Writes down what the run's newest attempt, which has ended, says against its nodes."""
    at = view.newest
    if at is None or at.job is None or not at.nodes or decide.training_state(view) != "gone":
        return
    if at.cancelled or view.finished:
        return
    cause, down = decide.cause(at), set[str]()
    if cause.kind == "node":
        known = backends.of_record(at.job.record).nodes(LOOK_S)
        down = {node.name for node in known if not node.reachable}
    run = f"{view.folder.root.parent.name}/{view.folder.root.name}"
    for each in health.blamed(at, cause, run=run, time=decide.ended(at), down=down):
        try:
            add(_runs(view.folder), each)
        except (
            OSError
        ) as error:  # the folder is another user's, say, and the run goes on all the same
            log.warning(f"what speaks against {each.node} is not kept: {error}")


def barred(run: RunFolder, config: Config) -> list[Exclusion]:
    """Returns the nodes that the next job of this run has to do without."""
    evidence = read_all(_runs(run))
    if not evidence:
        return []
    known = backends.of(config.cluster).nodes(LOOK_S)
    spare = sum(node.in_service for node in known) - (config.min_nodes or config.nodes)
    names = [node.name for node in known]
    return health.excluded(evidence, names, time.time(), spare=max(0, spare))


def sentences(exclusions: Iterable[Exclusion]) -> list[str]:
    """Returns one for each node, for a person."""
    return [f"{each.node} is left out {until(each)}: {each.why}" for each in exclusions]


def until(exclusion: Exclusion) -> str:
    """Returns how long an exclusion lasts, in words."""
    if exclusion.until is None:
        return "until it is forgiven"
    return time.strftime("until %Y-%m-%d %H:%M", time.localtime(exclusion.until))


def names(exclusions: Sequence[Exclusion]) -> tuple[str, ...]:
    """Returns the nodes, as a job names them."""
    return tuple(sorted(each.node for each in exclusions))


def _runs(run: RunFolder) -> Path:
    return run.root.parent.parent
