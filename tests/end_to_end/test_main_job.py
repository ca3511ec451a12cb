"""The main job through every room, as a user runs it: real processes, real digits, shortened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.cancel import cancel
from selfguide.spec.records import records
from selfguide.spec.run import RunFolder, read_record
from shards.wait import wait_until

SHORT = ["train.images=25_600", "train.checkpoint_every=12_800"]
OFTEN = [*SHORT, "train.snapshot_every=6_400"]
SELDOM = [*SHORT, "train.snapshot_every=12_800"]
FINAL = "img-000025600"


def command(module: str, *words: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, timeout=timeout
    )


@contextlib.contextmanager
def ended_after(folder: Path) -> Iterator[Path]:
    """A folder of runs; what still works in it afterwards is ended."""
    try:
        yield folder
    finally:
        for path in folder.glob("*/*/run.json"):
            cancel(RunFolder(path.parent))


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    with ended_after(tmp_path / "runs") as folder:
        yield folder


def submit(runs: Path, *words: str, code: int = 0) -> tuple[RunFolder, str]:
    """Submits and follows to the end, which must come with exit code `code`."""
    done = command("launcher.submit", f"runs={runs}", "cluster=local", "follow=true", *words)
    assert done.returncode == code, done.stdout + done.stderr
    (description,) = runs.glob("*/*/run.json")
    return RunFolder(description.parent), done.stdout


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    (file,) = (run.snapshots / FINAL).glob("ema-*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def demo(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunFolder, str]]:
    """The shortened demo, with its evaluations; and what it said."""
    with ended_after(tmp_path_factory.mktemp("demo") / "runs") as folder:
        yield submit(
            folder, "experiment=digits_dit", f"data.root={digits}", *OFTEN, "evaluation.samples=400"
        )


@pytest.mark.slow
def test_the_demo_scores_snapshots_while_training_goes_on(
    digits: Path, demo: tuple[RunFolder, str]
) -> None:
    run, said = demo
    runs = run.root.parent.parent
    (exits,) = [list(run.attempt(1).glob("exit-*.json"))]
    ended = min(json.loads(path.read_text())["time"] for path in exits)
    trainers = {json.loads(path.read_text())["pid"] for path in exits}
    found = list(records(run))
    early = [r for r in found if r.started < ended]
    # how many is up to the machine
    assert early and len(exits) == 2
    assert not trainers & {r.pid for r in found}
    assert [r for r in found if r.final and r.done]
    assert all((run.evals / f"{r.key}.{r.attempt}.png").stat().st_size > 1000 for r in found)
    told = next(r for r in found if r.final)
    assert told.label_free and told.scores["nmi"] > 0.3 and told.protocol["reference"]
    assert "images/s" in said and "left" in said, "a user sees the rate and when it ends"

    board = command("launcher.board", "--runs", str(runs))
    assert board.returncode == 0 and "digits_dit" in board.stdout
    page = (runs / "board.html").read_text()
    assert "data:image/png" in page and "digits_dit" in page

    again = command("launcher.submit", f"runs={runs}", "cluster=local", "experiment=digits_dit",
                    f"data.root={digits}", *OFTEN, "evaluation.samples=400")  # fmt: skip
    assert again.returncode == 0 and "finished" in again.stdout and len(run.attempt_numbers()) == 1


class Killer(threading.Thread):
    """Sends SIGKILL to every evaluation process of a runs folder until told to stop."""

    def __init__(self, runs: Path) -> None:
        super().__init__(daemon=True)
        self.mark, self.stop, self.killed = str(runs), threading.Event(), 0

    def run(self) -> None:
        while not self.stop.wait(0.05):
            for folder in Path("/proc").iterdir():
                if not folder.name.isdigit() or not self._is_evaluation(folder):
                    continue
                try:
                    os.kill(int(folder.name), signal.SIGKILL)
                    self.killed += 1
                except ProcessLookupError:
                    continue

    def _is_evaluation(self, folder: Path) -> bool:
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it ended between the look and the read
            return False
        return "submitit.core._submit" in words and f"{self.mark}" in words and "/evals/" in words


@pytest.mark.slow
def test_killing_every_evaluation_leaves_the_weights_bitwise_equal(
    digits: Path, demo: tuple[RunFolder, str], runs: Path
) -> None:
    killer = Killer(runs)
    killer.start()
    run, _ = submit(runs, "experiment=digits_dit", f"data.root={digits}", *SELDOM,
                    "evaluation.samples=200", "evaluation.attempts=2", code=1)  # fmt: skip  # no final score: not well
    killer.stop.set()
    states = [r.status for r in records(run)]
    assert killer.killed >= 2 and states and set(states) == {"failed"}
    undisturbed, found = weights(demo[0]), weights(run)
    assert undisturbed.keys() == found.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.slow
def test_cancelling_and_submitting_again_leaves_the_weights_bitwise_equal(
    digits: Path, demo: tuple[RunFolder, str], runs: Path
) -> None:
    words = ["experiment=digits_dit", f"data.root={digits}", *SELDOM, "evaluation=none"]
    done = command("launcher.submit", f"runs={runs}", "cluster=local", *words)
    assert done.returncode == 0, done.stderr
    (description,) = runs.glob("*/*/run.json")
    run = RunFolder(description.parent)
    assert wait_until(lambda: progress(run, 1).get("images"), timeout_s=120)
    cancel(run)
    ends = [json.loads(p.read_text()) for p in sorted(run.attempt(1).glob("exit-*.json"))]
    assert [(e["class"], e["code"]) for e in ends] == [("preempted", 75)] * 2
    saved = ends[0]["saved"]
    assert 0 < saved < 25_600 and {e["images"] for e in ends} == {saved} == set(run.saved())
    submit(runs, *words)
    assert progress(run, 2)["resumed_from"] == saved
    undisturbed, found = weights(demo[0]), weights(run)
    assert undisturbed.keys() == found.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, found[name]), name


def progress(run: RunFolder, attempt: int) -> dict[str, Any]:
    return read_record(run.attempt(attempt) / "progress.json") or {}


@pytest.mark.slow
def test_in1k_dit_trains_with_its_own_engine_loader_and_guidance(
    tmp_path: Path, runs: Path
) -> None:
    """Depth 2 and a batch of 2, all else as published: width 1152, bf16, ZeRO-1, [CLS], K = 5,000."""
    root = tmp_path / "latents"
    made = command("tools.shards", "make", "synthetic", "--out", str(root), "--count", "64",
                   "--shape", "4", "32", "32", "--classes", "1000", "--dtype", "float16")  # fmt: skip
    assert made.returncode == 0, made.stderr
    run, _ = submit(
        runs, "experiment=in1k_dit", f"data.root={root}", "model.depth=2", "guidance.layer=1",
        "guidance.teacher_refresh=2", "train.images=6", "train.batch=2", "train.log_every=2",
        "train.snapshot_every=6", "train.checkpoint_every=6",
    )  # fmt: skip
    log = next(run.attempt(1).glob("job/*_0_log.out")).read_text()
    lines = [
        json.loads(line) for line in (run.metrics / "train-0001.jsonl").read_text().splitlines()
    ]
    assert [line["images"] for line in lines] == [2, 4, 6], log
    assert "engine DeepSpeed ZeRO-1, torch.bfloat16 weights" in log and "2 ranks" in log
    assert all(line["loss"] > 0 and line["guidance_loss"] >= 0 for line in lines)
    held = load_file(next((run.snapshots / "img-000000006").glob("ema-*.safetensors")))
    assert held["head.prototypes"].shape == (5000, 1152) and held["backbone.cls"].shape == (1152,)
    assert all(bool(torch.isfinite(t).all()) for t in held.values())


def test_no_process_is_left_after_a_cancel(digits: Path, runs: Path) -> None:
    done = command("launcher.submit", f"runs={runs}", "cluster=local", "experiment=digits_uncond",
                   f"data.root={digits}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (description,) = runs.glob("*/*/run.json")
    progress = description.parent / "attempts" / "0001" / "progress.json"
    deadline = time.monotonic() + 120
    while not progress.exists() or json.loads(progress.read_text())["images"] == 0:
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.2)
    ended = command("launcher.cancel", str(description.parent))
    assert ended.returncode == 0, ended.stderr
    left = [p for p in Path("/proc").iterdir() if p.name.isdigit() and _mentions(p, str(runs))]
    assert not left


def _mentions(process: Path, text: str) -> bool:
    try:
        return text.encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False
