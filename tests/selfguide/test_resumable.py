"""Resumable rows under faults: a kill in the middle, two processes, changed settings, what earlier versions left."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selfguide.discovery import resumable
from selfguide.discovery.resumable import Rows, Work, gather
from shards import sidecar, storage
from shards.errors import UserError

COUNT, HASH = 23, "0" * 64
FORK = multiprocessing.get_context("fork")


def work_in(folder: Path, **settings: Any) -> Work:
    return Work(folder / "out", HASH, {"net": "squares", "saw_labels": False} | settings)


def rows_of(work: Work, chunk: int = 4) -> Rows:
    prefix = f"rows-{chunk}-"
    return Rows(folder=work.folder, prefix=prefix, count=COUNT, chunk=chunk, dtype=np.float32)


def squares(ordinals: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack((ordinals, ordinals**2), axis=1))


def finish(work: Work, make: Callable[[np.ndarray], Tensor] = squares) -> sidecar.Sidecar | None:
    rows = rows_of(work)
    rows.fill(make, batch=2, doing="squares")
    return work.publish(rows, kind="dense")


def asked_by(work: Work) -> list[int]:
    """Which rows are made now; all rows are published and right."""
    asked: list[int] = []

    def counting(ordinals: np.ndarray) -> Tensor:
        asked.extend(ordinals.tolist())
        return squares(ordinals)

    made = finish(work, counting)
    assert made is not None
    np.testing.assert_array_equal(made.rows(), squares(np.arange(COUNT)))
    assert sorted(p.name for p in work.target.parent.iterdir()) == ["out"], "parts are left over"
    return asked


def killed_at(ordinal: int) -> Callable[[np.ndarray], Tensor]:
    def make(ordinals: np.ndarray) -> Tensor:
        if ordinal in ordinals:
            os.kill(os.getpid(), signal.SIGKILL)
        return squares(ordinals)

    return make


@pytest.mark.parametrize(("ordinal", "left"), [(0, 0), (9, 8), (10, 8), (22, 20)])
def test_rows_killed_within_a_part_resume_behind_the_last_whole_one(
    tmp_path: Path, ordinal: int, left: int
) -> None:
    work = work_in(tmp_path)
    child = FORK.Process(target=finish, args=(work, killed_at(ordinal)))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not work.target.exists()
    assert asked_by(work) == list(range(left, COUNT))


def test_rows_killed_while_they_are_joined_are_joined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_in(tmp_path)

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as once:
        once.setattr(sidecar, "write", killed)
        child = FORK.Process(target=finish, args=(work,))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL and (work.target / sidecar.ROWS).exists()
    assert asked_by(work) == []


def _race(barrier: Any, work: Work, answers: Any) -> None:
    barrier.wait()
    made = finish(work)
    answers.put(None if made is None else made.sha256)


def test_two_processes_at_the_same_work_both_get_what_one_publishes(tmp_path: Path) -> None:
    for number in range(5):
        work = work_in(tmp_path / str(number))
        work.target.parent.mkdir()
        barrier, answers = FORK.Barrier(2), FORK.Queue()
        children = [FORK.Process(target=_race, args=(barrier, work, answers)) for _ in range(2)]
        for child in children:
            child.start()
        found = [answers.get(timeout=60) for _ in children]
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0, 0]
        published = sidecar.read(work.target, manifest=HASH)
        assert found == [published.sha256] * 2
        np.testing.assert_array_equal(published.rows(), squares(np.arange(COUNT)))
        assert [p.name for p in work.target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("folder_is_back", [False, True])
def test_parts_that_are_joined_and_removed_while_the_last_is_published_again_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_is_back: bool
) -> None:
    """Another process has made the same last part, and is at its end first."""
    work, publish = work_in(tmp_path), storage.publish

    def late(file: Path, data: bytes, **options: Any) -> None:
        publish(file, data, **options)
        if rows_of(work).complete:
            monkeypatch.setattr(storage, "publish", publish)
            assert work.publish(rows_of(work), kind="dense") is not None
            if folder_is_back:
                publish(file, data, **options)
            else:
                raise FileNotFoundError(file)

    monkeypatch.setattr(storage, "publish", late)
    made = finish(work)
    assert made is not None
    np.testing.assert_array_equal(made.rows(), squares(np.arange(COUNT)))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_rows_of_a_changed_setting_are_made_anew(tmp_path: Path) -> None:
    first = work_in(tmp_path, layer=1)
    with pytest.raises(KeyboardInterrupt):
        finish(first, stopping_at(20))
    second = work_in(tmp_path, layer=2)
    assert second.folder != first.folder
    made = finish(second, lambda ordinals: squares(ordinals) + 1)
    assert made is not None
    np.testing.assert_array_equal(made.rows(), squares(np.arange(COUNT)) + 1)
    with pytest.raises(UserError, match="layer=2, and these have layer=1"):
        finish(first)


def stopping_at(ordinal: int) -> Callable[[np.ndarray], Tensor]:
    def make(ordinals: np.ndarray) -> Tensor:
        if ordinal in ordinals:
            raise KeyboardInterrupt
        return squares(ordinals)

    return make


def test_a_report_decides_nothing(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    rows = rows_of(work)
    rows.fill(squares, batch=2, doing="squares")
    made = work.publish(rows, kind="dense", finish=lambda: ((), {"mean": 1.0}))
    assert made is not None and made.provenance["report"] == {"mean": 1.0}
    assert work.published() == made


def test_parts_of_ranks_are_published_by_whoever_finds_all(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    for rank in (2, 0):
        rows_of(work).fill(squares, batch=3, doing="squares", rank=rank, world=3)
        assert work.publish(rows_of(work), kind="dense") is None
    assert asked_by(work) == [*range(4, 8), *range(16, 20)]  # parts 1 and 4 are rank 1's


def test_the_folder_of_parts_is_called_as_by_earlier_versions(tmp_path: Path) -> None:
    """So what they left half done is gone on with; names are hashes of the settings, made in 2026."""
    settings = (tmp_path / "f", HASH, {"net": "pixels", "saw_labels": False})
    assert Work(*settings, {"chunk": 1024}).folder == tmp_path / ".f.889bc2d6ac72ecde"
    assert Work(*settings).folder == tmp_path / ".f.595c3f98d112144a"


def test_rows_that_earlier_versions_kept_in_one_file_are_made_anew(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    work.folder.mkdir()
    np.save(work.folder / "rows.npy", np.full((COUNT, 2), 7, np.float32))
    (work.folder / "rows.json").write_text(json.dumps({"done": 12}))
    assert asked_by(work) == list(range(COUNT))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_rows_that_are_not_finite_name_their_sample(tmp_path: Path, value: float) -> None:
    def bad(ordinals: np.ndarray) -> Tensor:
        made = squares(ordinals).float()
        made[ordinals == 13, 1] = value
        return made

    with pytest.raises(UserError, match="of sample 13 are NaN or infinite"):
        finish(work_in(tmp_path), bad)


def test_gathered_rows_are_those_of_the_whole_array() -> None:
    whole = np.random.default_rng(0).standard_normal((23, 3))
    parts = [whole[s : s + 5] for s in range(0, 23, 5)]
    chosen = np.array([22, 0, 4, 5, 5, 19])
    np.testing.assert_array_equal(gather(parts, chosen), whole[chosen])


def test_a_result_is_computed_once_and_a_state_is_the_last_one(tmp_path: Path) -> None:
    made = [resumable.array(tmp_path / "a" / "x.npy", lambda n=n: np.arange(n)) for n in (3, 4)]
    assert [len(x) for x in made] == [3, 3]
    kept = [resumable.record(tmp_path / "r.json", lambda n=n: {"n": n}) for n in (3, 4)]
    assert kept == [{"n": 3}, {"n": 3}]
    file = tmp_path / "state.pt"
    assert resumable.load(file) is None
    for step in (1, 2):
        resumable.save(file, {"step": step, "x": torch.arange(step)})
    state = resumable.load(file)
    assert state is not None and state["step"] == len(state["x"]) == 2


def test_cost_is_of_all_processes_and_changes_no_row(tmp_path: Path) -> None:
    work, rows = work_in(tmp_path / "a"), rows_of(work_in(tmp_path / "a"))

    def slow(ordinals: np.ndarray) -> Tensor:
        time.sleep(0.01)
        return squares(ordinals)

    # the second rank of two is killed in its second part, and what it did before counts
    def second() -> None:
        rows.fill(
            lambda o: killed_at(13)(o) if 13 in o else slow(o), batch=2, doing="", rank=1, world=2
        )

    child = FORK.Process(target=second)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    made = finish(work, slow)
    assert made is not None and made.cost is not None
    # 12 batches, of which the child made 2
    assert made.cost["seconds"] >= 0.12 and made.cost["ranks"] == 2
    assert made.cost["device"] == "cpu"
    plain = sidecar.write(
        tmp_path / "b", made.rows(), manifest=HASH, kind="dense", provenance=made.provenance
    )
    assert plain.cost is None and plain.sha256 == made.sha256
