"""The parameter space: groups and ranges of any shape through files, gathering and averages, at any world size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from selfguide.distributed import RankInfo, gather
from selfguide.spec.averages import AverageSpec
from selfguide.training.checkpoint import read_vectors, write_vectors
from selfguide.training.ema import Averages
from selfguide.training.engine.layout import Layout, Owned, ParameterSpace, Range, overlaps
from shards.storage import Fence

SHAPES = ((3, 4), (5,), (2, 3, 2), (1,), (7, 3), (4,))


def module(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> nn.Module:
    return nn.ParameterList([torch.arange(torch.Size(s).numel()).view(s) * 1.0 for s in shapes])


def by_rank(name: str, parameter: Tensor) -> tuple[str, float]:
    """Vectors are not decayed."""
    return ("decayed", 0.1) if parameter.ndim > 1 else ("kept", 0.0)


def zero_1(layout: Layout, rank: int, world: int) -> list[Range]:
    """An even share of each group, as ZeRO-1 and 2 partition; the last may be short, or empty."""
    found = []
    for group in layout.groups:
        share = -(-(group.stop - group.start) // world)
        start = min(group.start + rank * share, group.stop)
        found.append((start, min(start + share, group.stop)))
    return found


def zero_3(layout: Layout, rank: int, world: int) -> list[Range]:
    """A share of every parameter, as ZeRO-3 partitions."""
    found = []
    for name in layout.names:
        start, stop = layout.interval(name)
        share = -(-(stop - start) // world)
        low = min(start + rank * share, stop)
        found.append((low, min(low + share, stop)))
    return found


def whole(layout: Layout, rank: int, world: int) -> list[Range]:
    """Everything on every rank, a range for each group, as bare torch has it."""
    return [(group.start, group.stop) for group in layout.groups]


SPLITS = {"zero_1": zero_1, "zero_3": zero_3, "whole": whole}


def space_of(
    layout: Layout, ranges: list[Range], flat: Tensor, *, replicated: bool = False
) -> ParameterSpace:
    owned = [Owned(a, b, flat[a:b].clone()) for a, b in ranges]
    return ParameterSpace(layout, owned, replicated=replicated)


def test_a_layout_lays_groups_end_to_end_and_keeps_module_order_within_them() -> None:
    one, two = Layout.of(module()), Layout.of(module(), by_rank)
    assert one.names == ("0", "1", "2", "3", "4", "5") and [g.name for g in one.groups] == ["all"]
    assert two.names == ("0", "2", "4", "1", "3", "5")
    assert [(g.name, g.start, g.stop, g.weight_decay) for g in two.groups] == [
        ("decayed", 0, 45, 0.1),
        ("kept", 45, 55, 0.0),
    ]
    tensors = dict(module().named_parameters())
    for layout in (one, two):
        assert all(
            torch.equal(t, tensors[n]) for n, t in layout.split(layout.flatten(tensors)).items()
        )
        assert [n for g in layout.groups for n in layout.names_of(g)] == list(layout.names)


ranges_lists = st.lists(st.integers(0, 60), max_size=12, unique=True).map(
    lambda cuts: list(zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False))
)


@given(ranges_lists, ranges_lists)
def test_overlaps_of_any_two_lists_of_ranges_are_their_common_numbers(
    mine: list[Range], theirs: list[Range]
) -> None:
    found = list(overlaps(mine, theirs))
    numbers = [n for _, _, (low, high) in found for n in range(low, high)]
    held = [{n for low, high in each for n in range(low, high)} for each in (mine, theirs)]
    assert numbers == sorted(held[0] & held[1])
    for i, j, (low, high) in found:
        assert mine[i][0] <= low < high <= mine[i][1] and theirs[j][0] <= low < high <= theirs[j][1]


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of this process, whose collectives answer with what it gave."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@st.composite
def partitions(draw: st.DrawFn, total: int) -> list[list[Range]]:
    """Any cuts of [0, total), and any rank for each piece: some ranks may own nothing."""
    world = draw(st.integers(1, 5))
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), max_size=12))) if total > 1 else []
    ends = [0, *cuts, total]
    ranks: list[list[Range]] = [[] for _ in range(world)]
    for piece in pairwise(ends):
        ranks[draw(st.integers(0, world - 1))].append(piece)
    return ranks


shapes = st.lists(
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=8
)


@settings(deadline=None, max_examples=60)
@given(st.data(), shapes)
def test_what_any_ranks_wrote_any_other_ranks_read(
    alone: None, data: st.DataObject, shapes: list[tuple[int, ...]]
) -> None:
    """Real files of real spaces; writers and readers work one after the other in this process."""
    layout = Layout.of(module(tuple(shapes)), by_rank)
    flat = torch.randn(layout.total, generator=torch.Generator().manual_seed(layout.total))
    writers, readers = data.draw(partitions(layout.total)), data.draw(partitions(layout.total))
    with tempfile.TemporaryDirectory() as folder:
        path, written = Path(folder) / "img-1", []
        for rank, ranges in enumerate(writers):
            space, rank_info = space_of(layout, ranges, flat), RankInfo(rank, 0, len(writers))
            held = {"master": space.masters, "first": tuple(2 * m for m in space.masters)}
            written.append(write_vectors(path, held, space, rank_info, Fence(folder, 1))[1])
        for ranges in readers:
            space = space_of(layout, ranges, torch.full_like(flat, torch.nan))
            into = {n: tuple(m.clone() for m in space.masters) for n in ("master", "first")}
            read_vectors(path, written, into, space)
            for (low, high), master, first in zip(
                ranges, into["master"], into["first"], strict=True
            ):
                assert torch.equal(master, flat[low:high]) and torch.equal(
                    first, 2 * flat[low:high]
                )


def history(layout: Layout, steps: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(layout.total, generator=generator) for _ in range(steps)]


def trained(rank_info: RankInfo, split: str, folder: str) -> dict[str, Any]:
    """Averages over a history of masters, gathered, and written as a checkpoint does."""
    layout = Layout.of(module(), by_rank)
    begin, *later = history(layout)
    space = space_of(
        layout,
        SPLITS[split](layout, rank_info.rank, rank_info.world),
        begin,
        replicated=split == "whole",
    )
    averages = Averages(space, [AverageSpec(halflife=40), AverageSpec(width=0.2)], ramp=0.5)
    for number, flat in enumerate(later, start=1):
        for master, now in zip(space.masters, space.cut(flat), strict=True):
            master.copy_(now)
        averages.update(8, 8 * number, torch.tensor(number != 3))
    vectors = {
        "master": space.masters,
        "ema-40": averages.shards[0],
        "ema-power": averages.shards[1],
    }
    _, mine = write_vectors(Path(folder) / "img-1", vectors, space, rank_info, Fence(folder, 1))
    ranges = gather(mine)
    return {"ranges": ranges, **{n: space.gather(shard).tolist() for n, shard in vectors.items()}}


def read(rank_info: RankInfo, split: str, folder: str, ranges: list[Any]) -> dict[str, list[float]]:
    layout = Layout.of(module(), by_rank)
    space = space_of(
        layout,
        SPLITS[split](layout, rank_info.rank, rank_info.world),
        torch.zeros(layout.total),
        replicated=split == "whole",
    )
    names = ("master", "ema-40", "ema-power")
    vectors = {name: tuple(torch.empty_like(m) for m in space.masters) for name in names}
    read_vectors(Path(folder) / "img-1", ranges, vectors, space)
    return {name: space.gather(shard).tolist() for name, shard in vectors.items()}


def full_averages() -> dict[str, Tensor]:
    """The same averages over whole vectors, by hand."""
    begin, *later = history(Layout.of(module(), by_rank))
    found = {"master": later[-1], "ema-40": begin.clone(), "ema-power": begin.clone()}
    for number, flat in enumerate(later, start=1):
        for name, spec in (
            ("ema-40", AverageSpec(halflife=40)),
            ("ema-power", AverageSpec(width=0.2)),
        ):
            if number != 3:
                found[name] = torch.lerp(found[name], flat, 1 - spec.decay(8, 8 * number, 0.5))
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_averages_of_any_split_equal_full_ones_and_pass_through_files_to_another(
    ranks: Any, tmp_path: Path, split: str
) -> None:
    expected = full_averages()
    made = ranks(3, trained, split, str(tmp_path))
    for answer in made:
        assert all(answer[name] == full.tolist() for name, full in expected.items())
    for world, other in ((2, "zero_3" if split == "zero_1" else "zero_1"), (1, "whole")):
        for answer in ranks(world, read, other, str(tmp_path), made[0]["ranges"]):
            assert all(answer[name] == full.tolist() for name, full in expected.items())
