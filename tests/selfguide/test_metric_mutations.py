"""Planted mistakes in metrics are all seen by the suite: each row's check passes on the code and fails with it."""

from __future__ import annotations

import pytest

from tests.selfguide.metric_mutations import MUTATIONS, Check, Mutation
from tests.selfguide.mutation import planted
from tests.selfguide.test_feature_nets import fidelity, inception, ours

# fixtures of checks
__all__ = ["fidelity", "inception", "ours"]

pytestmark = pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")


@pytest.fixture(scope="module")
def passed() -> set[Check]:
    """Checks that have passed on the code as it is."""
    return set()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name)
def test_check_of_a_metric_with_a_planted_mistake_fails(
    mutation: Mutation, passed: set[Check], request: pytest.FixtureRequest
) -> None:
    if mutation.check not in passed:
        mutation.check(request)
        passed.add(mutation.check)
    with planted(mutation.function, mutation.edits), pytest.raises(AssertionError):
        mutation.check(request)


def half(value: float, *, of: float = 2) -> float:
    return value / of


def test_planted_mistake_is_seen_by_who_imported_the_function_and_gone_afterwards() -> None:
    before = half
    with planted(half, {"value / of": "value * of", "of: float = 2": "of: float = 3"}):
        assert before(6.0) == 18
    assert before(6.0) == half(6.0) == 3


@pytest.mark.parametrize("edits", [{"value // of": "1"}, {"value": "1"}, {"/ of": "/ of"}])
def test_planted_mistake_that_does_not_apply_is_an_error(edits: dict[str, str]) -> None:
    with pytest.raises(LookupError), planted(half, edits):
        pass
    assert half(6.0) == 3


def test_names_of_mutations_are_their_own() -> None:
    names = [each.name for each in MUTATIONS]
    assert len(set(names)) == len(names)
