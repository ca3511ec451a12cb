"""`tools.probe`: a snapshot's probe by hand, what it prints, draws and keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfguide.evaluation.metrics.probe import LinearProbes
from shards.errors import UserError
from tests.selfguide.snapshots import write_snapshot
from tools.probe import main

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
