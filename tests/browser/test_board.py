"""The page in a real browser, from a file, with no network: each thing that a reader can do on it."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from launcher.board import filter as grammar
from launcher.board import page
from launcher.board.collect import Row, Table, collect
from launcher.board.columns import Column, page_columns
from launcher.board.compare import standard_error
from launcher.board.reach import reach
from launcher.board.read import read_all, read_runs
from launcher.board.sweeps import recipe_words
from launcher.compose import compose
from selfguide.spec.config.evaluation import Expected
from selfguide.spec.files import to_yaml
from selfguide.spec.records import records
from selfguide.spec.run import write_record
from tests.board import fakes
from tests.browser.conftest import requested

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

HOSTILE = "<img src=x onerror=document.title='owned'>"


def add_curves(root: Path) -> None:
    """NMI and use of groups in the metrics of the run that is told first."""
    (run,) = (
        path.parent.parent for path in root.rglob("train-1.jsonl") if "digits_dit" in str(path)
    )
    lines = [
        {"images": n, "loss": 1.0, "nmi": n / 256_000, "perplexity": 0.5}
        for n in range(1280, 256_001, 12_800)
    ]
    (run / "metrics" / "train-1.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ties, missing scores, several seeds and variants, sweeps, a long name, and runs that have no score."""
    root = tmp_path_factory.mktemp("runs")
    grid = Image.effect_noise((572, 140), 50)
    run = fakes.finished_run(root, "digits_dit", 0, 7.2)
    add_curves(root)
    for g in (1.5, 2.0):
        fakes.add_record(run, 256_000, {"fd_digits": 5.0 + g}, protocol={"g": g})
    fakes.add_record(run, 256_000, {"fd_digits": 20.0}, protocol={"steps": 10}, nfe=10)
    for seed in (0, 1, 2):
        if seed:
            fakes.finished_run(root, "digits_dit", seed, 7.2 + seed / 10)
        fakes.finished_run(root, "digits_class", seed, 5.3)
    fakes.finished_run(root, "digits_dit", 0, 10.25, learning_rate=1e-4)
    fakes.finished_run(root, "digits_uncond", 0, 121.4)
    fakes.finished_run(root, "long_" * 40, 0, 130.0)
    run = fakes.make_run(root, "Zeta", 0)
    fakes.add_record(run, 64_000, {"fd_digits": 9.0, "nmi": 0.65, "ari": 0.5}, grid=grid)
    run = fakes.make_run(root, "alpha", 0)
    fakes.add_record(run, 64_000, {"nmi": 0.1, "fd_digits": float("nan")})
    fakes.add_progress(fakes.make_run(root, "waits", 0), 64_000, [(1280, 1.0), (2560, 0.5)])
    return root


@pytest.fixture(scope="module")
def table(root: Path) -> Table:
    board = collect(*read_runs(root))
    page.write(board, root / "board.html", built=fakes.CLOCK)
    return max(board.tables, key=lambda table: len(table.rows))


@pytest.fixture
def at(opened: Chrome, root: Path, table: Table) -> Iterator[Chrome]:
    """The browser on the page, at the table of most rows."""
    opened.get(f"{(root / 'board.html').as_uri()}#p={table.key}")
    yield opened


def shown(browser: Chrome) -> list[str]:
    script = (
        "return Array.from(document.querySelector('.sheet:not([hidden]) table.board').tBodies)"
        ".filter(b => b.getBoundingClientRect().height > 0).map(b => b.dataset.group)"
    )
    return browser.execute_script(script)


def find(browser: Chrome, css: str) -> list[WebElement]:
    return browser.find_elements("css selector", css)


def seen(browser: Chrome, css: str) -> WebElement:
    return next(each for each in find(browser, css) if each.is_displayed())


