"""The parameter space: every trainable parameter end to end in one flat space of N scalars, of which ranks own ranges.

Parameters lie group by group, and in module order within a group, so each group is one interval. What a rank owns is a
list of ranges: one of each group under ZeRO-1 and 2, a slice of every parameter under ZeRO-3, everything in bare torch.
Averages and checkpoints work on ranges, so neither knows which engine it serves, and a checkpoint written by one engine
loads into another at any world size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfguide.distributed import world_size

Range = tuple[int, int]  # [start, stop) of the flat space
Shard = tuple[Tensor, ...]  # a number for each that this rank owns: a tensor per owned range
# of a parameter, what `Group` calls name, weight decay and, where it is true, muon
GroupRule = Callable[[str, Tensor], tuple[str, float] | tuple[str, float, bool]]


@dataclass(frozen=True)
class Group:
    """Parameters that the optimiser treats alike; they fill [start, stop) of the flat space."""

    name: str
    start: int
    stop: int
    weight_decay: float = 0.0
    muon: bool = False  # its parameters are matrices, and each is stepped by itself


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of the trainable parameters in the flat space, and its groups; all ascending."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    total: int
    groups: tuple[Group, ...]

    @staticmethod
    def of(module: nn.Module, rule: GroupRule = lambda name, parameter: ("all", 0.0)) -> Layout:
        """The layout of `module`; `rule` names a parameter's group and how the optimiser treats it.

        Groups come in the order in which their first parameters do.
        """
        members: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                members.setdefault(rule(name, parameter), []).append((name, parameter))
        offsets, groups, total = [], [], 0
        for (group, *treated), held in members.items():
            start = total
            for _, each in held:
                offsets.append(total)
                total += each.numel()
            groups.append(Group(group, start, total, *treated))
        named = [pair for held in members.values() for pair in held]
        return Layout(
            tuple(name for name, _ in named), tuple(tuple(p.shape) for _, p in named),
            tuple(offsets), total, tuple(groups),
        )  # fmt: skip

    @staticmethod
    def of_shapes(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> Layout:
        """The layout of parameters of these names and shapes, in this order, without groups."""
        ends = [*itertools.accumulate(math.prod(shape) for shape in shapes)]
        kept = tuple(tuple(shape) for shape in shapes)
        return Layout(tuple(names), kept, (0, *ends[:-1]), ends[-1], ())

    def interval(self, name: str) -> Range:
        """Where the parameter `name` lies."""
        index = self.names.index(name)
        return self.offsets[index], (*self.offsets[1:], self.total)[index]

    def names_of(self, group: Group) -> tuple[str, ...]:
        """Its parameters, in the order of the flat space."""
        placed = zip(self.names, self.offsets, strict=True)
        return tuple(name for name, offset in placed if group.start <= offset < group.stop)

    def flatten(self, tensors: dict[str, Tensor]) -> Tensor:
        """A full flat vector (N,) from tensors by name."""
        return torch.cat([tensors[name].flatten() for name in self.names])

    def flatten_module(self, module: nn.Module) -> Tensor:
        """A full flat vector (N,) of the parameters of `module`, which become views of it."""
        parameters = dict(module.named_parameters())
        flat = self.flatten({name: parameters[name].detach() for name in self.names})
        for name, view in self.split(flat).items():
            parameters[name].data = view
        return flat

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a full flat vector (N,) by name."""
        ends = (*self.offsets[1:], self.total)
        return {
            name: flat[start:stop].view(shape)
            for name, shape, start, stop in zip(
                self.names, self.shapes, self.offsets, ends, strict=True
            )
        }


@dataclass(frozen=True)
class Owned:
    """A range of the flat space that this rank owns: it holds the fp32 masters and steps them."""

    start: int
    stop: int
    master: Tensor  # fp32 (stop - start,), a view: writing it and calling `refresh` changes weights


class ParameterSpace:
    """A layout, and which ranges of it each rank owns, ascending. All ranks build it together."""

    def __init__(self, layout: Layout, owned: Sequence[Owned], *, replicated: bool) -> None:
        """`replicated` says that every rank owns everything, as in bare torch; else each number has one owner."""
        self.layout, self.owned = layout, tuple(owned)
        self.ranges: tuple[Range, ...] = tuple((o.start, o.stop) for o in owned)
        self.replicated = replicated
        everyones: list[tuple[Range, ...]] = [self.ranges] * world_size()
        if not replicated:
            dist.all_gather_object(everyones, self.ranges)
        self._everyones = everyones

    @property
    def masters(self) -> Shard:
        return tuple(owned.master for owned in self.owned)

    def gather(self, shard: Shard) -> Tensor:
        """The full flat vector (N,) fp32 of every rank's `shard`, on every rank; all ranks call."""
        mine = torch.cat(shard) if len(shard) != 1 else shard[0]
        if self.replicated:
            return mine
        longest = max(length(ranges) for ranges in self._everyones)
        padded = mine.new_zeros(longest)
        padded[: len(mine)] = mine
        together = mine.new_empty(longest * len(self._everyones))
        dist.all_gather_into_tensor(together, padded)
        full = mine.new_empty(self.layout.total)
        for theirs, ranges in zip(together.view(-1, longest), self._everyones, strict=True):
            for (start, stop), piece in zip(ranges, pieces(theirs, ranges), strict=True):
                full[start:stop] = piece
        return full

    def cut(self, flat: Tensor) -> Shard:
        """This rank's part of a full flat vector (N,), as views."""
        return tuple(flat[start:stop] for start, stop in self.ranges)

    def parts_of(self, name: str) -> Iterator[tuple[int, slice, range]]:
        """Where shards hold the parameter `name`: which tensor, where in it, and which of the flattened numbers."""
        first, last = self.layout.interval(name)
        for index, (start, stop) in enumerate(self.ranges):
            low, high = max(first, start), min(last, stop)
            if low < high:
                yield index, slice(low - start, high - start), range(low - first, high - first)


def length(ranges: Iterable[Range]) -> int:
    """How many numbers `ranges` hold."""
    return sum(stop - start for start, stop in ranges)


def pieces(vector: Tensor, ranges: Sequence[Range]) -> Shard:
    """Views of a vector that holds `ranges` end to end, one of each; what lies behind them is left."""
    return vector[: length(ranges)].split([stop - start for start, stop in ranges])


def overlaps(mine: Sequence[Range], theirs: Sequence[Range]) -> Iterator[tuple[int, int, Range]]:
    """Where two ascending lists of ranges meet: the index in each, and the range that both hold."""
    i = j = 0
    while i < len(mine) and j < len(theirs):
        low, high = max(mine[i][0], theirs[j][0]), min(mine[i][1], theirs[j][1])
        if low < high:
            yield i, j, (low, high)
        if mine[i][1] < theirs[j][1]:
            i += 1
        else:
            j += 1
