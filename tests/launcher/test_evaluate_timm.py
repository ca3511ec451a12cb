"""Scores in a net of timm that is named alone, whose weights lie in the cache of Hugging Face's hub, or come later."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_evaluate import Memory, launched, memory
from test_evaluate_shards import FEW, Data, made, refused, run_on

from launcher import evaluate, submission, submit, watch
from launcher.compose import changed, compose
from launcher.reconcile import decide
from launcher.reconcile.view import read
from selfguide.evaluation.features.net import load_feature_net
from selfguide.spec.records import records
from selfguide.spec.validate import validate
from shards import storage
from shards.errors import UserError
from tests.selfguide import hub_cache
from tests.selfguide.hub_cache import NET

__all__ = ["launched", "made", "memory"]

BY_NAME = ["evaluation=fd_timm", f"evaluation.net={NET}"]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights, whose caches lie below this folder."""
    hub_cache.use(tmp_path, monkeypatch)
    return tmp_path


def test_submission_pins_the_weights_that_the_hubs_cache_has(
    settings: list[str], memory: Memory, caches: Path
) -> None:
    file, sha256 = hub_cache.add(caches)
    found = submission.meant(submit.resolve([*settings, *BY_NAME]))
    assert found.warnings == ()
    evaluation = found.config.evaluation
    assert evaluation.sha256 == sha256

    # of another revision, whose weights are others
    file.unlink()
    now = hub_cache.save(file, seed=1)
    with pytest.raises(UserError) as error:
        load_feature_net("fd_timm", evaluation.weights, net=NET, sha256=evaluation.sha256)
    for part in (str(file), sha256, now):
        assert part in str(error.value)


def test_submission_of_an_unknown_net_is_refused_with_the_nearest(
    settings: list[str], memory: Memory
) -> None:
    typed = submit.resolve([*settings, "evaluation=fd_timm", "evaluation.net=test_resnet.r160_in1"])
    with pytest.raises(UserError, match=f"did you mean '{NET}'"):
        validate(typed)


def test_score_by_name_waits_for_the_weights_and_is_of_those_that_come(
    made: Data, runs: Path, memory: Memory, launched: list[int], caches: Path
) -> None:
    run = run_on(made.images, runs, memory, *BY_NAME, *FEW)
    view = read(run)
    (lack,) = view.lacks
    assert lack.what == f"{NET} weights"
    for part in (str(caches / "hub"), f"`python -m tools.reference fetch {NET}`"):
        assert part in lack.sentence
    assert view.config is not None
    assert decide.evaluations_wanted(view, view.config).start == ()
    # a point has no key either
    refused(run, memory, ["sampler.steps=2,3"], lack.sentence)

    _, sha256 = hub_cache.add(caches)
    view = read(run)
    assert not view.lacks
    assert view.config is not None
    assert view.config.evaluation.sha256 == sha256
    watch.watch(run.root)
    (record,) = records(run)
    assert (record.status, record.protocol["net"]) == ("done", NET)
    assert record.protocol["feature_sha256"] == sha256

    # the same weights, given by path, are the same column
    file = caches / "net.safetensors"
    assert hub_cache.save(file) == sha256
    (point,) = evaluate.sweep(run, [f"evaluation.weights={file}"])["points"]
    assert point["score"] == record.score
    assert len([*records(run)]) == 1


def test_weights_that_are_not_what_the_cache_calls_them_are_waited_for(
    made: Data, runs: Path, memory: Memory, caches: Path
) -> None:
    file, called = hub_cache.add(caches)
    file.write_bytes(b"cut")
    (lack,) = read(run_on(made.images, runs, memory, *BY_NAME, *FEW)).lacks
    for part in (str(file), called, storage.sha256(str(file))):
        assert part in lack.sentence


def test_another_net_has_none_of_the_weights_of_the_former() -> None:
    first = ["evaluation.weights=one.safetensors", "evaluation.sha256=1a"]
    config = compose(["experiment=digits_uncond", "cluster=local", *BY_NAME, *first])
    for words, left in (
        (["evaluation.seed=3"], ("one.safetensors", "1a")),
        (["evaluation.net=test_vit.r160_in1k"], (None, None)),
        (["evaluation.weights=two.safetensors"], ("two.safetensors", None)),
        (["evaluation.sha256=2b", "evaluation.net=test_vit.r160_in1k"], (None, "2b")),
    ):
        evaluation = changed(config, words).evaluation
        assert (evaluation.weights, evaluation.sha256) == left
