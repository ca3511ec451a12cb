"""`tools.sample` of images beside the training set's, of ways between features, of estimates, of matched groups."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import shards
from selfguide.data.autoencoders import to_images
from selfguide.distributed import RankInfo
from selfguide.sampling import queries
from selfguide.sampling.condition_sampler import OtherImages, TrainingImages
from selfguide.sampling.queries import arc
from selfguide.spec.config import Config, LabelGuidance, SidecarGuidance
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.sources.source import ArraySource
from shards.write import writer
from tests.selfguide.test_sidecar_source import attempt
from tests.selfguide.test_training import config
from tools import sample, sample_run
from tools.ranks import run_ranks

N, WIDTH = 1797, 5


@pytest.fixture(scope="module")
def others(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of twenty other images: digits upside down."""
    root, held = tmp_path_factory.mktemp("others") / "val", shards.read_all(digits)
    turned = np.ascontiguousarray(held["x"][:20, :, ::-1])
    source = ArraySource.of("turned", turned, labels=held["y"][:20], classes=10)
    writer.write(root, source, header=Header.of(manifests.load(digits).header))
    return root


@pytest.fixture(scope="module")
def runs(digits: Path, others: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two steps, told boxes, features, the groups of `ids`, or labels; `notes` and `val` have the sidecars."""
    root, rng = tmp_path_factory.mktemp("told"), np.random.default_rng(0)
    labels = shards.read_all(digits)["y"]
    for folder, at, corner in (("notes", digits, 0), ("val", others, 3)):
        manifest = manifests.load(at)
        n = manifest.count
        made = {
            "boxes": ("box", np.tile(np.int32([corner, 0, corner + 2, 6]), (n, 1)), None),
            "features": ("dense", rng.normal(size=(n, WIDTH)).astype("f4"), None),
            # a digit's group is its label, turned by three
            "ids": ("id", ((labels[:n] + 3) % 10).astype("i4"), 10),
        }
        for name, (kind, values, groups) in made.items():
            sidecar.write(
                root / folder / name, values, manifest=manifest.hash, kind=kind, groups=groups,  # type: ignore[arg-type]
                provenance={"saw_labels": False},
            )  # fmt: skip
    run_ranks(1, trained, config(digits), root)
    return root


def trained(rank_info: RankInfo, base: Config, root: Path) -> None:
    short = replace(base.train, images=128, log_every=64, snapshot_every=128, checkpoint_every=128)
    at = {name: str(root / "notes" / name) for name in ("boxes", "features", "ids")}
    guidances = {
        "boxes": SidecarGuidance(layout=at["boxes"], channels=1),
        "features": SidecarGuidance(dense=at["features"], width=WIDTH),
        "ids": SidecarGuidance(ids=at["ids"], groups=10),
        "labels": LabelGuidance(),
    }
    for name, guidance in guidances.items():
        cfg = replace(base, train=short, guidance=guidance)
        if name == "labels":
            cfg = replace(cfg, data=replace(cfg.data, classes=10))
        attempt(rank_info, cfg, root / "runs" / name)


def sampled(run: Path, out: Path, *words: str) -> np.ndarray:
    """The images (N, 8, 8)."""
    assert sample.main([str(run), "--out", str(out), "--steps", "3", *words]) == 0
    return np.stack([np.asarray(Image.open(f)) for f in sorted((out / "images").iterdir())])


def tiles(file: Path, columns: int) -> np.ndarray:
    """(rows, columns, 8, 8, ...) of a grid of digits, a grey pixel between digits."""
    grid = np.asarray(Image.open(file))[::8, ::8]
    wide = [(0, 1), (0, 1), *[(0, 0)] * (grid.ndim - 2)]
    whole = np.pad(grid, wide)
    parts = whole.reshape(-1, 9, columns, 9, *grid.shape[2:])
    return parts.swapaxes(1, 2)[:, :, :8, :8]


def test_a_validation_image_is_told_by_its_own_box_which_stands_beside_it(
    runs: Path, others: Path, tmp_path: Path
) -> None:
    told = ("--shards", str(others), "--annotations", f"layout={runs / 'val' / 'boxes'}")
    words = ("--row", "4", "--count", "2", "--beside")
    sampled(runs / "runs" / "boxes", tmp_path / "val", *words, *told)
    row = tiles(tmp_path / "val" / "grid.png", 4)[0]
    levels = np.round(shards.read_all(others)["x"][4, 0].astype(float) * 255 / 16)
    np.testing.assert_array_equal(row[0, ..., 0], levels)
    box = np.zeros((8, 8), dtype=bool)
    box[3:5, :6] = True
    np.testing.assert_array_equal(row[1, ..., 0] == 255, box)
    # the training image of that number is another one, in another box
    sampled(runs / "runs" / "boxes", tmp_path / "train", *words)
    mine = tiles(tmp_path / "train" / "grid.png", 4)[0]
    assert not np.array_equal(mine[1], row[1]) and not np.array_equal(mine[2:], row[2:])


def test_a_condition_of_other_images_is_that_of_their_row(runs: Path, others: Path) -> None:
    snapshot, _ = sample_run.load_snapshot(str(runs / "runs" / "features"), "runs")
    folder = runs / "val" / "features"
    told = OtherImages(str(others), {"dense": str(folder)})
    found = queries.rows(snapshot, torch.tensor([3, 19]), told).dense
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), np.load(folder / "rows.npy")[[3, 19]])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--row", "4"], "conditioned on the box of an image"),
        (["--row", "4", "--annotations", "layout=TRAIN"], "annotates shards"),
        (["--row", "4", "--annotations", "dense=FEATURES"], "conditioned on the box of an image"),
        (["--row", "4", "--annotations", "layout=FEATURES"], "kind dense and size 5.*kind box"),
        (["--row", "4", "--annotations", "layout=BOXES", "dense=FEATURES"], "leave it out"),
        (["--row", "20", "--annotations", "layout=BOXES"], "image of .* 20 is not one of 0 to 19"),
        (["--row", "4", "--annotations", "box=BOXES"], "--annotations"),
        (["--row", "4", "--annotations", "layout"], "give layout=FOLDER"),
        (["--uncond"], "--row, --like or --between"),
    ],
)  # fmt: skip
def test_other_images_that_do_not_fit_are_refused(
    runs: Path, others: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    places = {"TRAIN": "notes/boxes", "FEATURES": "val/features", "BOXES": "val/boxes"}
    for name, place in places.items():
        words = [word.replace(name, str(runs / place)) for word in words]
    command = [str(runs / "runs" / "boxes"), "--out", str(tmp_path / "no"), "--shards", str(others)]
    with pytest.raises(UserError, match=said):
        sample.main([*command, *words])
    assert not (tmp_path / "no").exists()


def test_annotations_without_their_shards_are_refused(runs: Path, tmp_path: Path) -> None:
    words = ["--row", "4", "--annotations", "layout=x", "--out", str(tmp_path)]
    with pytest.raises(UserError, match="--shards names"):
        sample.main([str(runs / "runs" / "boxes"), *words])


def test_the_way_between_two_images_features_lies_on_the_sphere(runs: Path, tmp_path: Path) -> None:
    run = runs / "runs" / "features"
    way = sampled(run, tmp_path / "way", "--between", "3", "7", "--count", "5")
    for at, ordinal in ((0, "3"), (4, "7")):
        end = sampled(run, tmp_path / ordinal, "--row", ordinal, "--count", "1")
        # in a batch of another size: equal up to one level of grey
        assert np.abs(way[at].astype(int) - end[0].astype(int)).max() <= 16
    with pytest.raises(UserError, match="ordinals of two"):
        sample.main([str(run), "--between", "zeros", "ones", "--out", str(tmp_path / "no")])


def test_an_arc_has_equal_angles_and_lengths_in_between() -> None:
    made = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 16, generator=made, dtype=torch.float64) * torch.tensor(
        [[2.0], [6.0]]
    )
    path = arc(first, second, torch.linspace(0, 1, 9, dtype=torch.float64))
    torch.testing.assert_close(path[[0, 8]], torch.stack([first, second]))
    lengths = torch.lerp(first.norm(), second.norm(), torch.linspace(0, 1, 9, dtype=torch.float64))
    torch.testing.assert_close(path.norm(dim=1), lengths)
    steps = (normalize(path)[1:] * normalize(path)[:-1]).sum(1)
    torch.testing.assert_close(steps, steps[0].expand(8))


def test_a_chain_of_estimates_shows_what_the_network_reads_off_each_state(
    runs: Path, tmp_path: Path
) -> None:
    run = runs / "runs" / "ids"
    words = ("--count", "2", "--chain", "--columns", "3", "--batch", "1", "--g", "2")
    images = sampled(run, tmp_path / "x0", *words, "--what", "x0")
    found = tiles(tmp_path / "x0" / "grid.png", 3)
    np.testing.assert_array_equal(found[:, 2], images)
    np.testing.assert_array_equal(images, sampled(run, tmp_path / "states", *words))
    states = tiles(tmp_path / "states" / "grid.png", 3)
    np.testing.assert_array_equal(states[:, 2], images)
    assert not np.array_equal(states[:, 0], found[:, 0])
    # Euler's last step ends where the network, before it, says that the data are
    assert np.abs(found[:, 1].astype(int) - images.astype(int)).max() <= 16


def test_what_without_a_chain_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--chain too"):
        sample.main([str(runs / "runs" / "ids"), "--what", "x0", "--out", str(tmp_path)])


def test_a_label_stands_beside_the_group_that_is_matched_with_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = runs / "runs" / "ids"
    matched = sampled(told, tmp_path / "a", "--matched", "2", "9", "--count", "4")
    heard = capsys.readouterr().err
    assert "label 2 is matched with group 5" in heard and "label 9 is matched with group 2" in heard
    assert "100.0%" in heard
    groups = sampled(told, tmp_path / "b", "--group", "5", "2", "--count", "4")
    np.testing.assert_array_equal(matched, groups)
    labelled = runs / "runs" / "labels"
    grid = ["--grid", f"runs={told},{labelled}", "--matched", "2", "9", "--count", "4"]
    assert sample.main([str(told), *grid, "--steps", "3", "--out", str(tmp_path / "grid")]) == 0
    assert json.loads((tmp_path / "grid" / "sample.json").read_text())["rows"] == 4
    found = tiles(tmp_path / "grid" / "grid.png", 2)
    labels = sampled(labelled, tmp_path / "c", "--label", "2", "9", "--count", "4")
    np.testing.assert_array_equal(found[:, 0], groups)
    np.testing.assert_array_equal(found[:, 1], labels)


def test_a_label_that_no_group_is_left_for_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="12"):
        sample.main([str(runs / "runs" / "ids"), "--matched", "12", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="conditioned on box"):
        sample.main([str(runs / "runs" / "boxes"), "--matched", "1", "--out", str(tmp_path)])


def test_model_images_of_a_query_are_those_that_are_stored(runs: Path, others: Path) -> None:
    snapshot, _ = sample_run.load_snapshot(str(runs / "runs" / "ids"), "runs")
    images = TrainingImages(snapshot, OtherImages(str(others)))
    shown = to_images(snapshot.data["header"], images.x0(torch.arange(20)))
    stored = shards.read_all(others)["x"]
    np.testing.assert_array_equal(shown, np.round(stored.astype(float) * 255 / 16))
