"""The kit passes a trainer that resumes exactly, and catches five bugs that others have shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.resume_kit.kit import CHECKS, failures
from tests.resume_kit.toy import BUGS, Bug, Toy


def test_a_trainer_that_resumes_exactly_passes_every_check(tmp_path: Path) -> None:
    assert failures(Toy(), tmp_path) == {}


# the average not restored, its warm-up begun anew, the position taken from the epoch, a second resume that counts from
# the first, and the newest checkpoint by its name
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_that_others_have_shipped_is_caught(tmp_path: Path, bug: Bug) -> None:
    found = failures(Toy(bug), tmp_path)
    wanted = {
        "average": ("check_steps", "average differs"),
        "warm-up": ("check_steps", "average differs"),
        "epoch": ("check_steps", "other samples"),
        "second resume": ("check_twice", "another loss"),
        "newest": ("check_newest", "it began at"),
    }
    check, words = wanted[bug]
    assert words in found[check], found
    assert found.keys() <= CHECKS.keys()
