"""Ranks that are asked to stop: all stop at one step, save it, and resumed they lose nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.attempt import signals
from launcher.attempt.exits import Exit, exit_path
from selfguide.distributed import RankInfo
from selfguide.spec.config import Config
from selfguide.spec.rank_status import Preempted, RankStatus
from selfguide.spec.run import RunFolder, read_record
from selfguide.training import checkpoint, loop
from selfguide.training.saver import Saver
from selfguide.training.stop import StopVote
from shards.read.reader import Reader
from shards.read.stream import Stream
from shards.wait import wait_until
from tests.selfguide.test_training import IMAGES, assert_same, attempt, config, weights
from tools.ranks import RankFailed

# of the only rank that is signalled in most tests
WHO = 1
AT = 192


def rarely_saved(digits: Path, backend: str = "torch") -> Config:
    cfg = config(digits, backend)
    return replace(cfg, train=replace(cfg.train, snapshot_every=IMAGES, checkpoint_every=IMAGES))


def ask(status: RankStatus, number: int = signal.SIGTERM) -> None:
    """A signal to this process, which goes on once it was heard."""
    os.kill(os.getpid(), number)
    assert wait_until(lambda: status.stop, timeout_s=60)


def asked_after(images: int, then: Callable[[RankStatus], object]) -> None:
    """`then(status)` follows the step that ends at `images`, in this process."""
    step = loop.advance

    def advance(job: loop.Training) -> None:
        step(job)
        if job.state.images == images:
            then(job.telemetry.status)

    loop.advance = advance


def ended(rank_info: RankInfo, cfg: Config, root: str, folder: str) -> tuple[int | None, int]:
    """An attempt that listens to signals: image counts that it saved on its way out, and that it came to."""
    status = RankStatus()
    Path(folder).mkdir(exist_ok=True)
    signals.stop_on_signals(Path(folder), str(rank_info.rank), status)
    try:
        attempt(rank_info, cfg, root, status)
    except Preempted as stopped:
        assert status.images is not None
        return stopped.saved, status.images
    raise AssertionError("it was not stopped")


def never_late() -> None:
    """In this process, so that the vote of each step is read at the next one; a batch is waited for all the same."""
    Stream.ready = lambda *_: True  # type: ignore[method-assign]


def one_asked(
    rank_info: RankInfo, cfg: Config, root: str, folder: str, number: int
) -> tuple[int | None, int]:
    never_late()
    if rank_info.rank == WHO:
        asked_after(256, lambda status: ask(status, number))
    return ended(rank_info, cfg, root, folder)


@pytest.mark.parametrize(
    ("backend", "number"), [("torch", signal.SIGTERM), ("deepspeed", signal.SIGUSR2)]
)
def test_a_signal_to_one_rank_stops_all_at_one_step_and_nothing_is_lost(
    ranks: Any, digits: Path, tmp_path: Path, backend: str, number: int
) -> None:
    """With online guidance, behind its switch at 256 images; a checkpoint is due at the end alone."""
    cfg, whole, parts = rarely_saved(digits, backend), tmp_path / "whole", tmp_path / "parts"
    ranks(2, attempt, cfg, str(whole))
    first, second = ranks(2, one_asked, cfg, str(parts), str(tmp_path / "exits"), int(number))
    assert first == second == (320, 320), "one step later all know, and what they came to is saved"
    assert RunFolder(parts).saved()[-1] == first[0]
    assert ranks(2, attempt, cfg, str(parts)) == [2, 2]
    progress = read_record(RunFolder(parts).attempt(2) / "progress.json")
    assert progress is not None and progress["resumed_from"] == first[0] and progress["save_s"] > 0
    assert RunFolder(parts).slowest_save_s() is not None
    assert_same(weights(parts), weights(whole))


def asked_twice_in_a_save(
    rank_info: RankInfo, cfg: Config, root: str, folder: str
) -> tuple[tuple[int | None, int], int]:
    save, saves = checkpoint.save, []

    def interrupted(*arguments: Any) -> None:
        saves.append(arguments)
        status: RankStatus = arguments[1].status
        if rank_info.rank == WHO and len(saves) == 1:
            ask(status)
            os.kill(os.getpid(), signal.SIGUSR2)
        save(*arguments)

    def lend(job: loop.Training) -> None:
        job.state.status = job.telemetry.status  # type: ignore[attr-defined]

    step = loop.advance
    loop.advance = lambda job: (lend(job), step(job))[1]  # type: ignore[func-returns-value]
    checkpoint.save = interrupted
    return ended(rank_info, cfg, root, folder), len(saves)


def test_a_save_is_finished_and_is_the_last_when_signals_come_in_it(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    cfg = config(digits)
    cfg = replace(cfg, train=replace(cfg.train, checkpoint_writer="here"))
    found = ranks(2, asked_twice_in_a_save, cfg, str(root), str(tmp_path / "exits"))
    assert found == [((None, 128), 1)] * 2
    assert RunFolder(root).saved() == [128]


def asked_while_written(
    rank_info: RankInfo, cfg: Config, root: str, folder: str
) -> tuple[int | None, int]:
    """The writer of one rank is stopped at the first checkpoint, and goes on once that rank was asked to stop."""
    save = Saver.save

    def begun(saver: Saver, *arguments: Any) -> None:
        save(saver, *arguments)
        process = saver.writer._process
        if rank_info.rank != WHO or process is None:
            return
        os.kill(process.pid, signal.SIGSTOP)
        ask(saver._telemetry.status)
        threading.Timer(1.0, os.kill, (process.pid, signal.SIGCONT)).start()

    Saver.save = begun  # type: ignore[method-assign]
    return ended(rank_info, cfg, root, folder)


def test_a_save_beside_training_is_waited_for_when_a_signal_comes_in_it(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    found = ranks(2, asked_while_written, config(digits), str(root), str(tmp_path / "exits"))
    assert found[0] == found[1]
    new, images = found[0]
    run = RunFolder(root)
    # of the step that all stopped at; that of the checkpoint is there in any case
    assert run.saved()[-1] == images and (new in (None, images))
    assert 128 in run.saved()


def without_data(
    rank_info: RankInfo, cfg: Config, root: str, folder: str
) -> tuple[tuple[int | None, int], str | None]:
    """The source of rank 0 runs dry, which hears no signal; the other is asked to stop while both wait."""
    take, close, flow = Reader.take, Stream.close, threading.Event()
    seen: list[str | None] = []

    def dry(self: Reader, *ordinals: Any) -> Any:
        if self.position >= AT and rank_info.rank != WHO:
            flow.wait()
        return take(self, *ordinals)

    def ended_flow(self: Stream) -> None:
        flow.set()
        close(self)

    Reader.take, Stream.close = dry, ended_flow  # type: ignore[method-assign]
    if rank_info.rank == WHO:
        asked_after(
            AT, lambda status: threading.Thread(target=once_waiting, args=(status,)).start()
        )

    def once_waiting(status: RankStatus) -> None:
        assert wait_until(lambda: status.section == "data", timeout_s=60)
        seen.append(status.section)
        ask(status)

    return ended(rank_info, cfg, root, folder), seen[0] if seen else None


def test_ranks_that_wait_for_data_stop_where_they_are(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    found = ranks(
        2, without_data, rarely_saved(digits), str(tmp_path / "run"), str(tmp_path / "exits")
    )
    assert [end for end, _ in found] == [(AT, AT)] * 2
    assert found[WHO][1] == "data"


def beside_a_stopped_peer(rank_info: RankInfo, cfg: Config, root: str, folder: str) -> None:
    """One rank hangs after a step, and the other is asked to end while it waits for it in a collective."""
    signals.STOP_S = 1.0
    if rank_info.rank == WHO:
        asked_after(AT, lambda status: os.kill(os.getpid(), signal.SIGSTOP))
    else:
        asked_after(AT, lambda status: ask(status))
    ended(rank_info, cfg, root, folder)


def test_a_rank_that_waits_for_one_that_hangs_ends_itself_and_says_so(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(RankFailed):
        ranks(2, beside_a_stopped_peer, config(digits), str(tmp_path / "run"), str(tmp_path))
    found = Exit.read(tmp_path, 0)
    assert found is not None and (found.kind, found.code) == ("signal", 128 + signal.SIGTERM)
    assert (found.section, found.saved) == ("train", None) and found.images >= AT  # type: ignore[operator]


def beside_a_peer_that_left(rank_info: RankInfo, cfg: Config, root: str) -> None:
    """Its connections are closed as those of a killed process are; it stays until the other has said so."""

    def leave(_: RankStatus) -> None:
        for path in Path("/proc/self/fd").iterdir():
            number = int(path.name)
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as each:
                each.shutdown(socket.SHUT_RDWR)
        assert wait_until(lambda: Exit.read(Path(root), 0), timeout_s=60)

    if rank_info.rank == WHO:
        asked_after(AT, leave)
    try:
        attempt(rank_info, cfg, root)
    except Exception as error:
        Exit.of(error, RankStatus()).write(exit_path(Path(root), rank_info.rank))
        raise
    raise AssertionError("its peer is gone")


def test_an_error_for_want_of_a_peer_is_marked_as_one(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(RankFailed):
        ranks(2, beside_a_peer_that_left, config(digits), str(tmp_path))
    found = Exit.read(tmp_path, 0)
    assert found is not None and (found.kind, found.peer_gone) == ("error", True)


def asked_in_the_first_step(rank_info: RankInfo, cfg: Config, root: str, folder: str) -> None:
    prepare = loop.prepare_batch

    def slow(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()  # a compiler, which never comes back
        return prepare(*arguments)

    if rank_info.rank == WHO:
        loop.prepare_batch = slow
    ended(rank_info, cfg, root, folder)


def test_a_rank_that_compiles_its_first_step_ends_at_once_with_nothing_to_save(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(RankFailed):
        ranks(2, asked_in_the_first_step, config(digits), str(tmp_path / "run"), str(tmp_path))
    found = Exit.read(tmp_path, WHO)
    assert found is not None and (found.kind, found.code) == ("preempted", 76)
    assert found.images == 0 and found.saved is None


class Slow:
    """A stream whose next batches come at the third question, and its sections as each was asked."""

    def __init__(self, status: RankStatus, then: Callable[[], object] = lambda: None) -> None:
        self.status, self.then, self.sections = status, then, [""]

    def ready(self, batches: int, timeout_s: float = 0.0) -> bool:
        self.sections.append(self.status.section or "")
        if len(self.sections) == 3:
            self.then()
        return len(self.sections) > 3


def test_a_step_whose_images_are_late_is_waited_for_in_a_section_of_its_own() -> None:
    status = RankStatus(section="train")
    slow = Slow(status)
    vote = StopVote(status, slow)  # type: ignore[arg-type]
    assert vote.stop(at_once=False) == 0
    assert slow.sections[1:] == ["train", "data", "data", "train"] and status.section == "train"
    # the answer that is under way is read at the next boundary
    status.stop = signal.SIGUSR2
    assert vote.stop(at_once=False) == 0 and vote.stop(at_once=False) == signal.SIGUSR2


def test_a_signal_while_images_are_late_is_answered_before_they_come() -> None:
    status = RankStatus(section="train")
    slow = Slow(status, lambda: setattr(status, "stop", signal.SIGTERM))
    assert StopVote(status, slow).stop(at_once=False) == signal.SIGTERM  # type: ignore[arg-type]
    assert len(slow.sections) == 3
