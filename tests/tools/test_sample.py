"""tools.sample on real snapshots: what it draws, that seeds decide it, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import shards
from launcher.compose import compose
from selfguide.data.autoencoders import load_autoencoder
from selfguide.data.normaliser import Normaliser
from selfguide.diffusion.conditions import NULL, UNCONDITIONAL, Condition
from selfguide.discovery.features import SnapshotFeatures
from selfguide.distributed import RankInfo
from selfguide.randomness import normal
from selfguide.sampling import generate
from selfguide.sampling.condition_sampler import condition_sampler, sample_ordinals
from selfguide.sampling.queries import between, rows, slerp, without_condition
from selfguide.snapshot import load
from selfguide.spec import corrections
from selfguide.spec.config import LabelGuidance, SamplerConfig, SidecarGuidance
from selfguide.spec.conventions import total_weight
from selfguide.spec.corrections import Correction
from selfguide.spec.run import RunFolder
from selfguide.trained import changed_sampler
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.snapshots import write_snapshot
from tests.selfguide.test_autoencoders import latent_config, latents  # noqa: F401
from tests.selfguide.test_sidecar_source import attempt as sidecar_attempt
from tests.selfguide.test_training import attempt, config
from tools import sample, sample_options, weights
from tools.guide_search import lacking
from tools.ranks import run_ranks


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-guided run of 512 images, conditioned on its groups since 256."""
    root = tmp_path_factory.mktemp("self-guided") / "digits" / "run"
    run_ranks(1, attempt, config(digits), str(root))
    return root


