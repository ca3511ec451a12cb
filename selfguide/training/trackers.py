"""The lines of telemetry in the trackers that a run names: TensorBoard's files, W&B, MLflow, trackio.

Each knows the run by its id, so that attempts go on in one run of the tracker. None of them may end a training: one
that fails says so once in the log and is left out from then on.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from selfguide.spec.config import Config
from selfguide.spec.files import plain
from selfguide.spec.run import RunFolder, read_record, write_record

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """One of them, open."""

    def add(self, images: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All that a run names; of rank 0."""

    def __init__(self, run: RunFolder, config: Config, images: int) -> None:
        """Opens them for an attempt that goes on from `images`."""
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(config.train.trackers):
            made = self._try(name, lambda name=name: _TRACKERS[name](run, config, images))  # type: ignore[misc]
            if made is not None:
                self._open[name] = made

    def add(self, line: Mapping[str, Any]) -> None:
        """A line of telemetry."""
        scalars = flat(line)
        for name, each in list(self._open.items()):
            self._try(name, lambda each=each: each.add(line["images"], scalars))  # type: ignore[misc]

    def picture(self, images: int, png: bytes) -> None:
        """A grid of samples, which TensorBoard alone is given."""
        each = self._open.get("tensorboard")
        if isinstance(each, _TensorBoard):
            self._try("tensorboard", lambda: each.picture(images, png))

    def go_back(self, images: int) -> None:
        """The run goes back to `images`: TensorBoard drops what was said beyond them, and the others keep it."""
        each = self._open.get("tensorboard")
        if isinstance(each, _TensorBoard):
            self._try("tensorboard", lambda: each.begin(images))

    def close(self) -> None:
        for name, each in list(self._open.items()):
            self._try(name, each.close)

    def _try(self, name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - training is worth more than any tracker
            self._open.pop(name, None)
            log.warning(f"tracker {name} is left out from now on: {type(error).__name__}: {error}")
            return None


def flat(line: Mapping[str, Any], under: str = "") -> dict[str, float]:
    """Every finite number of a line by the path to it: spectrum/null/loss/03."""
    found: dict[str, float] = {}
    for name, value in line.items():
        path = f"{under}{name}"
        if isinstance(value, list | tuple):
            value = {f"{number:02d}": each for number, each in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}/")
        elif (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ):
            found[path] = float(value)
    found.pop("images", None)
    return found


class _TensorBoard:
    """Event files in `metrics/tensorboard/`, one of each attempt, written without TensorBoard's own thread.

    TensorBoard reads them in the order of their names, which begin with a time in seconds. That of an attempt is after
    all that are there, also where nodes' clocks differ.
    """

    def __init__(self, run: RunFolder, config: Config, images: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder = run.metrics / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        before = [
            int(each.name.split(".")[3]) for each in folder.glob("events.out.tfevents.[0-9]*")
        ]
        began = max([int(time.time()), *(each + 1 for each in before)])
        name = f"events.out.tfevents.{began:010d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("xb"))
        self._write(Event(file_version="brain.Event:2"))
        self._start = SessionLog(status=SessionLog.START)
        self.begin(images)

    def begin(self, images: int) -> None:
        """Training goes on from `images`: what was written beyond them is trained again, and TensorBoard drops it."""
        self._write(self._event(step=images + 1, session_log=self._start))

    def add(self, images: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
        self._write(self._event(step=images, summary=self._summary(value=values)))

    def picture(self, images: int, png: bytes) -> None:
        # where every PNG states its size
        width, height = struct.unpack(">II", png[16:24])
        image = self._summary.Image(width=width, height=height, encoded_image_string=png)
        values = [self._summary.Value(tag="samples", image=image)]
        self._write(self._event(step=images, summary=self._summary(value=values)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def _known_as(run: RunFolder, config: Config) -> str:
    """The id of a run where all experiments lie together, in which one name may be that of several runs."""
    name = run.root.name
    return name if config.name is None else f"{name}-{run.describe()['hash']}"


class _WandB:
    """W&B's own variables, such as WANDB_PROJECT and WANDB_MODE, hold."""

    def __init__(self, run: RunFolder, config: Config, images: int) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "selfguide")
        self._run = wandb.init(
            project=project,
            id=_known_as(run, config),
            name=config.name or run.root.name,
            group=config.experiment,
            resume="allow",
            dir=str(run.metrics),
            config=plain(config),
        )
        # its own steps only ever rise, while an attempt may train again what the one before lost
        self._run.define_metric("*", step_metric="images")

    def add(self, images: int, scalars: Mapping[str, float]) -> None:
        self._run.log({**scalars, "images": images})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """MLflow names runs itself: the name that it gave is in `metrics/mlflow.json`."""

    def __init__(self, run: RunFolder, config: Config, images: int) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "selfguide"))
        known = read_record(run.metrics / "mlflow.json")
        made = mlflow.start_run(
            run_id=known["id"] if known else None, run_name=config.name or run.root.name
        )
        if known is None:
            write_record(run.metrics / "mlflow.json", {"id": made.info.run_id})
            mlflow.set_tags({"selfguide.run": run.root.name, "experiment": str(config.experiment)})

    def add(self, images: int, scalars: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(scalars), step=images)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    def __init__(self, run: RunFolder, config: Config, images: int) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", "selfguide")
        self._trackio = trackio
        known = _known_as(run, config)
        trackio.init(project=project, name=known, resume="allow", config=plain(config))

    def add(self, images: int, scalars: Mapping[str, float]) -> None:
        self._trackio.log({**scalars, "images": images})

    def close(self) -> None:
        self._trackio.finish()


_TRACKERS: dict[str, Callable[[RunFolder, Config, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
