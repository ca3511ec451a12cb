"""Sets of samples: one .npz over ranks, resumed, and older sets that stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfguide.spec.config import LabelGuidance
from shards.errors import UserError
from tests.selfguide.test_training import attempt, config
from tools import sample, sample_run, sample_set, score_run
from tools.ranks import run_ranks


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run that was conditioned on labels."""
    root = tmp_path_factory.mktemp("labelled") / "digits" / "run"
    cfg = config(digits)
    labelled = replace(cfg, guidance=LabelGuidance(), data=replace(cfg.data, classes=10))
    run_ranks(1, attempt, labelled, str(root))
    return str(root)


def words(run: str, out: Path, *more: str) -> list[str]:
    return [run, "--out", str(out), "--steps", "2", "--batch", "4", "--count", "10", *more]


def test_npz_has_the_images_of_the_pictures_and_their_labels(run: str, tmp_path: Path) -> None:
    asked = ["--label", "3", "5"]
    assert sample.main(words(run, tmp_path / "a", *asked)) == 0
    assert sample.main(words(run, tmp_path / "b", *asked, "--npz")) == 0
    pictures = [np.asarray(Image.open(f)) for f in sorted((tmp_path / "a" / "images").iterdir())]
    with np.load(tmp_path / "b" / "samples.npz") as found:
        images, labels = found["arr_0"], found["arr_1"]
    assert images.shape == (10, 8, 8, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(images[..., 0], np.stack(pictures))
    assert labels.tolist() == [3] * 5 + [5] * 5
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "grid.png",
        "sample.json",
        "samples.npz",
    ]


def test_npz_of_two_ranks_that_were_killed_is_that_of_one(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main(words(run, tmp_path / "one", "--npz")) == 0
    both = tmp_path / "two"
    drawn: list[int] = []
    plain = sample_run.draw

    def counted(snapshot, sampler, condition, seeds, batch, callback=None):  # type: ignore[no-untyped-def]
        if len(drawn) == 1:
            drawn.append(0)
            raise KeyboardInterrupt
        drawn.append(int(seeds[0]))
        return plain(snapshot, sampler, condition, seeds, batch, callback)

    monkeypatch.setattr(sample_run, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        sample.main(words(run, both, "--npz"))
    assert not (both / "samples.npz").exists()
    # part 0 is there, and each rank makes its own of the others
    assert sample.main(words(run, both, "--npz", "--rank", "0", "--world", "2")) == 0
    assert "rank 0 is done" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sample.main(words(run, both, "--npz")) == 0
    assert drawn == [0, 0, 8, 4]
    assert (both / "samples.npz").read_bytes() == (tmp_path / "one" / "samples.npz").read_bytes()
    # once more there is nothing to do
    assert sample.main(words(run, both, "--npz")) == 0
    assert len(drawn) == 4


def test_a_new_set_leaves_an_older_one(run: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for seed in ("0", "1", "1", "2"):
        assert sample.main(words(run, out, "--seed", seed)) == 0
    for at, seed in (("older/1", 0), ("older/2", 1), (".", 2)):
        assert json.loads((out / at / "sample.json").read_text())["seed"] == seed
        assert len([*(out / at / "images").iterdir()]) == 10
    assert not (out / "older" / "3").exists()


def test_a_grid_shows_so_many_images(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_set, "GRID", 4)
    assert sample.main(words(run, tmp_path / "a", "--label", "1", "2")) == 0
    first = np.asarray(Image.open(tmp_path / "a" / "images" / "000005.png"))
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    # two rows of two images, each pixel 8 wide, with lines between
    assert grid.shape == (17 * 8, 17 * 8)
    np.testing.assert_array_equal(grid[9 * 8 :: 8, : 8 * 8 : 8], first)
    assert sample.main(words(run, tmp_path / "b", "--npz", "--columns", "2")) == 0
    assert np.asarray(Image.open(tmp_path / "b" / "grid.png")).shape == (17 * 8, 17 * 8)


def test_ranks_that_make_no_sense_are_refused(run: str, tmp_path: Path) -> None:
    for more in (["--rank", "0"], ["--npz", "--rank", "2", "--world", "2"], ["--rank", "0", "--world", "2"],
                 ["--npz", "--chain"]):  # fmt: skip
        with pytest.raises(UserError):
            sample.main(words(run, tmp_path / "x", *more))


def test_npz_that_is_there_already_is_said_as_json_where_that_is_asked_for(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    said = []
    for _ in range(2):
        assert sample.main(words(run, tmp_path / "a", "--npz", "--json")) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1] and said[0]["count"] == 10


def test_a_file_in_the_folders_place_is_refused_before_anything_is_drawn(
    run: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    for more in ([], ["--npz"], ["--grid", "g=1,2"]):
        with pytest.raises(UserError, match="taken is a file: name a folder"):
            sample.main(words(run, tmp_path / "taken", *more))
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_new_set_takes_nothing_of_what_was_chosen_of_an_older_one(
    run: str, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    assert sample.main(words(run, out, "--npz")) == 0
    (out / sample_set.CHOSEN).write_text(json.dumps({"chosen": {"kept": 5, "of": 10, "by": "x"}}))
    assert sample.main(words(run, out, "--npz", "--seed", "3")) == 0
    assert score_run.chosen_by(out / "samples.npz") is None
    assert score_run.chosen_by(out / "older" / "1" / "samples.npz") is not None
