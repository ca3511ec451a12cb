"""Evaluation records: a score is a named protocol, not a number.

One immutable JSON file per evaluation attempt, `evals/<key>.<attempt>.json`. The file's key names the snapshot and
what was asked for, so a score is never taken twice; the record's protocol key hashes all that the score depends on
besides the weights, so two protocols never share a column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from selfguide.spec.config import Config
from selfguide.spec.run import RunFolder, digest, image_folder, read_record

VERSION = 1  # of this schema
METRICS = {"fd_digits": 1}  # version of each metric's code; a new one scores every snapshot again


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything a score depends on besides the weights."""

    metric: str  # fd_digits
    version: int  # of the metric's code
    feature_sha256: str
    resize: str
    quantisation: str
    reference: str  # manifest hash of the reference images
    samples: int
    labels: str  # how conditions are drawn: "empirical p(k)", or as it is otherwise
    seed: int
    sampler: str
    steps: int | None  # None for an adaptive sampler, which has the two below instead
    tolerance: tuple[float, float] | None  # rtol, atol
    batch: int | None  # its step control is global to the batch
    g: float
    interval: tuple[float, float]
    ema: int | str  # `AverageSpec.plain`: a half-life in images, or the key of another average
    dtype: str
    settings: dict[str, Any] = field(default_factory=dict)  # `told_apart` of the sampler

    @property
    def key(self) -> str:
        """What a column of scores is headed by; no settings leave no trace, so plain samplers keep their column."""
        said = asdict(self)
        if self.g == 1:  # nothing is guided, wherever
            said["interval"] = (0.0, 1.0)
        if not said["settings"]:
            del said["settings"]
        return digest(said)


def job_key(config: Config, images: int) -> str:
    """Names the evaluation of one snapshot under the configured protocol, before any job has run."""
    wanted: dict[str, Any] = {
        "evaluation": config.evaluation.protocol,
        "samples": config.evaluation.samples,
    }
    wanted["version"] = METRICS.get(config.evaluation.protocol)
    wanted |= {"seed": config.evaluation.seed, "sampler": asdict(config.sampler)}
    if config.evaluation.prior != "empirical":
        wanted["prior"] = config.evaluation.prior
    return f"{image_folder(images)}-{digest(wanted, 8)}"


def record_path(run: RunFolder, key: str, attempt: int) -> Path:
    return run.evals / f"{key}.{attempt}.json"


def grid_path(run: RunFolder, key: str, attempt: int) -> Path:
    """The PNG of sample images that belongs to a record."""
    return run.evals / f"{key}.{attempt}.png"


def records(run: RunFolder) -> Iterator[dict[str, Any]]:
    """Every evaluation record of the run, by name."""
    if run.evals.is_dir():
        for path in sorted(run.evals.glob("img-*.json")):
            record = read_record(path)
            if record is not None:
                yield record
