"""Who is to blame where nothing moves, by hand-built heartbeats; and what real processes show of themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.attempt.hang import BEATS, STEPS, Limits, Seen, judge

LIMITS = Limits(step=60, start=1800, data=900, save=600, evaluation=700)
SILENT_S = BEATS * LIMITS.beat_s + 1


def waits(rank: int, **more: object) -> Seen:
    """A rank that has entered the 501st collective and waits in it, for 70 s."""
    told = Seen(
        rank=rank,
        section="train",
        images=1280,
        collectives=501,
        step_s=0.2,
        quiet_s=70.0,
        silent_s=3.0,
    )
    return replace(told, **more)  # type: ignore[arg-type]


def test_a_rank_before_the_collective_in_which_the_others_wait_is_blamed() -> None:
    verdict = judge([waits(0), waits(1), waits(2, collectives=500), waits(3)], LIMITS)
    assert verdict is not None
    assert (verdict.rank, verdict.section, verdict.images) == (2, "train", 1280)
    assert "did not enter the collective in which 3 ranks wait" in verdict.message


def test_a_stopped_rank_is_blamed_though_it_had_entered_every_collective() -> None:
    verdict = judge([waits(0), waits(1, stopped=True, silent_s=70.0)], LIMITS)
    assert verdict is not None and verdict.rank == 1 and "SIGSTOP" in verdict.message


def test_a_silent_rank_of_another_node_is_blamed_and_those_that_speak_say_where() -> None:
    """It said last, before a save, that it trains: its count is old, and so is its section."""
    silent = waits(1, silent_s=SILENT_S, images=640, collectives=300)
    verdict = judge([waits(0), silent, waits(2)], LIMITS)
    assert verdict is not None
    assert (verdict.rank, verdict.section, verdict.images) == (1, "train", 1280)
    saving = [waits(0, section="checkpoint"), silent, waits(2, section="checkpoint")]
    assert judge(saving, LIMITS) is None
    late = [replace(each, quiet_s=LIMITS.save + 1) for each in saving]
    verdict = judge(late, LIMITS)
    assert verdict is not None and (verdict.rank, verdict.section) == (1, "checkpoint")


def test_a_rank_that_never_spoke_is_blamed_after_the_limit_of_a_start() -> None:
    joining = [waits(rank, section="joining", collectives=None, images=0) for rank in range(2)]
    absent = Seen(rank=2, quiet_s=70.0, silent_s=70.0)
    assert judge([*joining, absent], LIMITS) is None
    late = [replace(each, quiet_s=1801.0) for each in [*joining, replace(absent, silent_s=1801.0)]]
    verdict = judge(late, LIMITS)
    assert verdict is not None and verdict.rank == 2


def test_a_rank_that_has_not_come_to_join_the_others_is_blamed() -> None:
    early = [waits(r, section="joining", collectives=None, quiet_s=1801.0) for r in range(3)]
    early[1] = replace(early[1], section="loading", quiet_s=1801.0)
    verdict = judge(early, LIMITS)
    assert verdict is not None and (verdict.rank, verdict.section) == (1, "loading")


@pytest.mark.parametrize(
    ("section", "step_s", "limit"),
    [
        ("loading", 0.0, LIMITS.start),
        ("joining", 0.0, LIMITS.start),
        ("starting", 0.0, LIMITS.start),
        # the first step compiles
        ("train", 0.0, LIMITS.start),
        ("compile", 0.2, LIMITS.start),
        ("train", 0.2, LIMITS.step),
        ("data", 0.2, LIMITS.data),
        ("snapshot", 0.2, LIMITS.save),
        ("checkpoint", 0.2, LIMITS.save),
        ("evaluate", 0.0, LIMITS.evaluation),
    ],
)
def test_each_section_has_its_limit_whatever_the_others_do(
    section: str, step_s: float, limit: float
) -> None:
    def ranks(quiet_s: float) -> list[Seen]:
        behind = waits(1, section=section, step_s=step_s, collectives=500)
        return [replace(each, quiet_s=quiet_s) for each in (waits(0), behind)]

    assert judge(ranks(limit - 1), LIMITS) is None
    verdict = judge(ranks(limit + 1), LIMITS)
    assert verdict is not None and (verdict.rank, verdict.section) == (1, section)


def test_ten_median_steps_are_allowed_where_steps_are_long() -> None:
    ranks = [
        waits(0, quiet_s=STEPS * 20 - 1.0),
        waits(1, quiet_s=STEPS * 20 + 9.0, collectives=500),
    ]
    assert judge(ranks, LIMITS, median_step_s=20.0) is None
    ranks = [replace(each, quiet_s=STEPS * 20 + 1.0) for each in ranks]
    assert judge(ranks, LIMITS, median_step_s=20.0) is not None


def test_a_rank_alone_that_holds_the_lock_is_blamed() -> None:
    alone = waits(0, collectives=None, silent_s=70.0)
    verdict = judge([alone], LIMITS)
    assert verdict is not None and verdict.rank == 0 and "lock" in verdict.message


@st.composite
def seen(draw: st.DrawFn, rank: int) -> Seen:
    return Seen(
        rank=rank,
        section=draw(st.sampled_from(["joining", "train", "data", "checkpoint"])),
        images=draw(st.integers(0, 3)) * 128,
        collectives=draw(st.integers(0, 5)),
        step_s=draw(st.sampled_from([0.0, 0.2, 9.0])),
        quiet_s=draw(st.floats(0, 4000)),
        silent_s=draw(st.floats(0, 60)),
        stopped=draw(st.booleans()),
    )


@st.composite
def many(draw: st.DrawFn) -> list[Seen]:
    return [draw(seen(rank)) for rank in range(draw(st.integers(1, 5)))]


@given(many(), st.floats(0, 30))
def test_a_rank_that_waits_is_never_blamed_while_another_is_behind_it(
    ranks: list[Seen], median: float
) -> None:
    verdict = judge(ranks, LIMITS, median)
    if verdict is None:
        return
    blamed = ranks[verdict.rank]
    speaks = not blamed.stopped and blamed.silent_s < SILENT_S
    assert not any(each.stopped for each in ranks) or blamed.stopped
    assert not speaks or all(
        (each.collectives or 0) >= (blamed.collectives or 0)
        and not each.stopped
        and each.silent_s < SILENT_S
        for each in ranks
    )


@given(st.lists(st.floats(0.01, 300), min_size=10, max_size=10), st.integers(0, 3))
def test_ranks_that_move_slowly_are_never_said_to_hang(steps: list[float], behind: int) -> None:
    """Ten runs of any step time: the last heartbeat of a rank is at most a step and two beats old."""
    for step_s in steps:
        quiet = step_s + 2 * LIMITS.beat_s
        ranks = [waits(rank, quiet_s=quiet, step_s=step_s) for rank in range(4)]
        ranks[behind] = replace(ranks[behind], collectives=500)
        assert judge(ranks, LIMITS, median_step_s=step_s) is None