def fill(browser: Chrome, css: str, text: str) -> None:
    """Puts text into a field as typing does, in one step."""
    script = (
        "const [field, text] = arguments; field.value = text; "
        "field.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    browser.execute_script(script, seen(browser, css), text)


def cells(browser: Chrome, id: str) -> list[str]:
    script = (
        "return Array.from(document.querySelectorAll(`.sheet:not([hidden]) tr.row > [data-id='${arguments[0]}']`))"
        ".map(c => c.dataset.sort)"
    )
    return browser.execute_script(script, id)


def expected(table: Table, column: Column, order: str) -> list[str]:
    """Python's order: by value, missing last either way, equal ones in the order of the ranking."""
    sign = 1 if order == "ascending" else -1

    def key(row: Row) -> tuple[bool, float]:
        value = column.value(row)
        return value is None, 0.0 if value is None else sign * value

    return [row.group for row in sorted(table.rows, key=key)]


def test_every_header_sorts_as_python_does(at: Chrome, table: Table) -> None:
    assert shown(at) == [row.group for row in table.rows]
    for column in page_columns(table, page.asked_score(table)):
        head = seen(at, f"thead th[data-id='{column.id}']")
        for _ in range(2):
            head.find_element("css selector", "button").click()
            order = str(head.get_attribute("aria-sort"))
            sorting = find(at, ".sheet:not([hidden]) thead th:not([aria-sort='none'])[aria-sort]")
            assert [each.get_attribute("data-id") for each in sorting] == [column.id]
            assert shown(at) == expected(table, column, order), (column.id, order)
        if column.id != "rank":  # it is sorted when the page opens
            assert order != ("descending" if column.best_high else "ascending")


def test_drawers_open_by_mouse_and_keyboard(at: Chrome) -> None:
    from selenium.webdriver.common.keys import Keys

    toggles = find(at, ".sheet:not([hidden]) .toggle")
    assert not find(at, "tr.drawer:not([hidden])")
    toggles[1].send_keys(Keys.ENTER)
    assert toggles[1].get_attribute("aria-expanded") == "true"
    (drawer,) = find(at, "tr.drawer:not([hidden])")
    assert drawer.get_attribute("id") == toggles[1].get_attribute("aria-controls")
    assert drawer.find_element("css selector", "svg.chart").size["height"] > 100
    for words in ("snapshot", "folder", "config of these runs"):
        assert words in drawer.text
    listed = drawer.find_elements("css selector", ".settings dt")
    assert "train.batch" in [each.get_attribute("textContent") for each in listed]
    seen(at, "tr.row td.number").click()  # anywhere on the row
    assert toggles[0].get_attribute("aria-expanded") == "true"
    toggles[1].send_keys(Keys.ESCAPE)
    assert not drawer.is_displayed()
    seen(at, "#expand").click()
    assert len([d for d in find(at, "tr.drawer") if d.is_displayed()]) == len(toggles)


def test_filters_leave_the_rows_that_fit(at: Chrome, table: Table) -> None:
    from selenium.webdriver.common.keys import Keys

    find(at, "body")[0].send_keys("/")
    box = at.switch_to.active_element
    assert box.get_attribute("id") == "filter"
    box.send_keys("DIGITS_dit final")
    assert shown(at) == [row.group for row in table.rows if row.experiment == "digits_dit"]
    assert find(at, "#count")[0].text.startswith("2 of ")
    box.send_keys(Keys.ESCAPE)
    assert shown(at) == [row.group for row in table.rows]
    below = [row.group for row in table.rows if row.score and row.score.mean < 9.5]
    for text, wanted in (
        ("fd_digits<9.5", below),
        ("-digits fd_digits<0.1k", [r.group for r in table.rows if r.experiment == "Zeta"]),
        (
            "train.learning_rate=0.0001",
            [r.group for r in table.rows if "0.0001" in "".join(r.variant)],
        ),
        ("experiment~zeta", [r.group for r in table.rows if r.experiment == "Zeta"]),
        ("experiment=zeta", [r.group for r in table.rows if r.experiment == "Zeta"]),
        ("seed=2", [r.group for r in table.rows if r.seeds == 3]),
        ("labels=used seed!=7", [r.group for r in table.rows if not r.label_free]),
        ("images!=256k", [r.group for r in table.rows if r.images != 256_000]),
        ("-seed!=2", [r.group for r in table.rows if r.seeds == 3]),
        ("images~64000", [r.group for r in table.rows if r.images == 64_000]),
        # what every object of a script has is no setting of a row
        ("constructor=1", []),
        ("digits toString~native", []),
    ):
        fill(at, "#filter", text)
        assert shown(at) == wanted, text
    fill(at, "#filter", "")
    find(at, "#by-column")[0].click()
    fill(at, "[data-filter='fd_digits']", "<9.5")
    fill(at, "[data-filter='experiment']", "DIT")
    assert shown(at) == [
        row.group for row in table.rows if row.group in below and "dit" in row.experiment
    ]


def test_terms_mean_on_the_page_what_they_mean_in_commands(at: Chrome, table: Table) -> None:
    keys = ("images", "seed", "experiment", "train.batch", "state", "labels", "fd_digits", "nmi")
    values = ("256k", "64000", "0,1", "digits_dit,zeta", "dit", "final", "used", "7.3", "9")
    signs = ("=", "!=", "~", "!~", "<", ">=")
    terms = [
        f"{minus}{key}{sign}{value}"
        for minus, key, sign, value in itertools.product(("", "-"), keys, signs, values)
        if sign not in ("<", ">=") or grammar.number(value) is not None
    ]
    found = at.execute_script(
        "const sheet = sheets.find((each) => each.key === arguments[0]);"
        "return arguments[1].map((text) => sheet.rows.filter((row) => terms(text).every((holds) => holds(row)))"
        ".map((row) => row.group))",
        table.key,
        terms,
    )
    known = [(row.group, grammar.facts(table, row)) for row in table.rows]
    for text, groups in zip(terms, found, strict=True):
        (term,) = grammar.parse(text)
        assert groups == [group for group, facts in known if term.holds(facts)], text


def test_filters_look_at_the_name_of_others_samples(opened: Chrome, tmp_path: Path) -> None:
    """As they do in commands: what is left of nothing is hidden, on a table of runs and where others stand alone."""
    fakes.finished_run(tmp_path, "digits_dit", 0, 7.2)
    names = ("ADM-G", "U-ViT-H/2 <b>", "ours")
    for score, name in enumerate(names, 6):
        fakes.add_other(tmp_path, name, float(score))
    fakes.add_other(tmp_path, "ADM-G", 9.0, protocol={"samples": 77})
    board = collect(*read_all(tmp_path))
    page.write(board, tmp_path / "board.html", built=fakes.CLOCK)
    opened.get((tmp_path / "board.html").as_uri())
    for text in (
        *("", "adm", "-adm", "experiment=adm-g", "experiment!=adm-g,ours", "experiment~u-vit", "-experiment~ours"),
        *("digits", "-digits", "seed=0", "seed!=0", "train.batch=128", "fd_digits<9", "adm ours", '"/2 <b>"'),
    ):  # fmt: skip
        fill(opened, "#filter", text)
        terms = grammar.parse(text)
        wanted = [
            [other.name for other in table.others if grammar.keeps(terms, other)]
            for table in board.tables
        ]
        places = find(opened, ".sheet .samples-of-others, .alone")
        assert len(places) == len(board.tables) == 2
        for place, left in zip(places, wanted, strict=True):
            heads = place.find_elements("css selector", "tbody th")
            assert [each.text for each in heads if each.is_displayed()] == left, text
            assert place.is_displayed() == bool(left), text


def test_k_gives_what_python_finds(at: Chrome, table: Table) -> None:
    for k in (page.asked_score(table), 14.0, 0.1):
        if k != page.asked_score(table):
            fill(at, "#k", str(k))
        assert k is not None
        found = [reach(row, table.metric, k) for row in table.rows]
        told = [float(each) if each else None for each in cells(at, "reach_images")]
        assert told == [each.images for each in found]
        assert [bool(x) for x in cells(at, "reach_hours")] == [
            each.gpu_hours is not None for each in found
        ]


def test_the_address_holds_the_state(at: Chrome, root: Path, table: Table) -> None:
    seen(at, "thead th[data-id='fd_digits'] button").click()
    fill(at, "#filter", "digits")
    seen(at, "thead th[data-id='seeds'] button").click()
    seen(at, ".toggle").click()
    find(at, "#picker summary")[0].click()
    seen(at, "#columns input[value='confident']").click()
    group = shown(at)[0]
    told = at.current_url.split("#")[1]
    for part in ("q=digits", "sort=seeds%3Adescending", f"open={group}", "hide=confident"):
        assert part in told
    order = shown(at)
    at.get("about:blank")
    at.get(f"{(root / 'board.html').as_uri()}#{told}")
    assert shown(at) == order and find(at, "#filter")[0].get_attribute("value") == "digits"
    assert seen(at, "tr.drawer:not([hidden])")
    assert not any(h.is_displayed() for h in find(at, "th[data-id='confident']"))
    seen(at, "thead th[data-id='experiment'] button").click()
    assert shown(at) != order
    at.back()
    assert shown(at) == order
    at.forward()
    assert shown(at) != order


def test_one_protocol_is_shown_at_a_time(at: Chrome, table: Table) -> None:
    sections = find(at, "section.sheet")
    assert [s.get_attribute("data-protocol") for s in sections if s.is_displayed()] == [table.key]
    at.execute_script(
        "const s = document.getElementById('protocol'); s.value = 'all'; s.dispatchEvent(new Event('change'))"
    )
    assert len(sections) == 4 and all(s.is_displayed() for s in sections)
    at.back()
    assert [s.get_attribute("data-protocol") for s in sections if s.is_displayed()] == [table.key]


def test_rows_are_compared_by_difference(at: Chrome, table: Table) -> None:
    from selenium.webdriver.common.keys import Keys

    button = find(at, "#compare")[0]
    find(at, "body")[0].send_keys("jxjx")
    assert button.text == "Compare 2" and button.is_enabled()
    find(at, "body")[0].send_keys("c")
    assert find(at, "#comparison")[0].is_displayed()
    first, other = table.rows[:2]
    assert first.score and other.score
    gap = find(at, "#comparison tbody tr:first-child small")[0].text
    error = (first.error**2 + other.error**2) ** 0.5
    assert gap == f"+{other.score.mean - first.score.mean:.2f} ± {error:.2f}"
    config = find(at, ".compared")[1].text
    assert "guidance.source" in config and "train.batch" not in config
    at.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not find(at, "#comparison")[0].is_displayed()
    marks = ",".join(row.group for row in table.rows)
    at.get(f"{at.current_url.split('#')[0]}#p={table.key}&mark={marks}&compare=1")
    at.refresh()
    assert len(find(at, "#comparison thead")[0].find_elements("css selector", "th")) == min(
        8, len(table.rows)
    )


def test_every_chart_has_a_table_with_its_numbers(at: Chrome) -> None:
    figures = [f for f in find(at, ".below .plot") if f.is_displayed()]
    titles = " ".join(f.find_element("css selector", "figcaption").text for f in figures)
    for words in (
        "over training",
        "GPU-hours",
        "network evaluations",
        "guidance",
        "agreement",
        "use of",
    ):
        assert words in titles
    for each in figures:
        assert each.find_element("css selector", "svg").get_attribute("aria-label")
        each.find_element("css selector", "summary").click()
        assert each.find_element("css selector", "td").is_displayed()


def test_runs_without_a_score_show_their_loss(at: Chrome) -> None:
    find(at, ".waiting .more > summary")[0].click()
    assert find(at, ".waiting svg")[0].size["height"] > 50


def test_no_request_leaves_the_file(at: Chrome, root: Path) -> None:
    seen(at, "#expand").click()
    script = "return Array.from(document.images, i => [i.complete, i.naturalWidth])"
    assert all(width == 572 for done, width in at.execute_script(script) if done)
    address = (root / "board.html").as_uri()
    asked = [each.split("#")[0] for each in requested(at)]
    assert asked[0] == address
    assert all(a == address or a.startswith("data:") for a in asked)


def test_nothing_hostile_runs(opened: Chrome, tmp_path: Path) -> None:
    run = fakes.make_run(
        tmp_path, HOSTILE, 0, note="</script><script>document.title='owned'</script>"
    )
    fakes.add_record(run, 64_000, {"fd_digits": 9.0}, host=HOSTILE)
    other = fakes.make_run(tmp_path, "<script>alert(1)<script>", 0)
    fakes.add_record(other, 64_000, {"fd_digits": 9.5})
    groups = ",".join(row.group for row in collect(*read_runs(tmp_path)).tables[0].rows)
    page.write(collect(*read_runs(tmp_path)), tmp_path / "board.html", built=fakes.CLOCK)
    opened.get((tmp_path / "board.html").as_uri() + f"#open=all&mark={groups}&compare=1")
    assert opened.title == "Selfguide leaderboard"
    assert HOSTILE in [each.get_attribute("textContent") for each in find(opened, ".toggle")]
    assert HOSTILE in find(opened, "#comparison")[0].text


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1440), ("dark", 768), ("light", 390), ("dark", 390)]
)
def test_the_page_fits_and_axe_finds_nothing_serious(
    opened: Chrome, root: Path, table: Table, scheme: str, width: int
) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    groups = [row.group for row in table.rows[:2]]
    state = f"p={table.key}&open={','.join(groups)}&mark={','.join(groups)}&f.fd_digits=%3C100"
    for extra in ("", "&compare=1"):
        opened.get("about:blank")
        opened.get(f"{(root / 'board.html').as_uri()}#{state}{extra}")
        wide = opened.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, "wide tables scroll inside their own frame"
        assert serious(opened) == []
    back = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in re.findall(r"\d+", back)]
    assert (sum(levels) < 150) if scheme == "dark" else (sum(levels) > 600)


