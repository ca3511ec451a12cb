"""What can be typed as model=... is what the table of sizes has."""

from __future__ import annotations

import pytest

from launcher.compose import compose, options
from selfguide.spec.sizes import CORRECTED, TABLE, outdated


def test_options_of_model_are_the_rows_of_the_table() -> None:
    assert options("model") == sorted(TABLE)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_choice_is_the_row_of_its_name(name: str) -> None:
    config = compose(["experiment=digits_dit", "cluster=local", f"model={name}"])
    assert config.model.name == name
    assert not outdated(config)


def test_a_model_of_before_its_correction_is_named_where_that_changes_what_it_computes() -> None:
    def found(*words: str) -> dict[str, object]:
        return outdated(compose(["experiment=digits_dit", "cluster=local", *words]))

    assert set(CORRECTED) <= set(TABLE)
    # first weights are nothing that a trained net still shows
    before = ["model.out_groups=null", "model.plain_init=null", "guidance=none"]
    assert found("model=unet_ddpm", *before) == {"out_groups": 8}
    whole = ["model=dit_s_2", "model.whole_index=null", "model.qk_bias=null"]
    assert found(*whole) == {}  # rectified flow has no table of steps
    assert found(*whole, "path=ddpm", "model.qk_norm=true") == {
        "whole_index": True,
        "qk_bias": True,
    }
    assert found("model=unet_edm_32", "model.label_bias=null", "guidance=none") == {}
    assert found("model=unet_edm_32", "model.label_bias=null") == {"label_bias": True}
