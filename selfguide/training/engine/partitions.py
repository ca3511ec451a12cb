"""Where DeepSpeed keeps the fp32 masters that a rank steps, as ranges of the parameter space.

Stages 1 and 2 lay each group end to end and cut it into one partition a rank. Stage 3 cuts every parameter by itself,
and a rank's slices lie end to end. Both pad what does not divide. The names used here are DeepSpeed's own and partly
private, so that they hold what the layout says is checked at the start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfguide.training.engine.layout import Layout, Owned
from selfguide.training.engine.protocol import Moments


class _Place(NamedTuple):
    """Numbers [start, stop) of the flat space: they lie in `stepped`, a tensor of the optimiser, from `at` on."""

    start: int
    stop: int
    stepped: Tensor
    at: int

    def of(self, tensor: Tensor) -> Tensor:
        """Their view of a tensor that is laid out like `stepped`."""
        return tensor.detach().view(-1)[self.at : self.at + self.stop - self.start]


class Partitions(ABC):
    """What a rank owns of a layout under ZeRO, and the moments of it."""

    def __init__(self, module: nn.Module, zero: Any, layout: Layout) -> None:
        """`zero` is the optimiser that DeepSpeed made of ours.

        Raises:
            RuntimeError: it holds parameters in another order, by which averages and checkpoints would be scrambled.
        """
        self.zero = zero
        names = {id(p): n for n, p in module.named_parameters()}
        held = [tuple(names[id(p)] for p in group) for group in self._groups()]
        if held != [layout.names_of(group) for group in layout.groups]:
            raise RuntimeError(
                "this DeepSpeed lays parameters out in another order; pin the version of constraints.txt"
            )
        self._places = tuple(self._found(layout))
        self.owned = [Owned(each.start, each.stop, each.of(each.stepped)) for each in self._places]

    def moments(self) -> Moments:
        """As `Engine.moments`."""
        state = self.zero.optimizer.state
        if not all(state.get(place.stepped) for place in self._places):
            zeros = [tuple(torch.zeros_like(own.master) for own in self.owned) for _ in range(2)]
            return Moments(zeros[0], zeros[1], 0)
        first, second = (
            tuple(place.of(state[place.stepped][name]) for place in self._places)
            for name in ("exp_avg", "exp_avg_sq")
        )
        return Moments(first, second, int(state[self._places[0].stepped]["step"]))

    def load_moments(self, moments: Moments) -> None:
        """As `Engine.load_moments`; padding is zero."""
        state = self.zero.optimizer.state
        for stepped in {id(place.stepped): place.stepped for place in self._places}.values():
            state[stepped] = {
                "step": torch.tensor(float(moments.count), device=stepped.device),
                "exp_avg": torch.zeros_like(stepped),
                "exp_avg_sq": torch.zeros_like(stepped),
            }
        for name, shard in (("exp_avg", moments.first), ("exp_avg_sq", moments.second)):
            for place, values in zip(self._places, shard, strict=True):
                place.of(state[place.stepped][name]).copy_(values)

    @abstractmethod
    def _groups(self) -> Sequence[Sequence[Tensor]]:
        """The parameters of each group, in the order in which they lie."""

    @abstractmethod
    def _found(self, layout: Layout) -> Iterator[_Place]:
        """This rank's, ascending."""

    @abstractmethod
    def refresh(self) -> None:
        """Casts the masters back into the live weights of every rank."""


class Intervals(Partitions):
    """Stages 1 and 2: of each group one interval; all ranks' are equally long, so the last may hold padding."""

    def _groups(self) -> Sequence[Sequence[Tensor]]:
        if any(any(padding) for padding in self.zero.round_robin_bit16_padding):
            raise RuntimeError("this DeepSpeed pads between parameters, which the layout does not")
        return list(self.zero.bit16_groups)

    def _found(self, layout: Layout) -> Iterator[_Place]:
        rank = dist.get_rank()
        partitions = self.zero.single_partition_of_fp32_groups
        for group, partition in zip(layout.groups, partitions, strict=True):
            size = partition.numel()
            start = min(group.start + rank * size, group.stop)
            yield _Place(start, min(start + size, group.stop), partition, 0)

    def refresh(self) -> None:
        self.zero.update_lp_params()


class Slices(Partitions):
    """Stage 3: of each parameter one slice, as long on every rank; the last ranks' may hold padding, or be empty."""

    def _groups(self) -> Sequence[Sequence[Tensor]]:
        groups: dict[int, list[Tensor]] = {}
        for sub_group, parameters in enumerate(self.zero.fp16_groups):
            groups.setdefault(self.zero.sub_group_to_group_id[sub_group], []).extend(parameters)
        return [groups[number] for number in sorted(groups)]

    def _found(self, layout: Layout) -> Iterator[_Place]:
        rank, offsets = dist.get_rank(), iter(layout.offsets)
        flats = self.zero.fp32_partitioned_groups_flat
        for parameters, flat in zip(self.zero.fp16_groups, flats, strict=True):
            at = 0
            for parameter in parameters:
                first, size = next(offsets), parameter.partition_numel()
                last = first + parameter.ds_numel
                start = min(first + rank * size, last)
                yield _Place(start, min(start + size, last), flat, at)
                at += size

    def refresh(self) -> None:
        # as DeepSpeed's own step does it after the optimiser's
        self.zero._partition_all_parameters()
        for sub_group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if persistent := self.zero.persistent_parameters:
            persistent[0].all_gather(persistent)
