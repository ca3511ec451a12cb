"""Waiting for a condition."""

from __future__ import annotations

import pytest

from shards.wait import wait_until


def test_wait_until_asks_until_the_condition_holds() -> None:
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), poll_s=0.0)


@pytest.mark.parametrize("answer", [False, True])
def test_wait_until_without_patience_asks_once(answer: bool) -> None:
    asked: list[float] = []
    assert wait_until(lambda: answer, timeout_s=0.0, pause=asked.append) is answer
    assert asked == []
