"""Blocks from a real S3 store: ours, with ETag and xxh3, against plain requests for the same ranges."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shards import storage, transfer
from shards.errors import DamagedError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.read.block_bytes import ByteRange
from shards.read.reader import Reader
from tools.bench.harness import Row, Variant, measure
from tools.bench.shards_data import Figure, Latents, Say, our_epoch
from tools.s3 import server as servers

STREAMS = 8  # ranges asked for at once


def storing(
    latents: Latents, root: Path, folder: Path, turns: int, goal: float, say: Say
) -> list[Figure]:
    """Copies the shards at `root` to a store of their own, reads them there, and takes it down."""
    with _store(folder / "s3", say) as bucket:
        remote = f"s3://{bucket}/latents"
        transfer.copy(root, remote)
        manifest = manifests.load(remote)
        order = np.random.default_rng(0).permutation(manifest.block_count).tolist()
        spans = _spans(remote, manifest, order)
        size = sum(part.stop - part.start for part in spans)
        client = _client()

        def plain(part: ByteRange) -> int:
            asked = {"Range": f"bytes={part.start}-{part.stop - 1}"}
            key = f"latents/{manifest.shards[part.shard].name}"
            return len(client.get_object(Bucket=bucket, Key=key, **asked)["Body"].read())

        def raw() -> None:
            with ThreadPoolExecutor(STREAMS) as pool:
                total = sum(pool.map(plain, spans))
            if total != size:
                raise RuntimeError(f"plain requests gave {total:,} bytes")

        def ours() -> None:
            reader = Reader(remote, manifest)  # a new one has hashed nothing and knows no ETag
            with ThreadPoolExecutor(STREAMS) as pool:
                for found in pool.map(lambda b: reader.blocks.read([b]), order):
                    for value in found.values():
                        if isinstance(value, DamagedError):
                            raise value
            reader.close()

        def stream() -> None:
            latents.check(our_epoch(remote, len(latents.x), threads=STREAMS), "the stream from S3")

        variants = [Variant("raw", raw), Variant("ours", ours), Variant("stream", stream)]
        rows = {r.name: r for r in measure(variants, repeats=turns, warmup=1)}
    blocks = f"blocks at random from S3 over plain GETs, {STREAMS} at once"
    whole = f"the whole stream from S3 over the same, {STREAMS} threads"
    return [
        _speed(blocks, size / 1e6, rows["raw"], rows["ours"]).judged(goal),
        _speed(whole, size / 1e6, rows["raw"], rows["stream"]),
    ]


def _spans(remote: str, manifest: Manifest, order: list[int]) -> list[ByteRange]:
    """What our reader asks for, block by block."""
    reader = Reader(remote, manifest)
    reader.close()
    return [part for block in order for part in reader.blocks.ranges(block)]


def _speed(name: str, size: float, raw: Row, ours: Row) -> Figure:
    return Figure(
        name=name,
        unit="MB/s",
        ours=size / ours.median,
        other=size / raw.median,
        ratio=1 / ours.ratio,
    )


def _client() -> Any:
    import botocore.session
    from botocore.config import Config

    return botocore.session.Session().create_client(
        "s3", config=Config(max_pool_connections=4 * STREAMS)
    )


@contextmanager
def _store(state: Path, say: Say) -> Iterator[str]:
    """A store that only this process knows; its bucket. The environment is as before afterwards."""
    server = servers.up(state, say=say)
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    try:
        for name in before:
            del os.environ[name]
        os.environ |= server.environment()
        storage.reconnect()  # the environment says where to connect
        yield server.bucket
    finally:
        for name in server.environment():
            os.environ.pop(name, None)
        os.environ |= before
        storage.reconnect()  # the environment says where to connect
        servers.down(state)
