"""tools.score and tools.reference: metrics beside the score of a protocol, of anybody's samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from shards import storage
from shards.errors import UserError
from shards.format.header import PIXELS
from shards.sources.source import ArraySource
from shards.write import writer
from tests.selfguide.snapshots import write_snapshot
from tools import score
from tools.reference import __main__ as reference

NET = "test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("net") / "net.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(NET).state_dict(), file)
    named = ["--net", NET, "--weights", str(file), "--sha256", storage.sha256(str(file))]
    return ["--protocol", "fd_timm", *named, "--batch", "20"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shards to train on and to test on, and samples."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    found = {}
    for name, count in (("train", 60), ("test", 50), ("samples", 40)):
        x = rng.integers(0, 256, (count, 3, 8, 8)).astype(np.uint8)
        found[name] = str(folder / name)
        writer.write(folder / name, ArraySource.of(name, x), header=PIXELS)
        if name == "samples":
            found[name] += ".npz"
            np.savez(folder / "samples.npz", arr_0=np.moveaxis(x, 1, -1))
    return found


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert score.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_metrics_are_scored_and_named_with_their_settings(
    data: dict[str, str], net: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [data["samples"], *net, "--shards", data["train"]]
    plain = answer(words, capsys)
    asked = ["kid", "density_coverage", "precision_recall", "near_copies", "ood_auroc", "fdr"]
    settings = ["kid_size=30", "kid_subsets=3", f"test={data['test']}"]
    found = answer([*words, "--metrics", *asked, "--setting", *settings], capsys)
    assert found["scores"].items() >= plain["scores"].items()
    new = found["scores"].keys() - plain["scores"].keys()
    assert new == {
        "kid", "kid_of_subsets_sd", "density", "coverage", "precision", "recall", "near_copies", "near_copies_real",
        "ood_auroc", "fdr",
    }  # fmt: skip
    assert set(found["metrics"]) == set(asked)
    assert found["metrics"]["kid"] == {"subsets": 3, "size": 30, "seed": 2020, "kept": 10_000}
    assert "metrics" not in plain


def test_ufid_against_samples_of_a_named_run_is_that_of_the_same_images_0(
    data: dict[str, str], net: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "uncond.npz")
    samples = ["samples", data["samples"], *net, "--out", out]
    with pytest.raises(UserError, match="--of NAME"):
        reference.main(samples)
    assert reference.main([*samples, "--of", "digits_uncond/77"]) == 0
    words = [data["samples"], *net, "--shards", data["train"], "--metrics", "ufid"]
    with pytest.raises(UserError, match=r"--setting unconditional=FILE\.npz"):
        score.main(words)
    found = answer([*words, "--setting", "unconditional=uncond.npz"], capsys)
    assert found["scores"]["ufid"] == pytest.approx(0, abs=1e-6)


def test_reference_of_a_runs_samples_is_that_of_the_images_it_draws(
    digits: Path, net: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_snapshot(
        tmp_path / "runs" / "digits_uncond" / "0123" / "snapshots" / "img-000000007",
        digits,
        "sampler.steps=1",
    )
    out = tmp_path / "uncond.npz"
    words = ["samples", str(folder), *net, "--out", str(out), "--count", "30", "--json"]
    assert reference.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["images"], found["experiment"]) == ("0123", 30, "digits_uncond")
    first = out.read_bytes()
    assert reference.main(words) == 0
    with np.load(out) as again, np.load(tmp_path / "uncond.npz") as once:
        assert np.array_equal(again["mu"], once["mu"])
    assert len(first) == out.stat().st_size


def test_reference_of_a_runs_samples_is_of_the_average_that_it_scores(
    digits: Path, net: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for average in range(2):
        folder = write_snapshot(
            tmp_path / "runs" / "digits_uncond" / str(average) / "snapshots" / "img-000000007",
            digits,
            "sampler.steps=1",
            "train.ema_halflife=[1000,2000]",
            f"evaluation.average={average}",
        )
        out = tmp_path / f"{average}.npz"
        words = ["samples", str(folder), *net, "--out", str(out), "--count", "30", "--json"]
        assert reference.main(words) == 0
        found.append(json.loads(capsys.readouterr().out)["snapshot"])
        weights = sorted(folder.glob("*.safetensors"))
        assert found[-1] == storage.sha256(str(weights[average]))
    assert found[0] != found[1]


def test_reference_of_samples_whose_seeds_are_too_large_is_refused(
    digits: Path, net: list[str], tmp_path: Path
) -> None:
    folder = write_snapshot(tmp_path / "img-000000007", digits, "sampler.steps=1")
    words = ["samples", str(folder), *net, "--out", str(tmp_path / "uncond.npz"), "--count", "30"]
    with pytest.raises(UserError, match=f"--seed {2**63}: take"):
        reference.main([*words, "--seed", str(2**63)])


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["--metrics", "kid"], "--setting kid_size=40"),
        (["--setting", "kid_size=20"], "--metrics kid"),
        (["--metrics", "ood_auroc"], "--setting test=ROOT"),
        (["--metrics", "inception_score"], "--protocol fid_adm"),
        (["--setting", "kid_sise=20"], "kid_size"),
        (["--metrics", "precision_recall", "--setting", "pr_k=0"], "--setting pr_k=0"),
        (["--setting", "crop=[1"], "--setting crop=[1 cannot be read"),
        (["--setting", "kid_size"], "give --setting kid_size=VALUE"),
        (["--setting", "crop=99"], "give --setting crop=8 or less"),
        (["--setting", "reference_count=9999"], "give --setting reference_count="),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_the_words_of_the_command(
    data: dict[str, str], net: list[str], words: list[str], cure: str
) -> None:
    with pytest.raises(UserError) as error:
        score.main([data["samples"], *net, "--shards", data["train"], *words])
    assert cure in str(error.value)
    assert "evaluation" not in str(error.value)
