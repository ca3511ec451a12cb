"""One process's share of an encoding, as plain values: here, in a call of its own, or as a task of an array of jobs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfguide.data.autoencoders.encoding import EncodedSource, Encoding, gpus
from shards.format.manifest import Manifest
from shards.parallel import Watch
from shards.write import committing, writer
from shards.write import plan as plans

REQUEST = "request.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Which images, what is made of them, and where it goes."""

    source: str
    out: str
    encoding: Encoding
    shard_bytes: int = plans.SHARD_BYTES
    device: str = "auto"
    workers: int | None = None  # one for each GPU that is seen, at least one
    rank: int = 0
    world: int = 1

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Task:
        return Task(**{**plain, "encoding": Encoding(**plain["encoding"])})

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def encode(
    task: Task,
    source: EncodedSource | None = None,
    *,
    watch: Watch[bool] = lambda shards, total: shards,
) -> tuple[Manifest, bool]:
    """Does the task's share, and what others leave; the manifest, and whether it is new. See `writer.write`."""
    made = source or EncodedSource.of(task.source, task.encoding, task.device)
    try:
        return writer.write(
            task.out,
            made,
            **_plan_options(task, made),
            workers=task.workers or max(1, gpus(task.device)),
            rank=task.rank,
            world=task.world,
            watch=watch,
        )
    finally:
        made.close()


def plan(task: Task, source: EncodedSource) -> plans.Plan:
    """What `encode` would write.

    Raises:
        UserError: it cannot be written, or `out` holds another data set.
    """
    made = plans.make_plan(source, **_plan_options(task, source))
    found = committing.find_existing(task.out)
    if found is not None and found.plan != made.hash:
        raise committing.other_data_set(task.out, found)
    return made


def take_share(folder: Path) -> None:
    """What a task of an array does; `folder` holds its request. Logs its progress shard by shard."""
    task = Task.of(json.loads((folder / REQUEST).read_text()))
    source = EncodedSource.of(task.source, task.encoding, task.device)

    def logged(shards: Iterable[bool], total: int) -> Iterator[bool]:
        started = time.monotonic()
        log.info("task %d of %d: %d shards are missing", task.rank, task.world, total)
        for done, built in enumerate(shards, start=1):
            yield built
            pace = (time.monotonic() - started) / done
            left = pace * (total - done)
            log.info("%d of %d, %.1f s each, at most %.0f s to go", done, total, pace, left)

    manifest, _ = encode(task, source, watch=logged)
    log.info("complete: %s samples, manifest %s", f"{manifest.count:,}", manifest.hash[:12])


def _plan_options(task: Task, source: EncodedSource) -> dict[str, Any]:
    return {
        "header": source.header,
        "seed": source.manifest.seed,
        "shard_bytes": task.shard_bytes,
        "class_names": tuple(source.manifest.plain.get("class_names", ())),
        "notes": source.notes,
        "shuffle": False,
    }
