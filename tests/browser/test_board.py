"""The page in a real browser: sorting equals Python's, drawers, filter, keyboard, no request, dark mode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from launcher.board import page
from launcher.board.collect import Row, Table, collect
from launcher.board.columns import Column, columns
from launcher.board.read import read_runs
from tests.board import fakes
from tests.browser.conftest import requested

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """A table with ties, missing scores, several seeds, several variants, and a second protocol beside it."""
    for seed in (0, 1, 2):
        fakes.finished_run(tmp_path, "digits_dit", seed, 7.2 + seed / 10)
        fakes.finished_run(tmp_path, "digits_class", seed, 5.3)
    fakes.finished_run(tmp_path, "digits_dit", 0, 10.25, learning_rate=1e-4)
    fakes.finished_run(tmp_path, "digits_uncond", 0, 121.4)
    run = fakes.make_run(tmp_path, "Zeta", 0)
    grid = Image.effect_noise((572, 140), 50)
    fakes.add_record(run, 64_000, {"fd_digits": 9.0, "nmi": 0.65, "ari": 0.5}, grid=grid)
    run = fakes.make_run(tmp_path, "alpha", 0)
    fakes.add_record(run, 64_000, {"nmi": 0.1})
    fakes.add_record(run, 64_000, {"fd_digits": 2.0}, protocol={"g": 2.0})
    board = collect(*read_runs(tmp_path))
    page.write(board, tmp_path / "board.html", built=fakes.CLOCK)
    return board.tables[0]


def expected(table: Table, column: Column, order: str) -> list[str]:
    """Python's order: by value, missing last either way, equal ones in the order of the ranking."""
    sign = 1 if order == "ascending" else -1

    def key(row: Row) -> tuple[bool, float]:
        value = column.value(row)
        return value is None, 0.0 if value is None else sign * value

    return [row.group for row in sorted(table.rows, key=key)]


def shown(browser: Chrome) -> list[str]:
    script = (
        "return Array.from(document.querySelector('table.board').tBodies)"
        ".filter(b => b.getBoundingClientRect().height > 0).map(b => b.dataset.group)"
    )
    return browser.execute_script(script)


def find(browser: Chrome, css: str) -> list[WebElement]:
    return browser.find_elements("css selector", css)


def test_every_header_sorts_as_python_does(opened: Chrome, tmp_path: Path, table: Table) -> None:
    opened.get((tmp_path / "board.html").as_uri())
    assert shown(opened) == [row.group for row in table.rows]
    for i, column in enumerate(columns(table)):
        button = find(opened, f"table.board th button[data-column='{i}']")[0]
        for _ in range(2):
            button.click()
            headers = find(opened, "table.board")[0].find_elements(
                "css selector", "thead th[aria-sort]"
            )
            orders = [h.get_attribute("aria-sort") for h in headers]
            assert [o != "none" for o in orders] == [j == i for j in range(len(orders))]
            assert shown(opened) == expected(table, column, str(orders[i])), (column.id, orders[i])
        first = "descending" if column.best_high else "ascending"
        if column.id != "rank":  # it is sorted when the page opens
            assert button.get_attribute("data-first") == first != orders[i]


def test_drawers_open_by_mouse_and_keyboard(opened: Chrome, tmp_path: Path, table: Table) -> None:
    from selenium.webdriver.common.keys import Keys

    opened.get((tmp_path / "board.html").as_uri())
    drawers, toggles = find(opened, "tr.drawer"), find(opened, ".toggle")
    assert len(drawers) == len(toggles) and not any(d.is_displayed() for d in drawers)
    toggles[1].send_keys(Keys.ENTER)
    assert [d.is_displayed() for d in drawers[:3]] == [False, True, False]
    assert toggles[1].get_attribute("aria-expanded") == "true"
    assert find(opened, "tr.drawer svg.chart")[0].size["height"] == 0
    assert drawers[1].find_elements("css selector", "svg.chart")[0].size["height"] > 100
    find(opened, "tr.row td")[0].click()  # anywhere on the row
    assert drawers[0].is_displayed()
    toggles[1].send_keys(Keys.SPACE)
    assert not drawers[1].is_displayed()
    find(opened, "#expand")[0].click()
    assert all(d.is_displayed() for d in drawers)
    assert all("snapshot" in d.text for d in drawers)


def test_the_filter_leaves_the_rows_that_hold_every_word(
    opened: Chrome, tmp_path: Path, table: Table
) -> None:
    from selenium.webdriver.common.keys import Keys

    opened.get((tmp_path / "board.html").as_uri())
    find(opened, "body")[0].send_keys("/")
    box = opened.switch_to.active_element
    assert box.get_attribute("id") == "filter"
    box.send_keys("DIGITS_dit final")
    assert shown(opened) == [row.group for row in table.rows if row.experiment == "digits_dit"]
    assert find(opened, "#count")[0].text.startswith("2 of ")
    box.send_keys(Keys.ESCAPE)
    assert shown(opened) == [row.group for row in table.rows]


def test_no_request_leaves_the_file(opened: Chrome, tmp_path: Path, table: Table) -> None:
    address = (tmp_path / "board.html").as_uri()
    opened.get(address)
    find(opened, "#expand")[0].click()
    pictures = opened.execute_script("return Array.from(document.images).map(i => i.naturalWidth)")
    assert pictures == [572, 572]
    asked = requested(opened)
    assert asked[0] == address
    assert all(a == address or a.startswith("data:") for a in asked)


def test_nothing_hostile_runs(opened: Chrome, tmp_path: Path) -> None:
    name = "<img src=x onerror=document.title='owned'>"
    run = fakes.make_run(tmp_path, name, 0, note="</script><script>document.title='owned'</script>")
    fakes.add_record(run, 64_000, {"fd_digits": 9.0}, host=name)
    page.write(collect(*read_runs(tmp_path)), tmp_path / "board.html", built=fakes.CLOCK)
    opened.get((tmp_path / "board.html").as_uri())
    assert opened.title == "Selfguide leaderboard"
    assert find(opened, ".toggle")[0].text == name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_reader(
    opened: Chrome, tmp_path: Path, table: Table, scheme: str
) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    opened.get((tmp_path / "board.html").as_uri())
    back = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in back.removeprefix("rgb(").removesuffix(")").split(",")]
    assert (sum(levels) < 150) if scheme == "dark" else (sum(levels) > 600)


@pytest.mark.parametrize("width", [390, 1300])
def test_the_page_fits_its_window(opened: Chrome, tmp_path: Path, table: Table, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened.get((tmp_path / "board.html").as_uri())
    find(opened, "#expand")[0].click()
    wide = opened.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width, "wide tables scroll inside their own frame"


def test_ages_are_told_and_the_moment_kept(opened: Chrome, tmp_path: Path, table: Table) -> None:
    opened.get((tmp_path / "board.html").as_uri())
    for time in find(opened, ".age time"):
        assert time.text.endswith("ago") or time.text == "just now"
        assert "UTC" in str(time.get_attribute("title"))
