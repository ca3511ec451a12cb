"""Many runs as a year on a cluster leaves them, to measure commands on: `python tests/launcher/many_runs.py DIR`.

Half of the runs have finished; of ten others five failed, three run and two are queued. Each has 40 snapshots and
scores (as many as it got to), three attempts of 32 ranks with their records, and two checkpoints. A squeue that knows
the jobs of those that work lies in DIR/bin.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher.compose import compose
from selfguide.spec.config import Config
from selfguide.spec.files import plain, to_yaml
from selfguide.spec.identity import digest, identity
from selfguide.spec.records import EvaluationRecord, Protocol, record_key
from selfguide.spec.run import RunFolder

STATES = (*["finished"] * 10, *["failed"] * 5, *["running"] * 3, *["queued"] * 2)
MANIFEST = "0" * 64
# when all of it last changed, in seconds since 1970
LONG_AGO = 1.7e9


def build(
    root: Path, count: int, *, snapshots: int = 40, ranks: int = 32, attempts: int = 3
) -> Path:
    """Writes so many runs into `root`/runs and a squeue into `root`/bin; returns the runs folder."""
    config = compose(["experiment=in1k_dit", "nodes=4", "cluster=slurm", "evaluation=fd_digits"])
    train = replace(config.train, snapshot_every=config.train.images // snapshots)
    queue: list[str] = []
    for number in range(count):
        one = replace(config, seed=number, train=train, runs=str(root / "runs"))
        _Writer(one, root / "runs", queue, ranks, attempts).run(STATES[number % len(STATES)])
    (root / "bin").mkdir(exist_ok=True)
    (root / "queue.txt").write_text("\n".join(queue) + "\n")
    squeue = root / "bin" / "squeue"
    squeue.write_text(
        '#!/bin/sh\ncase "$*" in *--states=all*) ;;\n'
        "*--states=PENDING*) sed -n 's/|PENDING.*/|Priority|2030-01-01T10:00:00/p' "
        f"{root}/queue.txt ;;\n*) cat {root}/queue.txt ;; esac\n"
    )
    squeue.chmod(0o755)
    for folder, _, names in os.walk(root / "runs"):
        for path in (folder, *(f"{folder}/{name}" for name in names)):
            os.utime(path, (LONG_AGO, LONG_AGO))
    return root / "runs"


class _Writer:
    """One run."""

    def __init__(
        self, config: Config, runs: Path, queue: list[str], ranks: int, attempts: int
    ) -> None:
        self.config, self.queue, self.ranks, self.attempts = config, queue, ranks, attempts
        self.text, self.plain = to_yaml(config), plain(config)
        self.identity = identity(config, MANIFEST)
        self.folder = RunFolder(runs / config.experiment / digest(self.identity))
        self.every, self.images = config.train.snapshot_every, config.train.images

    def run(self, state: str) -> None:
        id = self.folder.root.name
        about = {"id": id, "name": None, "experiment": self.config.experiment, "hash": id}
        about |= {"identity": self.identity, "images": self.images, "created": time.time()}
        _write(self.folder.run_json, about)
        share = {"finished": 1.0, "failed": 0.6, "running": 0.5, "queued": 0.3}[state]
        reached = int(self.images * share) // self.every * self.every
        for number in range(1, self.attempts + 1):
            self.attempt(number, state if number == self.attempts else "failed", reached)
        for images in range(self.every, reached + 1, self.every):
            self.snapshot(images)
        for images in range(max(self.every, reached - self.every), reached + 1, self.every):
            parts = {f"rank-{rank:05d}.safetensors": 100 for rank in range(self.ranks)}
            _publish(self.folder.checkpoint(images), parts, {"images": images})

    def attempt(self, number: int, state: str, reached: int) -> None:
        at = self.folder.attempt(number)
        _write(at / "submission.json", {"kind": "slurm", "nodes": 4, "tasks": 8, "world": 32})
        (at / "config.yaml").write_text(self.text)
        for name, job in (("job", "train"), ("successor", "train"), ("watcher", "watch")):
            self.job(at / f"{name}.json", job, state if name != "successor" else "")
        if state == "queued":
            return
        progress = {"section": "train", "images": reached, "of": self.images, "loss": 0.2}
        progress |= {"images_per_s": 900.0, "eta_s": 60_000.0, "resumed_from": 0, "save_s": 9.0}
        _write(at / "progress.json", progress)
        code = {"finished": 0, "failed": 1}.get(state)
        for rank in range(self.ranks):
            _write(at / f"start-{rank}.json", {"host": "n1"})
            _write(at / f"heartbeat-{rank}.json", {"section": "train", "images": reached})
            if code is not None:
                kind = "error" if code else "ok"
                ended = {"code": code, "class": kind, "message": "RuntimeError: an end"}
                _write(at / f"exit-{rank}.json", ended | {"images": reached, "section": "train"})
        if code:
            _write(at / "ended-job.json", {"state": "FAILED", "signals": {}})

    def snapshot(self, images: int) -> None:
        groups = getattr(self.config.guidance, "groups", 1000)
        guidance = {"source": "online", "level": "image", "p": [1 / groups + 1e-9] * groups}
        extra: dict[str, Any] = {"images": images, "guidance": guidance}
        extra |= {"data": {"manifest": MANIFEST, "root": "s3://bucket/in1k"}}
        parts = {"config.yaml": 3000, "ema-20000.safetensors": 5000}
        _publish(self.folder.snapshot(images), parts, extra)
        protocol = Protocol.of(self.config, extra)
        key = record_key(images, protocol)
        score = 5.0 + abs(images / self.images - 0.8) * 20
        about = EvaluationRecord(
            status="done", key=key, attempt=1, images=images, protocol=asdict(protocol),
            protocol_key=protocol.key, scores={protocol.metric: score, "fd_digits_se": 0.1},
        )  # fmt: skip
        _write(self.folder.evals / f"{key}.1.json", about.plain())
        (self.folder.evals / f"{key}.1.png").write_bytes(b"x" * 100)
        folder = self.folder.evals / "jobs" / f"{key}.1"
        _write(folder / "request.json", {"key": key, "config": self.plain})
        self.job(folder / "job.json", "eval", "")
        _write(folder / "exit-0.json", {"code": 0, "class": "ok", "message": ""})

    def job(self, path: Path, what: str, state: str) -> None:
        id = str(1000 + len(self.queue)) if state in ("running", "queued") else "7"
        name, comment = f"sg-{self.folder.root.name}-{what}", str(self.folder.root)
        word = {"running": "RUNNING", "queued": "PENDING"}.get(state)
        if word:
            self.queue.append(f"{id}|{word}|{name}|{comment}")
        record = {"id": id, "kind": "slurm", "conf": None, "name": name, "comment": comment}
        record |= {"folder": str(path.parent / "job"), "nodes": 4, "tasks": 8, "submitted": 1.0}
        _write(path, record)


def _publish(folder: Path, parts: dict[str, int], extra: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name, size in parts.items():
        (folder / name).write_bytes(b"x" * size)
    files = [{"name": n, "bytes": size, "sha256": MANIFEST} for n, size in parts.items()]
    _write(folder / "MANIFEST.json", {"files": files, **extra})


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"time": time.time(), **record}, indent=1))


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 200)
