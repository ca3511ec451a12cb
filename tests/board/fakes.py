"""Run folders as the trainer and its evaluation jobs leave them, written with their own functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from selfguide.spec import recipe
from selfguide.spec.identity import digest
from selfguide.spec.others import OtherRecord, measured
from selfguide.spec.records import Protocol, grid_path, record_path, records
from selfguide.spec.run import RunFolder, image_folder, write_record
from shards import storage

PROTOCOL = Protocol(
    metric="fd_digits",
    version=1,
    feature_sha256="5f" * 32,
    resize="none",
    quantisation="uint8",
    reference="9a" * 6,
    samples=5000,
    labels="empirical",
    seed=0,
    sampler="euler",
    steps=50,
    tolerance=None,
    batch=None,
    g=1.0,
    interval=(0.0, 1.0),
    ema=20_000,
    dtype="fp32",
)
CLOCK = 1_790_000_000.0  # a fixed now


def identity(experiment: str, seed: int, **train: Any) -> dict[str, Any]:
    source = {"digits_class": "labels", "digits_uncond": "none"}.get(experiment, "online")
    return {
        "experiment": experiment,
        "data": {"manifest": "c0ffee", "mode": "window"},
        "model": {"name": "dit_digits", "depth": 4},
        "guidance": {"source": source},
        "train": {"batch": 128, "learning_rate": 1e-3, **train},
        "seed": seed,
    }


def make_run(
    root: Path,
    experiment: str = "digits_dit",
    seed: int = 0,
    *,
    id: str = "",
    images: int = 256_000,
    **train: Any,
) -> RunFolder:
    """A run that was submitted and has not begun."""
    said = identity(experiment, seed, images=images, **train)
    run = RunFolder(root / experiment / (id or digest(said)))
    described = {"id": run.root.name, "name": None, "experiment": experiment, "hash": digest(said)}
    write_record(
        run.run_json,
        {**described, "identity": said, "images": images, "created": CLOCK, "time": CLOCK},
    )
    return run


def add_progress(run: RunFolder, images: int, losses: Iterable[tuple[int, float]] = ()) -> int:
    """A new attempt that has come to `images`; its number."""
    number = run.open_attempt()
    said = {
        "images": images,
        "of": 256_000,
        "images_per_s": 1500.0,
        "loss": 0.2,
        "time": CLOCK + images / 1500,
    }
    write_record(run.attempt(number) / "progress.json", said, replace=True)
    run.metrics.mkdir(exist_ok=True)
    lines = [
        json.dumps({"images": at, "loss": loss, "images_per_s": 1500.0}) + "\n"
        for at, loss in losses
    ]
    (run.metrics / f"train-{number}.jsonl").write_text("".join(lines))
    return number


def add_snapshot(run: RunFolder, images: int) -> None:
    folder = run.snapshot(images)
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"weights")
    storage.publish_folder(str(folder), extra={"images": images})


def add_record(
    run: RunFolder,
    images: int,
    scores: Mapping[str, float],
    *,
    attempt: int = 1,
    grid: Image.Image | None = None,
    protocol: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """A finished evaluation; `protocol` changes fields of PROTOCOL."""
    under = replace(PROTOCOL, **(protocol or {}))
    said = json.loads(run.run_json.read_text())
    key = f"{image_folder(images)}-{under.key[:8]}"
    started = CLOCK + images / 1500
    record = {
        "time": started + 41,
        "schema": 1,
        "status": "done",
        "run": said["id"],
        "experiment": said["experiment"],
        "seed": said["identity"]["seed"],
        "images": images,
        "final": images == said["images"],
        "key": key,
        "attempt": attempt,
        "protocol": asdict(under),
        "protocol_key": under.key,
        "scores": {
            "floor": 0.5,
            "copy_rate": 0.01,
            "copy_rate_real": 0.011,
            "classes": 10,
            **scores,
        },
        "nfe": 50,
        "label_free": said["identity"]["guidance"]["source"] != "labels",
        "started": started,
        "ended": started + 41,
        "host": "node1",
        "pid": 4711,
        "seconds": 41.0,
        "snapshot_sha256": digest([said["id"], images], 64),
    }
    write_record(record_path(run, key, attempt), {**record, **more})
    if grid is not None:
        grid.save(grid_path(run, key, attempt))


def add_failure(
    run: RunFolder, images: int, message: str, *, attempt: int = 1, log: str = ""
) -> None:
    """An evaluation that was given up by the watcher, which knows no protocol."""
    key = f"{image_folder(images)}-{PROTOCOL.key[:8]}"
    said = {"time": CLOCK, "schema": 1, "status": "failed", "images": images, "key": key}
    write_record(
        record_path(run, key, attempt), {**said, "attempt": attempt, "message": message, "log": log}
    )


def finished_run(root: Path, experiment: str, seed: int, fd: float, **more: Any) -> RunFolder:
    """A run at its end: two snapshots, both scored, the final one at `fd`."""
    run = make_run(root, experiment, seed, **more)
    losses = [(n, 1.0 / (1 + n / 30_000)) for n in range(1280, 256_001, 1280)]
    add_progress(run, 256_000, losses)
    for images, score in ((128_000, 2 * fd), (256_000, fd)):
        add_snapshot(run, images)
        add_record(run, images, {"fd_digits": score, "fd_digits_se": 0.1, "confident": 0.9})
    return run


def swept_run(root: Path, experiment: str, seed: int, fd: float) -> RunFolder:
    """A finished run with a sweep of its final snapshot over steps and guidance, and the recipe that follows."""
    run = finished_run(root, experiment, seed, fd)
    for steps, g, score in ((50, 1.5, fd - 2), (10, 1.0, fd + 2), (10, 1.5, fd - 1)):
        scores = {"fd_digits": score, "fd_digits_se": 0.1}
        under = {"steps": steps, "g": g}
        add_record(run, 256_000, scores, protocol=under, nfe=steps, sweep="5weep000")
    recipe.keep(run, records(run))
    return run


def add_other(
    runs: Path,
    name: str,
    score: float | None,
    *,
    se: float | None = None,
    protocol: dict[str, Any] | None = None,
    scores: dict[str, float] | None = None,
    **more: Any,
) -> Path:
    """Somebody's samples, scored as those of `fakes` are; `protocol` changes fields."""
    found = {"fd_digits": score, "fd_digits_se": se, **(scores or {})}
    record = OtherRecord(
        name=name,
        protocol=measured(asdict(PROTOCOL) | (protocol or {})),
        scores={key: value for key, value in found.items() if value is not None},
        **({"when": CLOCK, "host": "node2", "samples": "theirs.npz", "stamp": "5a"} | more),
    )
    return record.publish(runs)
