"""tools.confidence: TEMI's heads on samples, against what they said of the images that they were fitted to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shards
from shards import sidecar
from shards.errors import UserError
from tools import score_run
from tools.annotate.__main__ import main as annotate
from tools.confidence import main

QUICK = ("--heads", "2", "--epochs", "3", "--step-images", "128", "--learning-rate", "4e-3")
COUNT = 300


@pytest.fixture(scope="module")
def heads(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("notes") / "temi"
    words = ["temi", str(digits), "--pixels", "--groups", "10", "--out", str(out), *QUICK]
    assert annotate(words) == 0
    return out


@pytest.fixture(scope="module")
def samples(digits: Path, heads: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first images of the shards, as a set of samples that were told the groups that the heads gave them."""
    file = tmp_path_factory.mktemp("set") / "samples.npz"
    levels = np.round(shards.read_all(digits)["x"][:COUNT].astype(float) * 255 / 16)
    told = np.array(sidecar.read(heads).rows()[:COUNT]).astype(np.int64)
    told[:30] = (told[:30] + 1) % 10
    np.savez(file, arr_0=np.moveaxis(levels.astype(np.uint8), 1, -1), arr_1=told)
    return str(file)


def test_images_that_heads_were_fitted_to_have_the_confidence_that_was_published(
    digits: Path, heads: Path, samples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, wanted = tmp_path / "out", np.array(sidecar.read(heads).column("confidence")[:COUNT])
    least = float(np.sort(wanted)[50])
    words = [samples, str(digits), str(heads), "--pixels", "--batch", "64", "--out", str(out)]
    assert main([*words, "--least", str(least), "--beside", samples, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sets"][0] == said["sets"][1]
    assert said["sets"][0]["confidence"] == pytest.approx(wanted.mean(), abs=1e-4)
    # thirty were told another group
    assert said["sets"][0]["conditioned_group"] == pytest.approx(0.9)
    with np.load(samples) as given, np.load(out / "samples.npz") as kept:
        sure = wanted >= least
        assert abs(int(sure.sum()) - len(kept["arr_0"])) <= 1
        np.testing.assert_array_equal(kept["arr_0"][:100, ..., :1], given["arr_0"][sure][:100])
        np.testing.assert_array_equal(kept["arr_1"][:100], given["arr_1"][sure][:100])
    assert said["chosen"] | {"kept": 0} == {
        "by": "confidence of TEMI's heads", "least": least, "kept": 0, "of": COUNT, "from": samples,
        "rows_sha256": sidecar.read(heads).sha256,
    }  # fmt: skip
    # a score of these is said to be of chosen samples
    chosen = score_run.chosen_by(out / "samples.npz")
    assert chosen is not None and chosen["of"] == COUNT
    assert score_run.chosen_by(Path(samples)) is None
    one = tmp_path / "one"
    assert main([*words[:-1], str(one)]) == 0
    heights = [Image.open(at / "confidence.png").height for at in (out, one)]
    assert heights[0] > 1.5 * heights[1]
    assert not (one / "samples.npz").exists()


def test_samples_are_drawn_from_the_least_to_the_most_certain(
    digits: Path, heads: Path, samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools import confidence

    drawn = {}
    monkeypatch.setattr(confidence, "draw", lambda file, sets, count: drawn.update(sets=sets))
    assert main([samples, str(digits), str(heads), "--pixels", "--out", str(tmp_path)]) == 0
    (found,) = drawn["sets"]
    assert (np.diff(found.confidence[found.order]) >= 0).all()
    np.testing.assert_array_equal(found.ids, sidecar.read(heads).rows()[:COUNT])


def test_heads_of_other_features_and_what_is_no_probability_are_refused(
    digits: Path, heads: Path, samples: str, tmp_path: Path
) -> None:
    groups = tmp_path / "kmeans"
    words = ["kmeans", str(digits), "--pixels", "--groups", "4", "--out", str(groups)]
    assert annotate(words) == 0
    given = [samples, str(digits)]
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="not made by TEMI"):
        main([*given, str(groups), "--pixels", *out])
    with pytest.raises(UserError, match="give more than 0"):
        main([*given, str(heads), "--pixels", "--least", "2", *out])
    with pytest.raises(UserError, match="the highest confidence"):
        main([*given, str(heads), "--pixels", "--least", "1", *out])
    vit = ["--vit", "vit_tiny_patch16_224", "--weights", "random:0"]
    with pytest.raises(UserError, match="fitted to features of"):
        main([*given, str(heads), *vit, *out])
