"""Finds the data set that a place holds, or its finished shards, and publishes new ones beside other writers.

A shard is its tar and its record, which is published after it. Writers, of the same data set or of another one, take
names only while they are free, so that the first of two stays intact; there are no locks, and nobody waits. No data
set is ever overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, repeat
from pathlib import Path
from typing import Any, NamedTuple

from shards import parallel, storage
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.write.building import build_block, build_shard, join_shard
from shards.write.plan import Plan

_ASKING = 16  # questions to a store at once


def find_existing(root: storage.Url) -> Manifest | None:
    """The manifest of the data set at `root`, or None.

    Raises:
        UserError: `root` is a file.
    """
    if not storage.is_remote(root) and Path(root).is_file():
        raise UserError(f"{root} is a file: name a folder to write the shards to")
    if not storage.exists(storage.join(root, manifests.LATEST)):
        return None
    return manifests.load(root)


def other_data_set(root: storage.Url, found: Manifest) -> UserError:
    """The refusal to write over a data set."""
    return UserError(
        f"{root} holds another data set ({found.source['name']}, {found.count:,} samples, "
        f"manifest {found.hash[:12]}): choose another folder, or delete it first"
    )


def committed(
    root: storage.Url, plan: Plan, known: frozenset[int] = frozenset()
) -> dict[int, dict[str, Any]]:
    """The sidecars of finished shards, those `known` left out, by shard.

    Raises:
        UserError: there is a shard of another data set.
    """
    numbers = {_record(plan.tar(k)): k for k in range(plan.shards)}
    listed = [f"shards/{name}" for name in storage.list(storage.join(root, "shards"))]
    names = [n for n in listed if n.endswith(".json") and numbers.get(n) not in known]
    for name in names:
        if name not in numbers and manifests.read_record(storage.join(root, name)) is not None:
            raise _unfinished_other(root, name)
    own = [numbers[name] for name in names if name in numbers]
    with ThreadPoolExecutor(_ASKING) as pool:  # a store answers many as fast as one
        found = zip(own, pool.map(partial(_finished, root, plan), own), strict=True)
        return {k: sidecar for k, sidecar in found if sidecar is not None}


def _finished(root: storage.Url, plan: Plan, k: int) -> dict[str, Any] | None:
    """The sidecar of shard `k`, where its tar is there as well.

    Raises:
        UserError: there is a shard of another data set.
    """
    tar = plan.tar(k)
    found = manifests.read_record(storage.join(root, _record(tar)))
    if found is None:
        return None
    if found.get("plan") != plan.hash:
        raise _unfinished_other(root, _record(tar))
    return found if has_size(storage.join(root, tar), found["bytes"]) else None


def _unfinished_other(root: storage.Url, record: str) -> UserError:
    return UserError(
        f"{root} holds shards of another data set ({record}), begun but not finished: choose another folder, "
        "or delete it first"
    )


def _record(tar: str) -> str:
    return tar.removesuffix(".tar") + ".json"


def has_size(url: str, expected: int) -> bool:
    """Whether a tar exists with the expected size."""
    try:
        return storage.size(url) == expected
    except FileNotFoundError:
        return False


class _Left(NamedTuple):
    """Whether a tar and a record were there when building began: of what was killed, and ours to replace."""

    tar: bool
    record: bool


def commit(root: storage.Url, plan: Plan, k: int) -> bool:
    """Builds and publishes shard `k`, its sidecar last, unless another process did; whether it was built.

    On other hardware the same shard may come to other bytes, and a tar must not get another's sidecar. So a name
    that was free when building began is taken only while it is; who comes second leaves both to who came first.
    """
    left = _begin(root, plan, k)
    return left is not None and _publish(root, plan, k, left, *build_shard(plan, k))


def commit_by_blocks(
    root: storage.Url, plan: Plan, todo: Sequence[int], workers: int
) -> Iterator[bool]:
    """`commit` of each shard, whose blocks are shared out over worker processes; here they are joined."""
    begun: dict[int, _Left] = {}

    def blocks() -> Iterator[int]:
        for k in todo:
            left = _begin(root, plan, k)
            if left is not None:
                begun[k] = left
                yield from plan.blocks(k)

    built = parallel.spread(partial(build_block, plan), blocks(), workers)
    for k, some in groupby(built, lambda block: block.number // plan.shard_blocks):
        yield _publish(root, plan, k, begun[k], *join_shard(plan, k, some))
    yield from repeat(False, len(todo) - len(begun))


def _begin(root: storage.Url, plan: Plan, k: int) -> _Left | None:
    """What is there of a shard before it is built; None where it is finished."""
    if _finished(root, plan, k) is not None:
        return None
    tar = plan.tar(k)
    return _Left(*(storage.exists(storage.join(root, name)) for name in (tar, _record(tar))))


def _publish(
    root: storage.Url, plan: Plan, k: int, left: _Left, data: bytes, sidecar: dict[str, Any]
) -> bool:
    if _finished(root, plan, k) is not None:
        return False
    url, record = (storage.join(root, name) for name in (plan.tar(k), _record(plan.tar(k))))
    built = True
    try:
        storage.publish(url, data, replace=left.tar)
        storage.publish(record, manifests.seal(sidecar), replace=left.record)
    except FileExistsError:
        built = False
    if left.record or not built:
        _check_pair(root, plan, k)
    return built


def _check_pair(root: storage.Url, plan: Plan, k: int) -> None:
    url = storage.join(root, plan.tar(k))
    found = manifests.read_record(_record(url))
    if found is not None and found["sha256"] != storage.sha256(url):
        raise DamagedError(
            f"{url} is not what its .json says: two processes built it at once, to other bytes, as other "
            "hardware may; delete both files, and run the same command again"
        )
