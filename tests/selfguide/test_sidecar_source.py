"""Sidecars as guidance: conditions in training and in sampling, and the controls."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score

import shards
from selfguide import snapshot
from selfguide.data.batch import Batch
from selfguide.data.crop_flip import CropFlip, sample_crop_flip
from selfguide.diffusion.conditions import CONDITIONED, NULL, Condition
from selfguide.distributed import RankInfo
from selfguide.evaluation import job as evaluation
from selfguide.guidance.component import Inputs
from selfguide.guidance.labels import drop_images
from selfguide.guidance.sidecar import SidecarSource, shuffled
from selfguide.models import assemble
from selfguide.networks.student import build_student
from selfguide.sampling import queries
from selfguide.sampling.condition_sampler import condition_sampler, sample_ordinals
from selfguide.sampling.groups import sample_group_ids
from selfguide.snapshot import Snapshot
from selfguide.spec.annotations import check_annotations, promises
from selfguide.spec.averages import AverageSpec
from selfguide.spec.config import Config, LabelGuidance, SidecarGuidance
from selfguide.spec.identity import identity
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import Protocol, label_policy
from selfguide.spec.run import Lease, RunFolder, write_record
from selfguide.spec.sizes import architecture, footprint
from selfguide.training import job
from selfguide.training.components import Components
from selfguide.training.telemetry import Telemetry
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.host_reads import HostReads
from tests.selfguide.test_training import config as training_config
from tools.ranks import run_ranks

N, K, M, P = 1797, 7, 6, 24  # digits; groups, one of them empty; groups of masks; width of features
FREE = {"saw_labels": False}
NET = {"net": "vit_tiny", "sha256": "5f" * 32}


@pytest.fixture(scope="module")
def notes(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sidecars of every kind about the digits: made-up groups, boxes and masks of the ink, made-up features."""
    root, rng = tmp_path_factory.mktemp("notes"), np.random.default_rng(0)
    manifest = manifests.load(digits).hash
    ink = shards.read_all(digits)["x"][:, 0]  # (N, 8, 8), 0 to 16
    rows, columns = (ink > 8).any(2), (ink > 8).any(1)
    boxes = [rows.argmax(1), columns.argmax(1), 8 - rows[:, ::-1].argmax(1)]
    boxes.append(8 - columns[:, ::-1].argmax(1))
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "ids": (
            rng.choice(K, N, p=[0.4, 0.3, 0, 0.1, 0.1, 0.05, 0.05]).astype("i4"),
            {"groups": K},
        ),
        "several": ((rng.random((N, K)) < 0.4).astype("u1"), {"groups": K}),
        "boxes": (np.stack(boxes, 1).astype("i4"), {}),
        "masks": (
            np.where(ink > 8, np.arange(N)[:, None, None] % 5 + 1, 0).astype("u1"),
            {"groups": M},
        ),
        "features": (rng.normal(size=(N, P)).astype("f2"), {}),
        "seen": (rng.integers(0, K, N).astype("i4"), {"groups": K}),
    }
    kinds = {
        "ids": "id",
        "several": "multi_hot",
        "boxes": "box",
        "masks": "mask",
        "features": "dense",
        "seen": "id",
    }
    for name, (values, more) in made.items():
        net = {"features": NET} if name == "several" else {}
        sidecar.write(
            root / name, values, manifest=manifest, kind=kinds[name],  # type: ignore[arg-type]
            provenance={"saw_labels": name == "seen", **net}, **more,
        )  # fmt: skip
    return root


def guided(notes: Path, **fields: Any) -> SidecarGuidance:
    """Folders by their names in `notes`; sizes as they are there."""
    sizes = {"ids": K, "several": K, "seen": K, "boxes": 1, "masks": M, "features": P}
    names = {"ids": "groups", "layout": "channels", "dense": "width"}
    for field, size in names.items():
        if field in fields:
            fields.setdefault(size, sizes[fields[field]])
            fields[field] = str(notes / fields[field])
    return SidecarGuidance(**fields)


