"""Many hands, killed at any time: the bytes are those of one writer that nobody disturbed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import shards
from shards import parallel, storage
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.order import share
from shards.format.pictures import Picture
from shards.sources import folders
from shards.sources.source import ArraySource
from shards.verify import verify
from shards.write import committing, writer
from shards.write.building import build_shard
from shards.write.scan import scan
from tests.shards import inputs
from tests.shards.data import LATENT, source

COUNT, SHARD = 12288, ("--shape", "4", "8", "8", "--shard-mb", "0.1")  # a block is a shard


def _make(out: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "tools.shards", "make", "synthetic", "--out", str(out)]
    return [*command, "--count", str(COUNT), *SHARD, *more]


def _told(command: list[str]) -> dict:
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _tree(root: Path) -> dict[str, bytes]:
    """What a reader may see: hidden files are nobody's."""
    paths = [p for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(root)): p.read_bytes() for p in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one undisturbed process writes."""
    root = tmp_path_factory.mktemp("whole")
    assert _told(_make(root))["shards_built"] == COUNT // 256
    return root


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def _alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _until(condition, what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@contextlib.contextmanager
def _begun(out: Path, *more: str, through: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A writer that has finished a shard and is at work on others."""
    making = subprocess.Popen([*through, *_make(out, *more)], stderr=subprocess.PIPE)
    try:
        _until(lambda: list(out.glob("shards/*.json")) or making.poll() is not None, "no shard")
        assert making.poll() is None
        yield making
    finally:
        making.kill()
        making.communicate()


def test_killed_in_the_middle_it_goes_on_and_loses_one_shard_at_most(
    tmp_path: Path, whole: Path
) -> None:
    with _begun(tmp_path) as making:
        making.send_signal(signal.SIGKILL)
        making.wait()
    tars, records = (sorted(tmp_path.glob(f"shards/*.{kind}")) for kind in ("tar", "json"))
    assert 0 < len(records) < COUNT // 256 and len(tars) - len(records) in (0, 1)
    kept = {path: path.stat().st_mtime_ns for path in records}
    told = _told(_make(tmp_path))
    assert told["written"] and told["shards_built"] == COUNT // 256 - len(records)
    assert {path: path.stat().st_mtime_ns for path in records} == kept
    assert _tree(tmp_path) == _tree(whole) and verify(tmp_path).problems == ()


STARTING = """
import os, sys, time
from pathlib import Path
from shards import parallel

if __name__ == "__mp_main__":  # a worker that is not ready yet
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(0.5)

if __name__ == "__main__":
    print(sum(parallel.spread(abs, range(4), 2)))
"""


def test_workers_that_are_still_starting_leave_ctrl_c_to_their_parent(tmp_path: Path) -> None:
    script, begun = tmp_path / "starting.py", tmp_path / "begun"
    script.write_text(STARTING)
    begun.mkdir()
    command = [sys.executable, str(script), str(begun)]
    environment = {**os.environ, "PYTHONPATH": str(Path(shards.__file__).parents[1])}
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    while not (workers := [int(path.name) for path in begun.iterdir()]):
        assert started.poll() is None
        time.sleep(0.02)
    os.kill(workers[0], signal.SIGINT)
    assert started.communicate(timeout=60)[0] == "6\n" and started.returncode == 0


def test_workers_die_with_a_killed_parent_and_what_they_finished_counts(
    tmp_path: Path, whole: Path
) -> None:
    with _begun(tmp_path, "--workers", "2") as making:
        workers = _children(making.pid)
        assert len(workers) >= 2
        making.send_signal(signal.SIGKILL)
        making.wait()
        _until(lambda: not any(map(_alive, workers)), "workers outlived their parent", 30)
    done = len(list(tmp_path.glob("shards/*.json")))
    assert not (tmp_path / "LATEST").exists()
    assert _told(_make(tmp_path))["shards_built"] == COUNT // 256 - done
    assert _tree(tmp_path) == _tree(whole)


