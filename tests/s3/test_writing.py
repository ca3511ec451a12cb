"""Writing to a real S3 store: worker processes, ranks and a kill leave the objects that one local writer leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from shards import storage
from shards.verify import verify
from tests.s3.proxy import Proxy
from tests.shards import inputs


def _command(images: Path, out: str, *more: str) -> list[str]:
    command = [sys.executable, "-m", "tools.shards", "make", "folder", str(images), "--out", out]
    return [*command, "--size", "16", "--shard-mb", "0.15", "--json", *more]


def _told(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_workers_a_kill_and_a_second_rank_leave_what_a_local_writer_leaves(
    root: str, tmp_path: Path, proxy: Proxy
) -> None:
    images = inputs.image_folder(tmp_path / "in", inputs.pixels(2000, 16))
    assert _told(_command(images, str(tmp_path / "out")))["shards"] == 8
    # it comes no further before it is killed
    proxy.fail("unavailable", times=float("inf"), method="PUT", path="train-00004")
    making = subprocess.Popen(_command(images, root), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while sum(name.endswith(".json") for name in storage.list(f"{root}/shards")) < 2:
            assert making.poll() is None and time.monotonic() < deadline
    finally:
        making.kill()
        making.wait()
    proxy.heal()
    assert not storage.exists(f"{root}/LATEST")
    told = _told(_command(images, root, "--workers", "2", "--rank", "1", "--world", "2"))
    assert told["written"] and 0 < told["shards_built"] <= 6
    places = [p for p in sorted((tmp_path / "out").rglob("*")) if p.is_file()]
    for path in places:
        name = path.relative_to(tmp_path / "out").as_posix()
        assert storage.read_bytes(f"{root}/{name}") == path.read_bytes(), name
    assert verify(root).problems == ()
    assert _told(_command(images, root))["written"] is False
