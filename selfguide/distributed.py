"""Process group of one attempt: rank info, rendezvous, and the collectives that gradients pass through."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from selfguide.spec.nodes import NodeRefused, node_name
from selfguide.spec.run import read_record, write_record
from shards.wait import wait_until

T = TypeVar("T")

# seconds after which ranks that wait for long work of rank 0 hear that it goes on
_ASKED_S = 1.0
_CURE = "have the node's name mean its own address, in DNS or in its /etc/hosts"


@dataclass(frozen=True)
class RankInfo:
    """This process's rank, its rank on its node, and the number of ranks."""

    rank: int
    local_rank: int
    world: int

    @property
    def device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # with one visible GPU per task the index is 0 whatever the local rank
        return torch.device("cuda", self.local_rank if torch.cuda.device_count() > 1 else 0)


def join(rank_info: RankInfo, rendezvous: Path, timeout_s: int = 600) -> None:
    """Joins the ranks of one attempt. Rank 0 binds a free port and publishes it in the file `rendezvous`.

    A fixed port collides on shared nodes, and a silent fall-back to localhost trains N worlds of one. The others wait
    for the file, and every rank for each collective, `timeout_s` seconds at most.

    Raises:
        RuntimeError: rank 0 was started for another number of ranks.
        NodeRefused: rank 0 has no address that other nodes reach.
        TimeoutError: rank 0 published nothing.
    """
    if rank_info.rank == 0:
        host = _address()
        store = dist.TCPStore(host, 0, rank_info.world, is_master=True, wait_for_workers=False)
        about = {"host": host, "port": store.port, "world": rank_info.world}
        here = {"machine": socket.gethostname(), "node": node_name()}
        write_record(rendezvous, {**about, **here})
    else:
        record = _await_record(rendezvous, timeout_s)
        if record["world"] != rank_info.world:
            raise RuntimeError(
                f"rank {rank_info.rank} was started for {rank_info.world} ranks, rank 0 for {record['world']}"
            )
        if record["host"].startswith("127.") and record["machine"] != socket.gethostname():
            what = f"rank 0 has no address there that rank {rank_info.rank} on {node_name()} reaches; {_CURE}"
            raise NodeRefused(record["node"], "address", what)
        store = dist.TCPStore(record["host"], record["port"], rank_info.world, is_master=False)
    if rank_info.device.type == "cuda":
        torch.cuda.set_device(rank_info.device)
    # DeepSpeed reads these even when torch.distributed is already up, and takes LOCAL_RANK for the device's index
    device_index = (
        rank_info.device.index if rank_info.device.type == "cuda" else rank_info.local_rank
    )
    os.environ.update(
        RANK=str(rank_info.rank), LOCAL_RANK=str(device_index), WORLD_SIZE=str(rank_info.world),
        MASTER_ADDR=_address(), MASTER_PORT="0",
    )  # fmt: skip
    # bookkeeping collectives of CPU tensors must not queue behind the GPU's
    backend = "cpu:gloo,cuda:nccl" if rank_info.device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank_info.rank,
        world_size=rank_info.world,
        timeout=timedelta(seconds=timeout_s),
    )


def collectives() -> int | None:
    """Returns how many collectives this rank has entered so far, finished or not, in all groups together.

    All ranks enter the same collectives in the same order, so one with fewer than another has not come as far: that
    other waits for it. torch counts them by itself, so that a step pays nothing. May be called from any thread; None
    where this torch does not say, or the groups are being made or left.
    """
    entered = 0
    try:
        for group in list(distributed_c10d._world.pg_map):
            # gloo alone serves both devices
            for backend in {group._get_backend(device) for device in group._device_types}:
                entered += backend._get_sequence_number_for_group()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return None
    return entered


def leave() -> None:
    """Leaves the process group, if there is one; without it gloo processes abort now and then at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _address() -> str:
    """An address of this host that its peers reach: what its name resolves to, loopback only where it is all.

    Debian maps a host's own name to 127.0.1.1, which every other node would take for itself.

    Raises:
        NodeRefused: the name does not resolve. Gloo would listen on loopback then, in silence.
    """
    override = os.environ.get("SELFGUIDE_HOST")
    if override:
        return override
    try:
        found = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        what = f"its name {socket.gethostname()!r} does not resolve; {_CURE}"
        raise NodeRefused(node_name(), "address", what) from error
    if not found.startswith("127."):
        return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # a documentation address: routes are looked up, nothing is sent
            probe.connect(("192.0.2.1", 9))
        except OSError:  # a machine without a network has peers on itself only
            return found
        address = probe.getsockname()[0]
    if interface := _interface(address):
        # by itself Gloo listens where the name leads
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return address


def _interface(address: str) -> str | None:
    """The network interface that has this IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                # SIOCGIFADDR: the address is bytes 20 to 24 of what comes back
                found = fcntl.ioctl(asker, 0x8915, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def _await_record(path: Path, timeout_s: int) -> dict:
    found: list[dict] = []

    def published() -> bool:
        # listing the folder refreshes an NFS client's cache of it
        list(path.parent.iterdir())
        record = read_record(path)
        if record is not None:
            found.append(record)
        return bool(found)

    if not wait_until(published, timeout_s=timeout_s):
        raise TimeoutError(f"rank 0 published no {path.name} in {path.parent} within {timeout_s} s")
    return found[0]


def world_size() -> int:
    """The number of ranks; 1 where no process group was joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast_from_rank_0(value: Any) -> Any:
    """Broadcasts rank 0's `value`: two ranks may see one folder differently while it changes."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_rank_0(work: Callable[[], T]) -> T:
    """Calls `work` on rank 0 only, and returns its result, or raises its error, on every rank alike."""
    first = world_size() == 1 or dist.get_rank() == 0
    result, error = broadcast_from_rank_0(_outcome(work) if first else (None, None))
    if error is not None:
        raise error
    return result


def on_rank_0_at_length(work: Callable[[], T]) -> T:
    """As `on_rank_0`, for `work` that may take longer than one collective may (`engine.timeout_s`).

    It is done in a thread of rank 0, and each second the other ranks hear that it goes on.
    """
    if world_size() == 1:
        return work()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    first = dist.get_rank() == 0
    if first:
        # a daemon: it does not keep a process alive whose peers are gone
        threading.Thread(target=lambda: done.put(_outcome(work)), daemon=True).start()
    outcome = None
    while outcome is None:
        if first:
            with contextlib.suppress(queue.Empty):
                outcome = done.get(timeout=_ASKED_S)
        outcome = broadcast_from_rank_0(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Calls `work` on every rank, and returns all results, by rank; an error on one is raised on every rank alike."""
    found = gather(_outcome(work))
    results: list[Any] = []
    for result, error in found:
        if error is not None:
            raise error
        results.append(result)
    return results


def _outcome(work: Callable[[], T]) -> tuple[T, None] | tuple[None, Exception]:
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 - every rank raises it, whatever it is
        return None, error


def gather(value: T) -> list[T]:
    """`value` of every rank, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def any_rank_error(message: str | None) -> str | None:
    """Gathers `message` from all ranks and returns the first that is not None: an error on one stops all alike."""
    return next((each for each in gather(message) if each is not None), None)


class _SumOverRanks(torch.autograd.Function):
    """Forward: the sum over ranks. Backward: every rank's loss depends on it, so gradients are summed too."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(value: Tensor) -> Tensor:
    """Differentiable all-reduce; the value itself where there is one process, or where it is a mere shape (meta)."""
    return _SumOverRanks.apply(value) if world_size() > 1 and not value.is_meta else value
