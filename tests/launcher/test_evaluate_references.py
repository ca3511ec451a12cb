"""Scores against files of statistics: each is known by its content, wherever it lies and whatever it is called.

Evaluations are run in memory: each says which file it read.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluate import Memory, a_run, appear, launched, memory, nowhere, statistics

from launcher import evaluate, references, submission, submit, watch
from launcher.board.collect import collect
from launcher.board.read import read_runs
from launcher.reconcile import decide
from launcher.reconcile.view import read
from selfguide.spec.config import Config, build
from selfguide.spec.metrics import FEATURES
from selfguide.spec.records import EvaluationRecord, Protocol, record_key, records
from shards import storage
from shards.errors import UserError
from tests.shards import foreign
from tools.shards.__main__ import main as tool

__all__ = ["launched", "memory", "nowhere"]


def filed(request: Path) -> None:
    """A score that is the number in the file of the reference."""
    from selfguide.spec.run import RunFolder

    wanted = json.loads(request.read_text())
    run, config = RunFolder(Path(wanted["run"])), build(Config, wanted["config"])
    how = Protocol.of(config, run.snapshot_manifest(wanted["images"]))
    file = str(config.evaluation.reference)
    EvaluationRecord(
        status="done",
        key=wanted["key"],
        attempt=wanted["attempt"],
        images=wanted["images"],
        protocol=how.plain(),
        protocol_key=how.key,
        scores={"fid_adm": float(np.load(file)["mu"][0])},
        files={"reference": storage.sha256(file)},
        sweep=wanted.get("sweep", ""),
    ).publish(run)


@pytest.fixture
def files(tmp_path: Path, nowhere: Path, memory: Memory) -> dict[str, Path]:
    """Two references of one name, and evaluations that read them."""
    appear(nowhere)
    memory.evaluate = filed
    found = {}
    for number, name in enumerate("ab", 1):
        found[name] = tmp_path / name / "val.npz"
        found[name].parent.mkdir()
        statistics(found[name], number)
    return found


def against(file: Path) -> list[str]:
    return ["evaluation=fid_adm", f"evaluation.reference={file}", "evaluation.in_flight=9"]


def scores(told: dict[str, Any]) -> list[float]:
    return sorted(each["score"] for each in told["points"])


def test_references_of_one_name_in_two_folders_are_scored_against_each(
    runs: Path, settings: list[str], memory: Memory, launched: list[int], files: dict[str, Path]
) -> None:
    run = a_run(runs, settings, memory, "evaluation.in_flight=9", snapshots=(640,))
    both = f"evaluation.reference={files['a']},{files['b']}"
    assert scores(evaluate.sweep(run, ["evaluation=fid_adm", both])) == [1.0, 2.0]
    # again, each by itself, and nothing is begun
    begun = len(memory.jobs)
    for file, score in ((files["a"], 1.0), (files["b"], 2.0)):
        assert scores(evaluate.sweep(run, against(file)[:2])) == [score]
    assert len(memory.jobs) == begun
    # a file that was made anew is another one, though it lies where the former lay
    statistics(files["a"], 3)
    assert scores(evaluate.sweep(run, against(files["a"])[:2])) == [3.0]


def test_run_of_before_keeps_its_scores_and_is_scored_against_another_file_of_that_name(
    runs: Path, settings: list[str], memory: Memory, launched: list[int], files: dict[str, Path]
) -> None:
    # its config says nothing of what is in the file
    run = a_run(runs, settings, memory, *against(files["a"]), snapshots=(640,))
    watch.watch(run.root)
    (own,) = records(run)
    assert own.score == 1.0 and own.protocol_key != own.asked
    prepared = submission.prepare(
        submission.meant(submit.resolve([*settings, *against(files["a"])]))
    )
    assert prepared.run == run and prepared.config.evaluation.reference_sha256 is None
    view = read(run)
    assert own.key == record_key(640, decide.protocol(view, prepared.config, 640))
    begun = len(memory.jobs)
    (steps,) = {view.config.sampler.steps} if view.config else {0}
    (point,) = evaluate.sweep(run, [f"sampler.steps={steps}"])["points"]
    assert point["score"] == 1.0 and len(memory.jobs) == begun
    assert scores(evaluate.sweep(run, [f"evaluation.reference={files['b']}"])) == [2.0]
    # the same run, submitted against the other file
    other = submission.prepare(submission.meant(submit.resolve([*settings, *against(files["b"])])))
    assert other.config.evaluation.reference_sha256 == storage.sha256(str(files["b"]))


def test_scores_against_one_file_share_a_table_however_it_was_named(
    runs: Path, settings: list[str], memory: Memory, launched: list[int], files: dict[str, Path]
) -> None:
    for seed, file in enumerate((files["a"], files["a"], files["b"])):
        words = [*against(file), f"seed={seed}"]
        if seed == 1:
            # as today; the others have configs of before, or had no file when they were submitted
            words.append(f"evaluation.reference_sha256={storage.sha256(str(file))}")
            found = submission.meant(submit.resolve([*settings, *words[:-1]])).config
            assert f"evaluation.reference_sha256={found.evaluation.reference_sha256}" == words[-1]
        run = a_run(runs, settings, memory, *words, snapshots=(640,))
        watch.watch(run.root)
    tables = collect(read_runs(runs)[0]).tables
    seeds = [
        sorted(each.run.seed for row in t.rows for each in row.runs if each.headline)
        for t in tables
    ]
    assert sorted(seeds) == [[0, 1], [2]]


def test_failure_of_a_run_whose_file_was_named_alone_stands_in_the_table_of_its_scores(
    runs: Path, settings: list[str], memory: Memory, launched: list[int], files: dict[str, Path]
) -> None:
    run = a_run(runs, settings, memory, *against(files["a"]), snapshots=(640, 1280))
    watch.watch(run.root)
    first, last = records(run)
    path = run.evals / f"{last.key}.1.json"
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("scores", "files")}
    path.write_text(json.dumps({**values, "status": "failed", "message": "no"}))
    (found,), _ = read_runs(runs)
    assert {each.protocol_key for each in found.records} == {first.protocol_key}
    assert [each.done for each in found.records] == [True, False]


def test_two_missing_files_of_one_name_are_refused_before_anything_is_queued(
    runs: Path, settings: list[str], memory: Memory, launched: list[int], files: dict[str, Path]
) -> None:
    for file in files.values():
        file.unlink()
    run = a_run(runs, settings, memory, *against(files["a"]), snapshots=(640,))
    begun = len(memory.jobs)
    said = "scores against files of one name are told apart by their content"
    with pytest.raises(UserError, match=said) as raised:
        evaluate.sweep(run, [f"evaluation.reference={files['b']}"])
    assert str(files["a"]) in str(raised.value) and str(files["b"]) in str(raised.value)
    with pytest.raises(UserError, match=said):
        submission.prepare(submission.meant(submit.resolve([*settings, *against(files["b"])])))
    assert len(memory.jobs) == begun and not read(run).sweeps
    # what the run is compared with itself is no other file
    (point,) = evaluate.sweep(run, ["sampler.steps=3"])["points"]
    assert point["state"] == "waiting"
    # the cures that it prints
    statistics(files["b"], 2)
    evaluate.sweep(run, [f"evaluation.reference={files['b']}"])
    evaluate.sweep(run, [f"evaluation.reference={files['b'].with_name('other.npz')}"])


ADM = FEATURES["fid_adm"]


@pytest.mark.parametrize(
    ("field", "width", "about", "said"),
    [
        ("reference", 112, {}, "has 112 features and inception_v3_2015 has 2048: it is of another protocol"),
        (
            "reference",
            2048,
            {"features": {"sha256": ADM.sha256, "width": 2048, "resize": FEATURES["fid_clean"].resize}},
            f"was made with resize={FEATURES['fid_clean'].resize}, and this protocol has resize={ADM.resize}",
        ),
        ("unconditional", 2048, {}, "name no run"),
        ("unconditional", 64, {"run": "3f2a9c41"}, "it is of another protocol"),
    ],
)  # fmt: skip
def test_statistics_of_another_protocol_are_refused_before_anything_is_queued(
    runs: Path,
    settings: list[str],
    memory: Memory,
    launched: list[int],
    nowhere: Path,
    tmp_path: Path,
    field: str,
    width: int,
    about: dict[str, Any],
    said: str,
) -> None:
    appear(nowhere)
    file = tmp_path / "other.npz"
    words = ["evaluation=fid_adm", f"evaluation.{field}={file}"]
    if field == "unconditional":
        words.append("evaluation.metrics=[ufid]")
    run = a_run(runs, settings, memory, snapshots=(640,))
    begun = len(memory.jobs)
    statistics(file, width=width, **about)
    for asked in (
        lambda: submission.meant(submit.resolve([*settings, *words])),
        lambda: evaluate.sweep(run, words),
    ):
        with pytest.raises(UserError) as refused:
            asked()
        text = str(refused.value)
        assert text.startswith(f"evaluation.{field}={file}: ") and said in text
        assert "--protocol fid_adm --out FILE.npz` makes one of this protocol" in text
    assert len(memory.jobs) == begun and not read(run).sweeps
    # what that command writes, and what others write, who say nothing of how they made it
    stated = {"sha256": ADM.sha256, "width": 2048, "resize": ADM.resize, "net": ADM.nets[0]}
    for fitting in ({"features": stated, "run": "3f2a9c41"}, {"run": "3f2a9c41"}):
        statistics(file, **fitting)
        assert submission.meant(submit.resolve([*settings, *words])).warnings == ()


@pytest.mark.parametrize("damage", ["text", "truncated", "no mean", "no array"])
def test_file_that_holds_no_statistics_is_refused_before_anything_is_queued(
    settings: list[str], memory: Memory, nowhere: Path, tmp_path: Path, damage: str
) -> None:
    appear(nowhere)
    file = tmp_path / "val.npz"
    statistics(file)
    if damage == "text":
        file.write_text("mu")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "no mean":
        np.savez(file, sigma=np.zeros((1, 1)))
    else:
        np.savez(file, mu=np.array(1.0), sigma=np.zeros((1, 1)))
    with pytest.raises(UserError, match=f"evaluation.reference={file}: ") as refused:
        submission.meant(
            submit.resolve([*settings, "evaluation=fid_adm", f"evaluation.reference={file}"])
        )
    assert "tools.reference make SHARDS --protocol fid_adm" in str(refused.value)


def test_part_of_indexed_shards_is_drawn_by_a_seed_and_that_of_written_ones_as_before(
    runs: Path, settings: list[str], memory: Memory, files: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "tars"
    foreign.laion(root, count=60, in_a_tar=30)
    assert tool(["index", str(root), "--label", "json:class"]) == 0
    part = ["evaluation=fid_adm", "evaluation.reference_count=50"]

    def seed(*words: str) -> int | None:
        found = submission.meant(submit.resolve([*settings, *part, *words]))
        return submission.prepare(found).config.evaluation.reference_seed

    of_tars = f"evaluation.shards={root}"
    assert seed(of_tars) == 0 and seed(of_tars, "evaluation.reference_seed=7") == 7
    assert seed() is None
    # also where the run knows these shards already
    config = submission.meant(submit.resolve([*settings, "evaluation=fid_adm", of_tars])).config
    assert config.evaluation.manifest is not None
    more = replace(config.evaluation, reference_count=50)
    assert references.pinned(config, more, names=()).reference_seed == 0
    # a run of before goes on with what it was scored by
    run = a_run(runs, settings, memory, *part, of_tars, snapshots=(640,))
    manifest = submission.meant(
        submit.resolve([*settings, *part, of_tars])
    ).config.evaluation.manifest
    text = next(run.root.glob("attempts/*/config.yaml"))
    text.write_text(text.read_text().replace("  manifest: null", f"  manifest: {manifest}"))
    assert seed(of_tars) is None
    assert seed(of_tars, "evaluation.reference_seed=0") == 0
    assert seed(of_tars, "evaluation.reference_count=40") == 0
