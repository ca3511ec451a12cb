"""The front of score against network evaluations, and which of its points is the recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.compose import changed, compose
from selfguide.spec import recipe
from selfguide.spec.config import Config
from selfguide.spec.records import EvaluationRecord, Protocol, record_key
from selfguide.spec.run import RunFolder
from selfguide.spec.validate import validate
from shards.errors import UserError

CONFIG = compose(["experiment=digits_dit", "cluster=local"])
SHAPE = {"data": {"manifest": "m"}, "guidance": {}}
# what images of the same seeds have in common
COMMON = (3.0, -2.0, 1.0, 0.0, 2.0, -1.0, 1.5, -2.5, 0.5, -2.5)


def scored(config: Config, score: float, nfe: float, spread: float = 0.0) -> EvaluationRecord:
    """A record whose blocks err as those of all records do, and by `spread` of their own."""
    how = Protocol.of(config, SHAPE)
    own = [spread * (-1) ** block for block in range(10)]
    return EvaluationRecord(
        status="done",
        key=record_key(64, how),
        attempt=1,
        images=64,
        protocol=how.plain(),
        protocol_key=how.key,
        scores={"fd_digits": score},
        left_out=tuple(score + a + b for a, b in zip(COMMON, own, strict=True)),
        nfe=nfe,
    )


def at(*words: str) -> Config:
    return changed(CONFIG, words)


def test_front_holds_what_nothing_beats_in_both_and_its_cheapest_equal_is_chosen() -> None:
    records = [
        scored(at("sampler.steps=4"), 9.0, 4),
        scored(at("sampler.steps=8"), 5.01, 8, spread=0.1),
        scored(at("sampler.steps=8", "sampler.g=2"), 7.0, 8),
        scored(at("sampler.steps=64"), 5.0, 64),
    ]
    (front,) = recipe.fronts(records)
    assert list(front.front) == [records[i].key for i in (0, 1, 3)]
    # of the two that nothing tells apart the cheaper one
    assert (front.best, front.chosen) == (records[3].key, records[1].key)
    assert front.recipe.sampler["steps"] == 8 and front.recipe.sampler["interval"] == (0.0, 1.0)
    known = {point.key: point for point in front.points}
    assert known[records[0].key].worse == pytest.approx(4.0)
    assert known[records[0].key].worse_se == pytest.approx(0.0, abs=1e-12)
    # without what the jackknife left out nothing is known of a difference, and the best is taken
    (front,) = recipe.fronts([replace(record, left_out=()) for record in records])
    assert front.chosen == records[3].key


def test_scores_that_differ_in_more_than_the_sampler_make_no_front() -> None:
    one = scored(at("sampler.steps=4"), 9.0, 4)
    assert recipe.fronts([one]) == ()
    for other in ("evaluation.seed=5", "evaluation.samples=77", "evaluation.prior=uniform"):
        assert recipe.fronts([one, scored(at("sampler.steps=8", other), 5.0, 8)]) == ()
    later = replace(scored(at("sampler.steps=8"), 5.0, 8), images=128)
    failed = replace(scored(at("sampler.steps=8"), 5.0, 8), status="failed")
    assert recipe.fronts([one, later, failed]) == ()


def test_sampler_of_a_protocol_is_the_one_that_it_was_made_of() -> None:
    for words in (
        ["sampler.name=heun", "sampler.churn=3", "sampler.g=2", "sampler.interval=[0.1,0.7]"],
        ["sampler.name=dopri5", "sampler.rtol=1e-3"],
        ["sampler.name=euler", "sampler.shift=3", "sampler.g=2", "sampler.guided_channels=1"],
    ):
        config = at(*words)
        found = recipe.sampler_of(Protocol.of(config, SHAPE).plain())
        steps = {"steps": config.sampler.steps} if config.sampler.name == "dopri5" else {}
        assert replace(found, **steps) == config.sampler


def test_recipe_is_written_once_and_read_as_it_was(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert recipe.keep(run, []) == () and recipe.read(run) == ()
    assert not recipe.recipe_path(run).exists()
    records = [scored(at("sampler.steps=4"), 9.0, 4), scored(at("sampler.steps=8"), 5.0, 8)]
    kept = recipe.keep(run, records)
    (read,) = recipe.read(run)
    assert (read.front, read.chosen, read.id) == (kept[0].front, kept[0].chosen, kept[0].id)
    written = recipe.recipe_path(run).stat()
    recipe.keep(run, list(reversed(records)))
    assert recipe.recipe_path(run).stat().st_mtime_ns == written.st_mtime_ns


def test_score_of_another_average_is_named_by_it_and_one_that_is_not_kept_is_refused() -> None:
    config = at("train.ema_halflife=[20000,40000]")
    other = changed(config, ["evaluation.average=1"])
    assert [Protocol.of(each, SHAPE).ema for each in (config, other)] == [20000, 40000]
    (front,) = recipe.fronts([scored(config, 9.0, 4), scored(other, 5.0, 4)])
    assert front.recipe.average == 40000
    with pytest.raises(UserError):
        validate(changed(config, ["evaluation.average=2"]))