def batch_of(ordinals: torch.Tensor, crop_flip: CropFlip | None = None) -> Batch:
    x = torch.zeros(len(ordinals), 1, 8, 8)
    position = torch.arange(1000, 1000 + len(ordinals))
    return Batch(x, x, torch.zeros(len(x)), x, position, ordinals, None, 0, crop_flip=crop_flip)


def condition_of(guidance: SidecarGuidance, batch: Batch, seed: int = 0) -> Condition:
    return Components((SidecarSource(guidance, seed),)).inputs(batch, None).condition


def rows_of(notes: Path, name: str) -> np.ndarray:
    return np.load(notes / name / "rows.npy")


ORDINALS = torch.tensor([1796, 0, 17, 17, 4, 900, 33, 1200])


# --- the condition of an image ---------------------------------------------------------------------


def test_each_image_is_conditioned_on_the_rows_of_its_ordinal(notes: Path) -> None:
    guidance = guided(notes, ids="ids", dense="features", layout="boxes", drop=0.0)
    found = condition_of(guidance, batch_of(ORDINALS))
    assert (found.state == CONDITIONED).all() and found.given.keys() == {"id", "dense", "spatial"}
    assert found.id is not None and found.id.dtype == torch.int64
    np.testing.assert_array_equal(found.id, rows_of(notes, "ids")[ORDINALS])
    np.testing.assert_array_equal(found.given["dense"], rows_of(notes, "features")[ORDINALS])
    several = condition_of(guided(notes, ids="several"), batch_of(ORDINALS))
    np.testing.assert_array_equal(several.given["multi_hot"], rows_of(notes, "several")[ORDINALS])


def test_one_mask_drops_all_of_it_and_no_other(notes: Path) -> None:
    ordinals = torch.arange(512)
    guidance = guided(notes, ids="ids", layout="masks", drop=0.3)
    found = condition_of(guidance, batch_of(ordinals), seed=5)
    wanted = drop_images(5, torch.arange(1000, 1512), 0.3)
    assert 0.2 < wanted.double().mean() < 0.4
    assert torch.equal(found.state == NULL, wanted) and torch.equal(
        found.state == CONDITIONED, ~wanted
    )
    source = SidecarSource(guidance, 5)
    assert source.loss(None, batch_of(ordinals), None) is None  # type: ignore[arg-type]


def test_a_box_is_one_channel_with_ones_inside_moved_as_its_image_was(notes: Path) -> None:
    positions = torch.arange(8)
    for crop_flip in (None, sample_crop_flip(0, positions, (8, 8), flip=True)):
        found = condition_of(guided(notes, layout="boxes"), batch_of(ORDINALS, crop_flip))
        flips = crop_flip.mirrored if crop_flip else torch.zeros(8, dtype=torch.bool)
        assert crop_flip is None or (flips.any() and not flips.all())
        wanted = np.zeros((8, 1, 8, 8))
        for i, (ordinal, flip) in enumerate(zip(ORDINALS, flips, strict=True)):
            top, left, bottom, right = rows_of(notes, "boxes")[ordinal]
            for y in range(top, bottom):
                for x in range(left, right):
                    wanted[i, 0, y, 7 - x if flip else x] = 1
        np.testing.assert_array_equal(found.given["spatial"], wanted)
        assert found.given.keys() == {"spatial"}


@pytest.mark.parametrize("layout", ["boxes", "masks"])
def test_a_condition_from_sidecars_copies_no_constant_to_the_device(
    notes: Path, layout: str
) -> None:
    """Rows are read by ordinals, which the host knows; a copy of anything else waits for all that a GPU has to do."""
    source = SidecarSource(guided(notes, ids="ids", layout=layout, dense="features"), 0)
    batch = batch_of(ORDINALS, sample_crop_flip(0, torch.arange(8), (8, 8), flip=True))
    inputs = Inputs(Condition.unconditional(8))
    with HostReads() as seen:
        source.condition(batch, None, inputs)
    assert not seen.seen.keys() - {"cpu", "numpy"}, seen.seen