def serious(browser: Chrome) -> list[Any]:
    """What axe-core finds serious or critical: rule, and where."""
    pytest.importorskip("axe_playwright_python")
    axe = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    # outside the page's own policy, which lets no script in
    run = f"{axe}; axe.run().then(found => JSON.stringify([found.passes.length, found.violations]))"
    told = browser.execute_cdp_cmd(
        "Runtime.evaluate", {"expression": run, "awaitPromise": True, "returnByValue": True}
    )
    passes, violations = json.loads(told["result"]["value"])
    assert passes > 10
    return [
        (v["id"], v["nodes"][0]["html"][:200])
        for v in violations
        if v["impact"] in ("serious", "critical")
    ]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a board over `tmp_path` that reads at every request."""
    uvicorn = pytest.importorskip("uvicorn")
    serve = pytest.importorskip("launcher.board.serve")
    live = serve.Live(tmp_path, None, 0.0)
    config = uvicorn.Config(serve.application(live), log_level="error")
    running = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        running.should_exit = True
        thread.join(timeout=30)


def test_a_served_page_says_when_there_is_a_newer_one(
    opened: Chrome, tmp_path: Path, server: str
) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    fakes.finished_run(tmp_path, "digits_dit", 0, 7.2)
    opened.get(f"{server}#q=digits")
    assert len(shown(opened)) == 1 and not find(opened, "#reload")[0].is_displayed()
    # the script's first question must have its answer
    script = "return performance.getEntriesByType('resource').map(each => each.name)"
    asked = WebDriverWait(opened, 60).until(lambda browser: browser.execute_script(script))
    assert set(asked) == {server}
    fakes.finished_run(tmp_path, "digits_class", 0, 5.3)

    def newer(browser: Chrome) -> bool:
        browser.execute_script("dispatchEvent(new Event('focus'))")
        return find(browser, "#reload")[0].is_displayed()

    WebDriverWait(opened, 60).until(newer)
    find(opened, "#reload")[0].click()
    script = "return document.getElementById('filter')?.value === 'digits' && document.querySelectorAll('.row').length"
    assert WebDriverWait(opened, 60).until(lambda browser: browser.execute_script(script)) == 2


def test_many_rows_are_laid_out_when_asked_for(opened: Chrome, tmp_path: Path) -> None:
    for number in range(103):
        run = fakes.make_run(tmp_path, "digits_dit", 0, note=number)
        fakes.add_record(run, 64_000, {"fd_digits": 300.0 - number})
    (table,) = collect(*read_runs(tmp_path)).tables
    page.write(collect(*read_runs(tmp_path)), tmp_path / "board.html", built=fakes.CLOCK)
    opened.get((tmp_path / "board.html").as_uri())
    order = [row.group for row in table.rows]
    assert shown(opened) == order[:100]
    for _ in range(2):
        seen(opened, "thead th[data-id='fd_digits'] button").click()
    assert shown(opened) == order[:2:-1]
    seen(opened, ".rest").click()
    assert shown(opened) == order[::-1] and not find(opened, ".rest")[0].is_displayed()


def test_ages_are_told_and_the_moment_kept(at: Chrome) -> None:
    for time in find(at, ".age time"):
        assert time.text.endswith("ago") or time.text == "just now"
        assert "UTC" in str(time.get_attribute("title"))


@pytest.fixture
def told(tmp_path: Path) -> Table:
    """A page of a row of which everything is known, and one beside it whose samples pair up with its."""
    parent = fakes.finished_run(tmp_path, "digits_class", 0, 8.0)
    run = fakes.swept_run(tmp_path, "digits_dit", 0, 7.0)
    sha256 = next(records(parent)).snapshot_sha256
    about = json.loads(run.run_json.read_text())
    about["identity"]["init"] = {"source": "snapshot", "sha256": sha256}
    run.run_json.write_text(json.dumps(about))
    at = run.attempt(1)
    write_record(at / "code.json", {"hash": "c0ffee", "revision": "ab" * 20, "dirty": True})
    for path in run.snapshots.glob("*/MANIFEST.json"):
        known = {"data": {"manifest": "c0ffee"}, "guidance": {"source": "online"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | known))
    config = compose(["experiment=digits_dit", "evaluation=none"])
    expected = (Expected(metric="fd_digits", value=6.5, source="a paper, table 2"),)
    config = replace(config, evaluation=replace(config.evaluation, expected=expected))
    (at / "config.yaml").write_text(to_yaml(config))
    job: dict[str, Any] = {"kind": "local", "id": "4711", "pid": 1, "start": 1, "boot": "-"}
    job |= {"nodes": 1, "tasks": 1, "host": "n1", "folder": "-"}
    write_record(at / "job.json", job)
    (at / "job").mkdir()
    (at / "job" / "4711_0_log.out").write_text("step 1\nthe last line of the log\n")
    for each, shift in ((run, 0.0), (parent, 1.0)):
        blocks = [7.0 + shift + block * (1 + shift) / 100 for block in range(10)]
        fakes.add_record(
            each, 256_000, {"fd_digits": 7 + shift, "fd_digits_se": 1.0}, attempt=2, left_out=blocks
        )
    board = collect(*read_runs(tmp_path))
    page.write(board, tmp_path / "board.html", built=fakes.CLOCK)
    (table,) = board.tables
    return table


def test_comparison_by_another_score_pairs_the_blocks_of_the_protocol_s_own_alone(
    opened: Chrome, tmp_path: Path
) -> None:
    for name, shift in (("digits_dit", 0.0), ("digits_class", 1.0)):
        run = fakes.make_run(tmp_path, name, 0)
        blocks = [7.0 + shift + block * (1 + shift) / 100 for block in range(10)]
        scores = {"fd_digits": 7.0 + shift, "nmi": 0.5 + shift / 10}
        fakes.add_record(run, 256_000, scores, left_out=blocks)
    board = collect(*read_runs(tmp_path), metric="nmi")
    page.write(board, tmp_path / "board.html", built=fakes.CLOCK)
    (table,) = board.tables
    marked = ",".join(row.group for row in table.rows)
    opened.get(f"{(tmp_path / 'board.html').as_uri()}#mark={marked}")
    seen(opened, "#compare").click()
    rows = find(opened, "#comparison tbody")[0].find_elements("css selector", "tr:has(small)")
    gaps = {
        row.find_element("css selector", "th").text: row.find_element("css selector", "small").text
        for row in rows
    }
    # nobody knows the error of nmi
    error, paired = standard_error("fd_digits", *(r.runs[0].headline for r in table.rows))
    assert paired and gaps["fd_digits"].endswith(f"1.00 ± {error:.2f}")
    assert "±" not in gaps["nmi"]


def test_a_drawer_tells_all_that_is_known_of_a_run(
    opened: Chrome, tmp_path: Path, told: Table
) -> None:
    row, other = told.rows
    state = f"open={row.group}&mark={row.group},{other.group}"
    opened.get(f"{(tmp_path / 'board.html').as_uri()}#{state}")
    (drawer,) = find(opened, "tr.drawer:not([hidden])")
    (run,) = (scored.run for scored in row.runs)
    facts = drawer.find_element("css selector", "article dl").text
    for words in (
        "abababababab", "with changes", "local 4711", "a paper, table 2",
        f"snapshot {run.lineage[0].sha256[:12]} run {other.runs[0].run.id}", recipe_words(run.fronts[0]),
    ):  # fmt: skip
        assert words in facts
    log = drawer.find_element("css selector", "details.log")
    log.find_element("css selector", "summary").click()
    assert "the last line of the log" in log.text
    titles = [each.text for each in drawer.find_elements("css selector", "figcaption")]
    assert any("over network evaluations" in title for title in titles)
    metrics = {"width": 1440, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    for width in (1440, 390):
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**metrics, "width": width})
        wide = opened.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, "wide tables scroll inside their own frame"
    # the error of paired samples, from the blocks that the page holds
    seen(opened, "#compare").click()
    gap = find(opened, "#comparison tbody tr:first-child small")[0].text
    error, paired = standard_error(told.metric, *(r.runs[0].headline for r in (row, other)))
    assert paired and gap == f"+1.00 ± {error:.2f}"


def test_what_a_run_came_from_is_one_click_away(
    opened: Chrome, tmp_path: Path, told: Table
) -> None:
    row, other = told.rows
    opened.get(f"{(tmp_path / 'board.html').as_uri()}#open={row.group}&q=digits_dit")
    assert shown(opened) == [row.group]
    seen(opened, ".parent").click()
    assert {each.get_attribute("id") for each in find(opened, "tr.drawer:not([hidden])")} == {
        f"runs-{told.key}-{each.group}" for each in (row, other)
    }
    focused = "return document.activeElement.closest('tbody').dataset.group"
    assert opened.execute_script(focused) == other.group
