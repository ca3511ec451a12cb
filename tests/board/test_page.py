"""The page holds everything, loads nothing, and lets no name of a user's become markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.board import page
from launcher.board.collect import collect
from launcher.board.columns import columns, page_columns
from launcher.board.read import Reader, read_runs
from selfguide.spec.config.evaluation import Expected
from tests.board import fakes

HOSTILE = "<img src=x onerror=alert(1)>\"'`&lt;</script></title>"
LOADING = {
    "src",
    "href",
    "srcset",
    "action",
    "data",
    "poster",
    "background",
    "formaction",
    "xlink:href",
}


class Tags(HTMLParser):
    """Every start tag with its attributes, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def embedded(text: str) -> dict[str, Any]:
    """What the page's script computes with."""
    (block,) = re.findall('<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(block, parse_constant=pytest.fail)


def render(root: Path) -> str:
    return page.render(collect(*read_runs(root)), built=fakes.CLOCK)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    for experiment, fd in (("digits_dit", 7.2), ("digits_class", 5.3)):
        for seed in (0, 1):
            fakes.finished_run(tmp_path, experiment, seed, fd + seed / 10)
    waiting = fakes.make_run(tmp_path, "digits_uncond")
    fakes.add_snapshot(waiting, 64_000)
    fakes.add_failure(waiting, 128_000, "out of memory", log="Killed process 4711")
    return tmp_path


def test_nothing_is_loaded_from_anywhere(board: Path) -> None:
    run = fakes.make_run(board, "digits_dit", 9)
    fakes.add_record(run, 256_000, {"fd_digits": 7.0}, grid=Image.new("L", (8, 8), 128))
    text = render(board)
    assert "http:" not in text and "https:" not in text
    loaded = [(k, v) for _, a in Tags(text).tags for k, v in a.items() if k in LOADING]
    assert loaded
    for name, value in loaded:
        assert value and (value.startswith(("data:", "#"))), (name, value)
    assert "url(" not in text and "@import" not in text


def test_the_policy_allows_exactly_the_two_blocks(board: Path) -> None:
    text = render(board)
    (policy,) = (a["content"] for t, a in Tags(text).tags if a.get("http-equiv"))
    assert policy and "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        (block,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    attributes = {k for _, a in Tags(text).tags for k in a}
    assert "style" not in attributes and not any(k.startswith("on") for k in attributes)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    before = {tag for tag, _ in Tags(render(tmp_path)).tags}
    before |= {"img", "ul", "li", "strong", "nav", "a", "pre"}  # of the parts that come with it
    run = fakes.make_run(tmp_path, "digits_dit", 1, name=HOSTILE)
    more = {"host": HOSTILE, "message": HOSTILE, "snapshot_sha256": HOSTILE}
    fakes.add_record(run, 256_000, {"fd_digits": 7.0}, protocol={"resize": HOSTILE}, **more)
    (run.evals / f"img-{HOSTILE.replace('/', '')}.json").write_text("{")
    (tmp_path / HOSTILE.replace("/", "")).mkdir()
    lost = fakes.make_run(tmp_path, HOSTILE.replace("/", ""), 2)
    fakes.add_failure(lost, 64_000, HOSTILE, log=HOSTILE)
    text = render(tmp_path)
    parsed = Tags(text)
    assert "onerror" not in {k for _, a in parsed.tags for k in a}
    assert {tag for tag, _ in parsed.tags} <= before
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert ["train.name", HOSTILE] in [
        each for own in embedded(text)["settings"]["own"].values() for each in own
    ]
    assert all(a.get("src") != "x" for _, a in parsed.tags)
    assert HOSTILE in parsed.text, "the name is shown as it is"


def test_words_are_lowered_as_the_script_lowers_what_is_typed(tmp_path: Path) -> None:
    fakes.finished_run(tmp_path, "Straße ΣΟΦΟΣ", 0, 7.0)
    (words,) = (a["data-words"] for _, a in Tags(render(tmp_path)).tags if "data-words" in a)
    # of JavaScript's toLowerCase
    assert words is not None and words.startswith("straße σοφος label-free final")


def test_every_cell_carries_what_it_sorts_by(board: Path) -> None:
    parsed = Tags(render(board))
    sorts = [a["data-sort"] for _, a in parsed.tags if "data-sort" in a]
    assert sorts
    for value in sorts:
        assert value is not None and (value == "" or float(value) == float(value))
    assert [a["aria-sort"] for _, a in parsed.tags if "aria-sort" in a].count("ascending") == 1


def test_every_toggle_names_its_drawer(board: Path) -> None:
    tags = Tags(render(board)).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    toggles = [a for _, a in tags if "aria-controls" in a]
    assert len(toggles) == 2
    assert all(a["aria-controls"] in ids for a in toggles)


def test_charts_have_a_twin_in_numbers(board: Path) -> None:
    text = render(board)
    # of the table: over training, over GPU-hours; of each of two rows: scores, losses; the loss of the waiting run
    assert text.count("<svg") == text.count("the same numbers as a table") == 2 + 2 * 2
    assert all(a.get("aria-label") for tag, a in Tags(text).tags if tag == "svg")


def test_states_and_waiting_runs_are_shown(board: Path) -> None:
    text = " ".join(Tags(render(board)).text.split())
    for words in (
        "2 final",
        "No score yet",
        "1 to score",
        "1 not scored",
        "out of memory",
        "uses labels",
    ):
        assert words in text, words


def test_grids_are_carried_losslessly_but_only_pngs_of_a_sane_size(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    fakes.add_record(run, 256_000, {"fd_digits": 7.0}, grid=Image.effect_noise((64, 64), 50))
    (path,) = run.evals.glob("*.png")
    content = path.read_bytes()
    assert base64.b64encode(content).decode() in render(tmp_path)
    path.write_bytes(b"<svg onload=alert(1)>")
    assert "data:image" not in render(tmp_path)
    path.write_bytes(content + bytes(page.GRID_LIMIT))
    text = render(tmp_path)
    assert "data:image" not in text and path.name in text


def test_the_same_files_give_the_same_page(board: Path) -> None:
    assert render(board) == render(board)


def test_a_page_is_replaced_whole(board: Path) -> None:
    out = board / "pages" / "board.html"
    for _ in range(2):
        page.write(collect(*read_runs(board)), out, built=fakes.CLOCK)
    assert out.read_text() == render(board)
    assert [p.name for p in out.parent.iterdir()] == ["board.html"]


def test_data_of_the_script_is_what_collect_found(board: Path) -> None:
    (sheet,) = embedded(render(board))["sheets"]
    (table,) = collect(*read_runs(board)).tables
    assert (sheet["key"], sheet["metric"], sheet["higher"]) == (table.key, table.metric, False)
    for row in table.rows:
        told = sheet["rows"][row.group]
        assert row.score is not None
        assert told["scores"]["fd_digits"] == [row.score.mean, row.error]
        points = [[(images, score) for images, score, _ in each] for each in told["histories"]]
        assert points == [[(r.images, r.scores["fd_digits"]) for r in s.history] for s in row.runs]


def test_settings_shared_by_all_rows_are_carried_once(board: Path) -> None:
    settings = embedded(render(board))["settings"]
    assert ["train.batch", "128"] in settings["common"]
    assert all(
        {"experiment", "guidance.source"} == {key for key, _ in own}
        for own in settings["own"].values()
    )


def test_the_page_begins_with_the_published_score_or_the_median(board: Path) -> None:
    (table,) = collect(*read_runs(board)).tables
    assert page.asked_score(table) == pytest.approx(6.3)
    published = Expected(metric="fd_digits", value=2.27, source="a paper")
    rows = (replace(table.rows[0], expected=published), *table.rows[1:])
    assert page.asked_score(replace(table, rows=rows)) == 2.27
    assert page.asked_score(replace(table, rows=())) is None
    (cell,) = [c for c in page_columns(replace(table, rows=rows), 2.0) if c.id == "expected"]
    assert cell.text(rows[0]) == ("2.27", "+3.08") and cell.value(rows[1]) is None


def test_a_published_score_stands_behind_ours_where_a_row_has_one(board: Path) -> None:
    (table,) = collect(*read_runs(board)).tables
    published = Expected(metric="fd_digits", value=2.27, source="a paper")
    told = replace(table, rows=(replace(table.rows[0], expected=published), *table.rows[1:]))
    plain, with_it = ([column.id for column in columns(each)] for each in (table, told))
    at = with_it.index("fd_digits") + 1
    assert with_it[at] == "expected" and [*with_it[:at], *with_it[at + 1 :]] == plain
    on_page = [column.id for column in page_columns(told, 2.0)]
    assert on_page[at - 1 : at + 3] == ["fd_digits", "se", "expected", "reach_images"]
    assert "expected" not in [column.id for column in page_columns(table, 2.0)]


def test_grids_beyond_the_pages_share_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        run = fakes.make_run(tmp_path, seed=seed)
        grid = Image.effect_noise((64, 64), 50)
        fakes.add_record(run, 256_000, {"fd_digits": 7.0}, grid=grid)
    size = max(path.stat().st_size for path in tmp_path.rglob("*.png"))
    monkeypatch.setattr(page, "GRIDS_LIMIT", size + 100)
    text = render(tmp_path)
    # in the drawer and in the gallery
    assert text.count("data:image/png") == 2 and text.count("sample grid: ") == 1


def test_a_run_without_a_protocol_shows_its_loss_and_newest_samples(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    fakes.add_progress(run, 128_000, [(n, 1.0) for n in range(1280, 128_001, 1280)])
    text = render(tmp_path)
    assert "training loss" in text and "No score yet" in text


def test_an_empty_board_says_what_to_run(tmp_path: Path) -> None:
    assert "python -m launcher.submit" in render(tmp_path)


def test_a_renderer_that_keeps_drawers_gives_the_page_that_a_new_one_gives(tmp_path: Path) -> None:
    runs = [fakes.finished_run(tmp_path, "digits_dit", seed, 7.0 + seed) for seed in (0, 1)]
    runs += [fakes.finished_run(tmp_path, "digits_dit", 0, 9.0, batch=256)]
    fakes.add_record(runs[2], 192_000, {"fd_digits": 9.5}, grid=Image.effect_noise((20, 10), 9))
    renderer, reader = page.Renderer(), Reader()

    def both() -> str:
        board = collect(*reader.read(tmp_path))
        found = renderer.render(board, built=1.0)
        assert found == page.render(board, built=1.0)
        return found

    first = both()
    assert both() == first and len(renderer._kept) == 2
    # other ranks, another k, a column more, a setting more in the names of all rows
    fakes.add_record(runs[2], 256_000, {"fd_digits": 1.0}, attempt=2)
    second = both()
    assert second != first
    fakes.add_record(runs[1], 256_000, {"fd_digits": 7.5, "nmi": 0.5}, attempt=2)
    fakes.finished_run(tmp_path, "digits_dit", 0, 3.0, learning_rate=1e-4)
    assert both() != second
