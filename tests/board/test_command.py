"""`python -m launcher.board` as a user runs it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import launcher.board.__main__ as command
from launcher import runs as runs_command
from shards.errors import UserError
from tests.board import fakes

REPOSITORY = Path(__file__).parents[2]


def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    line = [sys.executable, "-m", "launcher.board", *arguments]
    return subprocess.run(
        line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def test_table_then_the_path_of_the_page(tmp_path: Path) -> None:
    for seed, fd in ((0, 7.0), (1, 8.0)):
        fakes.finished_run(tmp_path / "runs", "digits_dit", seed, fd)
    fakes.finished_run(tmp_path / "runs", "digits_class", 0, 5.0)
    done = call(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "runs/board.html"
    assert (tmp_path / "runs" / "board.html").is_file()
    assert "7.50 ± 0.71" in done.stdout and "label" in done.stdout
    rows = [
        line for line in done.stdout.splitlines() if "digits_" in line and "protocol" not in line
    ]
    assert [line.split()[:2] for line in rows] == [["1", "digits_class"], ["2", "digits_dit"]]


def test_json_is_one_object_of_finite_numbers(tmp_path: Path) -> None:
    run = fakes.finished_run(tmp_path / "runs", "digits_dit", 0, 7.0)
    fakes.add_record(run, 192_000, {"fd_digits": float("nan")})
    done = call("--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout, parse_constant=pytest.fail)
    (table,) = told["tables"]
    (row,) = table["rows"]
    assert told["page"] == "runs/board.html"
    assert (row["rank"], row["score"], row["images"]) == (
        1,
        {"mean": 7.0, "sd": None, "n": 1},
        256_000,
    )
    assert row["runs"][0]["scores"]["fd_digits"] == 7.0


def test_a_runs_folder_without_runs_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    done = call(cwd=tmp_path)
    assert done.returncode == 0
    assert "python -m launcher.submit experiment=digits_dit" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--runs", "nowhere"],
            ["--runs 'nowhere'", "python -m launcher.submit experiment=digits_dit"],
        ),
        (["--metric", "fd_digit"], ["--metric 'fd_digit'", "did you mean 'fd_digits'"]),
        (["--out", "runs"], ["--out 'runs'", "folder"]),
    ],
)
def test_user_errors_are_one_line_with_the_cure(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    fakes.finished_run(tmp_path / "runs", "digits_dit", 0, 7.0)
    done = call(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr
    assert not list(tmp_path.rglob("*.html"))


REFUSED = [
    (
        ["--runs", "RUNS/digits_dit", "ls"],
        "is the folder of the runs of one experiment; give --runs ",
    ),
    (["--runs", "RUNS/digits_dit/aaa0", "build"], "is the folder of one run; give --runs "),
    (["ls", "--runs", "RUNS", "--sort", ""], "--sort '' is no column; known: "),
    (["ls", "--runs", "RUNS", "--protocol", ""], "--protocol '' has no score; known: "),
    (["show", "aaa0", "--runs", "RUNS", "--log", "-3"], "--log -3 is no number of lines"),
    (["diff", "aaa0", "aaa0", "--runs", "RUNS"], "aaa0 aaa0 names a run twice"),
    (["diff", "aaa0", "RUNS/digits_dit/aaa0", "fresh", "--runs", "RUNS"], "these are aaa0, fresh"),
    (["serve", "--runs", "RUNS", "--every", "nan"], "--every nan is no number of seconds"),
    (["serve", "--runs", "RUNS", "--every", "-1"], "--every -1 is no number of seconds"),
    (["serve", "--runs", "RUNS", "--token", "@RUNS/bytes"], "is no file of text"),
]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A run with scores, and one that has not begun."""
    fakes.finished_run(tmp_path / "runs", "digits_dit", 0, 7.0, id="aaa0")
    fakes.make_run(tmp_path / "runs", "digits_dit", 1, id="fresh")
    (tmp_path / "runs" / "bytes").write_bytes(b"\xff\xfe" * 20)
    return tmp_path / "runs"


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_what_names_nothing_is_refused_with_what_to_type(
    two: Path, arguments: list[str], said: str
) -> None:
    with pytest.raises(UserError) as refused:
        command.main([word.replace("RUNS", str(two)) for word in arguments])
    assert said in str(refused.value)
    if "give --runs" in said:
        assert command.main(["ls", *shlex.split(str(refused.value).rpartition("give ")[2])]) == 0


def test_runs_on_s3_are_refused_as_they_were_typed(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (command.main, runs_command.main):
        with pytest.raises(SystemExit):
            main(["--runs", "s3://bucket/runs"])
        assert "s3://bucket/runs is on S3" in capsys.readouterr().err


def test_a_folder_of_one_experiment_is_no_folder_of_runs_for_a_list_either(two: Path) -> None:
    with pytest.raises(UserError, match=f"give --runs {two}$"):
        runs_command.main(["--runs", str(two / "digits_dit")])


def test_a_filter_that_leaves_no_row_is_named(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--runs", str(two), "--filter", "experiment=other"]
    assert command.main(["ls", *words]) == 0
    assert capsys.readouterr().out.strip() == "no row for --filter 'experiment=other'"
    assert command.main(["export", *words]) == 0
    told = capsys.readouterr()
    assert told.out == "" and "--filter 'experiment=other' leaves none" in told.err


def test_a_run_without_a_curve_is_named_beside_those_that_have_one(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["curve", "aaa0", "fresh", "--runs", str(two)]) == 0
    told = capsys.readouterr()
    assert "aaa0" in told.out and "run fresh has neither a score nor a loss" in told.err
    assert command.main(["curve", "aaa0", "fresh", "--metric", "floor", "--runs", str(two)]) == 0
    assert "run fresh has no floor" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [[], ["build"], ["export"]])
def test_a_file_on_s3_is_refused(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main([*verb, "--runs", str(two), "--out", "s3://bucket/rows"])
    assert ended.value.code == 2 and not list(tmp_path.glob("s3*"))


def test_an_export_makes_the_folder_of_its_file(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.csv"
    assert command.main(["export", "--runs", str(two), "--out", str(out)]) == 0
    assert "digits_dit" in out.read_text()


def test_no_torch(tmp_path: Path) -> None:
    fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    code = (
        "import sys; from launcher.board.__main__ import main; "
        f"main(['--runs', {str(tmp_path)!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, timeout=60
    )


def test_a_narrow_terminal_gets_the_columns_that_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from rich.console import Console

    fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    board = command.collect(*command.read_runs(tmp_path))
    for width in (70, 80, 120, 200):
        screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        monkeypatch.setattr(command.cli, "console", lambda screen=screen: screen)
        command.show(board, tmp_path)
        text = screen.file.getvalue()  # type: ignore[attr-defined]
        assert all(len(line) <= width for line in text.splitlines())
        for word in ("rank", "digits_dit", "fd_digits", "7.00", "final"):
            assert word in text, (width, word)
        assert ("a wider terminal also shows" in text) == (width < 200)


def test_the_wheel_carries_what_the_page_is_made_of() -> None:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import pip._vendor.tomli as tomllib  # type: ignore[no-redef]

    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    here = Path(str(files("launcher")))
    carried = {path for pattern in patterns["launcher"] for path in here.glob(pattern)}
    needed = [
        p for p in (here / "board").iterdir() if p.is_file() and p.suffix not in (".py", ".pyc")
    ]
    assert sorted(p.name for p in needed) == [
        "drawer.html",
        "macros.html",
        "page.html",
        "script.js",
        "style.css",
    ]
    assert set(needed) <= carried
