"""tools.better on real snapshots: what it answers, what it saves, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from selfguide.evaluation.features.net import FeatureNet, load_feature_net
from selfguide.spec.metrics import FEATURES
from selfguide.spec.run import RunFolder
from selfguide.spec.selections import selections
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import PIXELS
from shards.sources.source import ArraySource
from shards.write import writer
from tests.selfguide.snapshots import write_snapshot
from tools import better

NET = "test_resnet.r160_in1k"  # the smallest of timm


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
        (["--device", "banana"], "--device banana"),
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


def test_better_draws_from_the_average_that_the_run_scores(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["train.ema_halflife=[1000,2000]", "sampler.steps=1"]
    first, second = (
        str(write_snapshot(tmp_path / str(i), digits, *kept, f"evaluation.average={i}"))
        for i in range(2)
    )
    # of the same weights: each alone is no better than itself, and the two averages differ
    most = ["--most", "100", "--looks", "2"]
    apart = answer(capsys, first, second, *most)
    assert all(look["difference"] != 0 for look in apart["looks"])
    same = answer(capsys, second, second, *most)
    assert all(look["difference"] == 0 for look in same["looks"])


def test_better_of_samples_that_are_nan_is_refused(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = better.generate_each

    def broken(*of: Any, **more: Any) -> Any:
        for x, n in draw(*of, **more):
            x[2] = float("nan")
            yield x, n

    monkeypatch.setattr(better, "generate_each", broken)
    with pytest.raises(UserError, match="sample 2 of this snapshot is NaN"):
        better.main([models["1"], models["4"], "--batch", "100"])


@pytest.fixture
def colours(tmp_path: Path) -> Callable[..., list[str]]:
    """Snapshots of one network on coloured images, sampled in one step and in three, with these settings."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8)).astype(np.uint8)
    writer.write(tmp_path / "data", ArraySource.of("colours", pixels), header=PIXELS)
    manifest = manifests.load(tmp_path / "data")
    data = {"root": str(tmp_path / "data"), "header": manifest.header, "manifest": manifest.hash}

    def written(**evaluation: str) -> list[str]:
        settings = [f"evaluation.{name}={value}" for name, value in evaluation.items()]
        common = ["data.shape=[3,8,8]", "evaluation=fd_timm", "evaluation.batch=15", *settings]
        return [
            str(
                write_snapshot(
                    tmp_path / n, tmp_path / "data", f"sampler.steps={n}", *common, data=data
                )
            )
            for n in "13"
        ]

    return written


def timm_net(folder: Path) -> dict[str, str]:
    """Settings that name a small net of timm, whose weights are written into a folder."""
    file = folder / "net.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(NET).state_dict(), file)
    return {"net": NET, "weights": str(file), "sha256": storage.sha256(str(file))}


def test_better_measures_images_by_the_protocol_of_their_run(
    colours: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = colours(**timm_net(tmp_path))
    words = ["--runs", str(tmp_path / "runs"), "--most", "80", "--looks", "2", "--json"]
    found = []
    for pair in ((a, b), (b, a)):
        assert better.main([*pair, *words]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [look["metric"] for look in found] == ["fd_timm", "fd_timm"]
    first, turned = (each["looks"][0] for each in found)
    assert first["images"] == 40
    assert first["difference"] == pytest.approx(-turned["difference"])
    assert first["difference"] != 0


def test_better_by_another_protocol_reads_neither_reference_nor_weights_of_the_run_s_own(
    colours: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_adm = tmp_path / "adm.npz"
    np.savez(of_adm, mu=np.zeros(2048), sigma=np.eye(2048))
    a, b = colours(reference=str(of_adm), **timm_net(tmp_path))
    asked = []

    def small_net(protocol: str, *given: object, **named: object) -> FeatureNet:
        """One of other width than the run's, in place of a protocol's own, which is downloaded."""
        asked.append((protocol, *given, named))
        return load_feature_net("fd_timm", **timm_net(tmp_path))

    monkeypatch.setattr(better, "load_feature_net", small_net)
    words = ["--runs", str(tmp_path / "runs"), "--most", "40", "--looks", "2", "--json"]
    assert better.main([a, b, "--protocol", "fd_effnet", *words]) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == "fd_effnet"
    assert asked == [("fd_effnet", None, {"net": None, "sha256": None})]
    # named, the run's own protocol keeps what it is measured with
    with pytest.raises(UserError, match="2048 features"):
        better.main([a, b, "--protocol", "fd_timm", *words])


def test_better_with_select_writes_by_which_net_the_better_one_was_chosen(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {}
    for steps in (1, 4):
        run = RunFolder(tmp_path / "runs" / "digits_uncond" / f"{steps}")
        write_snapshot(run.snapshot(7), digits, f"sampler.steps={steps}")
        run.run_json.write_text("{}")
        runs[steps] = run
    words = [str(run.snapshot(7)) for run in runs.values()]
    found = answer(capsys, *words, "--most", "1000", "--looks", "2")
    assert not any(map(selections, runs.values()))
    assert answer(capsys, *words, "--most", "1000", "--looks", "2", "--select") == found
    better_one, other = (1, 4) if found["better"] == "A" else (4, 1)
    (choice,) = selections(runs[better_one])
    assert (choice.net, choice.images, choice.by) == ("fd_digits", 7, "tools.better")
    assert choice.sha256 == FEATURES["fd_digits"].sha256
    assert selections(runs[other]) == ()


def test_better_with_select_of_a_snapshot_in_no_run_is_refused_before_it_draws(
    models: dict[str, str],
) -> None:
    with pytest.raises(UserError, match="drop --select"):
        better.main([models["1"], models["4"], "--select"])
