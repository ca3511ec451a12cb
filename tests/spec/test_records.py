"""Evaluation records and protocols: one key, known before the job; a record is read as it was written."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.compose import compose
from selfguide.spec.config import EvaluationConfig
from selfguide.spec.metrics import FEATURES, METRICS
from selfguide.spec.records import (
    LARGEST,
    SCHEMA,
    EvaluationRecord,
    Protocol,
    label_policy,
    record_key,
    record_path,
    records,
    scored,
)
from selfguide.spec.run import RunFolder
from tests.board.fakes import PROTOCOL

CONFIG = compose(["experiment=digits_dit", "cluster=local"])
SNAPSHOT = {"data": {"manifest": "9a" * 6}, "guidance": {"source": "online", "level": "image"}}
# of evaluation=fid_adm evaluation.reference=val.npz, when files were known by their name alone
BY_NAME = "9ff912cf61da"
NUMBERS = st.floats(-LARGEST, LARGEST)


@given(
    scores=st.dictionaries(st.sampled_from(sorted(METRICS)), NUMBERS, min_size=1),
    images=st.integers(0, 10**9),
    attempt=st.integers(1, 99),
)
def test_a_record_written_and_read_again_is_the_same(
    scores: dict[str, float], images: int, attempt: int
) -> None:
    record = EvaluationRecord(
        status="done", key=record_key(images, PROTOCOL), attempt=attempt, images=images, final=True,
        protocol=asdict(PROTOCOL), protocol_key=PROTOCOL.key, scores=scores, nfe=50, label_free=True,
    )  # fmt: skip
    again = EvaluationRecord.of(json.loads(json.dumps(record.plain())))
    assert replace(again, protocol={}) == replace(record, protocol={})
    assert again.score == scores.get("fd_digits")


def test_a_score_that_is_no_number_is_missing() -> None:
    scores = {"fd_digits": math.nan, "nmi": math.inf, "ari": None, "classes": 10}
    values = {"schema": SCHEMA, "status": "done", "key": "k", "attempt": 1, "images": 5}
    values |= {"protocol_key": "p", "protocol": {"metric": "fd_digits"}}
    assert EvaluationRecord.of(values | {"scores": scores}).scores == {"classes": 10.0}


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 99},
        {"status": "half"},
        {"images": "many"},
        {"protocol_key": ""},
        {"attempt": None},
        {"protocol": None},
    ],
)
def test_a_record_that_is_none_is_refused(change: dict[str, object]) -> None:
    values = {"schema": SCHEMA, "status": "done", "key": "k", "attempt": 1, "images": 5}
    values |= {"protocol_key": "p", "protocol": {"metric": "fd_digits"}, "scores": {}}
    EvaluationRecord.of(values)
    with pytest.raises((ValueError, TypeError)):
        EvaluationRecord.of(values | change)


def test_a_key_with_a_malformed_record_is_scored_by_its_whole_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    key = "img-000000005-abcdef01"
    run.evals.mkdir(parents=True)
    record_path(run, key, 1).write_text('{"schema": 1, "key"')
    assert not scored(run, key)
    said = {"status": "done", "images": 5, "protocol_key": "p", "protocol": {"metric": "fdd"}}
    EvaluationRecord(key=key, attempt=2, **said).publish(run)  # type: ignore[arg-type]
    assert scored(run, key)
    assert str(record_path(run, key, 1)) in caplog.text


def test_a_failed_record_of_before_has_no_protocol_and_is_read(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    path = record_path(run, "img-000000005-abcdef01", 3)
    path.parent.mkdir(parents=True)
    said = {"schema": 1, "status": "failed", "images": 5, "key": "img-000000005-abcdef01"}
    path.write_text(json.dumps(said | {"attempt": 3, "scores": {}, "message": "no memory"}))
    (found,) = records(run)
    assert (found.done, found.protocol_key, found.message) == (False, "", "no memory")


def by_file(name: str, *more: str) -> Protocol:
    words = [
        "experiment=digits_dit",
        "cluster=local",
        "evaluation=fid_adm",
        f"evaluation.reference={name}",
    ]
    return Protocol.of(compose([*words, *more]), SNAPSHOT)


def read_from(protocol: Protocol, sha256: str) -> EvaluationRecord:
    """A record whose job read a file of this sha256, as it is read again."""
    written = EvaluationRecord(
        status="done", key=record_key(5, protocol), attempt=1, images=5, protocol=protocol.plain(),
        protocol_key=protocol.key, files={"reference": sha256},
    )  # fmt: skip
    return EvaluationRecord.of(json.loads(json.dumps(written.plain())))


def test_file_of_a_reference_is_known_by_its_content_and_before_that_by_its_name() -> None:
    one, other = (by_file("val.npz", f"evaluation.reference_sha256={sha * 64}") for sha in "ab")
    named = by_file("val.npz")
    assert len({one.key, other.key, named.key}) == 3
    # as it was before there was a sha256
    assert named.key == BY_NAME and "reference_sha256" not in named.plain()
    # once it was read it is the same column, of records of before as well, and these keep their own key
    assert read_from(named, "a" * 64).protocol_key == one.key
    assert read_from(named, "b" * 64).protocol_key == other.key
    assert read_from(one, "a" * 64).protocol_key == one.key
    assert read_from(named, "a" * 64).key == record_key(5, named)
    assert read_from(named, "a" * 64).asked == named.key


def test_statistics_of_an_unconditional_run_are_known_by_their_content() -> None:
    ufid = ["evaluation.metrics=[ufid]", "evaluation.unconditional=u.npz"]
    one, other = (
        by_file("val.npz", *ufid, f"evaluation.unconditional_sha256={s * 64}") for s in "ab"
    )
    assert len({one.key, other.key, by_file("val.npz", *ufid).key}) == 3


@pytest.mark.parametrize(
    "change",
    ["evaluation.samples=7", "evaluation.seed=1", "evaluation.prior=uniform", "sampler.steps=7",
     "sampler.g=2", "sampler.shift=2", "sampler=ddim", "train.ema_halflife=[77]"],
)  # fmt: skip
def test_what_a_score_depends_on_is_another_key(change: str) -> None:
    base = Protocol.of(CONFIG, SNAPSHOT)
    other = Protocol.of(compose(["experiment=digits_dit", "cluster=local", change]), SNAPSHOT)
    assert other.key != base.key and record_key(5, other) != record_key(5, base)


@pytest.mark.parametrize("change", ["evaluation.in_flight=3", "evaluation.attempts=9", "runs=x"])
def test_how_an_evaluation_is_run_is_no_other_key(change: str) -> None:
    base = Protocol.of(CONFIG, SNAPSHOT)
    assert (
        Protocol.of(compose(["experiment=digits_dit", "cluster=local", change]), SNAPSHOT) == base
    )


def test_the_batch_matters_to_an_adaptive_sampler_only() -> None:
    evaluation = replace(CONFIG.evaluation, batch=7)
    assert Protocol.of(replace(CONFIG, evaluation=evaluation), SNAPSHOT) == Protocol.of(
        CONFIG, SNAPSHOT
    )
    adaptive = replace(CONFIG, sampler=replace(CONFIG.sampler, name="dopri5"))
    changed = replace(adaptive, evaluation=evaluation)
    assert Protocol.of(changed, SNAPSHOT).key != Protocol.of(adaptive, SNAPSHOT).key


@pytest.mark.parametrize(
    ("guidance", "prior", "policy"),
    [
        ({"source": "none"}, "empirical", "empirical p(k)"),
        ({"source": "online", "level": "image"}, "uniform", "uniform over groups"),
        ({"source": "online", "level": "patch"}, "empirical", "training rows"),
        ({"sidecars": {"ids": {"kind": "id"}}}, "empirical", "empirical p(k)"),
        ({"sidecars": {"ids": {"kind": "multi_hot"}}}, "empirical", "training rows"),
        ({"sidecars": {"ids": {"kind": "id"}, "layout": {"kind": "box"}}}, "empirical", "training rows"),
    ],
)  # fmt: skip
def test_the_label_policy_follows_from_the_snapshot(
    guidance: dict[str, object], prior: str, policy: str
) -> None:
    assert label_policy(guidance, prior) == policy


def test_the_feature_net_that_a_protocol_names_is_the_one_that_lies_here() -> None:
    data = resources.files("selfguide.evaluation.features") / "weights" / "digitnet.safetensors"
    assert hashlib.sha256(data.read_bytes()).hexdigest() == FEATURES["fd_digits"].sha256


def test_every_protocol_has_its_row_in_both_tables() -> None:
    from typing import get_args, get_type_hints

    known = set(get_args(get_type_hints(EvaluationConfig)["protocol"])) - {"none"}
    assert known == set(FEATURES)
    assert {row.score or name for name, row in FEATURES.items()} <= set(METRICS)
