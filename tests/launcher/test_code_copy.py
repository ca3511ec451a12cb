"""The code copy: whole, without caches, and independent of the checkout afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import REPOSITORY

from launcher import code_copy


def test_it_holds_every_source_file_and_no_cache(tmp_path: Path) -> None:
    about = code_copy.copy(tmp_path / "code")
    copied = {
        p.relative_to(tmp_path / "code").as_posix()
        for p in (tmp_path / "code").rglob("*")
        if p.is_file()
    }
    for package in code_copy.PACKAGES:
        there = [p for p in (REPOSITORY / package).rglob("*") if p.is_file()]
        # in __pycache__ other processes write files of temporary names
        sources = [p for p in there if "__pycache__" not in p.parts and p.suffix != ".pyc"]
        wanted = [p for p in sources if not p.name.startswith(".")]
        assert {p.relative_to(REPOSITORY).as_posix() for p in wanted} <= copied
    assert not [name for name in copied if "__pycache__" in name or name.endswith(".pyc")]
    assert "configs/experiment/digits_dit.yaml" in copied and "launcher/attempt/entry.py" in copied
    assert json.loads((tmp_path / "code.json").read_text()) == about
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_its_hash_is_of_the_content(tmp_path: Path) -> None:
    one, two = code_copy.copy(tmp_path / "a" / "code"), code_copy.copy(tmp_path / "b" / "code")
    assert one["hash"] == two["hash"]
    (tmp_path / "b" / "code" / "launcher" / "attempt" / "entry.py").open("a").write("\n")
    assert code_copy.content_hash(tmp_path / "b" / "code") != one["hash"]


def test_copy_that_another_process_made_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = code_copy.git

    def other(root: Path) -> dict[str, object]:
        monkeypatch.setattr(code_copy, "git", git)
        code_copy.copy(tmp_path / "copies" / "0123")
        return git(root)

    # the last that is asked before the copy has its name
    monkeypatch.setattr(code_copy, "git", other)
    about = code_copy.copy(tmp_path / "copies" / "0123")
    assert code_copy.content_hash(tmp_path / "copies" / "0123") == about["hash"]
    assert sorted(p.name for p in (tmp_path / "copies").iterdir()) == ["0123", "0123.json"]


def test_git_is_named_where_it_tracks_the_source_and_only_there(tmp_path: Path) -> None:
    assert code_copy.git(tmp_path) == {}
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "__init__.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert code_copy.git(tmp_path) == {}  # there, and not tracked
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    found = code_copy.git(tmp_path)
    assert len(found["revision"]) == 40 and found["dirty"] is False
    (tmp_path / "launcher" / "__init__.py").write_text("x = 1\n")
    assert code_copy.git(tmp_path)["dirty"] is True


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        code_copy.location("no_such_package")


def test_python_prefers_the_copy_to_whatever_is_installed(tmp_path: Path) -> None:
    code_copy.copy(tmp_path / "code")
    program = "import launcher, selfguide, configs; print(launcher.__file__, selfguide.__file__, configs.__file__)"
    environment = {"PYTHONPATH": f"{tmp_path / 'code'}:{REPOSITORY}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count(str(tmp_path / "code")) == 3


def test_copies_of_one_block_are_the_first_whatever_happens_to_the_source(tmp_path: Path) -> None:
    with code_copy.one_for_all():
        found = [code_copy.copy(tmp_path / name / "code") for name in "ab"]
    assert found[0] == found[1] == code_copy.copy(tmp_path / "c" / "code")
    shutil.rmtree(tmp_path / "a")
    assert code_copy.content_hash(tmp_path / "b" / "code") == found[0]["hash"]
    assert json.loads((tmp_path / "b" / "code.json").read_text()) == found[0]
