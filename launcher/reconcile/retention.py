"""Which published snapshots stay, and why: the newest, those after each so many images, and all that is still of use.

Pure, as all that decides. What lets a snapshot go is `train.keep_snapshots`; without it all of them stay. `prune`
deletes, and looks at the other runs first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from launcher.reconcile.evaluations import at_work, unscorable, unscored, unscored_points
from launcher.reconcile.view import RunView
from selfguide.spec import recipe
from selfguide.spec.config import Config, TrainConfig
from selfguide.spec.metrics import METRICS
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.weak import weak_models

# images of a snapshot, and why it stays
Reason = tuple[int, str]


def expendable(view: RunView) -> tuple[int, ...]:
    """Returns the images of snapshots that nothing in the run keeps, ascending; none where all are to stay."""
    if view.config is None or view.config.train.keep_snapshots is None:
        return ()
    stay = staying(view)
    return tuple(images for images in view.published if images not in stay)


def staying(view: RunView) -> dict[int, str]:
    """Returns why each snapshot stays that does, by its images; none where the config lets none go, or is not known."""
    config = view.config
    newest = config.train.keep_snapshots if config else None
    if config is None or newest is None:
        return {}
    every = config.train.keep_snapshots_every
    return kept(view.published, newest, every, needs(view, config))


def kept(
    published: Sequence[int], newest: int, every: int | None, needed: Iterable[Reason]
) -> dict[int, str]:
    """Returns why each snapshot stays that does, by its images ascending; the others may go.

    Args:
        published: images of the snapshots, ascending.
        newest: so many of the newest stay.
        every: of each so many images seen, the first snapshot stays for good.
        needed: those that stay for another reason; the first of several is given.
    """
    found = dict.fromkeys(published[-newest:], f"of the newest {newest}")
    if every is not None:
        firsts = {images // every: images for images in reversed(published) if images >= every}
        for images in firsts.values():
            found.setdefault(images, f"the first after each {every:,} images")
    for images, reason in needed:
        found.setdefault(images, reason)
    return {images: found[images] for images in published if images in found}


def setting(train: TrainConfig) -> str:
    """Returns the settings that let snapshots go, as they are typed."""
    every = train.keep_snapshots_every
    more = "" if every is None else f" train.keep_snapshots_every={every}"
    return f"train.keep_snapshots={train.keep_snapshots}{more}"


def needs(view: RunView, config: Config) -> Iterator[Reason]:
    """Yields what the run itself has use for, besides the newest: images of a snapshot, and why it stays."""
    # without it the run would not have finished
    yield view.images, "the run's last one"
    yield from ((images, "pinned") for images in view.pinned)
    yield from _guides(config.sampler.weak, "sampler.weak")
    yield from _awaited(view, config)
    yield from best(view.records)
    yield from ((images, "chosen among the run's (tools.best)") for images in view.selected)
    yield from _recipes(view)
    yield from _to_go_back_to(view, config)


def _awaited(view: RunView, config: Config) -> Iterator[Reason]:
    """What is to be scored still, or again: a failure may be mended, and a snapshot that is gone may not."""
    # of one whose machine does not answer, its record says that it is over
    over = {(record.key, record.attempt) for record in view.records}
    for job in view.evaluations:
        if (job.key, job.attempt) not in over and at_work(view, [job]):
            yield job.images, "being scored"
    for by in config.scored_by:
        for images in unscored(view, by):
            yield images, f"without its score by {by.evaluation.protocol}"
    yield from ((images, "its evaluation failed: --retry") for images in unscorable(view))
    for point in unscored_points(view, config):
        yield point.images, "a point of a sweep has no score"
        yield from _guides(point.config.sampler.weak, "a sweep")


def best(records: Iterable[EvaluationRecord]) -> Iterator[Reason]:
    """Yields the best snapshot by each score of each protocol; of equals all of them."""
    known: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for record in records:
        for name, value in record.scores.items() if record.done else ():
            if name in METRICS and value is not None and math.isfinite(value):
                better = -value if METRICS[name].higher_is_better else value
                known.setdefault((name, record.protocol_key), []).append((better, record.images))
    for (name, _), found in known.items():
        first = min(found)[0]
        yield from ((images, f"the best {name}") for value, images in found if value == first)


def _recipes(view: RunView) -> Iterator[Reason]:
    """Snapshots whose sampling somebody swept, and what the chosen way of it leads away from."""
    swept = {record.key for record in view.records if record.sweep}
    for front in recipe.fronts(view.records) if swept else ():
        if swept.intersection(point.key for point in front.points):
            yield front.images, "a sweep found its recipe"
            weak = front.recipe.sampler.get("weak")
            yield from _guides(str(weak), "a recipe") if weak else ()


def _guides(weak: str, whose: str) -> Iterator[Reason]:
    for each in weak_models(weak):
        if each.images is not None:
            yield each.images, f"{whose} leads away from it"


def _to_go_back_to(view: RunView, config: Config) -> Iterator[Reason]:
    """The newest snapshot at or before each checkpoint, where the run sets later ones aside when it goes back."""
    if config.train.unstable != "roll_back" or view.finished:
        return
    for checkpoint in view.checkpoints:
        before = [images for images in view.published if images <= checkpoint]
        yield from ((images, f"the run may go back to {checkpoint:,}") for images in before[-1:])
