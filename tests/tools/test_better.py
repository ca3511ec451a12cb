"""tools.better on real snapshots: what it answers, what it saves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shards.errors import UserError
from tests.selfguide.snapshots import write_snapshot
from tools import better


@pytest.fixture(scope="module")
def models(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One network, sampled in one step and in four."""
    root = tmp_path_factory.mktemp("models")
    return {
        str(steps): str(write_snapshot(root / str(steps), digits, f"sampler.steps={steps}"))
        for steps in (1, 4)
    }


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert better.main([*words, "--batch", "100", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_better_names_the_better_model_early_and_either_way_round(
    models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    most = ["--most", "1000", "--looks", "5"]
    found = answer(capsys, models["1"], models["4"], *most)
    turned = answer(capsys, models["4"], models["1"], *most)
    assert {found["better"], turned["better"]} == {"A", "B"}
    last, other = found["looks"][-1], turned["looks"][-1]
    assert last["difference"] == pytest.approx(-other["difference"])
    assert found["saved"] == 2 * (1000 - last["images"]) > 0
    assert better.main([models["1"], models["4"], *most]) == 0
    assert "images saved" in capsys.readouterr().out


def test_better_of_a_model_and_itself_finds_no_difference_and_saves_nothing(
    models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, models["4"], models["4"], "--most", "100", "--looks", "2")
    assert found["better"] is None and found["saved"] == 0
    assert [look["images"] for look in found["looks"]] == [50, 100]
    assert all(look["difference"] == 0 for look in found["looks"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--most", "50"], "--most 50"),
        (["--alpha", "0"], "--alpha 0"),
        (["--looks", "0"], "--looks"),
    ],
)
def test_better_refuses_what_cannot_be_compared(
    models: dict[str, str], words: list[str], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        better.main([models["1"], models["4"], *words])


def test_better_refuses_models_of_other_data(
    models: dict[str, str], digits: Path, tmp_path: Path
) -> None:
    header = {"kind": "image", "shape": [1, 8, 8]}
    data = {"root": "elsewhere", "header": header, "manifest": "other"}
    other = write_snapshot(tmp_path / "other", digits, data=data)
    with pytest.raises(UserError, match="elsewhere"):
        better.main([models["1"], str(other)])
