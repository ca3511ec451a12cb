"""What the telemetry of a run gives reason to say: pure functions of its lines, for any reader.

A collapsed bootstrap trains on without a sign in the denoising loss. Its signs are those that users of SwAV (Caron et
al. 2020, arXiv 2006.09882) report: a code loss that stays at ln K, prototypes that nothing is assigned to, one that
takes everything.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from selfguide.spec.drift import MEMORY, drifts

PATIENCE = 5  # reports in a row that must say the same
# lines that `advise` can make use of
REMEMBERED = MEMORY

Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One thing that goes wrong, since when, and what to do."""

    name: str
    images: int
    text: str


class Sign(NamedTuple):
    """`holds` of this many reports in a row, then `text`, filled with the last line."""

    holds: Callable[[Line], bool]
    reports: int
    text: str
    of: str = "groups"  # only lines that have this are asked


def _late(line: Line) -> bool:
    """The weight of L_SK has grown to half at least, and each prototype could have been met often."""
    return line["warm"] >= 0.5 and line["counted"] >= 20 * line["groups"]


SIGNS = {
    "few_rows": Sign(
        lambda line: line["groups"] > 4 * line["rows"],
        1,
        "{groups} prototypes share about {rows} rows a step: most get none and codes are mostly noise; raise "
        "train.micro_batch or the number of ranks, lower guidance.groups, or set guidance.queue={queue}",
    ),
    "no_structure": Sign(
        lambda line: _late(line) and line.get("code_loss", 0.0) > 0.98,
        PATIENCE,
        "L_SK is {code_loss:.1%} of ln K: prototypes see no structure; read another guidance.layer (the middle or "
        "later) or guidance.pooling, extract at a lower guidance.noise_time, or lower train.learning_rate",
    ),
    "unused": Sign(
        lambda line: _late(line) and line.get("used", 1.0) < 0.5,
        PATIENCE,
        "only {used:.0%} of {groups} prototypes are in use; lower guidance.groups, give Sinkhorn more iterations or a "
        "smaller guidance.epsilon, or let the others begin anew with guidance.revive=0.01",
    ),
    "one_group": Sign(
        lambda line: _late(line) and line.get("largest", 0.0) > 0.5,
        PATIENCE,
        "one prototype takes {largest:.0%} of everything; raise guidance.iterations, lower guidance.epsilon, or read "
        "another guidance.layer: features that are all alike give one group",
    ),
    "restless": Sign(
        lambda line: line["warm"] == 1 and line.get("churn", 0.0) > 0.3,
        PATIENCE,
        "{churn:.0%} of images change their group from one report to the next while they are conditions; lengthen "
        "train.ema_halflife, lower train.learning_rate, or switch later (guidance.switch)",
    ),
    "data_wait": Sign(
        lambda line: line["data_share"] > 0.1,
        PATIENCE,
        "{data_share:.0%} of the time goes into waiting for data ({data_wait_max:.3f} s a step); where shards are "
        "remote name a folder on each node's disk as data.cache, raise data.threads, and data.decoders where pictures "
        "are decoded",
        of="data_share",
    ),
    "substituted": Sign(
        lambda line: line["substituted"] > 0,
        1,
        "{substituted} images since the last report stood in for damaged ones; `python -m tools.shards verify` names "
        "what is damaged, and metrics count what follows",
        of="substituted",
    ),
}


# of one part of the loss
DRIFT = (
    "the loss {what} rose by {rise:.0%} over the last {reports} reports while the mean moved by {mean:+.1%}, which "
    "hides it (`spectrum` in the metrics); look at the images and conditions of those steps, or lower "
    "train.learning_rate"
)


def advise(history: Sequence[Line]) -> list[Advice]:
    """What the lines of a run's telemetry, oldest first, give reason to say; pure, so that any reader can ask.

    `images` of an advice is the line with which its sign was complete for the first time.
    """
    found = []
    for name, sign in SIGNS.items():
        run = 0
        for line in (each for each in history if sign.of in each):
            run = run + 1 if sign.holds(line) else 0
            if run == sign.reports:
                text = sign.text.format(**line, queue=4 * line.get("groups", 0))
                found.append(Advice(name=name, images=line["images"], text=text))
                break
    if (drift := drifts(history)) is not None:
        text = DRIFT.format(**drift._asdict())
        found.append(Advice(name="drift", images=history[-1]["images"], text=text))
    return found


def recorded(metrics: Path) -> list[Advice]:
    """What was said in a run so far, by all attempts; without lines that a node has torn as it went down."""
    found = []
    for path in sorted(metrics.glob("advice-*.jsonl")):
        for text in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                said = json.loads(text)
                found.append(Advice(name=said["name"], images=said["images"], text=said["text"]))
    return found
