"""litdata and MosaicML streaming, each with a Python of its own that stays and reads an epoch on request."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import IO, Any

from tools import environments

RIVALS = ("litdata", "streaming")
PATIENCE = 10.0  # seconds in which one that has nothing more to read ends by itself


class Rival:
    """One reader over one folder. Use it in a `with`; `epoch()` reads all of its samples once."""

    def __init__(self, name: str, python: Path, folder: Path, batch: int) -> None:
        self.name = name
        self._log = folder.parent / f"{name}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_program(name, python), "read", str(folder), str(batch)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(folder.parent),
                text=True,
            )
        self._answer()

    def epoch(self) -> dict[str, int]:
        stdin = _pipe(self._process.stdin)
        stdin.write("\n")
        stdin.flush()
        return self._answer()

    def __enter__(self) -> Rival:
        return self

    def __exit__(self, *exception: object) -> None:
        _pipe(self._process.stdin).close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _pipe(self._process.stdout).close()

    def _answer(self) -> dict[str, Any]:
        for line in _pipe(self._process.stdout):
            if line.startswith("{"):  # what else it prints is for people
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self.name} ended: {_tail(self._log)}")


def python_of(name: str, say: Callable[[str], None]) -> Path:
    """Its Python, installed where it is not; raises environments.InstallError."""
    return environments.install(f"bench-{name}", requirements(name), say, beside=True)


def requirements(name: str) -> str:
    """What it is installed from, pinned."""
    return (resources.files("tools.bench.rivals") / f"{name}.txt").read_text()


def write(name: str, python: Path, arrays: tuple[Path, Path], folder: Path) -> None:
    """The samples and labels of two .npy files in its own format."""
    log = folder.parent / f"{name}.log"
    command = [*_program(name, python), "make", *map(str, arrays), str(folder)]
    with log.open("ab") as out:
        done = subprocess.run(command, stdout=out, stderr=out, env=_environment(folder.parent))
    if done.returncode:
        raise RuntimeError(f"{name} could not write: {_tail(log)}")


def _program(name: str, python: Path) -> list[str]:
    return [str(python), str(Path(__file__).parent / "rivals" / f"with_{name}.py")]


def _environment(folder: Path) -> dict[str, str]:
    """One core each, as we have; what they put aside goes to the benchmark's folder."""
    aside = folder / "aside"
    aside.mkdir(exist_ok=True)
    kept = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    places = ("TMPDIR", "DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER")
    return kept | dict.fromkeys(places, str(aside)) | {"OMP_NUM_THREADS": "1"}


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("this process was started without pipes")
    return stream


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