def test_ctrl_c_ends_workers_and_leaves_no_temporary_file(tmp_path: Path, whole: Path) -> None:
    with _begun(tmp_path, "--workers", "2") as making:
        workers = _children(making.pid)
        making.send_signal(signal.SIGINT)
        _, said = making.communicate(timeout=60)
    assert making.returncode == 130 and said.decode().strip() == "interrupted"
    _until(lambda: not any(map(_alive, workers)), "workers outlived their parent", 30)
    assert not list(tmp_path.rglob(".*.tmp")) and not (tmp_path / "LATEST").exists()
    _told(_make(tmp_path))
    assert _tree(tmp_path) == _tree(whole)


def test_a_writer_that_ignores_ctrl_c_as_under_nohup_goes_on_to_the_end(
    tmp_path: Path, whole: Path
) -> None:
    nohup = ("bash", "-c", "trap '' INT; exec \"$@\"", "bash")
    with _begun(tmp_path, "--workers", "2", through=nohup) as making:
        for pid in (making.pid, *_children(making.pid)):
            os.kill(pid, signal.SIGINT)
        assert making.wait(timeout=60) == 0
    assert _tree(tmp_path) == _tree(whole)


def test_a_worker_that_is_killed_is_an_error_that_says_so(tmp_path: Path, whole: Path) -> None:
    with _begun(tmp_path, "--workers", "2") as making:
        mapped = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in _children(making.pid)}
        worker = next(pid for pid, line in mapped.items() if b"spawn_main" in line)
        os.kill(worker, signal.SIGKILL)
        _, said = making.communicate(timeout=60)
    assert making.returncode == 2 and b"a worker process of workers=2 died" in said
    _told(_make(tmp_path))
    assert _tree(tmp_path) == _tree(whole)


