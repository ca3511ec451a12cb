"""The process that writes checkpoints, as training sees it: memory that both read, requests and their answers."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards import errors
from shards.errors import StoreError

log = logging.getLogger(__name__)

# as safetensors calls them, in its order
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_ORDER = [*_DTYPES]
# every tensor begins at a multiple of this
_ALIGNED = 64
_WITHOUT = "train.checkpoint_writer=here train.save_failed=stop do without it"
# how often a request is sent: a second time where its writer died
_TRIES = 2


class WriterDiedError(StoreError):
    """The process that writes checkpoints ended, and so did the one that took its place, or none could."""


class Memory:
    """Host memory that the writer reads, cut into tensors from its beginning; it grows, and is kept between saves."""

    def __init__(self, device: torch.device) -> None:
        self.descriptor = os.memfd_create("selfguide-checkpoint", 0)
        self._pins, self._pinned = device.type == "cuda", False
        self._size, self._used = 0, 0
        self._whole = torch.empty(0, dtype=torch.uint8)

    def clear(self, size: int) -> None:
        """Forgets all tensors and makes room for `size` bytes."""
        self._used = 0
        if size <= self._size:
            return
        self._unpin()
        os.ftruncate(self.descriptor, size)
        # torch holds the mapping, which ends with the last tensor of it
        mapped = mmap.mmap(self.descriptor, size)
        self._whole, self._size = torch.frombuffer(mapped, dtype=torch.uint8), size
        if self._pins:
            self._pin()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of the memory, uninitialised."""
        size = math.prod(shape) * dtype.itemsize
        part = self._whole[self._used : self._used + size].view(dtype).view(*shape)
        self._used += room(size)
        return part

    def places(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Sequence[Any]]:
        """Where tensors of it lie, in the order in which safetensors would write them."""
        names = sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name].dtype), name))
        return {name: self._place(tensors[name]) for name in names}

    def _place(self, tensor: Tensor) -> Sequence[Any]:
        first = tensor.data_ptr() - self._whole.data_ptr() if tensor.numel() else 0
        return [_DTYPES[tensor.dtype], list(tensor.shape), first, first + tensor.nbytes]

    def close(self) -> None:
        self._unpin()
        self._whole, self._size = torch.empty(0, dtype=torch.uint8), 0
        os.close(self.descriptor)

    def _pin(self) -> None:
        """So that a GPU copies into it beside its work; where that may not be, copies are waited for."""
        try:
            torch.cuda.check_error(
                torch.cuda.cudart().cudaHostRegister(self._whole.data_ptr(), self._size, 0)
            )
            self._pinned = True
        except RuntimeError as error:
            self._pins = False
            # the runtime keeps its last error, and the next kernel would be refused for it
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")
            log.warning(
                f"{self._size:,} bytes for checkpoints cannot be pinned ({error}): each copy from the GPU is waited for"
            )

    def _unpin(self) -> None:
        if self._pinned:
            self._pinned = False
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._whole.data_ptr()))


def room(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes of a memory."""
    return -(-size // _ALIGNED) * _ALIGNED


class Writer:
    """The process of one rank that writes; another one takes its place where it died."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        # it imports while training begins
        self._process: subprocess.Popen[bytes] | None = self._start()
        self._asked: list[Mapping[str, Any]] = []
        self._answers: list[dict[str, Any]] = []
        self._heard = b""
        self._tries = 0
        # of its processor, over all requests; and how long the last ones took
        self.cpu_s, self.took_s = 0.0, 0.0

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> None:
        """Sends requests, which are written in this order; the answers of those before must have been taken."""
        self._asked, self._answers, self._tries = [*requests], [], 0
        self._send()

    def answers(self, *, wait: bool = False) -> Sequence[Any] | None:
        """What became of the requests; None while they are under way, unless `wait`.

        Raises:
            WriterDiedError: it died twice.
            Exception: of `shards.errors`, what a request failed with.
        """
        while len(self._answers) < len(self._asked):
            assert self._process is not None and self._process.stdout is not None
            heard = self._process.stdout.fileno()
            os.set_blocking(heard, wait)
            try:
                read = os.read(heard, 1 << 16)
            except BlockingIOError:
                return None
            if not read:
                self._died()
                continue
            *lines, self._heard = (self._heard + read).split(b"\n")
            self._answers += [json.loads(line) for line in lines]
        self.cpu_s += sum(answer["cpu_s"] for answer in self._answers)
        self.took_s = sum(answer["seconds"] for answer in self._answers)
        failed = next((answer for answer in self._answers if "error" in answer), None)
        if failed is not None:
            raise _rebuilt(failed["error"], failed["message"])
        return [answer["done"] for answer in self._answers]

    def close(self, *, wait: bool) -> None:
        """Ends it once it has written what it was asked for; `wait` for that."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it died
                self._process.stdin.close()
            if wait:
                self._process.wait()
            self._process.stdout.close()

    def _send(self) -> None:
        self._tries += 1
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        lines = b"".join(json.dumps(request).encode() + b"\n" for request in self._asked)
        try:
            self._process.stdin.write(lines)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._died()

    def _start(self) -> subprocess.Popen[bytes]:
        # this code and no other of the name: a job runs from its attempt's copy
        root = str(Path(__file__).parents[2])
        code = (
            f"import sys; sys.path[:1] = [{root!r}]; from selfguide.training.writer import main; "
            f"main({self._memory.descriptor})"
        )
        try:
            return subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(self._memory.descriptor,),
            )
        except OSError as error:
            raise WriterDiedError(
                f"a process that writes checkpoints cannot be started ({error}): the node has no room for another one; "
                f"{_WITHOUT}"
            ) from error

    def _died(self) -> None:
        """The snapshot is still in memory, so another process writes it, once."""
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        code, pid = self._process.wait(), self._process.pid
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._process, self._answers, self._heard = None, [], b""
        if self._tries >= _TRIES:
            raise WriterDiedError(
                f"the process that writes checkpoints ended {how} (pid {pid}), as the one before it. This log says "
                f"why, or the node's where memory was full; {_WITHOUT}"
            )
        log.warning(
            f"the process that writes checkpoints ended {how} (pid {pid}); another one begins"
        )
        self._send()


def _rebuilt(name: str, message: str) -> Exception:
    """An error of the writer, as this process raises it."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        return kind(message)
    return StoreError(f"a checkpoint could not be written: {name}: {message}")
