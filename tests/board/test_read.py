"""What is on disk becomes facts; what cannot be read becomes a sentence and hides nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from launcher.board.collect import collect, group_key
from launcher.board.columns import columns
from launcher.board.read import read_runs
from launcher.board.states import chips
from launcher.folder import find
from selfguide.spec.config.evaluation import Expected
from selfguide.spec.files import read_config, to_yaml
from selfguide.spec.records import Protocol, record_key, record_path
from selfguide.spec.run import write_record
from tests.board import fakes
from tools.bench.board_runs import make


def test_a_finished_run(tmp_path: Path) -> None:
    folder = fakes.finished_run(tmp_path, "digits_dit", 3, 7.0)
    (run,), problems = read_runs(tmp_path)
    assert problems == ()
    assert (run.id, run.experiment, run.seed, run.images) == (
        folder.root.name,
        "digits_dit",
        3,
        256_000,
    )
    assert run.published == (128_000, 256_000) and run.seen == 256_000 and run.attempts == 1
    assert [r.images for r in run.records] == [128_000, 256_000]
    assert [r.final for r in run.records] == [False, True]
    assert run.records[-1].scores["fd_digits"] == 7.0
    assert run.label_free and run.failure == ""
    assert run.heard == run.records[-1].time


def test_a_link_is_a_name_of_a_run_and_no_run(tmp_path: Path) -> None:
    run, far = (fakes.finished_run(tmp_path / at, "digits_dit", 0, 7.0) for at in ("runs", "far"))
    here = run.root.parent
    (here / "latest").symlink_to(run.root.name)
    (here / "lost").symlink_to("nowhere")
    (tmp_path / "runs" / "alias").symlink_to(here.name)
    # a run that lies on another disk, and the newest of those
    (here / "moved").symlink_to(far.root)
    (here / "newest").symlink_to("moved")
    found, problems = read_runs(tmp_path / "runs")
    assert sorted(each.root.name for each in found) == sorted([run.root.name, "moved"])
    assert problems == ()
    assert find("latest", tmp_path / "runs").root.resolve() == run.root


def test_scores_that_are_no_numbers_are_missing(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    fakes.add_record(run, 64_000, {"fd_digits": float("nan"), "nmi": float("inf"), "ari": 0.5})
    (found,), problems = read_runs(tmp_path)
    assert problems == ()
    scores = found.records[0].scores
    assert scores["ari"] == 0.5 and "fd_digits" not in scores and "nmi" not in scores


def test_unreadable_files_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    (run.evals / "img-000000001-torn.1.json").write_text("{")
    (run.evals / "img-000000002-list.1.json").write_text("[]")
    fakes.add_record(run, 192_000, {"fd_digits": 8.0}, schema=2)
    bad = tmp_path / "digits_dit" / "bad"
    bad.mkdir()
    (bad / "run.json").write_text(json.dumps({"id": "bad"}))
    (run.metrics / "train-2.jsonl").write_text("not json\n")
    runs, problems = read_runs(tmp_path)
    assert [len(r.records) for r in runs] == [2] and runs[0].losses
    assert len(problems) == 5
    for name in ("torn", "list", "000192000", "bad/run.json", "train-2.jsonl"):
        assert any(name in told for told in problems), name
    assert any("schema is 2" in told for told in problems)
    assert any("no 'identity'" in told for told in problems)


def test_a_resumed_attempt_replaces_what_it_trained_again(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    fakes.add_progress(run, 300, [(100, 3.0), (200, 2.0), (300, 1.0)])
    fakes.add_progress(run, 250, [(150, 2.5), (250, 1.5)])
    (found,), _ = read_runs(tmp_path)
    assert found.losses == ((100, 3.0), (150, 2.5), (250, 1.5))
    assert found.seen == 250 and found.attempts == 2


def test_a_run_that_went_back_within_an_attempt_keeps_only_what_it_trained_last(
    tmp_path: Path,
) -> None:
    """From 400 images to 200, of which a value that not each line has may have no later point."""
    run = fakes.make_run(tmp_path)
    number = fakes.add_progress(run, 500)
    write_record(run.attempt(number) / "start-0.json", {"time": 0.0})
    asked = {"time": 0.0, "world": 1, "spent_s": 0.0}
    write_record(run.attempt(number) / "submission.json", asked)
    lines: list[dict[str, float]] = [
        {"time": 3600.0 * hour, "images": images, "loss": float(hour)}
        for hour, images in enumerate((100, 200, 300, 400, 300, 400, 500), 1)
    ]
    lines[0]["nmi"], lines[3]["nmi"] = 0.1, 0.9
    path = run.metrics / f"train-{number}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,), problems = read_runs(tmp_path)
    assert problems == ()
    assert found.losses == ((100, 1.0), (200, 2.0), (300, 5.0), (400, 6.0), (500, 7.0))
    assert found.curve("nmi") == ((100, 0.1),)
    assert [found.gpu_hours_at(images) for images in (200, 250, 300, 500)] == [2.0, 5.0, 5.0, 7.0]


def test_attempts_count_as_numbers(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    for number in range(1, 12):
        fakes.add_progress(run, 1000 * number, [(1000 * number, 1.0 / number)])
    (found,), _ = read_runs(tmp_path)
    assert [images for images, _ in found.losses] == [1000 * n for n in range(1, 12)]


def test_a_line_that_is_being_written_waits(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    fakes.add_progress(run, 100, [(100, 3.0)])
    with (run.metrics / "train-1.jsonl").open("a") as file:
        file.write('{"images": 200, "lo')
    (found,), problems = read_runs(tmp_path)
    assert found.losses == ((100, 3.0),) and problems == ()


def test_the_first_rank_to_fail_speaks(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    number = fakes.add_progress(run, 100)
    for rank, at, said in ((0, 20.0, "lost its peer"), (1, 10.0, "NaN loss")):
        record = {"time": at, "code": 1, "class": "error", "message": said}
        write_record(run.attempt(number) / f"exit-{rank}.json", record)
    (found,), _ = read_runs(tmp_path)
    assert found.failure == "rank 1: NaN loss" and found.state.word == "failed"


def test_labels_are_known_before_the_first_record(tmp_path: Path) -> None:
    fakes.make_run(tmp_path, "digits_class")
    fakes.make_run(tmp_path, "digits_dit")
    runs, _ = read_runs(tmp_path)
    assert {r.experiment: r.label_free for r in runs} == {"digits_class": False, "digits_dit": True}


def test_a_run_that_began_from_weights_is_label_free_only_by_a_record(tmp_path: Path) -> None:
    """Whether those saw labels is known once they were read."""
    run = fakes.make_run(tmp_path, "digits_dit")
    said = run.describe()
    for source, free in (("scratch", True), ("official", False), ("snapshot", False)):
        begun = said | {"identity": said["identity"] | {"init": {"source": source}}}
        run.run_json.write_text(json.dumps(begun))
        (found,), _ = read_runs(tmp_path)
        assert found.label_free is free


def test_a_torn_snapshot_is_not_published(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    fakes.add_snapshot(run, 64_000)
    fakes.add_snapshot(run, 128_000)
    (run.snapshot(128_000) / "weights.safetensors").write_bytes(b"torn")
    (found,), _ = read_runs(tmp_path)
    assert found.published == (64_000,)


@pytest.mark.parametrize("with_grid", [True, False])
def test_the_grid_lies_beside_its_record(tmp_path: Path, with_grid: bool) -> None:
    run = fakes.make_run(tmp_path)
    fakes.add_record(
        run, 64_000, {"fd_digits": 8.0}, grid=Image.new("L", (4, 4)) if with_grid else None
    )
    (found,), _ = read_runs(tmp_path)
    record = found.records[0]
    if with_grid:
        assert record.grid(run) == record_path(run, record.key, record.attempt).with_suffix(".png")
    else:
        assert record.grid(run) is None


def test_a_run_that_was_extended_is_in_the_row_of_one_as_long_from_the_start(
    tmp_path: Path,
) -> None:
    short, long = fakes.make_run(tmp_path, images=128_000), fakes.make_run(tmp_path, images=256_000)
    about = json.loads(short.run_json.read_text())
    write_record(short.run_json, about | {"images": 256_000}, replace=True)
    runs, _ = read_runs(tmp_path)
    assert {run.root for run in runs} == {short.root, long.root}
    assert len({group_key(run) for run in runs}) == 1


def test_a_runs_gpu_hours_stand_beside_its_score(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = fakes.finished_run(tmp_path, "digits_dit", seed, 7.0)
        # what the attempts before took; of this one nothing is known
        spent = {"world": 2, "time": 0.0, "spent_s": 3600.0 * (1 + seed)}
        write_record(run.attempt(1) / "submission.json", spent)
    board = collect(*read_runs(tmp_path))
    (row,) = board.tables[0].rows
    # two scores of 41 s each
    assert row.gpu_hours == pytest.approx(1.5 + 82 / 3600)
    assert "gpu_hours" in [column.id for column in columns(board.tables[0])]


def test_a_run_scored_by_two_protocols_waits_under_the_one_that_has_no_records(
    tmp_path: Path,
) -> None:
    make(tmp_path, 1)
    (kept,) = tmp_path.rglob("config.yaml")
    config = read_config(kept)
    other = replace(config.evaluation, samples=77)
    kept.write_text(to_yaml(replace(config, more_evaluations=(other,))))
    (run,) = read_runs(tmp_path)[0]
    (scored,) = {r.protocol_key for r in run.records}
    assert run.unscored == run.published and len(run.published) == 10
    assert run.waits(scored) == () and run.waits(None) == run.published
    assert run.waiting is not None and list(run.waiting.values()) == [run.published]
    (table,) = collect([run]).tables
    assert [chip.label for chip in table.rows[0].chips] == ["final"]
    assert [chip.label for chip in chips(run)] == ["final", "10 to score"]
    # a sweep scored one by the other protocol, which is the run's own
    snapshot = {"guidance": {"source": "online"}, "data": {"manifest": "c" * 64}}
    under = Protocol.of(config.scored_by[0], snapshot)
    assert under.key == scored
    swept = Protocol.of(replace(config, evaluation=other), snapshot)
    record = replace(
        run.records[-1], protocol=swept.plain(), protocol_key=swept.key, sweep="5weep000",
        key=record_key(run.images, swept),
    )  # fmt: skip
    record.publish(run.folder)
    (run,) = read_runs(tmp_path)[0]
    assert len(run.own) == 11 and len(run.waits(swept.key)) == 9


def test_each_of_two_protocols_of_a_run_has_the_published_number_of_its_own(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (kept,) = tmp_path.rglob("config.yaml")
    config = read_config(kept)
    numbers = [
        (Expected(metric="fd_digits", value=value, source=f"a paper, table {value:.0f}"),)
        for value in (2.0, 3.0)
    ]
    own = replace(config.evaluation, expected=numbers[0])
    other = replace(config.evaluation, samples=77, expected=numbers[1])
    kept.write_text(to_yaml(replace(config, evaluation=own, more_evaluations=(other,))))
    (run,) = read_runs(tmp_path)[0]
    (scored,) = {r.protocol_key for r in run.records}
    (unscored,) = set(run.expected_by) - {scored}
    assert run.expected == (*numbers[0], *numbers[1])
    assert run.expects("fd_digits", scored) == numbers[0][0]
    assert run.expects("fd_digits", unscored) == numbers[1][0]
    assert run.expects("fd_digits", "another") is None and run.expects("nmi", scored) is None
    (table,) = collect([run]).tables
    assert table.rows[0].expected == numbers[0][0]