def test_boxes_of_larger_images_fall_on_the_cells_of_latents(digits: Path, tmp_path: Path) -> None:
    """Their pixels are those of the image that was annotated: a cell is inside where its centre is."""
    manifest, boxes = manifests.load(digits).hash, np.tile(np.int32([5, 16, 33, 60]), (N, 1))
    about = FREE | {"image": [64, 64]}
    sidecar.write(tmp_path / "boxes", boxes, manifest=manifest, kind="box", provenance=about)
    guidance = SidecarGuidance(layout=str(tmp_path / "boxes"), channels=1)
    found = condition_of(guidance, batch_of(ORDINALS)).given["spatial"]
    centres = np.arange(8) * 8 + 4
    inside = ((centres >= 5) & (centres < 33))[:, None] & ((centres >= 16) & (centres < 60))[None]
    np.testing.assert_array_equal(found, np.tile(inside, (8, 1, 1, 1)))


def test_a_mask_is_one_channel_a_group_and_shares_of_coarser_cells(notes: Path) -> None:
    masks = rows_of(notes, "masks")[ORDINALS]
    found = condition_of(guided(notes, layout="masks"), batch_of(ORDINALS)).given["spatial"]
    np.testing.assert_array_equal(found, np.stack([masks == k for k in range(M)], 1))
    coarse = CropFlip(grid=(4, 4), size=(4, 4))
    shares = condition_of(guided(notes, layout="masks"), batch_of(ORDINALS, coarse)).given[
        "spatial"
    ]
    assert shares.shape == (8, M, 4, 4)
    for i in range(8):
        for k in range(M):
            for y in range(4):
                for x in range(4):
                    cell = masks[i, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                    assert shares[i, k, y, x] == (cell == k).mean()


def test_a_mask_gives_its_groups_as_a_multi_hot_where_asked(notes: Path) -> None:
    """SGDM: the image-level condition is the spatial maximum of the mask; ids that are given go first."""
    masks = rows_of(notes, "masks")[ORDINALS]
    found = condition_of(guided(notes, layout="masks", groups=M), batch_of(ORDINALS))
    wanted = [[k in mask for k in range(M)] for mask in masks]
    np.testing.assert_array_equal(found.given["multi_hot"], np.array(wanted))
    assert not np.array(wanted).all()
    both = condition_of(guided(notes, layout="masks", ids="ids"), batch_of(ORDINALS))
    assert both.given.keys() == {"id", "spatial"}


def test_the_network_takes_the_condition(notes: Path, digits: Path) -> None:
    everything = guided(notes, ids="ids", layout="masks", dense="features")
    for name in ("dit_digits", "unet_digits", "uvit_digits"):
        guidance = replace(everything, dense=None, width=0) if name == "uvit_digits" else everything
        base = training_config(digits)
        config = replace(base, guidance=guidance, model=replace(base.model, name=name))
        net = architecture(config)
        assert (net.classes, net.spatial, net.dense) == (K, M, guidance.width)
        model = assemble(net)
        count = sum(p.numel() for p in model.parameters())
        assert net.parameters() == footprint(config).parameters == count
        batch = batch_of(ORDINALS)
        out = model(batch.x, batch.tau, condition_of(guidance, batch))
        assert out.shape == batch.x.shape


def test_the_state_holds_frequencies_and_whether_labels_were_seen(notes: Path) -> None:
    ids = rows_of(notes, "ids")
    state = SidecarSource(guided(notes, ids="ids", layout="boxes"), 0).metadata()
    assert state["told"] and state["label_free"] and state["source"] == "sidecar"
    assert state["p"] == [float((ids == k).mean()) for k in range(K)] and state["p"][2] == 0
    assert state["sidecars"]["ids"] == {
        "folder": str(notes / "ids"), "kind": "id", "sha256": sidecar.read(notes / "ids").sha256,
    }  # fmt: skip
    assert not SidecarSource(guided(notes, ids="seen", layout="boxes"), 0).metadata()["label_free"]
    for fields in ({"ids": "several"}, {"layout": "masks"}, {"dense": "features"}):
        assert SidecarSource(guided(notes, **fields), 0).metadata()["p"] is None
    several = SidecarSource(guided(notes, ids="several"), 0).metadata()["sidecars"]["ids"]
    assert several["nets"] == [NET]


# --- the control: other images' rows -----------------------------------------------------------


@examples(max_examples=40)
@given(count=st.integers(1, 3000), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_a_shuffle_is_a_permutation_among_its_share(count: int, share: float, seed: int) -> None:
    found = shuffled(count, share, seed)
    np.testing.assert_array_equal(np.sort(found), np.arange(count))
    moved = int((found != np.arange(count)).sum())
    assert abs(moved - share * count) <= 8 + 5 * (share * (1 - share) * count) ** 0.5
    np.testing.assert_array_equal(found, shuffled(count, share, seed))


def test_a_full_shuffle_leaves_nothing_of_the_groups_and_none_leaves_all(notes: Path) -> None:
    ids, ordinals = rows_of(notes, "ids"), torch.arange(N)
    information = {}
    for share in (0.0, 0.5, 1.0):
        found = condition_of(guided(notes, ids="ids", shuffle=share, drop=0.0), batch_of(ordinals))
        assert np.bincount(found.id, minlength=K).tolist() == np.bincount(ids, minlength=K).tolist()
        information[share] = adjusted_mutual_info_score(ids, found.id)
    assert information[0.0] == pytest.approx(1)
    assert abs(information[1.0]) < 0.01 < 0.1 < information[0.5] < 0.6
    assert (shuffled(N, 1.0, 0) != np.arange(N)).all()
    assert (shuffled(N, 1.0, 0) != shuffled(N, 1.0, 1)).any()


def test_shuffled_rows_stay_together_and_fixed_through_the_run(notes: Path) -> None:
    guidance = guided(notes, ids="ids", dense="features", shuffle=0.5, drop=0.0)
    found = condition_of(guidance, batch_of(ORDINALS), seed=3)
    source = shuffled(N, 0.5, 3)[ORDINALS]
    np.testing.assert_array_equal(found.id, rows_of(notes, "ids")[source])
    np.testing.assert_array_equal(found.given["dense"], rows_of(notes, "features")[source])
    again = condition_of(guidance, batch_of(ORDINALS.flip(0)), seed=3)
    assert torch.equal(again.given["id"].flip(0), found.given["id"])


# --- conditions of a published student ----------------------------------------------------------


def published(guidance: SidecarGuidance, digits: Path, **changes: Any) -> Snapshot:
    config = replace(training_config(digits), guidance=guidance)
    manifest = manifests.load(digits)
    made = Snapshot(
        student=build_student(config, 0).eval(), config=config, images=0,
        guidance=SidecarSource(guidance, config.seed).metadata(),
        data={"manifest": manifest.hash, "root": str(digits), "header": manifest.header},
        sha256="", average=AverageSpec(halflife=1), saw_labels=False, origin={},
    )  # fmt: skip
    return replace(made, **changes)


SEEDS = torch.arange(4000)


def test_groups_are_drawn_at_their_frequency_or_evenly_among_those_that_occur(
    notes: Path, digits: Path
) -> None:
    made = published(guided(notes, ids="ids"), digits)
    p = made.guidance["p"]
    found = condition_sampler(made)(SEEDS).given["id"]
    assert torch.equal(found, sample_group_ids(p, 0, SEEDS))
    even = torch.bincount(condition_sampler(made, "uniform")(SEEDS).given["id"], minlength=K)
    assert even[2] == 0
    occurring = even[[0, 1, 3, 4, 5, 6]].double()
    assert (occurring - 4000 / 6).abs().max() < 5 * (4000 / 6) ** 0.5
    assert label_policy(made.guidance, "empirical") == "empirical p(k)"
    assert label_policy(made.guidance, "uniform") == "uniform over groups"


def test_layouts_and_their_groups_are_drawn_as_rows_of_training_images(
    notes: Path, digits: Path
) -> None:
    made = published(guided(notes, ids="ids", layout="boxes", dense="features"), digits)
    ordinals = sample_ordinals(N, SEEDS)
    counts = torch.bincount(ordinals // 180, minlength=10).double() / torch.tensor(
        [180] * 9 + [177]
    )
    assert ordinals.min() >= 0 and ordinals.max() < N and len(ordinals.unique()) > 0.8 * N
    assert (counts / counts.mean() - 1).abs().max() < 0.25
    found = condition_sampler(made)(SEEDS[:50])
    np.testing.assert_array_equal(found.id, rows_of(notes, "ids")[ordinals[:50]])
    np.testing.assert_array_equal(found.given["dense"], rows_of(notes, "features")[ordinals[:50]])
    areas = rows_of(notes, "boxes")[ordinals[:50]]
    areas = (areas[:, 2] - areas[:, 0]) * (areas[:, 3] - areas[:, 1])
    np.testing.assert_array_equal(found.given["spatial"].sum((1, 2, 3)), areas)
    later = condition_sampler(made)(SEEDS[20:50])
    assert torch.equal(later.given["spatial"], found.given["spatial"][20:])
    assert label_policy(made.guidance, "empirical") == "training rows"
    with pytest.raises(UserError, match="not on one group alone"):
        condition_sampler(made, "uniform")(SEEDS)


def test_a_row_is_that_training_images_condition_shuffled_or_not(notes: Path, digits: Path) -> None:
    guidance = guided(notes, ids="several", layout="masks", shuffle=1.0, drop=0.0)
    made = published(guidance, digits)
    found, trained = queries.rows(made, ORDINALS), condition_of(guidance, batch_of(ORDINALS))
    for name, value in trained.given.items():
        assert torch.equal(found.given[name], value)
    with pytest.raises(UserError, match="training image 1797 is not one of 0 to 1796"):
        queries.rows(made, torch.tensor([3, 1797]))
    with pytest.raises(UserError, match=r"conditioned on multi_hot, mask of an image.*--row"):
        queries.of_groups(made, torch.tensor([3]))
    labels = published(guided(notes, ids="ids"), digits)
    labelled = replace(
        labels,
        config=replace(labels.config, guidance=LabelGuidance()),
        guidance={"source": "labels", "told": True, "p": [0.1] * 10},
    )
    y = shards.read_all(digits)["y"]
    np.testing.assert_array_equal(queries.rows(labelled, ORDINALS).given["id"], y[ORDINALS])


def test_groups_outlive_their_sidecar_and_layouts_say_what_is_missing(
    notes: Path, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(notes, tmp_path / "notes")
    here = tmp_path / "notes"
    by_group = published(guided(here, ids="ids"), digits)
    by_row = published(guided(here, ids="ids", layout="boxes"), digits)
    changed = np.load(here / "boxes" / "rows.npy")
    shutil.rmtree(here / "boxes")
    for ask in (lambda: condition_sampler(by_row)(SEEDS), lambda: queries.rows(by_row, ORDINALS)):
        with pytest.raises(
            UserError, match=r"conditioned on the box of training images.*layout is gone"
        ):
            ask()
    changed[0, 2] += 1
    manifest = manifests.load(digits).hash
    sidecar.write(here / "boxes", changed, manifest=manifest, kind="box", provenance=FREE)
    with pytest.raises(UserError, match="has changed since"):
        condition_sampler(by_row)(SEEDS)
    shutil.rmtree(here / "ids")
    assert len(condition_sampler(by_group)(SEEDS).given["id"]) == 4000
    assert queries.of_groups(by_group, torch.tensor([3])).given["id"].tolist() == [3]
    assert queries.groups(by_group) == K
    with pytest.raises(UserError, match="group 7 is not one of 0 to 6"):
        queries.of_groups(by_group, torch.tensor([K]))


# --- whole runs --------------------------------------------------------------------------------


def attempt(rank_info: RankInfo, config: Config, root: Path) -> None:
    """One attempt of the run in `root`, submitted by rank 0 as the launcher does."""
    run = RunFolder(root)
    if rank_info.rank == 0 and run.open_attempt() == 1:
        manifest = manifests.load(config.data.root).hash
        what = identity(config, manifest, None, promises(check_annotations(config, manifest)))
        write_record(run.run_json, {"images": config.train.images, "identity": what})
    dist.barrier()
    lease = Lease(run, run.attempt_numbers()[-1])
    job.work(config, rank_info, lease, Telemetry(run, lease.number, rank_info, config.train.images))


def story(rank_info: RankInfo, notes: Path, config: Config, root: Path) -> list[str]:
    """Features as the condition, the oracle, with a box; then attempts of runs whose annotations changed."""
    attempt(rank_info, config, root / "oracle")
    labelled = replace(config, guidance=guided(notes, ids="seen"))
    attempt(rank_info, labelled, root / "labelled")
    said = []
    for change in (bytes_changed, made_anew):
        dist.barrier()
        if rank_info.rank == 0:
            change(notes / "seen")
        dist.barrier()
        try:
            attempt(rank_info, labelled, root / "labelled")
        except UserError as error:
            said.append(str(error))
    return said


def bytes_changed(folder: Path) -> None:
    """Other rows of the same size behind the same record."""
    rows = np.load(folder / "rows.npy")
    np.save(folder / "rows.npy", np.roll(rows, 1))


def made_anew(folder: Path) -> None:
    """Another sidecar in its place."""
    was, rows = sidecar.read(folder), np.load(folder / "rows.npy")
    shutil.rmtree(folder)
    sidecar.write(
        folder, rows, manifest=was.manifest, kind="id", groups=K, provenance=was.provenance
    )


@pytest.fixture(scope="module")
def trained(
    notes: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[list[str]]]:
    root = tmp_path_factory.mktemp("runs")
    here = root / "notes"
    shutil.copytree(notes, here)
    base = training_config(digits)
    short = replace(base.train, images=256, snapshot_every=256, checkpoint_every=256)
    config = replace(base, train=short, guidance=guided(here, dense="features", layout="boxes"))
    return root, here, run_ranks(2, story, here, config, root)


def test_the_oracle_of_dense_features_trains_and_is_drawn_from(
    trained: tuple[Path, Path, list[list[str]]],
) -> None:
    root, _, _ = trained
    made = snapshot.load(root / "oracle" / "snapshots" / "img-000000256")
    assert made.guidance["label_free"] and not made.saw_labels and made.guidance["p"] is None
    weight = made.student.backbone.condition.dense.weight  # type: ignore[union-attr]
    fresh = build_student(made.config, made.config.seed).backbone.condition.dense.weight  # type: ignore[union-attr]
    assert weight.shape == (64, P) and not torch.equal(weight, fresh)
    config = replace(
        made.config,
        sampler=replace(made.config.sampler, steps=2),
        evaluation=replace(made.config.evaluation, protocol="fd_digits", samples=64, batch=64),
    )
    protocol = Protocol.of(config, {"data": made.data, "guidance": made.guidance})
    scores, _, pixels = evaluation.fd_digits(made, config, protocol, RankStatus())
    assert protocol.labels == "training rows" and len(pixels) == 64
    assert np.isfinite(scores["fd_digits"])


def test_a_sidecar_that_saw_labels_makes_a_run_that_did(
    trained: tuple[Path, Path, list[list[str]]],
) -> None:
    root, _, _ = trained
    made = snapshot.load(root / "labelled" / "snapshots" / "img-000000256")
    assert made.saw_labels and not made.guidance["label_free"]
    made.student.backbone.condition.labels.weight.mul_(1e4)  # type: ignore[union-attr,operator]
    keys, drawn = set(), []
    for prior, words in {"empirical": "empirical p(k)", "uniform": "uniform over groups"}.items():
        settings = {"protocol": "fd_digits", "samples": 64, "batch": 64, "prior": prior}
        config = replace(
            made.config,
            sampler=replace(made.config.sampler, steps=2),
            evaluation=replace(made.config.evaluation, **settings),
        )
        protocol = Protocol.of(config, {"data": made.data, "guidance": made.guidance})
        _, _, pixels = evaluation.fd_digits(made, config, protocol, RankStatus())
        assert protocol.labels == words
        keys.add(protocol.key)
        drawn.append(pixels)
    assert len(keys) == 2 and not torch.equal(*drawn)


def test_annotations_that_changed_since_the_run_was_submitted_stop_every_rank(
    trained: tuple[Path, Path, list[list[str]]],
) -> None:
    _, here, said = trained
    assert said[0] == said[1] and len(said[0]) == 2
    for message in said[0]:
        assert f"guidance.ids={here / 'seen'} has sha256" in message and "new run" in message
