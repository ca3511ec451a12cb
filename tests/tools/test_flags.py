"""Rows of flags: each is what argparse would have been told by hand."""

from __future__ import annotations

from typing import Any

import pytest

from shards.errors import UserError
from tools import flags

PARSER = flags.command(
    "tools.none",
    "What it is for.",
    ("run RUN?", str, None, "a run"),
    ("--count N", int, 4, "how many"),
    ("--size A B", float, None, "two numbers"),
    ("--seeds +", int, [0], "several"),
    ("--kind", ("a", "b"), "a", "one of two"),
    ("--also +", ("a", "b"), None, "some of two"),
    ("--plain", bool, False, "a switch"),
    flags.OUT,
)
NOTHING: dict[str, Any] = {
    "run": None,
    "count": 4,
    "size": None,
    "seeds": [0],
    "kind": "a",
    "also": None,
    "plain": False,
    "out": "x",
}


@pytest.mark.parametrize(
    ("typed", "changed"),
    [
        ("", {}),
        ("here --count 7", {"run": "here", "count": 7}),
        ("--size 1 2.5", {"size": [1.0, 2.5]}),
        ("--seeds 3 4 5", {"seeds": [3, 4, 5]}),
        ("--kind b --also b a --plain", {"kind": "b", "also": ["b", "a"], "plain": True}),
    ],
)
def test_a_row_of_flags_typed_gives_its_type_and_default(
    typed: str, changed: dict[str, Any]
) -> None:
    assert vars(PARSER.parse_args([*typed.split(), "--out", "x"])) == NOTHING | changed


@pytest.mark.parametrize("typed", ["", "--out x --kind c", "--out x --size 1", "--out x --count a"])
def test_a_row_of_flags_mistyped_exits_2(typed: str) -> None:
    with pytest.raises(SystemExit) as left:
        PARSER.parse_args(typed.split())
    assert left.value.code == 2


def test_an_option_below_its_least_value_is_named() -> None:
    options = PARSER.parse_args(["--out", "x", "--count", "0"])
    flags.check_least(options, 0, "count", "run")
    with pytest.raises(UserError, match="--count 0: take 1 or more"):
        flags.check_least(options, 1, "count")
