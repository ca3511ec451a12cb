"""Sweeps over how one snapshot is sampled: every point is scored by a record of its own, from the same seeds.

One file a sweep in the run's folder, `evals/sweeps/<id>.json`, which holds no state: which points are still to be
scored follows from the records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from selfguide.spec.config import Config, EvaluationConfig, SamplerConfig, build
from selfguide.spec.config.sampler import plain_sampler
from selfguide.spec.identity import digest
from selfguide.spec.run import RunFolder, write_record

SWEEPS = "sweeps"


@dataclass(frozen=True, kw_only=True)
class ScoreSweep:
    """Points at which one snapshot is to be scored."""

    # of the snapshot
    images: int
    # of each point all settings of `sampler` and `evaluation`, as JSON
    points: tuple[Mapping[str, Any], ...]
    # jobs at once at most; None: as the run's own evaluations on one machine, all of them on a cluster
    in_flight: int | None = None
    # samples for which the chosen point is scored once more, from other seeds; None: it is not
    confirm: int | None = None

    @property
    def id(self) -> str:
        """The same for the same points, however many may run at once."""
        return digest({**self.plain(), "in_flight": None}, 8)

    @staticmethod
    def of(values: Mapping[str, Any]) -> ScoreSweep:
        """From JSON.

        Raises:
            KeyError, TypeError: it is no sweep.
        """
        return ScoreSweep(
            images=int(values["images"]),
            points=tuple(values["points"]),
            in_flight=values.get("in_flight"),
            confirm=values.get("confirm"),
        )

    @staticmethod
    def at(
        images: int,
        configs: Sequence[Config],
        *,
        in_flight: int | None = None,
        confirm: int | None = None,
    ) -> ScoreSweep:
        """Of these configs of one run, which may differ in `sampler` and `evaluation`."""
        points = tuple(
            {"sampler": plain_sampler(config.sampler), "evaluation": asdict(config.evaluation)}
            for config in configs
        )
        return ScoreSweep(images=images, points=points, in_flight=in_flight, confirm=confirm)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def publish(self, run: RunFolder) -> Path:
        """Writes the sweep beside the run's records; again where it is there."""
        path = sweeps_folder(run) / f"{self.id}.json"
        write_record(path, self.plain(), replace=True)
        return path

    def configs(self, config: Config) -> Iterator[Config]:
        """The config of each point; `config` is the run's.

        Raises:
            UserError: another version wrote it, with other fields.
        """
        for point in self.points:
            yield replace(
                config,
                sampler=build(SamplerConfig, dict(point["sampler"]), "sampler"),
                evaluation=build(EvaluationConfig, dict(point["evaluation"]), "evaluation"),
                more_evaluations=(),
            )


def sweeps_folder(run: RunFolder) -> Path:
    """Where a run's sweeps are."""
    return run.evals / SWEEPS
