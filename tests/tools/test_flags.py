"""Rows of flags: each is what argparse would have been told by hand."""

from __future__ import annotations

from pathlib import Path
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


@pytest.mark.parametrize(
    "typed",
    ["", "--out x --kind c", "--out x --size 1", "--out x --count a", "--out s3://bucket/x"],
)
def test_a_row_of_flags_mistyped_exits_2(typed: str) -> None:
    with pytest.raises(SystemExit) as left:
        PARSER.parse_args(typed.split())
    assert left.value.code == 2


def test_a_home_is_read_where_no_shell_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert PARSER.parse_args(["--out=~/x"]).out == "/home/somebody/x"


FIGURE = flags.command("tools.none", None, ("--figure FILE", str, None, "a picture"))


@pytest.mark.parametrize("name", ["new/folder/a.png", "a.PDF"])
def test_a_picture_s_file_that_can_be_written_is_taken(name: str, tmp_path: Path) -> None:
    typed = str(tmp_path / name)
    assert FIGURE.parse_args(["--figure", typed]).figure == typed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.foo", "ends in .png, .pdf"),
        ("a", "ends in .png, .pdf"),
        ("folder.png", "is a folder"),
        ("file.txt/a.png", "nothing can be written in"),
        ("s3://bucket/a.png", "a file of this machine"),
    ],
)
def test_a_picture_s_file_that_cannot_be_written_is_refused_before_anything_is_done(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").touch()
    typed = name if name.startswith("s3:") else str(tmp_path / name)
    with pytest.raises(SystemExit) as left:
        FIGURE.parse_args(["--figure", typed])
    assert left.value.code == 2 and words in capsys.readouterr().err


def test_an_option_below_its_least_value_is_named() -> None:
    options = PARSER.parse_args(["--out", "x", "--count", "0"])
    flags.check_least(options, 0, "count", "run")
    with pytest.raises(UserError, match="--count 0: take 1 or more"):
        flags.check_least(options, 1, "count")
