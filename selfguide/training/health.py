"""Whether an online source finds groups and data comes in time: what is measured at every report, and what to do.

A collapsed bootstrap trains on without a sign in the denoising loss. Its signs are those that users of SwAV (Caron et
al. 2020, arXiv 2006.09882) report: a code loss that stays at ln K, prototypes that nothing is assigned to, one that
takes everything.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.distributed import world_size
from selfguide.guidance.online import OnlineSource, assign
from selfguide.guidance.prototype_counts import LEARNED
from selfguide.networks.student import Batch, Student
from selfguide.spec.config import Config
from selfguide.training.state import State

PROBE = 256  # images of each rank whose groups are asked for again at every report
PATIENCE = 5  # reports in a row that must say the same

Line = Mapping[str, Any]


class Health:
    """Keeps the first images of the attempt: between two reports their groups change by learning alone."""

    def __init__(self) -> None:
        self._probe: Batch | None = None
        self._ids: Tensor | None = None

    def see(self, batch: Batch) -> None:
        if self._probe is None:
            few = {n: getattr(batch, n)[:PROBE].clone() for n in ("x0", "eps", "tau", "x")}
            few |= {n: getattr(batch, n)[:PROBE].clone() for n in ("position", "ordinal")}
            self._probe = replace(batch, **few, label=None, placement=None)

    def measure(self, state: State, config: Config) -> dict[str, float]:
        """For the line of a report; nothing without an online source. All ranks call.

        used        share of prototypes that were nearest to something in the last one to two windows
        perplexity  exp of the entropy of how often each was, as a share of K: 1 is even
        largest     share of the fullest one
        dead        prototypes that Sinkhorn could not reach, a mean over steps
        code_loss   L_SK / ln K without weights: 1 is a head that tells nothing apart
        churn       share of a fixed set of rows that the teacher puts elsewhere than at the last report
        """
        source, teacher = state.source, state.teacher
        if not isinstance(source, OnlineSource) or teacher is None:
            return {}
        groups, learned = source.config.groups, source.usage.report()
        counts = source.usage.totals()[LEARNED].sum(0).double()
        found: dict[str, float] = {"dead": learned.dead}
        if counts.sum() > 0:
            p = counts / counts.sum()
            entropy = -torch.special.xlogy(p, p).sum().item()
            found |= {
                "used": (counts > 0).double().mean().item(),
                "perplexity": math.exp(entropy) / groups,
                "largest": p.max().item(),
                "code_loss": learned.entropy / math.log(groups),
            }
        churn = self._churn(source, teacher.module)
        if churn is not None:
            found["churn"] = churn
        facts = {
            "groups": groups,
            "counted": int(counts.sum()),
            "rows": self._rows(source, config),
            "warm": min(state.images / max(source.switch, 1), 1.0),
        }
        return {name: v for name, v in found.items() if math.isfinite(v)} | facts

    def _rows(self, source: OnlineSource, config: Config) -> int:
        """What Sinkhorn shares out at once, a queue aside."""
        assert self._probe is not None and self._ids is not None
        each = len(self._ids) // len(self._probe.x0)
        low, high = source.config.mask
        partial = source.config.view == "training" and source.config.codes_over == "counted"
        share = high - low if partial else 1.0
        return round(config.micro_batch * world_size() * each * share)

    def _churn(self, source: OnlineSource, teacher: Student) -> float | None:
        assert self._probe is not None
        before = self._ids
        self._ids = assign(teacher, source.extract(self._probe, teacher))
        if before is None:
            return None
        moved = torch.stack(((before != self._ids).sum(), before.new_tensor(len(before)))).cpu()
        if dist.is_initialized():
            dist.all_reduce(moved)
        return (moved[0] / moved[1]).item()


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
        "{churn:.0%} of images change their group from one report to the next while groups are told; lengthen "
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
    return found


class Advisor:
    """Says each advice once in a run, and records it beside the telemetry; rank 0 only."""

    def __init__(self, metrics: Path, attempt: int) -> None:
        self._said = {advice.name for advice in recorded(metrics)}
        self._file = metrics / f"advice-{attempt:04d}.jsonl"
        self._history: list[Line] = []

    def hear(self, line: Line) -> None:
        self._history = [*self._history, line][-PATIENCE:]  # no sign takes more
        for advice in advise(self._history):
            if advice.name not in self._said:
                self._said.add(advice.name)
                print(f"advice at {advice.images:,} images: {advice.text}", flush=True)
                with self._file.open("a") as file:  # one writer a file: the attempt's rank 0
                    file.write(json.dumps({"time": time.time(), **asdict(advice)}) + "\n")


def recorded(metrics: Path) -> list[Advice]:
    """What was said in a run so far, by all attempts."""
    found = []
    for path in sorted(metrics.glob("advice-*.jsonl")):
        for text in path.read_text().splitlines():
            said = json.loads(text)
            found.append(Advice(name=said["name"], images=said["images"], text=said["text"]))
    return found
