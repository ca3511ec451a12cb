"""The laws of which nodes are excluded, over random evidence, and what an attempt says against its nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.folder import Attempt
from launcher.reconcile import decide, health
from launcher.reconcile.health import HALF_LIFE_S, Evidence, excluded
from launcher.reconcile.view import AttemptView

HOUR_S = 3600.0
NODES = [f"n{number}" for number in range(12)]
NOW = 100 * HALF_LIFE_S

failures = st.builds(
    Evidence,
    node=st.sampled_from(NODES),
    time=st.floats(NOW - 4 * HALF_LIFE_S, NOW),
    kind=st.sampled_from(sorted(health.WEIGHTS)),
    run=st.sampled_from(["a/1", "a/2", "b/1"]),
    attempt=st.integers(1, 9),
    type=st.sampled_from(["", "ValueError"]),
    images=st.sampled_from([None, 128, 256]),
)
many = st.lists(failures, max_size=40)


def failure(node: str, hours_ago: float = 0.0, kind: str = "killed", **more: object) -> Evidence:
    base = Evidence(node=node, time=NOW - hours_ago * HOUR_S, kind=kind, run="a/1", attempt=1)
    return replace(base, **more)


def names(evidence: list[Evidence], now: float = NOW, **more: int) -> list[str]:
    return [each.node for each in excluded(evidence, NODES, now, **more)]


@given(many, st.integers(0, 12))
def test_excluded_never_more_than_a_quarter_and_than_what_is_spare(
    evidence: list[Evidence], spare: int
) -> None:
    assert len(names(evidence)) <= len(NODES) // 4
    assert len(names(evidence, spare=spare)) <= min(spare, len(NODES) // 4)


@given(many)
def test_excluded_without_news_ends_when_it_says(evidence: list[Evidence]) -> None:
    for each in excluded(evidence, NODES, NOW):
        assert each.until is not None and each.until > NOW
        assert each.node not in names(evidence, each.until)
    assert names(evidence, NOW + 10 * HALF_LIFE_S) == []


@given(many)
def test_excluded_takes_two_failures_unless_one_was_measured(evidence: list[Evidence]) -> None:
    for node in names(evidence):
        against = [each for each in evidence if each.node == node]
        assert len(against) >= 2 or against[0].kind == "preflight"


@given(many, st.randoms())
def test_excluded_whatever_order_the_files_are_read_in(evidence: list[Evidence], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(evidence)
    random.shuffle(shuffled)
    assert names(shuffled) == names(evidence)


@given(many, st.sampled_from(NODES))
def test_excluded_until_a_person_forgives_or_as_long_as_one_says(
    evidence: list[Evidence], node: str
) -> None:
    forgiven = Evidence(node=node, time=NOW + 1, kind="forgiven")
    assert node not in names([*evidence, forgiven], NOW + 1)
    by_hand = replace(forgiven, kind="excluded")
    assert names([*evidence, by_hand], NOW + 100 * HALF_LIFE_S) == [node]


@given(many)
def test_excluded_by_the_worst_first(evidence: list[Evidence]) -> None:
    weights = [each.weight for each in excluded(evidence, NODES, NOW)]
    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize(("hours", "out"), [(0, True), (23.9, True), (24.1, False)])
def test_two_failures_within_a_day_exclude_a_node(hours: float, out: bool) -> None:
    assert names([failure("n1", hours), failure("n1")]) == (["n1"] if out else [])


def test_the_same_error_on_two_nodes_is_the_runs_own_fault() -> None:
    own = [
        failure(node, kind="crash", images=256, attempt=i) for i, node in enumerate(["n1", "n2"])
    ]
    assert names([*own, *own, *own]) == []
    # nor does one node that a run always falls on at the same place
    assert names([failure("n1", images=256, attempt=i) for i in range(9)]) == []
    assert names([failure("n1", images=128 * i) for i in range(2)]) == ["n1"]


def test_a_job_that_takes_all_nodes_finds_them() -> None:
    assert names([failure("n1"), failure("n1", 1)], spare=0) == []


# ---- what an attempt says ----------------------------------------------------------------------------


def attempt(tmp_path: Path, exits: dict[str, dict[str, object]], state: str = "") -> AttemptView:
    return AttemptView(
        files=Attempt(tmp_path / "0003"),
        opened=1.0,
        world=2,
        starts=frozenset({"0", "1"}),
        nodes={"0": "n1", "1": "n2"},
        exits=exits,
        job=None,
    )


def against(at: AttemptView, cause: decide.Cause, down: tuple[str, ...] = ()) -> list[Evidence]:
    return health.blamed(at, cause, run="a/1", time=5.0, down=down)


def exit_of(kind: str, code: int, **more: object) -> dict[str, object]:
    return {"class": kind, "code": code, "message": f"a {kind}", "time": 2.0, **more}


def test_blamed_is_the_node_of_the_rank_that_was_killed(tmp_path: Path) -> None:
    at = attempt(tmp_path, {"0": exit_of("error", 1, peer_gone=True)})
    (found,) = against(at, decide.cause(at))
    assert (found.node, found.kind, found.rank, found.attempt) == ("n2", "killed", "1", 3)


def test_blamed_is_nobody_where_all_ranks_ended_without_a_word(tmp_path: Path) -> None:
    at = attempt(tmp_path, {})
    assert decide.cause(at).kind == "killed" and against(at, decide.cause(at)) == []


def test_blamed_is_every_node_that_preflight_refused(tmp_path: Path) -> None:
    exits = {rank: exit_of("node", 88, node=f"n{rank}", check="disk") for rank in ("0", "1")}
    at = attempt(tmp_path, exits)
    assert decide.cause(at).kind == "node"
    found = against(at, decide.cause(at))
    assert {(each.node, each.kind, each.type) for each in found} == {
        ("n0", "preflight", "disk"),
        ("n1", "preflight", "disk"),
    }


def test_blamed_of_a_lost_node_is_what_slurm_cannot_reach(tmp_path: Path) -> None:
    lost = decide.Cause(kind="node", message="its node failed")
    both = {rank: exit_of("error", 1, peer_gone=True) for rank in ("0", "1")}
    assert [each.node for each in against(attempt(tmp_path, both), lost, ("n2", "n9"))] == ["n2"]
    # or what nobody heard of again
    one = attempt(tmp_path, {"0": both["0"]})
    assert [each.node for each in against(one, lost)] == ["n2"]
    assert against(attempt(tmp_path, both), lost) == []


@pytest.mark.parametrize(
    "kind", ["user", "numeric", "preempted", "limit", "outside", "ok", "error"]
)
def test_blamed_is_no_node_for_what_is_not_its_fault(tmp_path: Path, kind: str) -> None:
    cause = decide.Cause(kind=kind, rank="1", message="rank 1: ValueError: no")  # type: ignore[arg-type]
    assert against(attempt(tmp_path, {}), cause) == []


def test_blamed_is_the_node_of_an_error_that_only_a_gpu_makes(tmp_path: Path) -> None:
    cause = decide.Cause(
        kind="error", rank="0", message="rank 0: CUDA error: uncorrectable ECC error"
    )
    (found,) = against(attempt(tmp_path, {}), cause)
    assert (found.node, found.kind) == ("n1", "gpu")
