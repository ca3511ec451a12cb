"""The process that writes checkpoints beside training: tensors in memory that both share, as files, at low priority.

It imports no torch, so it starts in a fifth of a second and needs 30 MB. A request is a line of JSON on its input, an
answer one on its output; it ends when its input does. Signals that ask a job to stop are not for it: training, which
hears them too, waits for what it still has to write.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfguide.spec.run import Lease, RunFolder
from selfguide.training import store
from selfguide.training.retention import prune
from shards import storage
from shards.storage import CHUNK

# it gives way to training, of whose share it still gets a third where no core is idle; the disk's priority follows.
# At 10, a tenth, training on all cores waits for it: 370 ms of work take longer than ten steps of 400 ms
NICE = 5
_DEAF = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# safetensors begins every tensor's bytes at a multiple of this
_ALIGNED = 8


def main(memory: int) -> None:
    """Answers requests until there are no more; `memory` is the descriptor of what it shares with training."""
    for number in _DEAF:
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    for line in sys.stdin.buffer:
        request, began, worked = json.loads(line), time.monotonic(), time.process_time()
        try:
            answer: dict[str, Any] = {"done": _TASKS[request.pop("task")](memory, **request)}
        except Exception as error:  # noqa: BLE001 - training raises it, or goes on without this checkpoint
            answer = {"error": type(error).__name__, "message": str(error)}
        answer |= {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - worked}
        print(json.dumps(answer), flush=True)


def write(
    memory: int, file: str, fence: Sequence[Any], tensors: Mapping[str, Sequence[Any]]
) -> Mapping[str, Any]:
    """Publishes tensors as a safetensors file; returns what the manifest of its folder says of it.

    Args:
        tensors: by name, their dtype as safetensors calls it, their shape, and first and last byte in the memory.

    Raises:
        NoRoomError, FencedError: as `shards.storage.write_part`.
    """
    path, pieces = Path(file), _pieces(tensors, _shared(memory))
    return storage.write_part(path.parent, path.name, pieces, storage.Fence(*fence))


def _shared(memory: int) -> memoryview:
    """The memory as it now is; it is unmapped with the last view of it."""
    size = os.fstat(memory).st_size
    return memoryview(mmap.mmap(memory, size, prot=mmap.PROT_READ)) if size else memoryview(b"")


def _pieces(tensors: Mapping[str, Sequence[Any]], shared: memoryview) -> Iterator[memoryview]:
    """The bytes of a safetensors file: the length of its header, the header, and the tensors end to end."""
    header, at = {}, 0
    for name, (dtype, shape, first, last) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + last - first]}
        at += last - first
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, _, first, last in tensors.values():
        for start in range(first, last, CHUNK):
            yield shared[start : min(start + CHUNK, last)]


def publish(
    memory: int,
    run: str,
    number: int,
    folder: str,
    extra: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    keep: Mapping[str, int | None],
) -> None:
    """Declares a checkpoint complete, and deletes those that are too many; a repetition changes nothing.

    Raises:
        NoRoomError, FencedError: it is not complete.
    """
    lease = Lease(RunFolder(Path(run)), number)
    try:
        lease.publish(Path(folder), extra=extra, parts=parts)
    except FileExistsError:
        # by a writer that died before it could say so
        found = storage.read_manifest(folder)
        if found is None or found["attempt"] != number:
            raise
    prune(Path(folder).parent, **keep)  # type: ignore[arg-type]


def put(memory: int, **request: Any) -> bool:
    """Copies a checkpoint to the run's store, and says whether it is there, as `store.put` describes it."""
    return store.put(**request)


_TASKS: Mapping[str, Callable[..., Any]] = {"write": write, "publish": publish, "put": put}