@pytest.fixture(scope="module")
def labelled(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, conditioned on human labels."""
    root = tmp_path_factory.mktemp("labelled") / "digits" / "run"
    cfg = config(digits)
    labelled_run = replace(cfg, guidance=LabelGuidance(), data=replace(cfg.data, classes=10))
    run_ranks(1, attempt, labelled_run, str(root))
    return root


def sampled(run: Path, out: Path, *arguments: str) -> tuple[np.ndarray, dict]:
    """The images (N, H, W) and what the command said of them."""
    assert sample.main([str(run), "--out", str(out), "--steps", "4", *arguments]) == 0
    said = json.loads((out / "sample.json").read_text())
    files = sorted((out / "images").iterdir())
    return np.stack([np.asarray(Image.open(f)) for f in files]), said


def test_image_i_is_a_function_of_seed_plus_i(run: Path, tmp_path: Path) -> None:
    first, said = sampled(run, tmp_path / "a", "--count", "6", "--batch", "4")
    later, _ = sampled(run, tmp_path / "b", "--count", "4", "--seed", "2", "--batch", "3")
    assert first.shape == (6, 8, 8) and said["nfe"] == 4 and said["count"] == 6
    np.testing.assert_array_equal(first[2:], later)
    assert not np.array_equal(first[0], first[1])


def test_a_snapshot_of_before_a_correction_is_sampled_as_it_was_and_says_so(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = sampled(run, tmp_path / "a", "--count", "2")
    assert not caplog.records
    since = Correction("model", "dit_digits", {"name": "dit_digits"}, {"token_std": 1.0})
    monkeypatch.setattr(corrections, "CORRECTIONS", (since,))
    after, _ = sampled(run, tmp_path / "b", "--count", "2")
    assert np.array_equal(before, after)
    (said,) = (r.getMessage() for r in caplog.records)
    assert "model=dit_digits" in said and "model.token_std=1.0" in said


def test_images_are_lossless_levels_of_the_data(run: Path, tmp_path: Path) -> None:
    images, _ = sampled(run, tmp_path, "--count", "4")
    allowed = np.round(np.arange(17) * 255 / 16)
    assert np.isin(images, allowed).all()
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    np.testing.assert_array_equal(grid[: 8 * 8 : 8, : 8 * 8 : 8], images[0])  # each pixel 8 wide


def test_group_option_with_a_papers_convention_equals_our_weight(run: Path, tmp_path: Path) -> None:
    group, _ = sampled(run, tmp_path / "a", "--group", "3", "--count", "3", "--g", "1.4")
    same, said = sampled(
        run, tmp_path / "b", "--group", "3", "--count", "3", "--g", "0.4", "--convention", "sgfm"
    )
    other, _ = sampled(run, tmp_path / "c", "--group", "5", "--count", "3", "--g", "1.4")
    assert said["sampler"]["g"] == pytest.approx(total_weight("sgfm", 0.4))
    np.testing.assert_array_equal(group, same)
    assert not np.array_equal(group, other)


def test_a_query_image_is_its_nearest_group(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The group re-derived by hand: noised at tau, without a condition, tokens of the layer, head, nearest row."""
    snapshot = load(run / "snapshots" / "img-000000512")
    guidance, student = snapshot.config.guidance, snapshot.student
    data = shards.read_all(snapshot.data["root"])["x"]
    eps = normal(0, "extraction-noise", torch.zeros(1), (1, 8, 8))
    groups = set()
    for ordinal in (7, 20, 33):
        x0 = torch.as_tensor(data[ordinal : ordinal + 1]).float() / 8 - 1
        tau = guidance.noise_time
        tokens = student.backbone.features(
            (1 - tau) * x0 + tau * eps, torch.tensor([tau]), Condition.unconditional(1), 3
        )
        z = student.head.out(student.head.norm(student.head.hidden(tokens.flatten(1))).relu())
        rows = student.head.prototypes
        wanted = (z @ (rows / rows.norm(dim=1, keepdim=True)).T).argmax().item()
        # the same image as a file: grey levels 0..16 stretched to 0..255, its rows still rows
        picture = np.round(data[ordinal, 0] * (255 / 16)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "query.png")
        asked = (str(ordinal), str(tmp_path / "query.png"))
        found, _ = sampled(run, tmp_path / "a", "--like", *asked, "--count", "4")
        heard = capsys.readouterr().err.split("nearest to group ")[1:]
        assert [int(words.split()[0]) for words in heard] == [wanted, wanted]
        named, _ = sampled(run, tmp_path / "b", "--group", str(wanted), "--count", "4")
        np.testing.assert_array_equal(found, named)
        groups.add(wanted)
    assert len(groups) > 1


@pytest.mark.parametrize("kind", ["run", "labelled"])
def test_the_way_between_two_groups_begins_and_ends_at_them(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(kind)
    way, _ = sampled(run, tmp_path / "a", "--between", "3", "7", "--count", "5")
    for at, group in ((0, "3"), (4, "7")):
        end, _ = sampled(run, tmp_path / group, "--group", group, "--count", "1")
        # the same noise and condition in a batch of another size: equal up to one level of grey
        assert np.abs(way[at].astype(int) - end[0].astype(int)).max() <= 16


def test_between_prototypes_lies_the_great_circle() -> None:
    a, b = torch.nn.functional.normalize(torch.randn(2, 16, dtype=torch.float64), dim=1)
    way = torch.linspace(0, 1, 9, dtype=torch.float64)
    path = slerp(a, b, way)
    torch.testing.assert_close(path.norm(dim=1), torch.ones(9, dtype=torch.float64))
    steps = (path[1:] * path[:-1]).sum(1)  # equal angles
    torch.testing.assert_close(steps, steps[0].expand(8))
    torch.testing.assert_close(path[0], a), torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(slerp(a, a, way), a.expand(9, -1))


@pytest.mark.parametrize("net", ["unet_sgdm_32", "dit_digits"])
def test_between_groups_lies_the_great_circle_where_a_network_reads_their_vector(
    net: str, digits: Path, tmp_path: Path
) -> None:
    small = (
        "model.size=8",
        "model.channels=1",
        "model.base=16",
        "model.mult=[1,2]",
        "model.blocks=1",
    )
    sizes = (*small, "model.groups=8", "model.attention=[]") if net == "unet_sgdm_32" else ()
    write_snapshot(
        tmp_path / "s", digits, f"model={net}", *sizes, "guidance=labels", "data.classes=10",
        guidance={"source": "labels", "told": True, "p": [0.1] * 10, "label_free": False},
    )  # fmt: skip
    snapshot = load(tmp_path / "s")
    shares = between(snapshot, 3, 7, 9).multi_hot
    assert shares is not None
    torch.testing.assert_close(shares[[0, 8]], torch.eye(10)[[3, 7]])
    if net == "dit_digits":  # it reads the mean of rows
        torch.testing.assert_close(shares.sum(1), torch.ones(9))
        return
    torch.testing.assert_close(shares.norm(dim=1), torch.ones(9))
    steps = (shares[1:] * shares[:-1]).sum(1)  # equal angles
    torch.testing.assert_close(steps, steps[0].expand(8))


def test_a_chain_shows_the_way_from_noise_to_the_image(run: Path, tmp_path: Path) -> None:
    images, _ = sampled(run, tmp_path, "--chain", "--count", "2", "--columns", "4", "--batch", "1")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    zoom, cell = 8, 9 * 8
    rows = [grid[r * cell :: zoom, 3 * cell :: zoom][:8, :8] for r in range(2)]
    np.testing.assert_array_equal(np.stack(rows), images)  # the last column is the image


@pytest.mark.parametrize(
    ("key", "values"), [("g", (0, 1, 2)), ("steps", (1, 3)), ("images", (256, 512))]
)
def test_a_grid_has_one_noise_a_row_and_one_value_a_column(
    key: str, values: tuple[int, ...], run: Path, tmp_path: Path
) -> None:
    made = tmp_path / "grid"
    few = ("--count", "2", *(() if key == "steps" else ("--steps", "3")))
    grid = f"{key}={','.join(map(str, values))}"
    assert sample.main([str(run), "--grid", grid, "--out", str(made), *few]) == 0
    said = json.loads((made / "sample.json").read_text())
    assert said["columns"] == [f"{key}={value}" for value in values] and said["rows"] == 2
    sheet = np.asarray(Image.open(made / "grid.png"))
    for column, value in enumerate(values):
        sampled(run, tmp_path / str(value), f"--{key}", str(value), *few, "--columns", "1")
        alone = np.asarray(Image.open(tmp_path / str(value) / "grid.png"))
        # a column of the grid is what the same flags draw in one
        start = column * (sheet.shape[1] - alone.shape[1]) // (len(values) - 1)
        assert np.array_equal(sheet[:, start : start + alone.shape[1]], alone)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid", "weight=1,2"], "weight"),
        (["--grid", "g=1"], "two values"),
        (["--grid", "g"], "two values"),
        (["--grid", "g=1,1"], "each once"),
        (["--grid", "g=one,two"], "numbers"),
        (["--grid", "steps=1.5,2"], "whole numbers"),
        (["--grid", "g=1,2", "--g", "3"], "drop the flag"),
        (["--grid", "g=1,2", "--chain"], "--chain"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_refused(
    run: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        sample.main([str(run), *arguments, "--out", str(tmp_path)])


def test_no_condition_is_the_null_row_of_a_conditioned_student(labelled: Path, run: Path) -> None:
    """Its unconditional row was never trained."""
    labelled_run = load(labelled / "snapshots" / "img-000000512")
    before = load(run / "snapshots" / "img-000000256")
    assert without_condition(labelled_run, 2).state.tolist() == [NULL] * 2
    assert without_condition(before, 2).state.tolist() == [UNCONDITIONAL] * 2


def test_a_snapshot_that_was_never_trained_without_its_condition_is_not_read_without_it(
    labelled: Path,
) -> None:
    known = load(labelled / "snapshots" / "img-000000512")
    guidance = replace(known.config.guidance, drop=0.0)
    always = replace(known, config=replace(known.config, guidance=guidance))
    with pytest.raises(UserError, match=r"guidance\.drop=0.*never learned to draw without"):
        without_condition(always, 2)
    with pytest.raises(UserError, match=r"weak=condition.*guidance\.drop=0.*take sampler\.g=1"):
        changed_sampler(always, {"g": 1.5})
    assert "guidance.drop=0" in str(lacking(always, "condition"))
    assert lacking(known, "condition") is None
    with pytest.warns(UserWarning, match=r"guidance\.drop=0"):
        SnapshotFeatures(always, always.data["header"])


def test_flags_that_nothing_would_read_are_refused(labelled: Path, tmp_path: Path) -> None:
    words = [str(labelled), "--out", str(tmp_path), "--count", "1"]
    for more, said in (
        (["--weak", "head"], "--weak head .*give --g 1.5"),
        (["--interval", "0.2", "0.8"], "--interval .*give --g 1.5"),
        (["--sampler", "dopri5", "--steps", "3"], "--steps 3 .*dopri5 chooses"),
        (["--uncond", "--g", "3"], "--uncond --g 3"),
    ):
        with pytest.raises(UserError, match=said):
            sample.main([*words, *more])


def test_a_papers_numbers_become_ours(run: Path, tmp_path: Path) -> None:
    lightning = ("--convention", "lightningdit", "--g", "6.7", "--shift", "0.3")
    _, said = sampled(run, tmp_path, "--count", "1", *lightning, "--interval", "0.11", "1")
    sampler = said["sampler"]
    assert sampler["g"] == 6.7 and sampler["shift"] == pytest.approx(1 / 0.3)
    assert sampler["interval"] == pytest.approx([0, 0.89])


def test_groups_get_as_many_images_each_and_old_ones_go(run: Path, tmp_path: Path) -> None:
    assert len(sampled(run, tmp_path, "--group", "1", "2", "3", "4", "--count", "5")[0]) == 8
    assert len(sampled(run, tmp_path, "--count", "3")[0]) == 3


def test_latents_are_decoded(
    latents: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A run on the tiny autoencoder's latents: images of its decoder, whatever is asked of them."""
    root = tmp_path / "digits" / "run"
    run_ranks(1, attempt, latent_config(latents), str(root))
    images, _ = sampled(root, tmp_path / "a", "--count", "3")
    assert images.shape == (3, 8, 8) and len(np.unique(images)) > 17  # not the data's 17 levels
    snapshot = load(RunFolder(root).snapshot(RunFolder(root).published()[-1]))
    codec = load_autoencoder("tiny")
    sampler = replace(snapshot.config.sampler, steps=4)
    seeds = torch.arange(3)
    drawn = list(
        generate.generate_each(
            snapshot, sampler, condition_sampler(snapshot)(seeds), seeds, batch=3
        )
    )
    header = snapshot.data["header"]
    wanted = codec.decode(Normaliser.of(header).decode(drawn[0][0]))[:, 0].numpy()
    np.testing.assert_array_equal(images, wanted)
    sampled(root, tmp_path / "b", "--count", "2", "--chain")
    with pytest.raises(UserError, match="the data's encoder is tiny, not identity"):
        sampled(root, tmp_path / "c", "--autoencoder", "identity")


def test_every_setting_of_a_sampler_has_a_flag() -> None:
    settings = {f.name for f in fields(SamplerConfig)} - {"name"} | {"sampler"}
    assert settings <= vars(sample_options.parser(None).parse_args(["RUN"])).keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--group", "99"], "group 99 is not one of 0 to 11"),
        (["--label", "3"], "knows groups that it found itself; give --group"),
        (["--like", "99999"], "training image .* is not one of 0 to 1796"),
        (["--like", "absent.png"], "no such file"),
        (["--sampler", "heum"], "did you mean 'heun'"),
        (["--eta", "1"], "--eta 1.0 is read with --sampler ddim only"),
        (["--spacing", "leading"], "--spacing leading .* take --spacing trailing, or"),
        (["--sampler", "ddim", "--clipped-noise", "kept"], "--clipped-noise kept needs a --clip;"),
        (["--convention", "sgfm"], "has nothing to convert"),
        (["--g", "1", "--convention", "sgfmm"], "did you mean 'sgfm'"),
        (["--images", "300"], "this run has snapshots at 256, 512"),
        (["--ema", "1"], "--ema 1"),
        (["--count", "0"], "--count 0"),
        (["--chain", "--sampler", "dopri5"], "dopri5"),
    ],
)
def test_mistakes_are_named(run: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        sample.main([str(run), "--out", str(tmp_path / "none"), *arguments])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("form", ["dit", "uvit"])
def test_weights_that_no_official_file_has_a_place_for_are_read_as_printed(
    run: Path, tmp_path: Path, form: str
) -> None:
    with pytest.raises(UserError) as refused:
        weights.main(["export", str(run), "--form", form, "--out", str(tmp_path / "w.pt")])
    message = str(refused.value)
    assert "group found online" in message if form == "dit" else "--form dit" in message
    assert not (tmp_path / "w.pt").exists()
    (command,) = re.findall("`([^`]+)`", message)
    module, *words = shlex.split(command)[2:]
    assert module == "tools.sample"
    out = ["--out", str(tmp_path / "out"), "--count", "1", "--steps", "1"]
    assert sample.main([*words, *out]) == 0
    chosen = re.findall(r"init\S*=\S+", message)
    config = compose(["experiment=digits_dit", "cluster=local", *shlex.split(" ".join(chosen))])
    assert config.init.path == words[0]


def test_an_unconditional_snapshot_refuses_conditions(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its second stage"):
        sample.main([str(run), "--images", "256", "--group", "1", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--g 2"):
        sample.main([str(run), "--images", "256", "--g", "2", "--out", str(tmp_path)])


# --- conditions from sidecars, and by patches ----------------------------------------------------


@pytest.fixture(scope="module")
def annotated(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in one folder, conditioned on sidecars: `ids` groups, `boxes` groups and boxes; `patches` finds its own."""
    root, rng = tmp_path_factory.mktemp("annotated"), np.random.default_rng(0)
    manifest, count = manifests.load(digits).hash, 1797
    made = {
        "ids": ("id", rng.choice(4, count, p=[0.7, 0.1, 0.1, 0.1]).astype("i4"), 4),
        "boxes": ("box", np.tile(np.int32([0, 0, 4, 4]), (count, 1)), None),
    }
    for name, (kind, values, k) in made.items():
        sidecar.write(
            root / "notes" / name, values, manifest=manifest, kind=kind, groups=k,  # type: ignore[arg-type]
            provenance={"saw_labels": False},
        )  # fmt: skip
    ids = SidecarGuidance(ids=str(root / "notes" / "ids"), groups=4)
    boxes = replace(ids, layout=str(root / "notes" / "boxes"), channels=1)
    online = config(digits).guidance
    patches = replace(online, level="patch")  # type: ignore[type-var]
    run_ranks(1, annotated_runs, digits, root, {"ids": ids, "boxes": boxes, "patches": patches})
    return root / "runs" / "digits"


def annotated_runs(
    rank_info: RankInfo, digits: Path, root: Path, guidances: dict[str, Any]
) -> None:
    base = config(digits)
    short = replace(base.train, images=256, snapshot_every=256, checkpoint_every=256)
    for name, guidance in guidances.items():
        cfg = replace(base, train=short, guidance=guidance)
        sidecar_attempt(rank_info, cfg, root / "runs" / "digits" / name)


def test_groups_of_a_sidecar_are_drawn_by_frequency_or_evenly(
    annotated: Path, tmp_path: Path
) -> None:
    run = annotated / "ids"
    often, _ = sampled(run, tmp_path / "a", "--count", "6")
    evenly, _ = sampled(run, tmp_path / "b", "--count", "6", "--prior", "uniform")
    assert not np.array_equal(often, evenly)
    labelled_run = load(run / "snapshots" / "img-000000256")
    ids = condition_sampler(labelled_run, "uniform")(torch.arange(6)).given["id"]
    assert ids.unique().numel() > 1
    first, _ = sampled(run, tmp_path / "c", "--group", str(int(ids[0])), "--count", "1")
    assert np.abs(first[0].astype(int) - evenly[0].astype(int)).max() <= 16


def test_row_option_gives_that_images_condition(annotated: Path, tmp_path: Path) -> None:
    ids = np.load(annotated.parents[1] / "notes" / "ids" / "rows.npy")
    ordinal = int(np.flatnonzero(ids == 2)[0])
    by_row, _ = sampled(annotated / "ids", tmp_path / "a", "--row", str(ordinal), "--count", "2")
    by_group, _ = sampled(annotated / "ids", tmp_path / "b", "--group", "2", "--count", "2")
    np.testing.assert_array_equal(by_row, by_group)
    both, said = sampled(annotated / "boxes", tmp_path / "c", "--row", "3", "9", "--count", "4")
    assert len(both) == 4 and said["count"] == 4
    assert len(sampled(annotated / "boxes", tmp_path / "d", "--count", "3")[0]) == 3


def test_patch_level_samples_a_layout_of_a_training_image_or_a_query(
    annotated: Path, tmp_path: Path
) -> None:
    run = annotated / "patches"
    row, _ = sampled(run, tmp_path / "a", "--row", "7", "--count", "2")
    like, _ = sampled(run, tmp_path / "b", "--like", "7", "--count", "2")
    np.testing.assert_array_equal(row, like)
    made, seeds = load(run / "snapshots" / "img-000000256"), torch.arange(20)
    drawn = condition_sampler(made)(seeds)
    again = rows(made, sample_ordinals(1797, seeds))
    assert drawn.given.keys() == {"patch"} and torch.equal(
        drawn.given["patch"], again.given["patch"]
    )
    assert drawn.given["patch"].shape == (20, 16, 32)
    assert len(drawn.given["patch"].flatten(1).unique(dim=0)) > 5
    assert len(sampled(run, tmp_path / "c", "--count", "2")[0]) == 2


def tiles(file: Path, columns: int) -> np.ndarray:
    """(rows, columns, 8, 8, 3) of a grid of digits in colour, a grey pixel between digits."""
    grid = np.asarray(Image.open(file))[::8, ::8]
    assert grid.shape[1] == 9 * columns - 1
    whole = np.pad(grid, ((0, 1), (0, 1), (0, 0)))
    return whole.reshape(-1, 9, columns, 9, 3).swapaxes(1, 2)[:, :, :8, :8]


def test_beside_begins_each_row_with_its_image_and_its_box(annotated: Path, tmp_path: Path) -> None:
    run = annotated / "boxes"
    made, _ = sampled(run, tmp_path, "--row", "3", "9", "--count", "4", "--beside")
    found = tiles(tmp_path / "grid.png", 4)
    real = shards.read_all(load(run / "snapshots" / "img-000000256").data["root"])["x"]
    boxes = np.load(annotated.parents[1] / "notes" / "boxes" / "rows.npy")
    for row, ordinal in zip(found, (3, 9), strict=True):
        levels = np.round(real[ordinal, 0].astype(float) * 255 / 16)
        np.testing.assert_array_equal(row[0], np.stack([levels] * 3, -1))
        inside = np.zeros((8, 8), dtype=bool)
        top, left, bottom, right = boxes[ordinal]
        inside[top:bottom, left:right] = True
        np.testing.assert_array_equal(row[1] == 255, np.stack([inside] * 3, -1))
    np.testing.assert_array_equal(found[:, 2:, ..., 0].reshape(4, 8, 8), made)


def test_beside_shows_patches_of_one_group_in_one_colour_and_groups_without_layout_alone(
    annotated: Path, run: Path, tmp_path: Path
) -> None:
    patches = annotated / "patches"
    sampled(patches, tmp_path / "a", "--like", "7", "--count", "2", "--beside")
    layout = tiles(tmp_path / "a" / "grid.png", 4)[0, 1]
    snapshot = load(patches / "snapshots" / "img-000000256")
    vectors = rows(snapshot, torch.tensor([7])).patch
    assert vectors is not None
    same = (vectors[0][:, None] == vectors[0]).all(-1).numpy()
    colours = layout[::2, ::2].reshape(16, 3)
    np.testing.assert_array_equal((colours[:, None] == colours).all(-1), same)
    # a patch is two pixels wide
    np.testing.assert_array_equal(layout, layout[::2, ::2].repeat(2, 0).repeat(2, 1))
    sampled(run, tmp_path / "b", "--row", "7", "--count", "2", "--beside")
    assert tiles(tmp_path / "b" / "grid.png", 3).shape[:2] == (1, 3)


@pytest.mark.parametrize(
    "words", [["--count", "2"], ["--row", "3", "--npz"], ["--row", "3", "--chain"]]
)
def test_beside_without_query_images_or_a_grid_of_them_is_refused(
    run: Path, tmp_path: Path, words: list[str]
) -> None:
    with pytest.raises(UserError, match="--beside"):
        sample.main([str(run), "--out", str(tmp_path), "--beside", *words])


@pytest.mark.parametrize(
    ("run", "arguments", "words"),
    [
        ("ids", ["--like", "4"], "guidance.source=sidecar has no prototypes"),
        ("ids", ["--group", "4"], "group 4 is not one of 0 to 3"),
        ("ids", ["--row", "1797"], "training image .* is not one of 0 to 1796"),
        ("ids", ["--group", "1", "--prior", "uniform"], "--group names the condition"),
        ("ids", ["--label", "1"], "give --group"),
        ("boxes", ["--group", "1"], "conditioned on id, box of an image.*--row ORDINAL"),
        ("boxes", ["--prior", "uniform"], "not on one group alone"),
        ("patches", ["--group", "1"], "a group for each patch"),
        ("patches", ["--between", "1", "2"], "a group for each patch"),
    ],
)
def test_mistakes_with_annotations_are_named(
    annotated: Path, tmp_path: Path, run: str, arguments: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        sample.main([str(annotated / run), "--out", str(tmp_path / "none"), *arguments])
    assert not (tmp_path / "none").exists()
