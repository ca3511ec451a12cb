"""The laws of a run's identity: what is added or renamed later renames no run, and a changed default merges none."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.compose import compose, known_keys
from selfguide.spec.config import Config, TrainConfig, build
from selfguide.spec.config.laws import Formerly, Neutral, NotIdentity, fields_of, identity_of
from selfguide.spec.files import read_config, to_yaml
from selfguide.spec.identity import digest, identity
from shards.errors import UserError

DIGITS = ["experiment=digits_dit", "cluster=local"]


def extended(default: Any, neutral: Any) -> type:
    """TrainConfig with a field that came later."""
    kind = Annotated[int, Neutral(neutral)]
    return make_dataclass(
        "Later", [("extra", kind, default)], bases=(TrainConfig,), frozen=True, kw_only=True
    )


@given(default=st.integers(0, 3), neutral=st.integers(0, 3), value=st.integers(0, 3))
def test_a_later_field_leaves_a_trace_unless_it_is_neutral(
    default: int, neutral: int, value: int
) -> None:
    """Whatever its default becomes: at the neutral value runs keep the id they had before the field existed."""
    before = identity_of(TrainConfig(images=1, batch=1))
    now = identity_of(extended(default, neutral)(images=1, batch=1, extra=value))
    assert now == (before if value == neutral else before | {"extra": value})


@given(default=st.floats(1e-6, 1), value=st.floats(1e-6, 1))
def test_a_changed_default_merges_only_runs_that_are_alike(default: float, value: float) -> None:
    changed = make_dataclass(
        "Changed",
        [("learning_rate", float, default)],
        bases=(TrainConfig,),
        frozen=True,
        kw_only=True,
    )
    old = identity_of(TrainConfig(images=1, batch=1, learning_rate=value))
    assert (identity_of(changed(images=1, batch=1)) == old) == (default == value)


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig)])
def test_every_field_of_training_is_in_the_identity_or_says_that_it_is_not(name: str) -> None:
    base = TrainConfig(images=100, batch=10)
    value = getattr(base, name)
    if isinstance(value, str | tuple):
        other = value * 2 or (5,)
    else:
        other = (value or 0) + 1
    law = next(f for f in fields_of(TrainConfig) if f.name == name).law(NotIdentity)
    differs = identity_of(replace(base, **{name: other})) != identity_of(base)
    assert differs == (law is None)


@dataclass(frozen=True, kw_only=True)
class Renamed:
    new: Annotated[str, Formerly("old", {"row": "line"})] = "row"


def test_a_renamed_field_keeps_its_former_name_and_spelling_in_the_identity() -> None:
    assert identity_of(Renamed()) == {"old": "line"}
    assert identity_of(Renamed(new="other")) == {"old": "other"}


def test_a_former_name_is_read_and_both_names_at_once_are_refused() -> None:
    assert build(Renamed, {"old": "line"}) == Renamed(new="row")
    assert build(Renamed, {"old": "other"}) == Renamed(new="other")
    with pytest.raises(UserError):
        build(Renamed, {"old": "line", "new": "row"})


FORMER = [
    (f"{part}.{former.name}={former.old(value)}", f"{part}.{field.name}={value}", former.name)
    for part, cls, value_of in [
        ("guidance", "OnlineGuidance", {
            "view_condition": "unconditional", "condition_rows": "averaged", "unconditional": "zero",
        }),
    ]
    for field in fields_of(getattr(__import__("selfguide.spec.config", fromlist=[cls]), cls))
    if (former := field.law(Formerly)) is not None
    for value in [value_of[field.name]]
]  # fmt: skip


@pytest.mark.parametrize(("former", "current", "name"), FORMER)
def test_a_former_key_typed_by_a_user_means_the_new_one_with_a_warning(
    former: str, current: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        old = compose([*DIGITS, "guidance=sgfm_paper", former])
    assert caplog.records and current.partition("=")[0] in caplog.records[0].getMessage()
    caplog.clear()
    new = compose([*DIGITS, "guidance=sgfm_paper", current])
    assert old == new and not caplog.records
    assert name in identity(new, None)["guidance"]


def test_keys_are_those_of_the_config_classes() -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys))
    assert {f.name for f in fields(Config)} == {key.partition(".")[0] for key in keys}


def test_the_id_is_the_hash_of_the_identity() -> None:
    config = compose(DIGITS)
    assert digest(identity(config, "m")) != digest(identity(config, "n"))
    assert digest(identity(config, "m")) == digest(identity(replace(config, runs="else"), "m"))


def test_a_layer_that_conditions_later_ones_is_one_by_number_and_by_name() -> None:
    by_number, by_name, other = (
        identity(compose(["experiment=digits_uncond", f"model.self_condition={layer}"]), "0")
        for layer in ("2", "block_2", "block_3")
    )
    assert by_number == by_name != other


def test_what_weight_decay_spares_is_in_the_identity_where_there_is_any() -> None:
    def of(*words: str) -> dict[str, Any]:
        return identity(compose([*DIGITS, *words]), "0")

    spared, every = of("train.weight_decay=0.1"), of("train.weight_decay=0.1", "train.decayed=all")
    assert spared["train"]["decayed"] == "matrices" and "decayed" not in every["train"]
    assert of() == of("train.decayed=weights") == of("train.decayed=all")


def test_a_config_that_lacks_a_later_field_is_read_at_its_neutral_value(tmp_path: Path) -> None:
    """Every field whose default is another is in a group that is read so."""
    file, config = tmp_path / "config.yaml", compose([*DIGITS, "train.weight_decay=0.1"])
    file.write_text(to_yaml(config).replace("  decayed: matrices\n", ""))
    assert read_config(file) == replace(config, train=replace(config.train, decayed="all"))
    file.write_text(to_yaml(config))
    assert read_config(file) == config

    def later(cls: Any) -> set[str]:
        laws = {each.name: (each.law(Neutral), each.default) for each in fields_of(cls)}
        return {name for name, (law, default) in laws.items() if law and law.value != default}

    read_so = {each.type for each in fields_of(Config)}
    inner = {kind for each in fields_of(Config) for kind in get_args(each.type)}
    assert later(TrainConfig) == {"decayed"} and TrainConfig in read_so
    assert not any(later(kind) for kind in inner if is_dataclass(kind))
