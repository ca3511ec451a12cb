"""Run folders as a group of people leaves them, to measure the board on: scored snapshots, metrics, attempts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.compose import compose
from selfguide.spec.config import Config
from selfguide.spec.files import to_yaml
from selfguide.spec.identity import digest, identity
from selfguide.spec.records import EvaluationRecord, Protocol, record_key, record_path
from selfguide.spec.run import RunFolder
from shards import storage

EXPERIMENTS = ("digits_dit", "digits_class", "digits_uncond", "digits_uvit")
# runs of one setting, which make one row
SEEDS = 5
SNAPSHOTS, LINES = 10, 200
# seconds since 1970 at which all of it last changed
LONG_AGO = 1.75e9
_MANIFEST = "c" * 64


def make(root: Path, count: int) -> None:
    """Writes `count` finished runs below `root`, each with ten scored snapshots and 200 lines of metrics."""
    for number in range(count):
        setting, seed = divmod(number, SEEDS)
        words = [f"experiment={EXPERIMENTS[setting % len(EXPERIMENTS)]}", f"seed={seed}"]
        base = _composed(tuple(words))
        rate = 1e-4 * (1 + setting // len(EXPERIMENTS))
        _write(root, replace(base, train=replace(base.train, learning_rate=rate)), number)
    for folder, _, names in os.walk(root):
        for path in (folder, *(f"{folder}/{name}" for name in names)):
            os.utime(path, (LONG_AGO, LONG_AGO))


_known: dict[tuple[str, ...], Config] = {}


def _composed(words: tuple[str, ...]) -> Config:
    if words not in _known:
        _known[words] = compose([*words, "evaluation=fd_digits"])
    return _known[words]


def _write(root: Path, config: Config, number: int) -> None:
    said = json.loads(json.dumps(identity(config, _MANIFEST), default=str))
    run = RunFolder(root / config.experiment / digest(said))
    about = {
        "id": run.root.name,
        "name": None,
        "experiment": config.experiment,
        "hash": digest(said),
    }
    images = config.train.images
    _write_json(run.run_json, about | {"identity": said, "images": images, "created": LONG_AGO})
    _write_attempt(run, config, images)
    every = images // SNAPSHOTS
    for part in range(1, SNAPSHOTS + 1):
        _write_snapshot(run, config, part * every if part < SNAPSHOTS else images, number)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes without waiting for the disk, which tens of thousands of records would do for minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def _write_attempt(run: RunFolder, config: Config, images: int) -> None:
    at = run.attempt(run.open_attempt())
    (at / "config.yaml").write_text(to_yaml(config))
    asked = {"kind": "local", "nodes": 1, "tasks": 1, "world": 1, "spent_s": 0.0}
    ended = {"code": 0, "class": "ok", "message": "", "images": images, "section": "train"}
    files: Mapping[str, dict[str, Any]] = {
        "submission": asked,
        "job": {
            "kind": "local",
            "id": "1",
            "pid": 1,
            "start": 1,
            "nodes": 1,
            "tasks": 1,
            "boot": "-",
            "host": "n1",
            "folder": "-",
        },
        "code": {"hash": "c0ffee", "revision": "0" * 40, "dirty": False},
        "start-0": {"node": "n1"},
        "exit-0": ended,
        "progress": {"section": "train", "images": images, "of": images, "resumed_from": 0},
    }
    for name, values in files.items():
        _write_json(at / f"{name}.json", {"time": LONG_AGO, **values})
    run.metrics.mkdir()
    every = images // LINES
    with (run.metrics / "train-0001.jsonl").open("w") as file:
        for line in range(1, LINES + 1):
            loss = 0.2 + math.exp(-line / 40)
            told_then = {"time": LONG_AGO + line, "images": line * every, "images_per_s": 1500.0}
            file.write(
                json.dumps(told_then | {"loss": loss, "grad_norm": loss, "used": 0.9}) + "\n"
            )


def _write_snapshot(run: RunFolder, config: Config, images: int, number: int) -> None:
    manifest = {"guidance": {"source": config.guidance.source}, "data": {"manifest": _MANIFEST}}
    folder = run.snapshot(images)
    folder.mkdir(parents=True)
    weights = {"name": "ema-20000.safetensors", "bytes": 7, "sha256": digest([number, images], 64)}
    (folder / "ema-20000.safetensors").write_bytes(b"weights")
    _write_json(folder / storage.MANIFEST, {"files": [weights], "images": images, **manifest})
    protocol = Protocol.of(config, manifest)
    key = record_key(images, protocol)
    score = 5.0 + 20.0 * math.exp(-3 * images / config.train.images) + math.sin(number) / 4
    record = EvaluationRecord(
        status="done", key=key, attempt=1, images=images, final=images == config.train.images,
        run=run.root.name, experiment=config.experiment, seed=config.seed, protocol=protocol.plain(),
        protocol_key=protocol.key, snapshot_sha256=digest([number, images], 64), nfe=50.0, seconds=40.0,
        scores={"fd_digits": score, "fd_digits_se": 0.1, "floor": 0.5, "copy_rate": 0.01},
        label_free=config.guidance.source != "labels",
    )  # fmt: skip
    _write_json(record_path(run, key, 1), record.plain())
