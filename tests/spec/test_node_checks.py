"""Which nodes are refused by what ranks measure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from selfguide.spec.nodes import Finding, Probe, judge


def probes(count: int = 4, **device: str) -> list[Probe]:
    well = Probe(
        rank=0, node="", device="H100", wrong="", product_s=0.01, missummed="", reduce_s=0.0, clock=1e9, unreadable="",
    )  # fmt: skip
    return [replace(well, rank=rank, node=f"n{rank}") for rank in range(count)]


def found(
    measured: list[Probe], *, ahead: float = 0.0, **past: float
) -> list[tuple[str, str, bool]]:
    judged = judge(measured, server_ahead_s=ahead, past_s=past)
    return [(each.node, each.check, each.refused) for each in judged]


def changed(rank: int, count: int = 4, **more: object) -> list[Probe]:
    all_well = probes(count)
    all_well[rank] = replace(all_well[rank], **more)
    return all_well


def test_judge_where_all_is_well_finds_nothing() -> None:
    assert found(probes()) == [] == found(probes(1))


@pytest.mark.parametrize(
    ("more", "check"),
    [
        ({"wrong": "9 entries are wrong"}, "gemm"),
        ({"missummed": "9 sums are wrong"}, "all-reduce"),
        ({"unreadable": "FileNotFoundError"}, "shards"),
        ({"free": 0.4}, "gpu memory"),
        ({"product_s": 0.021}, "gemm speed"),
        ({"clock": 1e9 + 60}, "clock"),
        ({"clock": 1e9 - 60}, "clock"),
    ],
)
@pytest.mark.parametrize("rank", [0, 3])
def test_judge_of_one_bad_node_refuses_that_one(
    more: dict[str, object], check: str, rank: int
) -> None:
    # the file server is as far from rank 0 as the others are
    ahead = 1e9 - float(str(more.get("clock", 1e9))) if rank == 0 else 0.0
    assert found(changed(rank, **more), ahead=ahead) == [(f"n{rank}", check, True)]


@pytest.mark.parametrize("more", [{"wrong": "x"}, {"unreadable": "x"}, {"free": 0.1}])
def test_judge_of_what_all_nodes_have_refuses_none(more: dict[str, object]) -> None:
    assert found([replace(each, **more) for each in probes()]) == []


def test_judge_of_the_only_node_refuses_it() -> None:
    assert found([replace(probes(1)[0], wrong="x")]) == [("n0", "gemm", True)]


def test_judge_of_a_little_slower_or_off_only_notes_it() -> None:
    assert found(changed(1, product_s=0.018)) == [("n1", "gemm speed", False)]
    assert found(changed(1, clock=1e9 + 3)) == [("n1", "clock", False)]


def test_judge_of_a_product_on_cpus_allows_for_neighbours() -> None:
    slow = [replace(each, device="cpu") for each in changed(1, product_s=0.03)]
    assert found(slow) == [("n1", "gemm speed", False)]


def test_judge_compares_with_the_node_at_its_best() -> None:
    assert found(probes(1), n0=0.004) == [("n0", "gemm speed", True)]
    assert found(probes(2), n0=0.009, n1=0.009) == []


def test_judge_of_two_clocks_asks_the_file_server() -> None:
    ahead = changed(1, 2, clock=1e9 + 60)
    assert found(ahead, ahead=0.0) == [("n1", "clock", True)]
    assert found(ahead, ahead=60.0) == [("n0", "clock", True)]


def test_judge_tells_what_was_found() -> None:
    (told,) = judge(changed(2, wrong="9 entries are wrong"), server_ahead_s=0.0, past_s={})
    assert told == Finding("n2", "gemm", "9 entries are wrong")
