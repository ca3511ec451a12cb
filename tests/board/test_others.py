"""Others' samples on the board: a place beside the rows that were measured alike, and no rank."""

from __future__ import annotations

import csv
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import selfguide.spec.others
from launcher.board import __main__ as command
from launcher.board import page, serve
from launcher.board import read as reading
from launcher.board.collect import Board, Table, collect
from launcher.board.export import encoded
from launcher.board.others import Other
from launcher.board.plain import flat_rows, of_board
from launcher.board.read import Reader, read_all
from launcher.board.views import chosen
from selfguide.spec.others import FOLDER
from selfguide.spec.records import LARGEST
from shards.errors import UserError
from tests.board import fakes

HOSTILE = "<img src=x onerror=alert(1)>\"'`&lt;</script></table>"


def board_of(runs: Path, **how: Any) -> Board:
    return collect(*read_all(runs), **how)


def only_table(runs: Path, **how: Any) -> Table:
    (table,) = board_of(runs, **how).tables
    return table


def places(others: tuple[Other, ...]) -> list[tuple[str, int | None]]:
    return [(other.name, other.place) for other in others]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two rows, 5.0 and 7.0, each ± 0.1."""
    fakes.finished_run(tmp_path, "digits_class", 0, 5.0)
    fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    return tmp_path


def test_others_measured_alike_have_places_and_leave_ranks(runs: Path) -> None:
    before = only_table(runs).rows
    for name, score in (("last", 9.0), ("first", 3.0), ("between", 6.0)):
        fakes.add_other(runs, name, score, se=0.1)
    table = only_table(runs)
    assert table.rows == before
    assert places(table.others) == [("first", 1), ("between", 2), ("last", 3)]
    assert [(o.score, o.error) for o in table.others] == [(3.0, 0.1), (6.0, 0.1), (9.0, 0.1)]
    assert table.others[0].scores == {"fd_digits": 3.0, "fd_digits_se": 0.1}


@pytest.mark.parametrize(("gap", "place"), [(0.0, 1), (0.13, 1), (0.15, 2)])
def test_place_within_the_error_of_the_difference_is_that_of_a_tie(
    tmp_path: Path, gap: float, place: int
) -> None:
    assert 0.13 < math.hypot(0.1, 0.1) < 0.15
    fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    fakes.add_other(tmp_path, "theirs", 7.0 + gap, se=0.1)
    assert places(only_table(tmp_path).others) == [("theirs", place)]


def test_place_by_a_score_of_which_more_is_better_counts_rows_with_more(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    fakes.add_record(run, 256_000, {"fd_digits": 7.0, "confident": 0.9})
    for name, confident in (("more", 0.95), ("less", 0.5)):
        fakes.add_other(tmp_path, name, 7.0, scores={"confident": confident})
    fakes.add_other(tmp_path, "unknown", 1.0)
    table = only_table(tmp_path, metric="confident")
    assert places(table.others) == [("more", 1), ("less", 2), ("unknown", None)]


def test_place_among_rows_without_a_rank_does_not_count_them(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    nets = [{"net": "fd_digits", "sha256": fakes.PROTOCOL.feature_sha256, "use": "selected"}]
    fakes.add_record(run, 256_000, {"fd_digits": 1.0}, nets=nets)
    fakes.add_other(tmp_path, "theirs", 7.0)
    table = only_table(tmp_path)
    assert [row.rank for row in table.rows] == [None]
    assert places(table.others) == [("theirs", None)]


def test_others_stand_in_every_table_that_differs_in_drawing_alone(runs: Path) -> None:
    run = fakes.make_run(runs, "digits_uncond")
    fakes.add_record(run, 256_000, {"fd_digits": 4.0}, protocol={"g": 1.5, "steps": 10, "seed": 7})
    fakes.add_other(runs, "theirs", 6.0)
    tables = board_of(runs).tables
    assert [(len(t.rows), places(t.others)) for t in tables] == [
        (2, [("theirs", 2)]), (1, [("theirs", 2)]),
    ]  # fmt: skip


def test_others_measured_like_no_run_have_a_table_of_their_own(runs: Path) -> None:
    fakes.add_other(runs, "theirs", 6.0, protocol={"samples": 10_000})
    fakes.add_other(runs, "alike", 5.0, protocol={"samples": 10_000})
    fakes.add_other(runs, "elsewhere", 1.0, protocol={"samples": 10_000, "reference": "b0" * 6})
    of_runs, *own = board_of(runs).tables
    assert len(of_runs.rows) == 2 and of_runs.others == ()
    assert of_runs.differs == ("reference", "samples")
    assert [t.rows for t in own] == [(), ()]
    assert {tuple(places(t.others)) for t in own} == {
        (("alike", None), ("theirs", None)),
        (("elsewhere", None),),
    }
    assert {page.summary(t.protocol) for t in own} == {"fd_digits v1 · 10,000 samples"}
    assert len({t.key for t in (of_runs, *own)}) == 3


def test_others_without_any_run_make_a_board(tmp_path: Path) -> None:
    fakes.add_other(tmp_path, "theirs", 6.0)
    board = board_of(tmp_path)
    assert [places(t.others) for t in board.tables] == [[("theirs", None)]]
    assert board.heard == fakes.CLOCK and board.waiting == ()
    assert "theirs" in page.render(board, built=fakes.CLOCK)


def test_others_in_any_order_of_files_give_the_same_board(runs: Path) -> None:
    for name in ("b", "a", "c"):
        fakes.add_other(runs, name, 6.0)
    read = read_all(runs)
    backwards = read._replace(others=read.others[::-1])
    assert collect(*backwards) == collect(*read)


def test_metric_that_others_alone_have_is_known(runs: Path) -> None:
    fakes.add_other(runs, "theirs", 6.0, scores={"kid": 0.1})
    assert places(only_table(runs, metric="kid").others) == [("theirs", None)]
    with pytest.raises(UserError, match="kid"):
        board_of(runs, metric="kidd")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"schema": 1}', "\x00", "changed"])
def test_damaged_file_of_others_is_named_and_hides_nothing(
    runs: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fakes.add_other(runs, "damaged", 6.0)
    fakes.add_other(runs, "whole", 6.5)
    values = json.loads(path.read_text()) | {"scores": {"fd_digits": math.nan}}
    path.write_text(json.dumps(values) if text == "changed" else text)
    (runs / FOLDER / "folder.json").mkdir()
    board = board_of(runs)
    (table,) = board.tables
    assert len(table.rows) == 2 and places(table.others) == [("whole", 2)]
    assert len(board.problems) == 2 and any(str(path) in told for told in board.problems)
    assert command.main(["--runs", str(runs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert len(told["problems"]) == 2
    assert path.name in (runs / "board.html").read_text()


@pytest.mark.parametrize("score", [0.0, -LARGEST, LARGEST, 5e-324])
def test_scores_of_others_of_any_size_are_shown(runs: Path, score: float) -> None:
    fakes.add_other(runs, "theirs", score, se=abs(score))
    assert command.main(["--runs", str(runs)]) == 0


# ---- readers -----------------------------------------------------------------------------------------


def test_reader_that_reads_again_opens_only_files_of_others_that_changed(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    paths = [fakes.add_other(runs, name, 6.0) for name in ("a", "b")]
    for path in paths:
        os.utime(path, (1.75e9, 1.75e9))
    opened: list[str] = []
    real = selfguide.spec.others.read_other_file
    monkeypatch.setattr(
        reading, "read_other_file", lambda path: opened.append(str(path)) or real(path)
    )
    reader = Reader()
    first = reader.read_all(runs)
    assert sorted(opened) == sorted(map(str, paths))
    opened.clear()
    assert reader.read_all(runs) == first and opened == []
    fakes.add_other(runs, "b", 5.0)
    again = reader.read_all(runs)
    assert sorted(o.scores["fd_digits"] for o in again.others) == [5.0, 6.0]
    assert opened == [str(paths[1])]
    paths[0].unlink()
    assert [o.name for o in reader.read_all(runs).others] == ["b"]


def test_server_shows_others_that_came_since(runs: Path) -> None:
    live = serve.Live(runs, None, every_s=0.0)
    before = live.seen()
    assert live.seen() is before
    fakes.add_other(runs, "theirs", 6.0)
    after = live.seen()
    assert after.tag != before.tag and b"theirs" in after.page and b"theirs" not in before.page
    (table,) = of_board(after.board)["tables"]
    assert [other["name"] for other in table["others"]] == ["theirs"]


# ---- what is shown -----------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The start tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(runs: Path) -> Elements:
    return Elements(page.render(board_of(runs), built=fakes.CLOCK))


@pytest.mark.parametrize("protocol", [None, {"samples": 10_000}, {"resize": HOSTILE}])
def test_page_with_hostile_names_of_others_keeps_them_text(
    runs: Path, protocol: dict[str, Any] | None
) -> None:
    fakes.add_other(runs, "plain", 6.0, se=0.1, protocol=protocol, note="plain")
    before = rendered(runs)
    given = {"note": HOSTILE, "host": HOSTILE, "samples": HOSTILE, "stamp": HOSTILE}
    fakes.add_other(runs, HOSTILE, 6.0, se=0.1, protocol=protocol, **given)
    after = rendered(runs)
    assert {tag for tag, _ in after.tags} == {tag for tag, _ in before.tags}
    assert after.text.count(HOSTILE) >= 4
    assert not any(key.startswith("on") for _, attrs in after.tags for key in attrs)


def test_page_says_place_score_note_and_file_of_others_in_a_table_with_headings(runs: Path) -> None:
    fakes.add_other(runs, "ADM-G", 6.0, se=0.1, note="guidance 1.5", samples="adm_g.npz")
    found = rendered(runs)
    (table,) = (i for i, (tag, a) in enumerate(found.tags) if a.get("class") == "others")
    inside = found.tags[table : table + 20]
    assert inside[1][0] == "caption"
    assert [a.get("scope") for tag, a in inside if tag == "th"] == ["col"] * 6 + ["row"]
    for said in ("ADM-G", "6.00", "± 0.10", "guidance 1.5", "adm_g.npz", "2026-09-21", "node2"):
        assert said in found.text, said


def test_page_of_others_alone_says_how_they_were_measured_and_needs_no_script(
    tmp_path: Path,
) -> None:
    fakes.add_other(tmp_path, "theirs", 6.0)
    found = rendered(tmp_path)
    assert "fd_digits v1 · 5,000 samples" in found.text and "No runs yet" not in found.text
    assert not any(a.get("class") == "sheet" for _, a in found.tags)


def test_terminal_has_lines_of_others_below_their_table(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.add_other(runs, "ADM-G", 6.0, se=0.1, note="[bold]guidance 1.5[/bold]")
    fakes.add_other(runs, "alone", 3.0, protocol={"samples": 10_000})
    assert command.main(["ls", "--runs", str(runs)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (theirs,) = (line for line in lines if line.startswith("ADM-G"))
    assert "place 2" in theirs and "6.00 ± 0.10" in theirs and "[bold]guidance 1.5" in theirs
    assert lines.index(theirs) > max(i for i, line in enumerate(lines) if "digits_dit" in line)
    (own,) = (i for i, line in enumerate(lines) if "10,000 samples" in line)
    assert any(line.startswith("alone") for line in lines[own:])


def test_json_of_a_table_holds_its_others(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.add_other(runs, "ADM-G", 6.0, note="guided")
    assert command.main(["ls", "--runs", str(runs), "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["tables"]
    assert len(table["rows"]) == 2
    assert table["others"] == [
        {
            "name": "ADM-G", "note": "guided", "place": 2, "score": 6.0, "error": None, "scores": {"fd_digits": 6.0},
            "when": fakes.CLOCK, "host": "node2", "samples": "theirs.npz", "stamp": "5a",
        }
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ADM-G", "=cmd|' /C calc'!A0"])
def test_export_holds_others_behind_the_rows_of_their_table(
    runs: Path, tmp_path: Path, name: str
) -> None:
    fakes.add_other(runs, name, 6.0, se=0.1)
    rows = flat_rows(board_of(runs))
    assert [row["experiment"] for row in rows] == ["digits_class", "digits_dit", name]
    last = rows[-1]
    assert (last["states"], last["score"], last["se"], last["place"]) == ("others'", 6.0, 0.1, 2)
    assert last["rank"] is None and last["scores.fd_digits"] == 6.0
    assert json.loads(encoded(rows, "json")) == rows
    told = list(csv.DictReader(io.StringIO(encoded(rows, "csv").decode())))
    assert not told[-1]["experiment"].startswith("=")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "rows.parquet").write_bytes(encoded(rows, "parquet"))
    assert parquet.read_table(tmp_path / "rows.parquet").to_pylist() == rows


@pytest.mark.parametrize(
    ("text", "rows", "others"),
    [
        ("", ["digits_class", "digits_dit"], [("ADM-G", 2), ("DiT", 2)]),
        ("adm", [], [("ADM-G", None)]),
        ("dit", ["digits_dit"], [("DiT", 1)]),
        ("-adm", ["digits_class", "digits_dit"], [("DiT", 2)]),
        ("experiment=dit", [], [("DiT", None)]),
        ("seed=0", ["digits_class", "digits_dit"], []),
        ("fd_digits<8", ["digits_class", "digits_dit"], []),
        ("nobody", [], []),
    ],
)
def test_filter_looks_at_names_of_others_and_places_them_among_the_rows_left(
    runs: Path, text: str, rows: list[str], others: list[tuple[str, int | None]]
) -> None:
    fakes.add_other(runs, "ADM-G", 6.0, note="dit")
    fakes.add_other(runs, "DiT", 6.5)
    tables = chosen(board_of(runs), text=text).tables
    assert [row.experiment for t in tables for row in t.rows] == rows
    assert [each for t in tables for each in places(t.others)] == others


def test_view_of_a_board_with_tables_of_others_alone_is_sorted_and_chosen(runs: Path) -> None:
    fakes.add_other(runs, "alone", 3.0, protocol={"samples": 10_000})
    board = board_of(runs)
    own = next(t for t in board.tables if not t.rows)
    assert chosen(board, protocol=own.key[:8]).tables == (own,)
    assert len(chosen(board, sort="images").tables) == 2
