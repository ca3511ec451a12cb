"""What a run is: the hash of everything that changes its result.

Two laws hold over time. Adding a field renames no run: a field that came later is left out at its neutral value
(`laws.Neutral`), and a field that was renamed keeps its former name and spelling here (`laws.Formerly`). A changed
default merges no two runs: every field is in by its value. tests/guard holds the ids of all shipped experiments.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from selfguide.spec.config import Config
from selfguide.spec.config.laws import identity_of
from selfguide.spec.sizes import architecture


def canonical(value: Any) -> str:
    """The one JSON text of a value; hashes are taken over it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def digest(value: Any, length: int = 12) -> str:
    """The first `length` hex digits of the sha256 of a value's canonical text."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def identity(
    config: Config,
    manifest: str | None,
    weights: str | None = None,
    annotations: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What changes a run's result: data, first weights, model, path, guidance, optimisation, engine numerics, seed.

    `manifest` and `weights` are the hashes of the shards and of what `init` begins from, `annotations` what
    `selfguide.spec.annotations.promises` says of the sidecars.
    """
    guidance, data, init = config.guidance, config.data, config.init
    # the size of windows, where there are any
    crop = {"crop": list(data.shape)} if data.crop else {}
    # a layer is one however it was named
    named = {}
    if config.model.self_condition is not None:
        named["self_condition"] = architecture(config).self_condition
    # what is decayed changes nothing where nothing is
    train = identity_of(config.train)
    if not config.train.weight_decay:
        train.pop("decayed", None)
    # the weights themselves, not where they lie
    begins = {} if init.source == "scratch" else identity_of(init) | {"sha256": weights}
    return {
        "experiment": config.experiment,
        "data": {"manifest": manifest} | identity_of(data) | crop,
        "init": {"source": init.source} | begins,
        "model": identity_of(config.model) | named,
        "path": identity_of(config.path),
        "guidance": identity_of(guidance) | guidance.identity(config, annotations or {}),
        "train": train,
        "engine": identity_of(config.engine),
        "seed": config.seed,
    } | {
        name: identity_of(settings) | settings.identity(config)
        for name, settings in config.components.items()
    }
