"""Where a rank's time goes, by its own account."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from selfguide.spec import rank_status
from selfguide.spec.rank_status import RankStatus


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A monotonic clock that stands still but for what the test lets pass."""
    now = 100.0
    monkeypatch.setattr(rank_status.time, "monotonic", lambda: now)

    def more(seconds: float) -> None:
        nonlocal now
        now += seconds

    return more


def test_every_second_of_a_rank_is_in_the_class_of_its_section(
    passes: Callable[[float], None],
) -> None:
    # the field's own default holds the real clock
    status = RankStatus(section="joining", moved=100.0, _counted=100.0)
    passes(3)
    status.enter("starting")
    passes(5)
    status.start(0, compiles=True)
    passes(7)
    status.advance(128)
    assert status.section == "train"
    passes(2)
    status.advance(256)
    status.enter("data")
    passes(1)
    status.enter("checkpoint")
    passes(4)
    status.enter("train")
    # no progress yet
    passes(50)
    assert status.seconds == {"start": 8.0, "compile": 7.0, "train": 3.0, "checkpoint": 4.0}
    before = status.seconds
    status.enter("done")
    assert status.seconds["train"] == 53.0 and before["train"] == 3.0


def test_a_first_step_that_compiles_nothing_is_training(passes: Callable[[float], None]) -> None:
    status = RankStatus(moved=100.0, _counted=100.0)
    status.start(640)
    passes(2)
    status.advance(768)
    assert status.seconds == {"start": 0.0, "train": 2.0}
