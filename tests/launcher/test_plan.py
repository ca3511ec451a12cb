"""What a run will take, from what others took; where each number comes from."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import plan as command
from launcher.backends import Span
from launcher.compose import compose
from launcher.folder import Attempt
from launcher.plan import plan
from launcher.reconcile.lived import Lived
from launcher.reconcile.view import AttemptView, JobView, RunView
from selfguide.spec.config import Config
from selfguide.spec.identity import identity
from selfguide.spec.run import RunFolder
from shards.errors import UserError

SETTINGS = [
    "experiment=digits_dit",
    "cluster=slurm",
    "nodes=2",
    "cluster.gpus_per_node=1",
    "cluster.timeout_min=60",
    "train.images=1280000",
    "train.batch=128",
    "train.checkpoint_every=12800",
]


@functools.cache
def a_config(*more: str) -> Config:
    return compose([*SETTINGS, *more])


def an_attempt(
    number: int, start: float, end: float, *, first: int = 0, **more: Any
) -> AttemptView:
    """Of two ranks that trained 100 images/s from 60 s after the start on, and saved for 1 s every 128 s."""
    job = {"kind": "slurm", "id": str(number), "nodes": 2, "tasks": 1, "gpus": 2, "submitted": 0.0}
    saves, rest = divmod(end - start - 60, 129)
    train = 128 * saves + min(rest, 128)
    seconds = {"start": 60.0, "train": train, "checkpoint": saves}
    left = {"time": end, "images": first + int(100 * train), "section": "train", "seconds": seconds}
    left |= {"class": "ok", "code": 0, "message": ""}
    ending = more.pop("ending", {})
    killed = bool(ending)
    files = Attempt(RunFolder(Path(f"/runs/digits_dit/{more.pop('run', 'a')}")).attempt(number))
    made = AttemptView(
        files=files,
        opened=start,
        world=2,
        job=JobView(record=job, state="gone", spans=(Span(start, end, 7.0),), ending=ending),
        began=start,
        resumed_from=first,
        starts=frozenset("01"),
        begins={rank: {"time": start} for rank in "01"},
        exits={} if killed else dict.fromkeys("01", left),
        heartbeats=dict.fromkeys("01", left),
        progress={"section": "train", "save_s": 1.5, "time": end},
    )
    return replace(made, **more)


def a_view(name: str, *attempts: AttemptView, config: Config | None = None) -> RunView:
    config = config or a_config()
    return RunView(
        folder=RunFolder(Path("/runs/digits_dit") / name), time=1e6, id=name, experiment="digits_dit", name=None,
        hash="", identity=json.loads(json.dumps(identity(config, "c0ffee"))), images=config.train.images,
        created=0.0, tries=len(attempts), attempts=tuple(attempts), config=config,
    )  # fmt: skip


NODE = {"state": "NODE_FAIL"}


def test_plan_of_a_run_that_stopped_is_by_its_own_attempts() -> None:
    first = an_attempt(1, 0.0, 60.0 + 10 * 129, ending=NODE)
    second = an_attempt(2, 1400.0, 1460.0 + 10 * 129, first=128_000)
    view = replace(a_view("a", first, second), checkpoints=(243_200, 256_000))
    made = plan(view, a_config(), [Lived.of(view)])
    assert {name: each.value for name, each in made.known.items()} == {
        "images_per_s": pytest.approx(100.0),
        "save_s": pytest.approx(1.0),
        "start_s": pytest.approx(60.0),
        "gap_s": pytest.approx(50.0),
        "queued_s": pytest.approx(7.0),
        "failures_per_node_s": pytest.approx(1 / (2 * 2 * 1350)),
    }
    assert all(each.source.startswith("measured: ") for each in made.known.values())
    assert (made.images, made.of, made.unit) == (256_000, 1_280_000, "GPU")
    # a failure each 2700 s of two nodes, a limit of an hour less its warning
    assert made.costs.failures_per_s == pytest.approx(1 / 2700)
    assert made.costs.limit_s == 3600 - 62
    assert made.expected.wall_s > 10_240 and made.gpu_hours == pytest.approx(
        2 * made.expected.allocated_s / 3600
    )
    assert made.best_checkpoint_every == pytest.approx(100 * 72.8, abs=64)
    assert made.checkpoint_every == 12_800 and made.best_saves_s is not None
    assert made.best_saves_s > 0


def test_plan_of_a_new_run_takes_runs_that_train_the_same_and_then_others_of_the_cluster() -> None:
    other = a_config("model.width=32")
    lived = [Lived.of(a_view("b", an_attempt(1, 0.0, 1350.0), config=other))]
    with pytest.raises(UserError):
        plan(None, a_config(), lived)
    said = plan(None, a_config(), lived, images_per_s=50.0)
    assert (said.known["images_per_s"].value, said.known["images_per_s"].source) == (50.0, "given")
    assert said.known["start_s"].value == pytest.approx(60.0)
    assert said.known["save_s"].source.startswith("estimated")
    assert said.costs.failures_per_s == 0 and said.best_checkpoint_every is None
    # another seed and another length train the same; twice the ranks are thought twice as fast
    same = a_config("seed=3", "train.images=256000")
    lived.append(Lived.of(a_view("c", an_attempt(1, 0.0, 1350.0), config=same)))
    made = plan(None, a_config("nodes=4"), lived)
    assert made.known["images_per_s"].value == pytest.approx(200.0)
    assert made.known["images_per_s"].source.startswith("estimated")
    assert made.known["save_s"].value == 1.5
    # elsewhere another machine trains
    with pytest.raises(UserError):
        plan(None, a_config("cluster.kind=devcluster"), lived)


def test_plan_counts_preemptions_and_machines_but_not_the_runs_own_mistakes() -> None:
    kinds = [{"state": "PREEMPTED"}, NODE, {"state": "CANCELLED by 0"}]
    attempts = [
        an_attempt(i + 1, 2000.0 * i, 2000.0 * i + 1800, ending=ending)
        for i, ending in enumerate(kinds)
    ]
    fell = {"time": 7800.0, "class": "error", "code": 1, "message": "ValueError", "images": 640}
    mistake = replace(an_attempt(4, 6000.0, 7800.0), exits={"0": fell, "1": fell})
    by_hand = replace(an_attempt(5, 8000.0, 9800.0, ending=kinds[2]), cancelled=True)
    view = a_view("a", *attempts, mistake, by_hand)
    known = plan(view, a_config(), [Lived.of(view)]).known
    assert known["failures_per_node_s"].value == pytest.approx(1 / (2 * 5 * 1800))
    assert known["preemptions_per_s"].value == pytest.approx(2 / (5 * 1800))


def test_plan_of_a_finished_run_has_nothing_before_it() -> None:
    view = a_view("a", an_attempt(1, 0.0, 1350.0))
    view = replace(view, snapshots={view.images: {}}, checkpoints=(view.images,))
    made = plan(view, a_config(), [Lived.of(view)])
    assert made.expected.wall_s == 0 and made.notes


def run_plan(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert command.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_takes_settings_or_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SETTINGS, f"runs={tmp_path}", "--images-per-s", "1000"]
    found = run_plan(settings, capsys)
    assert found["run"] is None and found["expected"]["wall_s"] > 1280
    assert found["finish"] == pytest.approx(found["now"] + found["expected"]["wall_s"])
    assert command.main(settings) == 0 and capsys.readouterr().out
    ends = tmp_path / "ends"
    ends.write_text("600 failure\n700 preemption\n")
    assert run_plan([*settings, "--ends", str(ends)], capsys)["given_s"] > 1280
    ends.write_text("600 rain\n")
    for words in (
        [*settings, "--ends", str(ends)],
        ["a", "b"],
        ["nothing", "--runs", str(tmp_path)],
        [*settings[:-1], "-1"],
    ):
        with pytest.raises(UserError):
            command.main(words)


def test_the_command_imports_no_torch() -> None:
    code = "import sys, launcher.plan, launcher.ledger; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["launcher.plan", "launcher.doctor"])
def test_guidance_away_from_a_snapshot_that_will_not_be_is_refused_as_submission_does(
    module: str, tmp_path: Path
) -> None:
    words = ["experiment=digits_dit", f"runs={tmp_path}", "sampler.g=2", "cluster=local"]
    with pytest.raises(UserError, match=r"take sampler\.weak=snapshot-96000 or"):
        importlib.import_module(module).main([*words, "sampler.weak=snapshot-641"])
