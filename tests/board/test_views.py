"""One filter grammar, protocols and orders, and what goes out as a file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from launcher.board import filter as grammar
from launcher.board import page
from launcher.board.collect import Board, collect
from launcher.board.export import encoded
from launcher.board.plain import finite, flat_rows
from launcher.board.read import read_runs
from launcher.board.views import chosen
from shards.errors import UserError
from tests.board import fakes


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    root = tmp_path_factory.mktemp("views")
    for seed, fd in ((0, 7.0), (1, 8.0)):
        fakes.finished_run(root, "digits_dit", seed, fd)
    fakes.finished_run(root, "digits_class", 0, 5.0)
    run = fakes.finished_run(root, "digits_uncond", 0, 9.0, batch=256)
    fakes.add_record(run, 256_000, {"fd_digits": 8.1}, protocol={"g": 1.5})
    return collect(*read_runs(root))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("", ["digits_class", "digits_dit", "digits_uncond"]),
        ("digits -class", ["digits_dit", "digits_uncond"]),
        ('"label-free"', ["digits_dit", "digits_uncond"]),
        ("labels=used", ["digits_class"]),
        ("seed=1", ["digits_dit"]),
        ("seed=1,0 fd_digits<=7.5", ["digits_class", "digits_dit"]),
        ("fd_digits>7.5", ["digits_uncond"]),
        ("train.batch>=0.2k images=256k", ["digits_uncond"]),
        ("experiment!=digits_dit,digits_class", ["digits_uncond"]),
        ("guidance.source~LINE", ["digits_dit"]),
        ("guidance.source!~on", ["digits_class"]),
        ("-experiment=digits_dit -labels=used", ["digits_uncond"]),
        ("-experiment!=digits_dit", ["digits_dit"]),
        ("-guidance.source!~on -labels!=used", []),
        ("experiment~ß", []),
        ("state=final seeds<2", ["digits_class", "digits_uncond"]),
    ],
)
def test_terms_choose_rows_which_are_ranked_among_themselves(
    board: Board, text: str, left: list[str]
) -> None:
    found = [t for t in chosen(board, text=text).tables if t.key == fakes.PROTOCOL.key]
    rows = found[0].rows if found else ()
    assert [row.experiment for row in rows] == left
    assert [row.rank for row in rows] == list(range(1, len(left) + 1))


@pytest.mark.parametrize("text", ['"open', "images>many", "images>1,2", "imagse=1"])
def test_terms_that_mean_nothing_are_refused(board: Board, text: str) -> None:
    with pytest.raises(UserError):
        chosen(board, text=text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("256k", 256e3),
        ("1.5M", 1.5e6),
        ("2_000", 2000.0),
        ("1e-4", 1e-4),
        ("-3", -3.0),
        ("k", None),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: float | None) -> None:
    assert grammar.number(text) == value


def test_a_protocol_is_named_by_metric_or_the_beginning_of_its_key(board: Board) -> None:
    assert len(chosen(board, protocol="fd_digits").tables) == 2
    (table,) = chosen(board, protocol=fakes.PROTOCOL.key[:6]).tables
    assert table.key == fakes.PROTOCOL.key
    with pytest.raises(UserError):
        chosen(board, protocol="fid_adm")


def test_a_column_sorts_by_its_better_end_and_ranks_stay(board: Board) -> None:
    def order(**how: object) -> list[tuple[str, int | None]]:
        shown = chosen(board, protocol=fakes.PROTOCOL.key, **how)  # type: ignore[arg-type]
        return [(row.experiment, row.rank) for row in shown.tables[0].rows]

    assert order(sort="seeds")[0] == ("digits_dit", 2)
    assert order(sort="fd_digits", reverse=True)[0] == ("digits_uncond", 3)
    with pytest.raises(UserError):
        order(sort="fd_digit")


def test_rows_go_out_as_csv_json_and_parquet_alike(board: Board, tmp_path: Path) -> None:
    rows = flat_rows(chosen(board, text="labels=free"))
    assert [row["experiment"] for row in rows] == ["digits_dit", "digits_uncond", "digits_uncond"]
    assert json.loads(encoded(rows, "json")) == rows
    told = list(csv.DictReader(io.StringIO(encoded(rows, "csv").decode())))
    assert [float(row["score"]) for row in told] == [row["score"] for row in rows]
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "rows.parquet").write_bytes(encoded(rows, "parquet"))
    assert parquet.read_table(tmp_path / "rows.parquet").to_pylist() == rows


def test_an_error_that_nobody_knows_is_none(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    fakes.add_record(run, 256_000, {"fd_digits": 7.0})
    (row,) = flat_rows(collect(*read_runs(tmp_path)))
    assert (row["score"], row["sd"], row["se"]) == (7.0, None, None)


def test_a_name_that_a_spreadsheet_would_run_goes_out_as_text() -> None:
    assert (
        encoded([{"experiment": "=cmd()", "score": -1.5}], "csv")
        == b"experiment,score\n'=cmd(),-1.5\n"
    )


def test_cells_of_a_csv_come_back_whatever_is_in_them() -> None:
    names = ["a, b", 'say "so"', "one\ntwo", "one\rtwo", "one\r\ntwo", "\ttab", "-5 %"]
    text = encoded([{"experiment": name, "score": 1.5} for name in names], "csv").decode()
    told = [row["experiment"] for row in csv.DictReader(io.StringIO(text, newline=""))]
    assert told == [*names[:3], *["one\ntwo"] * 2, "'\ttab", "'-5 %"]


def test_a_setting_without_a_value_is_null_in_names_and_filters(tmp_path: Path) -> None:
    for warmup in (None, 128):
        run = fakes.make_run(tmp_path, warmup_images=warmup)
        fakes.add_record(run, 256_000, {"fd_digits": 7.0})
    board = collect(*read_runs(tmp_path))
    (table,) = chosen(board, text="train.warmup_images=null").tables
    assert [row.variant for row in table.rows] == [("train.warmup_images=null",)]
    text = page.render(board, built=0.0)
    assert '["train.warmup_images","null"]' in text and "=None" not in text


def test_what_is_no_json_is_none() -> None:
    assert finite({"a": [float("nan"), 1.0], "b": float("inf")}) == {"a": [None, 1.0], "b": None}