def test_two_ranks_at_once_write_what_one_writes(tmp_path: Path, whole: Path) -> None:
    ranks = [
        subprocess.Popen(
            [*_make(tmp_path, "--rank", str(rank), "--world", "2"), "--json"],
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    told = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks)
    assert sum(t["shards_built"] for t in told) >= COUNT // 256
    assert told[0]["manifest"] == told[1]["manifest"]
    assert _tree(tmp_path) == _tree(whole)


def test_a_rank_alone_finishes_what_the_other_never_began(tmp_path: Path, whole: Path) -> None:
    told = _told(_make(tmp_path, "--rank", "1", "--world", "3"))
    assert told["shards_built"] == COUNT // 256 and _tree(tmp_path) == _tree(whole)


def test_images_are_the_same_bytes_for_any_number_of_workers_and_ranks(tmp_path: Path) -> None:
    inputs.image_folder(tmp_path / "in", inputs.pixels(600, 6))
    (tmp_path / "in" / "a" / "bad.png").write_text("no image")
    command = [sys.executable, "-m", "tools.shards", "make", "folder", str(tmp_path / "in")]
    more = ["--size", "4", "--shard-mb", "0.02", "--max-skipped", "1"]
    for name, how in (
        ("one", []),
        ("two", ["--workers", "2"]),
        ("r", ["--rank", "1", "--world", "2"]),
    ):
        told = _told([*command, "--out", str(tmp_path / name), *more, *how])
        assert told["samples"] == 600 and told["inputs"]["skipped"] == 1 and told["shards"] == 3
    assert _tree(tmp_path / "one") == _tree(tmp_path / "two") == _tree(tmp_path / "r")


@pytest.mark.parametrize("lost", ["tar", "json", "a byte of tar", "half of json", "fields of json"])
def test_only_what_is_missing_is_built_again(tmp_path: Path, lost: str) -> None:
    def write() -> int:
        built: list[bool] = []

        def watch(shards, total):
            for one in shards:
                built.append(one)
                yield one

        writer.write(tmp_path, source(), header=LATENT, seed=3, shard_bytes=1, watch=watch)
        return sum(built)

    assert write() == 4
    tree = _tree(tmp_path)
    (tmp_path / "LATEST").unlink()  # as after a kill
    record = next(tmp_path.glob("shards/*-00002-*.json"))
    tar = record.with_suffix(".tar")
    if lost in ("tar", "json"):
        (tar if lost == "tar" else record).unlink()
    elif lost == "a byte of tar":
        tar.write_bytes(tar.read_bytes()[:-1])
    else:
        record.write_text(record.read_text()[:100] if lost == "half of json" else '{"plan": "x"}')
    assert write() == 1 and _tree(tmp_path) == tree


def test_what_another_finished_meanwhile_is_not_built_again(tmp_path: Path) -> None:
    built: list[bool] = []

    def watch(shards, total):
        writer.write(tmp_path, source(), header=LATENT, shard_bytes=1)  # somebody else is quicker
        built.extend(shards)
        return []

    writer.write(tmp_path, source(), header=LATENT, shard_bytes=1, watch=watch)
    assert built == [False] * 4


class Meeting(ArraySource):
    """While its images are first read, something else happens."""

    meanwhile: Callable[[], object]

    @staticmethod
    def with_(x: ArraySource, meanwhile: Callable[[], object]) -> Meeting:
        made = Meeting(name=x.name, x=x.x, keys=x.keys, labels=x.labels, classes=x.classes)
        made.__dict__["meanwhile"] = meanwhile
        return made

    def images(self, rows: np.ndarray) -> np.ndarray:
        self.__dict__.pop("meanwhile", lambda: None)()
        return super().images(rows)


def test_of_two_data_sets_begun_at_once_in_one_folder_the_first_to_finish_stays(
    tmp_path: Path,
) -> None:
    other = replace(source(), x=source().x + 1)
    slow = Meeting.with_(
        source(), lambda: writer.write(tmp_path, other, header=LATENT, shard_bytes=1)
    )
    with pytest.raises(UserError, match="holds shards of another data set"):
        writer.write(tmp_path, slow, header=LATENT, shard_bytes=1)
    assert verify(tmp_path).problems == ()
    assert shards.read_all(tmp_path)["x"].mean() > 0.5


def test_a_pointer_is_not_moved_from_what_was_published_meanwhile(tmp_path: Path) -> None:
    first, _ = writer.write(tmp_path, source(), header=LATENT)
    other, _ = writer.write(tmp_path / "other", source(900), header=LATENT)
    manifests.save(tmp_path, first, new=True)
    with pytest.raises(UserError, match=f"holds another data set by now .*{first.hash[:12]}"):
        manifests.save(tmp_path, other, new=True)
    assert manifests.pointer(tmp_path) == first.hash


@pytest.mark.parametrize("left", ["nothing", "nothing, before", "tar", "half of json"])
def test_ranks_on_hardware_that_rounds_otherwise_leave_pairs_of_tar_and_record(
    tmp_path: Path, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second publishes a shard of its own bytes while the first is about to, or at it."""
    plan, other = (
        writer.make_plan(one, LATENT, 0, 1)
        for one in (source(), replace(source(), x=source().x + np.float16(1)))
    )
    other = replace(other, fingerprint=plan.fingerprint)
    url = tmp_path / plan.tar(0)
    if not left.startswith("nothing"):
        url.parent.mkdir()
        url.write_bytes(b"half a tar")
    if left == "half of json":
        url.with_suffix(".json").write_text("{")
    publish, steps = storage.publish, []

    def interleaved(where: storage.Url, data: bytes, *, replace: bool) -> None:
        steps.append(where)
        if len(steps) > 1 or left != "nothing, before":
            publish(where, data, replace=replace)
        if len(steps) == 1:
            committing.commit(tmp_path, other, 0)
            if left == "nothing, before":
                publish(where, data, replace=replace)

    monkeypatch.setattr(storage, "publish", interleaved)
    if left == "half of json":  # both took it for theirs to replace
        with pytest.raises(DamagedError, match="two processes built it at once"):
            committing.commit(tmp_path, plan, 0)
        return
    assert not committing.commit(tmp_path, plan, 0)
    record = json.loads(url.with_suffix(".json").read_text())
    assert record["sha256"] == storage.sha256(url)
    assert record["sha256"] == build_shard(other, 0)[1]["sha256"]


def test_unfinished_shards_of_another_data_set_are_refused_and_left_alone(tmp_path: Path) -> None:
    writer.write(tmp_path, source(), header=LATENT, shard_bytes=1)
    (tmp_path / "LATEST").unlink()
    tree = _tree(tmp_path)
    with pytest.raises(
        UserError, match=r"holds shards of another data set .*begun but not finished"
    ):
        writer.write(tmp_path, source(), header=LATENT, seed=1, shard_bytes=1)
    assert _tree(tmp_path) == tree


def test_another_data_set_is_refused_before_the_first_look(tmp_path: Path) -> None:
    listing = folders.image_folder(
        str(inputs.image_folder(tmp_path / "in", inputs.pixels(4))), Picture()
    )
    writer.write(tmp_path / "out", source(), header=LATENT)
    tree = _tree(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds another data set \(test, 1,000 samples"):
        scan(tmp_path / "out", listing)
    assert _tree(tmp_path / "out") == tree
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        scan(tmp_path / "file", listing)


def test_a_scan_that_was_cut_goes_on_behind_its_last_part(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3000 * 3, dtype=np.uint8).reshape(3000, 1, 1, 3))
    from shards.sources.arrays import numpy_file

    listing = numpy_file(str(tmp_path / "x.npy"), channels_first=False)
    looked: list[bool] = []

    def cut(parts, total):
        for number, one in enumerate(parts):
            looked.append(one)
            if number == 1:
                raise KeyboardInterrupt
            yield one

    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path / "out", listing, watch=cut)
    source, _ = scan(
        tmp_path / "out", listing, watch=lambda parts, total: looked.extend(parts) or []
    )
    assert looked == [True, True, True] and len(source.keys) == 3000
    assert source.fingerprint == scan(tmp_path / "other", listing)[0].fingerprint


@pytest.mark.parametrize(("world", "alive"), [(8, 8), (8, 7), (8, 4), (16, 4), (3, 1)])
def test_what_absent_ranks_leave_is_done_once_by_the_others(world: int, alive: int) -> None:
    """In step, each does the next of its tasks that was not done when it came to it: few are done twice."""
    tasks, done, twice = 800, set(), 0
    orders = [iter(share(range(tasks), rank, world)) for rank in range(alive)]
    while len(done) < tasks:
        taken = [next((task for task in order if task not in done), None) for order in orders]
        own = [task for task in taken if task is not None]
        twice += len(own) - len({*own} - done)
        done |= {*own}
    assert twice < 0.04 * tasks


def test_ranks_share_out_tasks_and_take_over_all_others() -> None:
    order = share(range(7), 1, 3)
    assert order[:2] == [1, 4] and sorted(order[2:]) == [0, 2, 3, 5, 6]
    assert order == share(range(7), 1, 3)  # the same whenever it is asked
    for world in (1, 2, 5, 9):
        firsts = [share(range(7), rank, world) for rank in range(world)]
        assert all(sorted(order) == [*range(7)] for order in firsts)
    for rank, world in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(UserError, match=f"rank={rank} of world={world}"):
            share([], rank, world)
    with pytest.raises(UserError, match="workers=0"):
        list(parallel.spread(abs, [1], 0))


def _fail(task: int) -> int:
    if task == 1:
        raise UserError(f"task {task} is bad")
    return task


def test_an_error_in_a_worker_is_raised_here(tmp_path: Path) -> None:
    for workers in (1, 2):
        with pytest.raises(UserError, match="task 1 is bad"):
            list(parallel.spread(_fail, [0, 1, 2], workers))


def _die_holding(queue: str, lock: str, task: int) -> int:
    """Task 0 dies with a lock of the pool's in its hands, while the other worker is at a task of its own."""
    if task == 0:
        frame = sys._getframe()
        while frame.f_code.co_name != "_process_worker":
            assert frame.f_back is not None
            frame = frame.f_back
        time.sleep(0.5)
        getattr(frame.f_locals[queue], lock).acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2)
    return task


@pytest.mark.parametrize(("queue", "lock"), [("call_queue", "_rlock"), ("result_queue", "_wlock")])
def test_a_worker_killed_with_a_lock_in_its_hands_hangs_nobody(queue: str, lock: str) -> None:
    work = partial(_die_holding, queue, lock)
    with pytest.raises(UserError, match="a worker process of workers=2 died"):
        list(parallel.spread(work, range(6), 2))
    assert not [
        child for child in multiprocessing.active_children() if child.name.startswith("Spawn")
    ]


def test_class_names_must_be_as_many_as_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 class names for classes=5"):
        writer.write(tmp_path, source(), header=LATENT, class_names=("a", "b"))
    manifest, _ = writer.write(tmp_path, source(), header=LATENT, class_names=tuple("abcde"))
    assert manifests.load(tmp_path).plain["class_names"] == [*"abcde"] and manifest.classes == 5
    assert len(shards.read_all(tmp_path)["x"]) == 1000
