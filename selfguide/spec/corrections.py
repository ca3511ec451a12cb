"""Choices that were corrected: earlier runs and snapshots keep what the choice meant then, and say so.

A correction is a field that came later (`laws.Neutral`), so an old config holds its neutral value whether the file
names it or not; or, of a sampler, which is no part of a run's identity, another value than before. What tells a config
of the choice from others is what the choice has always set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from selfguide.spec.config import Config
from selfguide.spec.config.laws import Neutral, as_typed, fields_of
from selfguide.spec.sizes import CORRECTED, architecture


@dataclass(frozen=True)
class Correction:
    """`group=name`, the fields by which a config of it is known, and those that it sets since.

    `was` has what fields without a neutral value were before.
    """

    group: str
    name: str
    known_by: Mapping[str, Any]
    now: Mapping[str, Any]
    was: Mapping[str, Any] = field(default_factory=dict)


CORRECTIONS: tuple[Correction, ...] = (
    *(Correction("model", name, {"name": name}, now) for name, now in CORRECTED.items()),
    Correction("path", "vp", {"name": "vp"}, {"last": 1e-4}),
    Correction(
        "path",
        "edm2",
        {"name": "edm", "weighting": "uncertainty"},
        {"uncertainty": "normalised"},
    ),
    Correction(
        "sampler",
        "lightning",
        {"name": "euler", "shift": 1 / 0.3, "guided_channels": 3},
        {"steps": 249},
        {"steps": 250},
    ),
    Correction(
        "sampler",
        "dopri5_sit",
        {"name": "dopri5", "rtol": 1e-3, "atol": 1e-6},
        {"guided_channels": 3},
        {"guided_channels": None},
    ),
    Correction(
        "guidance",
        "sgfm_code",
        {
            "source": "online",
            "view": "training",
            "codes_over": "all",
            "mean_over": "all",
            "extraction_noise": "training",
            "teacher_buffers": "frozen",
            "condition_rows": "averaged",
        },
        {
            "id_rows": "averaged",
            "prototype_gradient": "plain",
            "teacher_rate": 1e-4,
            "snapshot_buffers": "teacher",
            "token_std": 1.0,
            "head_std": 0.02,
            "official_tokens": "fresh",
            "query_noise": "own",
        },
    ),
)


def kept_from_before(config: Config) -> Iterator[str]:
    """A sentence for each corrected choice of which `config` keeps an earlier value that changes something here."""
    for each in CORRECTIONS:
        group = getattr(config, each.group)
        if any(getattr(group, name, None) != value for name, value in each.known_by.items()):
            continue
        neutral = {f.name: law.value for f in fields_of(type(group)) if (law := f.law(Neutral))}
        before = {name: value for name, value in neutral.items() if name in each.now}
        before |= each.was
        kept = {name: value for name, value in before.items() if getattr(group, name) == value}
        if each.group == "model" and kept:
            kept = {name: value for name, value in kept.items() if name not in _idle(config)}
        if kept:
            yield (
                f"{each.group}={each.name} was corrected since: this keeps {_typed(each.group, kept)}, as before; "
                f"a new run has {_typed(each.group, {name: each.now[name] for name in kept})}"
            )


def _idle(config: Config) -> set[str]:
    """Corrected fields of the model that change nothing in this config."""
    net, idle = architecture(config), set()
    if config.path.name != "ddpm":  # no other path has a table of steps
        idle.add("whole_index")
    if not getattr(net, "qk_norm", False):
        idle.add("qk_bias")
    if not getattr(net, "condition_width", 0):
        idle.add("label_bias")
    return idle


def _typed(group: str, values: Mapping[str, Any]) -> str:
    return ", ".join(f"{group}.{name}={_value(value)}" for name, value in values.items())


def _value(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return as_typed(value)
