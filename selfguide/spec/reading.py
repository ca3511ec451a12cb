"""How shards are read, and by whose credentials: the laws of these fields, and which of them change a run's result."""

from __future__ import annotations

import math
from typing import Any

from selfguide.spec.config import Config, DataConfig
from shards.errors import UserError

_SECRET = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def validate_reading(config: Config) -> None:
    """Returns when data can be read as asked; touches no file.

    Raises:
        UserError: the first law that does not hold, with its cure.
    """
    data = config.data
    _mixture(config)
    for name in _SECRET:
        if name in config.cluster.environment:
            raise UserError(
                f"cluster.environment.{name} would be written into the run's folder, where others read it; export "
                f"{name} in the shell that submits, from which jobs inherit it, or keep a profile in ~/.aws"
            )
    for field, least in (("threads", 1), ("decoders", 0), ("cache_bytes", 1)):
        if getattr(data, field) < least:
            raise UserError(
                f"data.{field}={getattr(data, field)} is too small; take {least} or more"
            )
    if not (math.isfinite(data.damaged) and 0 <= data.damaged <= 1):
        raise UserError(
            f"data.damaged={data.damaged} is a share of all samples: take a number in [0.0, 1.0]"
        )
    if data.on_damage == "fail" and data.damaged != DataConfig.damaged:
        raise UserError(
            f"data.damaged={data.damaged} is read with data.on_damage=substitute only; drop it or take that"
        )
    if data.cache is None and data.cache_bytes != DataConfig.cache_bytes:
        raise UserError(
            f"data.cache_bytes={data.cache_bytes} is read with data.cache=FOLDER only; drop it or name a folder"
        )
    if data.cache is not None and not data.cache.strip():
        raise UserError("data.cache is empty: give data.cache=FOLDER on a disk of each node")


def _mixture(config: Config) -> None:
    """Rows of a sidecar, and a score's reference, are of one data set."""
    data = config.data
    if not data.mix and not data.weights:
        return
    if len(data.weights) != len(data.mix) + 1 or not data.mix:
        raise UserError(
            f"data.weights={list(data.weights)} with data.mix={list(data.mix)}: give a weight to data.root and one to "
            "each of data.mix"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in data.weights):
        raise UserError(f"data.weights={list(data.weights)} must be positive numbers")
    if config.guidance.source == "sidecar":
        raise UserError(
            f"data.mix={list(data.mix)} with guidance.source=sidecar: the rows of a sidecar are one data set's; leave "
            "data.mix out, or take guidance=online"
        )
    if config.evaluation.protocol != "none":
        raise UserError(
            f"data.mix={list(data.mix)} with evaluation.protocol={config.evaluation.protocol}: a score compares with "
            "one data set; set evaluation=none"
        )


def reading_identity(data: DataConfig) -> dict[str, Any]:
    """What of it a run is named after. How much may be damaged decides when a run ends, not what it learns."""
    return {} if data.on_damage == "fail" else {"on_damage": data.on_damage}
