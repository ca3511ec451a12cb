"""Scores of others' samples: a file is read as it was written, and two protocols measure alike or they do not."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfguide.spec.config import EvaluationConfig
from selfguide.spec.metrics import METRICS
from selfguide.spec.others import (
    FOLDER,
    MEASURING,
    NAME,
    NOTE,
    OtherRecord,
    measured,
    measured_alike,
    other_files,
    read_other_file,
)
from selfguide.spec.records import LARGEST, Protocol, measuring

# with a value in every field
PROTOCOL: dict[str, Any] = {
    "metric": "fid_clean",
    "version": 1,
    "feature_sha256": "5f" * 32,
    "resize": "bicubic, antialiased, float, to 299",
    "quantisation": "round to 0..255",
    "reference": "file in1k.npz",
    "samples": 50_000,
    "labels": "empirical p(k)",
    "seed": 0,
    "sampler": "dopri5",
    "steps": 50,
    "tolerance": [1e-5, 1e-5],
    "batch": 500,
    "g": 1.5,
    "interval": [0.0, 0.7],
    "ema": 20_000,
    "dtype": "fp32",
    "settings": {"churn": 40},
    "normalisation": "(x - 128) / 128",
    "net": "resnet50.a1_in1k",
    "decoder_sha256": "d0" * 32,
    "reference_sha256": "4e" * 32,
    "reference_count": 10_000,
    "reference_seed": 3,
    "crop": "centre, 64 by 64",
    "sets": 3,
    "extras": {"kid": {"subsets": 100, "size": 1000, "seed": 2020, "kept": 10_000}},
}
DRAWING = [name for name in PROTOCOL if name not in MEASURING]
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")))
NUMBERS = st.floats(-LARGEST, LARGEST)


def a_record(**changes: Any) -> OtherRecord:
    record = OtherRecord(
        name="ADM-G",
        protocol=measured(PROTOCOL),
        scores={"fid_clean": 3.94, "fid_clean_se": 0.05},
        left_out=(3.9,) * 10,
        when=1.79e9,
        host="node1",
        samples="adm_g.npz",
        stamp="00ff00ff00ff",
    )
    return replace(record, **changes)


@given(
    name=TEXT.filter(lambda text: text.strip()).map(lambda text: text[:NAME]).filter(str.strip),
    note=TEXT.map(lambda text: text[:NOTE]),
    scores=st.dictionaries(st.sampled_from(sorted(METRICS)), NUMBERS),
    left_out=st.lists(NUMBERS, max_size=10).map(tuple),
    when=st.floats(0, 2e11),
    optional=st.sets(st.sampled_from(["net", "crop", "reference_count", "extras"])),
)
def test_record_written_and_read_again_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    note: str,
    scores: dict[str, float],
    left_out: tuple[float, ...],
    when: float,
    optional: set[str],
) -> None:
    runs = tmp_path_factory.mktemp("runs")
    protocol = {k: v for k, v in measured(PROTOCOL).items() if k not in optional}
    given = {"scores": scores, "left_out": left_out, "when": when, "protocol": protocol}
    record = a_record(name=name, note=note, **given)
    path = record.publish(runs)
    assert other_files(runs) == [path] and read_other_file(path) == record


def test_record_of_the_same_name_measured_the_same_way_replaces_the_one_before(
    tmp_path: Path,
) -> None:
    a_record().publish(tmp_path)
    a_record(scores={"fid_clean": 4.0}, when=1.8e9, note="again").publish(tmp_path)
    (path,) = other_files(tmp_path)
    assert read_other_file(path).scores == {"fid_clean": 4.0}
    a_record(name="ADM").publish(tmp_path)
    a_record(protocol=measured(PROTOCOL | {"samples": 10_000})).publish(tmp_path)
    assert len(other_files(tmp_path)) == 3


def test_other_files_of_names_that_are_no_records_are_left_alone(tmp_path: Path) -> None:
    assert other_files(tmp_path) == []
    a_record().publish(tmp_path)
    for name in (".nfs0001.json", "notes.txt"):
        (tmp_path / FOLDER / name).write_text("{")
    assert len(other_files(tmp_path)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"schema": None},
        {"name": 5},
        {"name": " "},
        {"name": "a" * (NAME + 1)},
        {"name": "a\x1b[2J"},
        {"name": "a\nb"},
        {"name": "\ud800"},
        {"note": None},
        {"note": "a" * (NOTE + 1)},
        {"note": "a\x07"},
        {"host": ["node1"]},
        {"samples": 7},
        {"stamp": None},
        {"when": math.nan},
        {"when": -1.0},
        {"when": 1e30},
        {"when": "today"},
        {"when": True},
        {"scores": None},
        {"scores": [3.9]},
        {"scores": {"fid_clean": math.nan}},
        {"scores": {"fid_clean": math.inf}},
        {"scores": {"fid_clean": 1e101}},
        {"scores": {"fid_clean": 10**400}},
        {"scores": {"fid_clean": "3.9"}},
        {"scores": {"fid_clean": None}},
        {"scores": {"fid_clean": True}},
        {"left_out": "0123456789"},
        {"left_out": ["3.9"]},
        {"left_out": [math.nan]},
        {"protocol": None},
        {"protocol": []},
        {"protocol": PROTOCOL | {"metric": ""}},
        {"protocol": PROTOCOL | {"metric": 5}},
        {"protocol": PROTOCOL | {"version": "1"}},
        {"protocol": PROTOCOL | {"samples": 0}},
        {"protocol": PROTOCOL | {"samples": 2**63}},
        {"protocol": PROTOCOL | {"samples": 5e4}},
        {"protocol": PROTOCOL | {"resize": None}},
        {"protocol": PROTOCOL | {"reference_count": "all"}},
        {"protocol": PROTOCOL | {"crop": 64}},
        {"protocol": PROTOCOL | {"extras": ["kid"]}},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_record_of_wrong_values_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(a_record().plain() | changes))
    with pytest.raises(ValueError):
        read_other_file(path)


@pytest.mark.parametrize("missing", [each.name for each in fields(OtherRecord)] + ["schema"])
def test_record_that_lacks_a_field_is_refused(missing: str) -> None:
    values = a_record().plain()
    del values[missing]
    with pytest.raises(ValueError, match=missing):
        OtherRecord.of(values)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '"text"', "\x00"])
def test_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "torn.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        read_other_file(path)


def test_record_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        a_record(name="a\nb").publish(tmp_path)
    assert not list(tmp_path.iterdir())


def test_fields_of_a_protocol_measure_or_draw() -> None:
    assert set(PROTOCOL) == {each.name for each in fields(Protocol)}
    evaluation = EvaluationConfig(protocol="fid_clean")
    assert set(MEASURING) == set(measuring(evaluation, "9a" * 6))


@pytest.mark.parametrize("name", MEASURING)
def test_measured_alike_of_protocols_that_differ_in_measuring_is_false(name: str) -> None:
    value = PROTOCOL[name]
    other = {**value, "fdr": {}} if isinstance(value, dict) else value * 2
    assert not measured_alike(PROTOCOL, PROTOCOL | {name: other})
    without = {field: value for field, value in PROTOCOL.items() if field != name}
    assert not measured_alike(PROTOCOL, without)
    # no value is what it is however it is written
    assert measured_alike(without, PROTOCOL | {name: None})


@pytest.mark.parametrize("name", DRAWING)
def test_measured_alike_of_protocols_that_differ_in_drawing_is_true(name: str) -> None:
    assert measured_alike(PROTOCOL, PROTOCOL | {name: "another"})
    assert measured_alike(PROTOCOL, {f: value for f, value in PROTOCOL.items() if f != name})


def test_measured_alike_of_a_protocol_in_memory_and_in_its_record_is_true() -> None:
    given = {**PROTOCOL, "extras": {"precision_recall": {"k": 5, "sizes": (5000, 5000)}}}
    protocol = Protocol(**given)
    assert measured_alike(protocol.plain(), json.loads(json.dumps(asdict(protocol))))
