"""This project's trainer as the kit asks for it: ranks are processes, and a kill is SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from selfguide.distributed import RankInfo
from selfguide.spec.config import Config
from selfguide.spec.run import RunFolder, read_record
from selfguide.training import checkpoint, loop
from selfguide.training.engine.layout import Owned, ParameterSpace
from selfguide.training.state import State
from selfguide.training.stored import open_checkpoint
from selfguide.training.work import Training
from tests.resume_kit.kit import Kill, Seen
from tests.selfguide.dying_writer import STRUCK, Point, struck
from tests.selfguide.test_training import attempt
from tools.ranks import RankFailed, run_ranks

# at which point the process that writes a checkpoint is when a share of it is done
_POINTS: Mapping[float, Point] = {0.0: "part", 0.5: "parts", 0.9: "manifest"}


@dataclass
class Real:
    """A run of `config`, which is to report at every step, on two ranks unless a check says otherwise."""

    config: Config

    def __post_init__(self) -> None:
        train = self.config.train
        self.batch, self.images, self.every = train.batch, train.images, train.checkpoint_every
        self.swaps = train.preview > 0

    def attempt(self, folder: Path, world: int = 2, kill: Kill | None = None) -> Seen:
        run, died = RunFolder(folder), False
        try:
            run_ranks(world, _work, self.config, str(folder), kill, start="forkserver")
        except RankFailed:
            # not by itself
            died = (run.attempt(run.attempt_numbers()[-1]) / STRUCK).exists()
            if not died:
                raise
        assert died == (kill is not None), "the attempt came to its end"
        return _seen(run, world, self.batch)

    def saved(self, folder: Path) -> Sequence[tuple[int, Path]]:
        run = RunFolder(folder)
        return [(images, run.checkpoint(images)) for images in run.saved()]

    def final(self, folder: Path) -> Mapping[str, np.ndarray]:
        stored = open_checkpoint(RunFolder(folder).checkpoint(self.images))
        _, averages, ranges = checkpoint.averages_in(stored.manifest)
        names, total = ["master", "first", "second", *averages], stored.layout.total
        full = {name: (torch.empty(total),) for name in names}
        space = ParameterSpace(
            stored.layout, [Owned(0, total, torch.empty(total))], replicated=True
        )
        checkpoint.read_vectors(stored.folder, ranges, full, space)
        held = {name: vector for name, (vector,) in full.items()}
        held |= load_file(stored.folder / checkpoint.REPLICATED)
        counted = {
            name: np.array(stored.manifest[name]) for name in ("images", "steps", "ema_since")
        }
        return {name: tensor.double().numpy() for name, tensor in held.items()} | counted


def _seen(run: RunFolder, world: int, batch: int) -> Seen:
    """What the newest attempt told of its steps before it ended."""
    number = run.attempt_numbers()[-1]
    progress = read_record(run.attempt(number) / "progress.json")
    assert progress is not None
    parts = [_read(run.attempt(number) / f"order-{rank}.jsonl") for rank in range(world)]
    # steps after which no rank died before it had written its line
    done = set.intersection(*({images for images, _ in part} for part in parts))
    order: dict[int, list[int]] = {images: [] for images in done}
    for images, ordinals in [line for part in parts for line in part if line[0] in done]:
        order[images] += ordinals
    told = _read(run.metrics / f"train-{number:04d}.jsonl")
    losses = {line["images"] - batch: line["loss"] for line in told}
    return Seen(progress["resumed_from"] or 0, losses, order)


def _read(file: Path) -> list[Any]:
    return [*map(json.loads, file.read_text().splitlines())] if file.exists() else []


def _work(rank_info: RankInfo, config: Config, folder: str, kill: Kill | None) -> None:
    """One rank of an attempt; one of them dies as `kill` says, and the other is ended like it."""
    advance, save, exchange, lines = loop.advance, checkpoint.save, State._exchange, 0

    def dies(job: Training) -> bool:
        if kill is None or kill.where != "step" or kill.images != job.state.images:
            return False
        return kill.images // config.train.batch % rank_info.world == rank_info.rank

    def noted(job: Training) -> None:
        if dies(job):
            _die(RunFolder(Path(folder)))
        images = job.state.images
        advance(job)
        read = [int(each) for arrays in job.arrays for each in arrays["ordinal"]]
        file = job.lease.run.attempt(job.lease.number) / f"order-{rank_info.rank}.jsonl"
        with file.open("a") as out:
            out.write(json.dumps([images, read]) + "\n")

    def killed(at: Path, state: State, *rest: Any) -> None:
        """The first save tells how many lines one runs; the one that is to die does so behind a share of them."""
        nonlocal lines
        assert kill is not None
        limit = int(kill.share * lines) if kill.images == state.images else None
        ran = 0

        def trace(*_: Any) -> Any:
            nonlocal ran
            if ran == limit:
                _die(RunFolder(Path(folder)))
            ran += 1
            return trace

        sys.settrace(trace)
        save(at, state, *rest)
        sys.settrace(None)
        lines = ran

    def swapped(state: State, index: int) -> None:
        exchange(state, index)
        assert kill is not None
        if kill.images == state.images:
            _die(RunFolder(Path(folder)))

    loop.advance = noted
    strikes: AbstractContextManager[object] = nullcontext()
    if kill is not None and rank_info.rank == 0:
        if kill.where == "save" and config.train.checkpoint_writer == "process":
            # another process writes them, and ends the file that it is at
            strikes = struck(Path(folder), kill.images, _POINTS[kill.share], "trainer")
        elif kill.where == "save":
            checkpoint.save = killed
        elif kill.where == "swap":
            State._exchange = swapped  # type: ignore[method-assign]
    with strikes:
        attempt(rank_info, config, folder)


def _die(run: RunFolder) -> None:
    (run.attempt(run.attempt_numbers()[-1]) / STRUCK).touch()
    os.kill(os.getpid(), signal.SIGKILL)
