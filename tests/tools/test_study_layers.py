"""The study of layers and noise-times: what it measures, keeps and draws."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score

import shards
from selfguide.discovery import kmeans as module
from selfguide.discovery.features import InputFeatures, SnapshotFeatures
from selfguide.snapshot import load
from selfguide.spec.run import RunFolder
from shards.errors import UserError
from shards.format.manifest import digest
from shards.sources.source import ArraySource
from shards.write import writer
from tests.selfguide.snapshots import write_snapshot
from tests.shards import data
from tools.study import layers as study
from tools.study.__main__ import main


def test_a_cell_is_the_median_over_snapshots_and_is_measured_once(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = [
        str(write_snapshot(tmp_path / f"s{n}", digits, f"train.ema_halflife=[{n}]")) for n in (1, 2)
    ]
    out, figure = tmp_path / "out", tmp_path / "figure.png"
    settings = ["--noise-times", "0.1", "0.9", "--poolings", "mean", "--restarts", "1"]
    flags = [str(digits), *runs, *settings, "--out", str(out), "--figure", str(figure), "--json"]
    assert main(flags) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["cells"]) == 4 * 2
    for row in said["cells"]:
        assert row["nmi"] == statistics.median(row["each_nmi"]) and len(row["each_nmi"]) == 2
    assert said["best"]["nmi"] == max(row["nmi"] for row in said["cells"])
    assert 0.65 < said["pixels"]["nmi"] < 0.8

    held = shards.read_all(digits)  # one cell again, by hand
    header = load(Path(runs[0])).data["header"]
    net = SnapshotFeatures(load(Path(runs[0])), header, layer=3, noise_time=0.1, pooling="mean")
    rows = net(torch.from_numpy(held["x"]), torch.arange(1797)).numpy()
    found = module.kmeans(rows, 10, restarts=1)
    cell = next(r for r in said["cells"] if (r["layer"], r["noise_time"]) == ("block_3", 0.1))
    assert cell["each_nmi"][0] == pytest.approx(normalized_mutual_info_score(held["y"], found.ids))

    pixels = np.asarray(Image.open(figure).convert("RGB"))
    assert pixels.shape[0] > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(study, "kmeans", never)
    assert main(flags) == 0
    assert json.loads(capsys.readouterr().out) == said
    with pytest.raises(AssertionError, match="measured again"):  # other settings are other scores
        main([*flags, "--seed", "1"])


def test_scores_over_images_are_those_of_each_snapshot_alone(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "digits" / "0123")
    for seed, images in enumerate((7, 9)):
        write_snapshot(run.snapshot(images), digits, seed=seed, images=images)
    run.run_json.write_text(json.dumps({"id": "0123", "images": 9}))
    few = ["--noise-times", "0.1", "--poolings", "mean", "--restarts", "1", "--json"]
    words = [str(digits), str(run.root), *few, "--out", str(tmp_path / "out")]
    figures = [tmp_path / f"{name}.png" for name in ("newest", "over")]
    assert main([*words, "--figure", str(figures[0])]) == 0
    newest = json.loads(capsys.readouterr().out)
    assert main([*words, "--over-images", "--figure", str(figures[1])]) == 0
    found = json.loads(capsys.readouterr().out)["over_images"]
    assert [each["images"] for each in found] == [7, 9]
    assert {"images": 9, **newest} == found[1] and found[0]["cells"] != found[1]["cells"]
    # a panel for each snapshot
    widths = [Image.open(file).width for file in figures]
    assert widths[1] > 1.5 * widths[0]
    other = RunFolder(tmp_path / "digits" / "4567")
    write_snapshot(other.snapshot(8), digits, images=8)
    other.run_json.write_text(json.dumps({"id": "4567", "images": 8}))
    with pytest.raises(UserError, match="no snapshot at the same number"):
        main([str(digits), str(run.root), str(other.root), "--over-images", *few])


def test_mistakes_are_named_before_anything_is_measured(digits: Path, tmp_path: Path) -> None:
    run = str(write_snapshot(tmp_path / "s", digits))
    data.write(tmp_path / "unlabelled", 100, labels=False)
    for flags, words in {
        (str(tmp_path / "unlabelled"), run): "has no labels",
        (str(digits), run, "--groups", "1798"): "groups=1798",
        (str(digits), run, "--noise-times", "0.1", "2"): "noise_time=2 is not on",
        (str(digits), run, "--poolings", "cls"): "has no \\[CLS\\]",
    }.items():
        with pytest.raises(UserError, match=words):
            main([*flags, "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


def test_scores_that_earlier_versions_kept_are_read_and_a_torn_line_is_not(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of theirs as it was; its key hashes what decided the score."""
    settings = {"seed": 0, "restarts": 1, "spherical": False, "normalise": True}
    measured = study.Measured(tmp_path, study.Data.load(str(digits)), 10, settings)
    pixels = InputFeatures(measured.data.manifest.header)
    what = {"shards": measured.data.manifest.hash, "groups": 10, **settings, **pixels.provenance}
    line = {"key": digest(what), "what": what, "scores": {"nmi": 0.5}}
    (tmp_path / "cells.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line)[:40])
    monkeypatch.setattr(study, "kmeans", None)
    assert measured.scores(pixels) == {"nmi": 0.5}


def test_features_of_latents_are_held_against_the_latents(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root, x = tmp_path / "latents", np.random.default_rng(0).standard_normal((80, 4, 8, 8))
    labels = np.arange(80) % 2
    # two kinds of latents, which k-means tells apart
    x[labels == 1] += 3
    source = ArraySource.of("two", x.astype(np.float16), labels=labels, classes=2)
    writer.write(root, source, header=data.LATENT, seed=0)
    words = ("model.depth=1", "model.width=32", "model.heads=2")
    one = write_snapshot(tmp_path / "one", root, *words, experiment="emoji_uncond")
    flags = [str(root), str(one), "--noise-times", "0.1", "--poolings", "mean", "--restarts", "1"]
    flags += ["--out", str(tmp_path / "out"), "--figure", str(tmp_path / "figure.png")]
    assert main([*flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["latents"]["nmi"] == pytest.approx(1) and "pixels" not in said
    assert main(flags) == 0
    assert "latents 1.000" in capsys.readouterr().out
