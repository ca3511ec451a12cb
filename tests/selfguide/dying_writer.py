"""The process that writes checkpoints, as tests have it: at one point of one save it kills itself, or its trainer.

It imports no torch, as the one whose place it takes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

from selfguide.spec.run import RunFolder, image_folder
from selfguide.training import writer
from shards.wait import wait_until

# in a part, between the parts of rank 0, before the manifest, and behind it, before anybody has heard of it
Point = Literal["part", "parts", "manifest", "published"]
POINTS: tuple[Point, ...] = ("part", "parts", "manifest", "published")
# who dies: the trainer alone, whose writer works on, or both
Who = Literal["writer", "trainer", "both"]
# in the folder of the attempt that it struck, with the id of the process that struck
STRUCK = "killed"
_PLAN = "SELFGUIDE_TEST_STRIKES"


@contextmanager
def struck(run: Path, images: int, point: Point, who: Who) -> Iterator[None]:
    """Writers that this process begins strike once in an attempt on `run`, at a point of the save at `images`."""
    plan = json.dumps({"run": str(run), "images": images, "point": point, "who": who})

    def begin(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
        code = command[-1].replace(f"from {writer.__name__} import", f"from {__name__} import")
        assert code != command[-1]
        return subprocess.Popen([*command[:-1], code], env=os.environ | {_PLAN: plan}, **how)

    from selfguide.training import writer_process

    with patch.object(
        writer_process, "subprocess", SimpleNamespace(Popen=begin, PIPE=subprocess.PIPE)
    ):
        yield


def main(memory: int) -> None:
    """What `selfguide.training.writer.main` does, but for the strike."""
    plan = json.loads(os.environ[_PLAN])
    write, publish, pieces, prune = writer.write, writer.publish, writer._pieces, writer.prune
    # where the request of now belongs to
    at: dict[str, Any] = {"images": None, "parts": 0}

    def strike(point: Point) -> None:
        if plan["point"] == point and at["images"] == image_folder(plan["images"]):
            _strike(Path(plan["run"]), plan["who"])

    def cut(*given: Any) -> Iterator[memoryview]:
        for number, piece in enumerate(pieces(*given)):
            # the header is written, and its bytes are on their way
            if number == 2:
                sys.stdout.flush()
                strike("part")
            yield piece

    def part(memory: int, file: str, **request: Any) -> Any:
        folder = Path(file).parent.name
        at.update(images=folder, parts=at["parts"] + 1 if folder == at["images"] else 1)
        if at["parts"] == 2:
            strike("parts")
        return write(memory, file, **request)

    def manifest(memory: int, folder: str, **request: Any) -> None:
        at["images"] = Path(folder).name
        strike("manifest")
        publish(memory, folder=folder, **request)

    def published(*given: Any, **keep: Any) -> None:
        strike("published")
        prune(*given, **keep)

    tasks: dict[str, Any] = {"write": part, "publish": manifest}
    with (
        patch.object(writer, "_TASKS", tasks),
        patch.object(writer, "_pieces", cut),
        patch.object(writer, "prune", published),
    ):
        writer.main(memory)


def _strike(run: Path, who: Who) -> None:
    """Once in an attempt: another process takes the place of this one."""
    folder = RunFolder(run)
    mark = folder.attempt(folder.attempt_numbers()[-1]) / STRUCK
    if mark.exists():
        return
    mark.write_text(str(os.getpid()))
    trainer = os.getppid()
    if who != "writer":
        os.kill(trainer, signal.SIGKILL)
        # it is dead, and this process another one's
        wait_until(lambda: os.getppid() != trainer, poll_s=0.001)
    if who != "trainer":
        os.kill(os.getpid(), signal.SIGKILL)


def ended(pid: int) -> bool:
    """Whether a process is gone, or only its exit status is left of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
