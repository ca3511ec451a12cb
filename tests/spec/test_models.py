"""What can be typed as model=... is what the table of sizes has."""

from __future__ import annotations

import pytest

from launcher.compose import compose, options
from selfguide.spec.corrections import kept_from_before
from selfguide.spec.sizes import CORRECTED, TABLE


def test_options_of_model_are_the_rows_of_the_table() -> None:
    assert options("model") == sorted(TABLE)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_choice_is_the_row_of_its_name(name: str) -> None:
    config = compose(["experiment=digits_dit", "cluster=local", f"model={name}"])
    assert config.model.name == name
    assert not list(kept_from_before(config))


def test_what_was_corrected_is_a_row_of_the_table() -> None:
    assert set(CORRECTED) <= set(TABLE)
