"""What can be typed as model=... is what the table of sizes has."""

from __future__ import annotations

import pytest

from launcher.choices import options
from launcher.compose import compose
from selfguide.spec.corrections import kept_from_before
from selfguide.spec.sizes import CORRECTED, TABLE


def test_options_of_model_are_the_rows_of_the_table() -> None:
    assert options("model") == sorted(TABLE)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_choice_is_the_row_of_its_name(name: str) -> None:
    config = compose(["experiment=digits_dit", "cluster=local", f"model={name}"])
    assert config.model.name == name
    assert not list(kept_from_before(config))


def test_a_model_of_before_its_correction_is_named_where_that_changes_something() -> None:
    def found(*words: str) -> str:
        config = compose(["experiment=digits_dit", "cluster=local", *words])
        return " ".join(kept_from_before(config))

    assert set(CORRECTED) <= set(TABLE)
    whole = ["model=dit_s_2", "model.whole_index=null", "model.qk_bias=null"]
    assert not found(*whole)  # rectified flow has no table of steps
    assert "model.whole_index=true" in found(*whole, "path=ddpm")
    assert "model.qk_bias=true" in found(*whole, "model.qk_norm=true")
    before = ["model=unet_edm_32", "model.label_bias=null"]
    assert not found(*before, "guidance=none")
    assert "model.label_bias=true" in found(*before)


def test_a_new_run_of_an_experiment_keeps_nothing_from_before() -> None:
    for experiment in options("experiment"):
        config = compose([f"experiment={experiment}", "cluster=local"])
        assert not list(kept_from_before(config)), experiment
