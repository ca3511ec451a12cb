"""What test jobs do instead of training and evaluating; imported by the jobs' own processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import launcher
from launcher.attempt import entry
from launcher.attempt.entry import run_rank
from selfguide.spec.config import Config, build
from selfguide.spec.files import read_config
from selfguide.spec.rank_status import Preempted, RankStatus
from selfguide.spec.records import EvaluationRecord, Protocol
from selfguide.spec.run import RunFolder
from shards import storage
from shards.errors import UserError
from shards.wait import wait_until


def nap(folder: str) -> None:
    """Sleeps until it is ended."""
    run_rank(Path(folder), lambda rank, local_rank, world: time.sleep(600))


def look_around(folder: str) -> None:
    """Tells where it runs, and ends well."""

    def work(rank: int, local_rank: int, world: int) -> None:
        told = {
            "rank": rank,
            "local_rank": local_rank,
            "world": world,
            "cwd": str(Path.cwd()),
            "launcher": launcher.__file__,
            "python": sys.executable,
            "environment": dict(os.environ),
            "nice": os.nice(0),
            "session": os.getsid(0),
        }
        (Path(folder) / f"place-{rank}.json").write_text(json.dumps(told))

    run_rank(Path(folder), work)


def fall(folder: str) -> None:
    """Rank 1 raises, the others wait for it for ever."""

    def work(rank: int, local_rank: int, world: int) -> None:
        if rank == 1:
            # rank 0 handles signals from here on, and leaves a record of how it was ended
            wait_until((Path(folder) / "start-0.json").exists, timeout_s=60)
            raise RuntimeError("rank one fell")
        time.sleep(600)

    run_rank(Path(folder), work)


def train_until_asked(folder: str) -> None:
    """Trains for ever; where a rank is asked to stop, all save 640 images and end, each in its own time."""
    status = RankStatus()

    def work(rank: int, local_rank: int, world: int) -> None:
        status.start(0)
        status.begun = True
        (Path(folder) / f"ready-{rank}").touch()
        wait_until(lambda: status.stop)
        (Path(folder) / f"asked-{rank}").touch()
        wait_until(lambda: (Path(folder) / f"save-{rank}").exists())
        raise Preempted("SIGTERM", 640)

    run_rank(Path(folder), work, status)


def fall_in_training(folder: str) -> None:
    """Rank 1 raises, and the others wait for it in a collective."""
    status = RankStatus()

    def work(rank: int, local_rank: int, world: int) -> None:
        status.start(0)
        status.begun = True
        (Path(folder) / f"ready-{rank}").touch()
        if rank == 1:
            wait_until((Path(folder) / "ready-0").exists, timeout_s=60)
            raise MemoryError("of rank one")
        time.sleep(600)

    run_rank(Path(folder), work, status)


def hang_at_the_end(folder: str) -> None:
    """All is done, but leaving the group never ends."""
    entry.END_S = 0.5
    run_rank(Path(folder), lambda rank, local_rank, world: None, leave=lambda: time.sleep(600))


def vanish(folder: str) -> None:
    """Rank 1 is killed as the kernel kills, the others wait for it for ever."""

    def work(rank: int, local_rank: int, world: int) -> None:
        if rank == 1:
            # rank 0 handles signals from here on, and leaves a record of how it was ended
            wait_until((Path(folder) / "start-0.json").exists, timeout_s=60)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    run_rank(Path(folder), work)


def crash(folder: str) -> None:
    """Rank 1 falls in native code; rank 0 works on until it is ended."""

    def work(rank: int, local_rank: int, world: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(600)

    run_rank(Path(folder), work)


def vanish_alone(folder: str) -> None:
    """Is killed as the kernel kills, with nobody else to notice."""
    run_rank(Path(folder), lambda rank, local_rank, world: os.kill(os.getpid(), signal.SIGKILL))


def stubborn(folder: str) -> None:
    """Ignores being asked to end."""

    def work(rank: int, local_rank: int, world: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (Path(folder) / f"ready-{rank}").touch()
        time.sleep(600)

    run_rank(Path(folder), work)


def publish_all(folder: str) -> None:
    """Publishes every snapshot of the run, as rank 0."""

    def work(rank: int, local_rank: int, world: int) -> None:
        config = read_config(Path(folder) / "config.yaml")
        run = RunFolder(Path(folder).parent.parent)
        every = config.train.snapshot_every
        for images in range(every, config.train.images + 1, every) if rank == 0 else ():
            publish(run, images)

    run_rank(Path(folder), work)


def publish(run: RunFolder, images: int) -> None:
    """A complete snapshot folder with one part."""
    run.snapshot(images).mkdir(parents=True)
    (run.snapshot(images) / "weights").write_bytes(b"x" * 10)
    extra = {"images": images, "data": {"manifest": "none"}, "guidance": {}}
    storage.publish_folder(run.snapshot(images), extra=extra)


def score(request: str) -> None:
    """Publishes a record, as an evaluation does."""
    run_rank(Path(request).parent, lambda rank, local_rank, world: _score(Path(request)))


def score_telling_threads(request: str) -> None:
    """Scores as an evaluation that tells how many threads it was given, and a variable of the user's."""
    import torch

    from selfguide.evaluation import job

    def evaluate(*_: object) -> None:
        told = {"threads": torch.get_num_threads(), "colour": os.environ.get("COLOUR")}
        Path(request).with_name("told.json").write_text(json.dumps(told))
        _score(Path(request))

    job.evaluate = evaluate  # type: ignore[assignment]
    run_rank(Path(request).parent, lambda *_: job.main(Path(request), RankStatus()))


