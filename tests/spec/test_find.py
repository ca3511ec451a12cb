"""Which run a user means, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

import selfguide
from selfguide.spec.find import find
from shards.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("digits/0a1b2c", "digits/0a9999", "flags/0a1b2c", "flags/best"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("best", "flags/best"),
        ("be", "flags/best"),
        ("0a9", "digits/0a9999"),
        ("flags/0a1b2c", "flags/0a1b2c"),
        ("digits/0a1", "digits/0a1b2c"),
        ("flags/b", "flags/best"),
    ],
)
def test_find_of_an_id_a_name_or_the_beginning_of_one_is_the_run(
    root: Path, text: str, meant: str
) -> None:
    assert find(text, root).root == root / meant
    assert find(str(root / meant), root / "elsewhere").root == root / meant


@pytest.mark.parametrize("text", ["0a1b2c", "0a", "0a1"])
def test_find_of_what_several_are_called_is_cured_as_printed(root: Path, text: str) -> None:
    with pytest.raises(UserError) as refused:
        find(text, root)
    listed = str(refused.value).partition("several runs: ")[2].partition(";")[0].split(", ")
    assert len(listed) == (3 if text == "0a" else 2)
    assert [find(each, root).root for each in listed] == [root / each for each in listed]


@pytest.mark.parametrize(
    ("place", "gone", "meant"),
    [
        ("runs/digits/0a1b2d", "0a1b2d", "0a1b2c"),
        ("runs/digts/0a1b2c", "digts", "digits"),
        ("rums/digits/0a1b2c", "rums", "runs"),
        ("zzz/a/b", "zzz", None),
        ("runs/flags/best/snapshots/img-000000512", "snapshots", None),
    ],
)
def test_load_of_a_path_that_does_not_exist_says_from_where_on(
    root: Path, place: str, gone: str, meant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    for text in (str(root.parent / place), f"./{place}", place):
        with pytest.raises(UserError) as refused:
            selfguide.load(text, runs=root)
        message = str(refused.value)
        assert f"{text} does not exist" in message and f"has no {gone!r}" in message
        assert message.endswith(f"; did you mean '{meant}'?") == (meant is not None)


def test_load_of_a_folder_that_is_no_run_names_those_in_it(root: Path) -> None:
    with pytest.raises(UserError) as refused:
        selfguide.load(root / "flags", runs=root)
    cure = str(refused.value).rpartition("name one, ")[2]
    assert find(cure, root).root == root / "flags" / "0a1b2c"
    with pytest.raises(UserError, match=r"no run.json"):
        selfguide.load(root, runs=root)


def test_load_without_runs_says_what_python_takes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"which does not exist: .* or give runs=FOLDER"):
        selfguide.load("best", runs=tmp_path / "none")
    with pytest.raises(UserError, match="or give --runs FOLDER"):
        find("best", tmp_path)
    with pytest.raises(UserError, match="on S3"):
        selfguide.load("s3://bucket/runs/a/b", runs=tmp_path)
    with pytest.raises(UserError, match="has no"):
        selfguide.load(tmp_path / "no" / "such", runs=tmp_path)
