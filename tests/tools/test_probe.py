"""`tools.probe`: a snapshot's probe by hand, what it prints, draws and keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from launcher.compose import compose
from selfguide.evaluation.metrics.probe import LinearProbes
from selfguide.evaluation.probe import Probed
from selfguide.snapshot import load
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.run import RunFolder
from selfguide.spec.validate import validate
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.snapshots import write_snapshot
from tools.probe import main, settings
from tools.probe_report import Measured

SETTINGS = ["--noise-times", "0.1", "0.5", "--passes", "1", "--samples", "50", "--batch", "256"]


def test_probe_prints_a_table_draws_it_and_measures_once(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshot, figure = write_snapshot(tmp_path / "s", digits), tmp_path / "probe.png"
    flags = [str(snapshot), *SETTINGS, "--out", str(tmp_path / "out"), "--figure", str(figure)]
    assert main([*flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["cells"]) == 4 * 2
    assert said["images"] == {"validation": 50, "test": 50, "train": 1697}
    assert 0 < said["scores"]["knn_accuracy"] <= 1
    pixels = np.asarray(Image.open(figure).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(LinearProbes, "step", never)
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "block_4" in shown
    assert shown.count("*") >= 4


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--layers", "block_7"], "block_7"),
        (["--noise-times", "2"], "2.0"),
        (["--passes", "0"], "0"),
        (["--pooling", "cls"], "cls"),
    ],
)
def test_probe_with_a_setting_that_cannot_be_is_refused_before_work(
    digits: Path, tmp_path: Path, flags: list[str], value: str
) -> None:
    snapshot = write_snapshot(tmp_path / "s", digits)
    with pytest.raises(UserError, match=value):
        main([str(snapshot), *flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def run_of(folder: Path, root: Path) -> RunFolder:
    """A run with two snapshots of two averages each, of which the first average is better than the second."""
    run = RunFolder(folder)
    for images in (7, 9):
        part = write_snapshot(
            run.snapshot(images), root, "train.ema_halflife=[20000,500]", images=images,
            data={"root": str(root), "header": manifests.load(root).header, "manifest": manifests.load(root).hash},
        )  # fmt: skip
        weights = load_file(part / "ema-20000.safetensors")
        save_file({n: t.clone().zero_() for n, t in weights.items()}, part / "ema-500.safetensors")
        about = json.loads((part / "MANIFEST.json").read_text())
        (part / "MANIFEST.json").unlink()
        storage.publish_folder(part, extra={n: v for n, v in about.items() if n != "files"})
    run.run_json.write_text(json.dumps({"id": folder.name, "images": 9}))
    return run


def test_probes_over_images_averages_and_poolings_are_each_what_one_alone_is(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, out = run_of(tmp_path / "digits" / "0123", digits), ["--out", str(tmp_path / "out")]
    few = [*SETTINGS, "--samples", "300", "--layers", "block_1", "block_3", *out]
    figure = tmp_path / "probes.png"
    asked = ["--over-images", "--ema", "0", "1", "--pooling", "mean", "token"]
    assert main([str(run.root), *few, *asked, "--figure", str(figure), "--json"]) == 0
    probes = json.loads(capsys.readouterr().out)["probes"]
    told = [(each["images"], each["average"], each["pooling"]) for each in probes]
    assert len(told) == len(set(told)) == 8 and {images for images, _, _ in told} == {7, 9}
    by = dict(zip(told, probes, strict=True))
    main_one = probes[0]["average"]
    # weights of zero see nothing, and one patch tells less than all of them
    nothing = max(e["scores"]["knn_accuracy"] for e in probes if e["average"] != main_one)
    token, mean = (by[9, main_one, how]["scores"]["knn_accuracy"] for how in ("token", "mean"))
    assert nothing < token < mean, (nothing, token, mean)
    assert main([str(run.root), *few, "--images", "7", "--pooling", "token", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["cells"] == by[7, main_one, "token"]["probe"]["cells"]
    pixels = np.asarray(Image.open(figure).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert main([str(run.root), *few, *asked]) == 0
    assert capsys.readouterr().out.count("block_") >= 8


def test_what_an_evaluation_of_the_run_measured_is_not_measured_again(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = run_of(tmp_path / "digits" / "0123", digits), ["--out", str(tmp_path / "out")]
    few = [str(run.root), *SETTINGS, "--layers", "block_1", *out, "--images", "7"]
    assert main([*few, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    (key,) = {path.name.rpartition("-")[0] for path in (tmp_path / "out").iterdir()}
    record = EvaluationRecord(
        status="done", key=f"img-000000007-{key}", attempt=1, images=7, protocol_key=key,
        protocol={"metric": "linear_accuracy"}, scores=table.pop("scores"), probe=table,
        snapshot_sha256=load(run.snapshot(7)).sha256,
    )  # fmt: skip
    run.evals.mkdir()
    record.publish(run)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("tools.probe.probe", never)
    assert main([*few, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == table["cells"]
    with pytest.raises(AssertionError, match="measured again"):
        main([*few[:-1], "9"])


def test_a_run_that_is_probed_is_probed_with_its_own_settings(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = ("passes=1", "layers=[block_2]", "noise_times=[0.3]", "samples=50")
    words = ["evaluation=probe_digits", *(f"evaluation.{each}" for each in few)]
    snapshot = write_snapshot(tmp_path / "s", digits, *words)
    assert main([str(snapshot), "--out", str(tmp_path / "out"), "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert (cell["layer"], cell["noise_time"]) == ("block_2", 0.3)


@pytest.mark.parametrize("use", ["contrastive", "guidance", "self_condition"])
def test_what_a_probe_chose_is_typed_to_the_next_run_as_it_is_printed(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture, use: str
) -> None:
    run = run_of(tmp_path / "digits" / "0123", digits)
    flags = [str(run.root), *SETTINGS, "--out", str(tmp_path / "out")]
    assert main([*flags, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    best = table["linear_best"]
    assert main([*flags, "--choose", use]) == 0
    words = capsys.readouterr().out.split()
    small = ["contrastive.weight=0.01", "contrastive.hidden=32", "guidance=digits_online"]
    config = compose(["experiment=digits_dit", "cluster=local", *small, *words])
    validate(config)
    if use == "self_condition":
        # no later layer could read the last one
        earlier = [cell for cell in table["cells"] if cell["layer"] != "block_4"]
        best = max(earlier, key=lambda cell: cell["linear_validation"])
        assert config.model.self_condition == best["layer"]
        return
    chosen = getattr(config, use)
    assert chosen.noise_time == best["noise_time"]
    assert f"block_{str(chosen.layer).removeprefix('block_')}" == best["layer"]


@pytest.mark.parametrize(("pooling", "feature"), [("mean", "pooled"), ("cls", "cls")])
def test_a_run_reads_what_was_probed(pooling: str, feature: str) -> None:
    words = ["experiment=digits_dit", "cluster=local", "model.cls_token=true"]
    best = {"layer": "block_2", "noise_time": 0.1}
    found = Probed({}, {"linear_best": best, "cells": [best]})
    probed = Measured(Path("none"), 7, "one", pooling, found, compose(words))
    typed = settings(probed, "contrastive").split()
    config = compose([*words, "contrastive.weight=0.01", *typed])
    validate(config)
    assert config.contrastive.feature == feature and config.contrastive.layer == "block_2"
    # the experiment's own is flat
    config = compose([*words, *settings(probed, "guidance").split()])
    validate(config)
    assert config.guidance.pooling == pooling and config.guidance.layer == 2


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--choose", "guidance", "--over-images"], "--choose guidance"),
        (["--choose", "guidance", "--ema", "0", "1"], "--choose guidance"),
        (["--choose", "guidance", "--pooling", "token"], "--choose guidance .*give --pooling mean"),
        (["--over-images", "--images", "7"], "--images 7"),
        (["--ema", "2"], "--ema 2"),
    ],
)
def test_flags_of_probes_that_contradict_are_refused(
    digits: Path, tmp_path: Path, flags: list[str], value: str
) -> None:
    run = run_of(tmp_path / "digits" / "0123", digits)
    with pytest.raises(UserError, match=value):
        main([str(run.root), *flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_last_layer_alone_cannot_be_chosen_for_self_conditioning(
    digits: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "digits" / "0123", digits)
    flags = [str(run.root), *SETTINGS, "--layers", "block_4", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"only block_4 was probed.*leave --layers out"):
        main([*flags, "--choose", "self_condition"])
