"""Lines of telemetry in trackers: what TensorBoard reads back over two attempts, and trackers that fail."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.compose import compose
from selfguide.spec.config import Config
from selfguide.spec.config.train import check_train
from selfguide.spec.identity import identity
from selfguide.spec.run import RunFolder, write_record
from selfguide.training import trackers
from selfguide.training.trackers import Trackers, flat
from shards.errors import UserError


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(["experiment=digits_uncond", "cluster=local"])


def with_trackers(config: Config, *names: Any) -> Config:
    return replace(config, train=replace(config.train, trackers=names))


def line(images: int, loss: float) -> dict[str, Any]:
    return {
        "images": images,
        "loss": loss,
        "spectrum": {"all": {"loss": [loss, None]}},
        "peak": "x",
    }


def test_every_finite_number_of_a_line_has_a_path() -> None:
    found = flat({**line(64, 0.5), "rate": None, "bad": float("nan"), "slowest": {"rank": 1}})
    assert found == {"loss": 0.5, "spectrum/all/loss/00": 0.5, "slowest/rank": 1.0}


@pytest.mark.parametrize("later", [-3600.0, 0.0, 1.0, 60.0])
def test_tensorboard_reads_one_curve_of_attempts_whatever_the_clocks_say(
    later: float, tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt goes on from 128 images: what the first wrote beyond them is trained again.

    Nodes' clocks differ, and two attempts may begin within the same second.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path)
    began = time.time()
    monkeypatch.setattr(trackers.time, "time", lambda: began)
    first = Trackers(run, with_trackers(config, "tensorboard"), 0)
    for images in (64, 128, 192):
        first.add(line(images, images / 64))
    first.close()
    monkeypatch.setattr(trackers.time, "time", lambda: began + later)
    second = Trackers(run, with_trackers(config, "tensorboard"), 128)
    for images in (192, 256):
        second.add(line(images, images / 640))
    second.close()
    third = Trackers(run, with_trackers(config, "tensorboard"), 256)
    third.add(line(320, 0.5))
    third.close()
    read = EventAccumulator(str(tmp_path / "metrics" / "tensorboard"))
    read.Reload()
    points = [(each.step, each.value) for each in read.Scalars("loss")]
    assert [step for step, _ in points] == [64, 128, 192, 256, 320]
    assert [value for _, value in points] == pytest.approx([1, 2, 0.3, 0.4, 0.5])


def test_tensorboard_drops_what_a_run_left_behind_as_it_went_back(
    tmp_path: Path, config: Config
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = Trackers(RunFolder(tmp_path), with_trackers(config, "tensorboard"), 0)
    for images in (64, 128, 192, 256):
        made.add(line(images, 1.0))
    made.go_back(128)
    for images in (224, 288):
        made.add(line(images, 0.5))
    made.close()
    read = EventAccumulator(str(tmp_path / "metrics" / "tensorboard"))
    read.Reload()
    points = [(each.step, each.value) for each in read.Scalars("loss")]
    assert points == [(64, 1.0), (128, 1.0), (224, 0.5), (288, 0.5)]


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[int] = []

    class Failing:
        def add(self, images: int, scalars: Any) -> None:
            heard.append(images)
            raise OSError("no room")

        def close(self) -> None:
            raise AssertionError("it was left out")

    def refuses(*_: Any) -> Any:
        raise ConnectionError("no server")

    monkeypatch.setitem(trackers._TRACKERS, "wandb", lambda *_: Failing())
    monkeypatch.setitem(trackers._TRACKERS, "mlflow", refuses)
    with caplog.at_level(logging.WARNING):
        made = Trackers(
            RunFolder(tmp_path), with_trackers(config, "wandb", "mlflow", "tensorboard"), 0
        )
        made.add(line(64, 1.0))
        made.add(line(128, 1.0))
    made.close()
    assert heard == [64]
    assert [("mlflow" in r.message, "wandb" in r.message) for r in caplog.records] == [
        (True, False),
        (False, True),
    ]
    assert any((tmp_path / "metrics" / "tensorboard").iterdir())


def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in {"wandb": "selfguide[wandb]", "tensorboard": "tensorboard>="}.items():
        with pytest.raises(UserError) as error:
            check_train(with_trackers(config, name).train)
        assert package in str(error.value) and "train.trackers" in str(error.value)
    check_train(with_trackers(config).train)


def test_a_folder_that_has_the_name_of_a_tracker_is_none(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B leaves `wandb/` where it ran, and Python takes any folder for a package."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None))
    with pytest.raises(UserError, match=r"selfguide\[wandb\]"):
        check_train(with_trackers(config, "wandb").train)


@pytest.mark.parametrize(("tracker", "field"), [("wandb", "id"), ("trackio", "name")])
def test_runs_of_one_name_are_two_where_all_experiments_lie_together_and_attempts_are_one(
    tracker: str, field: str, tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def init(**settings: Any) -> Any:
        begun.append(settings[field])
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setitem(sys.modules, tracker, SimpleNamespace(init=init))
    for name, key in (("base", "a1b2"), ("base", "c3d4"), ("base", "a1b2"), (None, "a1b2")):
        run = RunFolder(tmp_path / key / (name or key))
        write_record(run.run_json, {"hash": key}, replace=True)
        Trackers(run, replace(with_trackers(config, tracker), name=name), 0)
    assert begun == ["base-a1b2", "base-c3d4", "base-a1b2", "a1b2"]


def test_trackers_and_the_peak_are_no_part_of_a_run() -> None:
    words = ["experiment=digits_uncond", "cluster=local"]
    more = ["train.trackers=[]", "train.peak_tflops=1.5"]
    assert identity(compose(words), None) == identity(compose([*words, *more]), None)