def score_second_time(request: str) -> None:
    """Dies without a word at the first attempt of every snapshot."""

    def work(rank: int, local_rank: int, world: int) -> None:
        if json.loads(Path(request).read_text())["attempt"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        _score(Path(request))

    run_rank(Path(request).parent, work)


def preempted_evaluation(request: str) -> None:
    """Is asked to end, as a preemption would, at the first four attempts of every snapshot."""

    def work(rank: int, local_rank: int, world: int) -> None:
        if json.loads(Path(request).read_text())["attempt"] <= 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        _score(Path(request))

    run_rank(Path(request).parent, work)


def never_score(request: str) -> None:
    """Fails every time."""

    def work(rank: int, local_rank: int, world: int) -> None:
        raise RuntimeError("no score today")

    run_rank(Path(request).parent, work)


def refuse(request: str) -> None:
    """Fails in a way that trying again repeats."""

    def work(rank: int, local_rank: int, world: int) -> None:
        raise UserError("evaluation.protocol=x is unknown")

    run_rank(Path(request).parent, work)


def _score(request: Path) -> None:
    wanted = json.loads(request.read_text())
    run = RunFolder(Path(wanted["run"]))
    protocol = Protocol.of(build(Config, wanted["config"]), run.snapshot_manifest(wanted["images"]))
    EvaluationRecord(
        status="done",
        key=wanted["key"],
        attempt=wanted["attempt"],
        images=wanted["images"],
        protocol=asdict(protocol),
        protocol_key=protocol.key,
        scores={"fd_digits": 7.0},
        seconds=0.1,
    ).publish(run)


def share(folder: str) -> None:
    """A task of an array: falls, naps, or leaves what its request asks for."""

    def work(rank: int, local_rank: int, world: int) -> None:
        asked = json.loads((Path(folder) / "request.json").read_text())
        if asked["how"] == "fall":
            raise RuntimeError(f"task {asked['rank']} fell")
        if asked["how"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if asked["how"] == "nap":
            time.sleep(600)
        time.sleep(0.5)  # after the others have fallen
        told = {"cwd": str(Path.cwd()), "devices": os.environ["CUDA_VISIBLE_DEVICES"]}
        (Path(asked["out"]) / f"{asked['rank']}.json").write_text(json.dumps(told))

    run_rank(Path(folder), work)
