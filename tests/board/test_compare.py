"""Differences of scores with their errors, what runs came from, when they reached a score, and what was swept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launcher.board import page, plain
from launcher.board.__main__ import main
from launcher.board.collect import collect
from launcher.board.compare import differences, settings, standard_error
from launcher.board.detail import log_tail, newest_grid
from launcher.board.figures import of_row, of_table
from launcher.board.reach import reach
from launcher.board.read import Run, read_runs
from launcher.board.sweeps import front, points, recipe_words
from launcher.board.words import of_run
from selfguide.evaluation.metrics.frechet import Reference, frechet
from selfguide.evaluation.metrics.moments import Moments
from selfguide.evaluation.paired import paired_difference
from selfguide.spec import recipe
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.run import write_record
from tests.board import fakes


def read(root: Path) -> dict[int, Run]:
    return {run.seed: run for run in read_runs(root)[0]}


def test_runs_differ_in_settings_and_in_scores_from_the_first(tmp_path: Path) -> None:
    fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    fakes.finished_run(tmp_path, "digits_dit", 1, 8.0, batch=256)
    runs = read(tmp_path)
    assert settings([runs[0], runs[1]]) == {"seed": [0, 1], "train.batch": [128, 256]}
    (found,) = differences([runs[0], runs[1]])
    assert (found.difference, found.images, found.paired) == (1.0, (256_000, 256_000), False)
    assert found.se == pytest.approx(math.hypot(0.1, 0.1))


def test_paired_blocks_give_the_error_of_the_difference() -> None:
    a = EvaluationRecord(
        status="done", key="k", attempt=1, images=1, protocol_key="p", protocol={"metric": "fd"},
        scores={"fd": 7.0, "fd_se": 3.0}, left_out=(6.0, 7.0, 8.0),
    )  # fmt: skip
    # what all images have in common drops out
    shifted = replace(a, left_out=(7.0, 8.0, 9.0))
    assert standard_error("fd", a, shifted) == (0.0, True)
    other = replace(a, left_out=(7.0, 7.0, 10.0))
    # changes of 1, 0, 2 about their mean 1: 2/3 of 1 + 1
    assert standard_error("fd", a, other) == (pytest.approx(math.sqrt(4 / 3)), True)
    assert standard_error("fd", a, replace(a, left_out=())) == (
        pytest.approx(math.hypot(3, 3)),
        False,
    )
    assert standard_error("floor", a, shifted) == (None, False)


def two_models(images: int = 400) -> tuple[Reference, Moments, Moments]:
    """Two models that draw image i from the same noise, one a little off the other."""
    random = np.random.default_rng(5)
    noise = random.normal(size=(images, 3))
    mean, cov = np.zeros(3), np.eye(3)
    found = []
    for scale, shift in ((1.1, 0.2), (1.1, 0.3)):
        moments = Moments(mean)
        moments.update(scale * noise + shift + 0.05 * random.normal(size=noise.shape), 0)
        found.append(moments)
    return Reference(mean, cov, cov), *found


def test_paired_error_of_two_records_is_that_of_the_paired_jackknife_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, *models = two_models()
    for seed, moments in enumerate(models):
        score = frechet(reference, moments)
        scores = {"fd_digits": score.value, "fd_digits_se": score.se}
        run = fakes.make_run(tmp_path, "digits_dit", seed, batch=128 + seed)
        fakes.add_record(run, 256_000, scores, left_out=list(score.left_out))
    exact = paired_difference(reference, models[1], models[0])
    runs = read(tmp_path)
    ours, theirs = (runs[seed].records[0] for seed in (0, 1))
    assert standard_error("fd_digits", ours, theirs) == (pytest.approx(exact.se), True)
    apart = math.hypot(*(r.scores["fd_digits_se"] for r in (ours, theirs)))
    assert exact.se < apart / 2
    # what the page subtracts is what it was given
    data = page.render(collect(runs.values()), built=0.0)
    told = json.loads(data.partition('id="data">')[2].partition("</script>")[0])["sheets"][0][
        "rows"
    ]
    assert sorted(each["left_out"] for each in told.values()) == sorted(
        list(r.left_out) for r in (ours, theirs)
    )
    names = [runs[seed].id for seed in (0, 1)]
    assert main(["diff", *names, "--runs", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["differences"]
    assert found["paired"] and found["se"] == pytest.approx(exact.se)
    assert found["difference"] == pytest.approx(exact.value)


def test_a_score_is_reached_at_the_first_snapshot_that_has_it(tmp_path: Path) -> None:
    fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    folder = fakes.finished_run(tmp_path, "digits_dit", 1, 9.0)
    at = folder.attempt(1)
    write_record(at / "start-0.json", {"time": 1000.0})
    write_record(at / "submission.json", {"time": 0.0, "world": 2, "spent_s": 3600.0})
    lines = [
        {"time": 1000.0 + n / 100, "images": n, "loss": 1.0, "used": 0.5, "code_loss": 0.9}
        for n in (128_000, 256_000)
    ]
    (folder.metrics / "train-1.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    (table,) = collect(*read_runs(tmp_path)).tables
    (row,) = table.rows
    found = reach(row, "fd_digits", 14.0)
    assert (found.images, found.runs, found.of) == ((128_000 + 256_000) / 2, 2, 2)
    late = reach(row, "fd_digits", 8.0)
    assert (late.images, late.runs, late.gpu_hours) == (256_000, 1, None)
    assert reach(row, "fd_digits", 1.0).images is None
    run = read(tmp_path)[1]
    assert run.gpu_hours_at(128_000) == pytest.approx((3600 + 2 * 1280) / 3600)
    assert run.curve("used") == ((128_000, 0.5), (256_000, 0.5))
    assert run.curve("code_loss") == ((128_000, 0.9), (256_000, 0.9))


def test_a_sweep_is_the_records_that_measure_alike(tmp_path: Path) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    fakes.add_record(run, 256_000, {"fd_digits": 6.5}, protocol={"g": 1.5})
    fakes.add_record(run, 256_000, {"fd_digits": 9.0}, protocol={"steps": 10}, nfe=10)
    # other samples: another measure
    fakes.add_record(run, 256_000, {"fd_digits": 5.0}, protocol={"samples": 100})
    tables = {table.key: table for table in collect(*read_runs(tmp_path)).tables}
    table = tables[fakes.PROTOCOL.key]
    found = points(table, table.rows[0])
    assert [(p.nfe, p.g, p.score, p.own) for p in found] == [
        (10, 1.0, 9.0, False),
        (50, 1.0, 7.0, True),
        (50, 1.5, 6.5, False),
    ]


def test_a_sweep_has_its_chart_front_and_recipe_and_no_table(tmp_path: Path) -> None:
    run = fakes.swept_run(tmp_path, "digits_dit", 0, 7.0)
    board = collect(*read_runs(tmp_path))
    (table,) = board.tables
    (row,) = table.rows
    assert (table.key, row.score and row.score.mean) == (fakes.PROTOCOL.key, 7.0)
    found = points(table, row)
    assert [(p.nfe, p.g, p.own) for p in found] == [
        (10, 1.0, False), (10, 1.5, False), (50, 1.0, True), (50, 1.5, False),
    ]  # fmt: skip
    costs = [(p.nfe, p.score) for p in found if p.nfe is not None]
    assert front(costs) == ((10, 6.0), (50, 5.0))
    titles = [figure.title for figure in of_table(table)]
    assert any("network evaluations" in title for title in titles)
    assert any("guidance" in title for title in titles)
    (chart,) = (f for f in of_row(table, row) if "recipe" in f.head)
    assert [line[1:] for line in chart.body if line[3]] == [
        ("10", "6 ± 0.1", "yes", ""),
        ("50", "5 ± 0.1", "yes", "yes"),
    ]
    (told,) = row.runs[0].run.fronts
    assert told.chosen == recipe.read(run)[0].chosen
    words = [line for line in of_run(row.runs[0].run) if line.startswith("recipe")]
    assert len(words) == 1 and "euler, 50 steps, g 1.5, average 20000: " in words[0]
    drawers = page.render(board, built=0.0)
    assert drawers.count('<div class="recipe">') == 1 and recipe_words(told) in drawers
    assert plain.of_run(row.runs[0].run)["fronts"][0]["chosen"] == told.chosen


def test_a_swept_run_that_no_protocol_scores_shows_its_front_among_those_that_wait(
    tmp_path: Path,
) -> None:
    run = fakes.swept_run(tmp_path, "digits_dit", 0, 7.0)
    for path in run.evals.glob("img-*.json"):
        if not json.loads(path.read_text()).get("sweep"):
            path.unlink()
    board = collect(*read_runs(tmp_path))
    assert board.tables == () and len(board.waiting) == 1
    assert '<div class="recipe">' in page.render(board, built=0.0)


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ((), {"schema": 99}),
        (("fronts", 0), {"chosen": "img-0"}),
        (("fronts", 0), {"samples": "5000"}),
        (("fronts", 0), {"selected_by": 5}),
        (("fronts", 0, "points", 0), {"sampler": {"steps": "many"}}),
        (("fronts", 0, "points", 0), {"sampler": {}}),
        (("fronts", 0, "points", 0), {"nfe": "fifty"}),
        (("fronts", 0, "points", 0), {"nfe": 10**400}),
        (("fronts", 0, "points", 0), {"score": float("nan")}),
        (("fronts", 0, "points", 0), {"score": None}),
        (("fronts", 0, "points", 0), {"se": "0.1"}),
    ],
)
def test_a_recipe_that_cannot_be_read_is_left_out_and_named(
    tmp_path: Path, where: tuple[str | int, ...], change: dict[str, Any]
) -> None:
    path = recipe.recipe_path(fakes.swept_run(tmp_path, "digits_dit", 0, 7.0))
    values = json.loads(path.read_text())
    changed: Any = values
    for each in where:
        changed = changed[each]
    changed.update(change)
    path.write_text(json.dumps(values))
    board = collect(*read_runs(tmp_path))
    assert len(board.tables) == 1 and [str(path) in told for told in board.problems] == [True]
    assert page.render(board, built=0.0).count('<div class="recipe">') == 0


def test_the_front_holds_what_nothing_cheaper_beats() -> None:
    given = [(10.0, 9.0), (50.0, 7.0), (20.0, 9.5), (50.0, 6.5), (100.0, 6.5)]
    assert front(given) == ((10.0, 9.0), (50.0, 6.5))
    assert front(given, higher_is_better=True) == ((10.0, 9.0), (20.0, 9.5))


def test_a_run_names_what_it_began_from(tmp_path: Path) -> None:
    first = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    sha256 = json.loads((first.snapshot(256_000) / "MANIFEST.json").read_text())["files"][0][
        "sha256"
    ]
    second = fakes.make_run(tmp_path, "digits_dit", 1)
    about = json.loads(second.run_json.read_text())
    about["identity"]["init"] = {"source": "snapshot", "sha256": sha256}
    second.run_json.write_text(json.dumps(about))
    (parent,) = read(tmp_path)[1].lineage
    assert (parent.kind, parent.sha256, parent.runs) == ("snapshot", sha256, (first.root.name,))


def test_code_jobs_and_the_log_of_an_attempt_are_told(tmp_path: Path) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    at = run.attempt(1)
    write_record(at / "code.json", {"hash": "c0ffee", "revision": "ab" * 20, "dirty": True})
    (at / "job").mkdir()
    (at / "job" / "7_0_log.out").write_text("one\ntwo\nthree\n")
    found = read(tmp_path)[0]
    assert found.code is not None and (found.code.hash, found.code.dirty) == ("c0ffee", True)
    assert log_tail(found, 2) == "two\nthree"
    assert newest_grid(found) is None


def test_the_newest_samples_are_training_s_until_an_evaluation_has_drawn_some(
    tmp_path: Path,
) -> None:
    run, picture = fakes.make_run(tmp_path), Image.new("L", (8, 8), 128)
    for images in (64_000, 128_000):
        run.preview(images).parent.mkdir(exist_ok=True)
        picture.save(run.preview(images))
    assert newest_grid(read(tmp_path)[0]) == (128_000, run.preview(128_000))
    text = page.render(collect(*read_runs(tmp_path)), built=fakes.CLOCK)
    assert "<small>128,000 images</small>" in text and "data:image/png" in text
    fakes.add_record(run, 128_000, {"fd_digits": 7.0}, grid=picture)
    found = newest_grid(read(tmp_path)[0])
    assert found is not None and found[0] == 128_000 and found[1].parent == run.evals
