"""A probe of a snapshot: the bytes of any ranks and after any kill, its record, and what is refused before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.board.page import summary
from launcher.compose import compose
from launcher.submission import with_reference
from selfguide.diffusion.conditions import Condition
from selfguide.discovery.features import SnapshotFeatures
from selfguide.evaluation import job, labelled
from selfguide.evaluation.labelled import Batches, Labelled
from selfguide.evaluation.metrics.probe import LinearProbes
from selfguide.evaluation.probe import INPUT, PROBES, Probed, probe
from selfguide.randomness import normal
from selfguide.snapshot import Snapshot, load
from selfguide.spec.data_fit import check_fit
from selfguide.spec.files import plain
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import Protocol, record_key, records
from selfguide.spec.run import RunFolder
from selfguide.spec.validate import validate
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import PIXELS
from shards.sources.source import ArraySource
from shards.write import writer
from tests.selfguide.snapshots import write_snapshot

SETTINGS = (
    "evaluation=probe", "evaluation.samples=30", "evaluation.batch=16", "evaluation.passes=3",
    "evaluation.noise_times=[0.1,0.4]", "evaluation.layers=[block_1,4]", "evaluation.learning_rate=0.02",
)  # fmt: skip


def write(root: Path, labels: np.ndarray, seed: int = 0, size: int = 8) -> Path:
    """Shards of images that are brighter the higher their label is."""
    x = np.random.default_rng(seed).integers(0, 90, (len(labels), 1, size, size))
    x = x + 60 * labels[:, None, None, None]
    source = ArraySource.of("bright", x.astype(np.uint8), labels=labels, classes=3)
    writer.write(root, source, header=PIXELS)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 150 images in three classes."""
    return write(tmp_path_factory.mktemp("data") / "bright", np.arange(150) % 3)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with one snapshot, scored by a probe."""
    found = RunFolder(tmp_path_factory.mktemp("runs") / "bright" / "0123")
    manifest = manifests.load(data)
    write_snapshot(
        found.snapshot(7), data, *SETTINGS,
        data={"root": str(data), "header": manifest.header, "manifest": manifest.hash},
    )  # fmt: skip
    found.run_json.write_text(json.dumps({"id": "0123", "images": 7}))
    return found


@pytest.fixture(scope="module")
def snapshot(run: RunFolder) -> Snapshot:
    return load(run.snapshot(7))


def probed(
    snapshot: Snapshot, work: Path, *, rank: int = 0, world: int = 1, **changes: Any
) -> Probed | None:
    evaluation = replace(snapshot.config.evaluation, **changes)
    return probe(snapshot, evaluation, RankStatus(), work, rank=rank, world=world)


@pytest.fixture(scope="module")
def alone(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    found = probed(snapshot, tmp_path_factory.mktemp("alone"))
    assert found is not None
    return found


def test_probe_has_a_cell_of_each_layer_and_noise_time_and_scores_the_one_chosen(
    alone: Probed,
) -> None:
    cells = {(cell["layer"], cell["noise_time"]): cell for cell in alone.table["cells"]}
    assert cells.keys() == {(layer, t) for t in (0.1, 0.4) for layer in ("block_1", "block_4")}
    assert alone.table["images"] == {"validation": 30, "test": 30, "train": 90}
    for kind in PROBES:
        best = cells[tuple(alone.table[f"{kind}_best"].values())]
        top = max(cell[f"{kind}_validation"] for cell in cells.values())
        assert best[f"{kind}_validation"] == top
        share, count = alone.scores[f"{kind}_accuracy"], 30
        assert share == best[f"{kind}_accuracy"]
        error = alone.scores[f"{kind}_accuracy_se"]
        assert error == pytest.approx((share * (1 - share) / count) ** 0.5)
        assert alone.scores[f"{kind}_accuracy_{INPUT}"] == alone.table[INPUT][f"{kind}_accuracy"]
    # brightness is easy to tell, and a third is chance
    assert min(alone.table[INPUT][f"{kind}_accuracy"] for kind in PROBES) > 0.5


def test_probe_on_two_and_five_ranks_is_that_of_one(
    snapshot: Snapshot, alone: Probed, tmp_path: Path
) -> None:
    for world in (2, 5):
        work = tmp_path / f"{world}"
        for rank in reversed(range(world)):
            found = probed(snapshot, work, rank=rank, world=world)
            assert (found is None) == (rank > 0)
        assert found == alone


def test_probe_after_kills_and_with_other_ranks_is_that_of_a_whole_one(
    snapshot: Snapshot, alone: Probed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [9]
    step = LinearProbes.step

    def dying(probes: LinearProbes, *given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        step(probes, *given)

    monkeypatch.setattr(LinearProbes, "step", dying)
    for world, steps in ((2, 9), (3, 8), (1, 13)):
        left[0] = steps
        with pytest.raises(KeyboardInterrupt):
            probed(snapshot, tmp_path, rank=world - 1, world=world)
    assert list(tmp_path.glob("*.pt"))
    left[0] = 1000
    assert probed(snapshot, tmp_path) == alone
    # it went on, and did not begin anew
    assert 1000 - left[0] < 3 * 3 * 6


def test_probe_does_not_look_at_the_test_part_to_choose(
    snapshot: Snapshot, alone: Probed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_batches = labelled.Batches.plain

    def other_labels(batches: Any, part: str) -> Any:
        for batch in plain_batches(batches, part):  # type: ignore[arg-type]
            wrong = (batch.labels + 1) % 3 if part == "test" else batch.labels
            yield replace(batch, labels=wrong)

    monkeypatch.setattr(labelled.Batches, "plain", other_labels)
    found = probed(snapshot, tmp_path)
    assert found is not None
    assert [found.table[f"{kind}_best"] for kind in PROBES] == [
        alone.table[f"{kind}_best"] for kind in PROBES
    ]
    assert found.scores != alone.scores


def test_probe_with_shards_to_test_on_trains_on_all_but_the_validation_part(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    test = write(tmp_path / "test", np.arange(60) % 3, seed=1)
    found = probed(snapshot, tmp_path / "work", shards=str(test))
    assert found is not None
    assert found.table["images"] == {"validation": 30, "test": 30, "train": 120}


def test_features_of_several_layers_are_bitwise_those_of_each(snapshot: Snapshot) -> None:
    x0 = torch.rand(5, 1, 8, 8)
    eps = normal(0, "test", torch.arange(5), (1, 8, 8))
    header = snapshot.data["header"]
    both = SnapshotFeatures(snapshot, header, noise_time=0.1).of_layers(x0, eps, [1, 4])
    for layer, found in zip(("block_1", 4), both, strict=True):
        one = SnapshotFeatures(snapshot, header, noise_time=0.1, layer=layer)
        assert torch.equal(one.of_layers(x0, eps, [one.number])[0], found)


def test_one_patch_of_an_image_is_that_at_its_place_of_a_plain_forward(snapshot: Snapshot) -> None:
    x0 = torch.rand(5, 1, 8, 8)
    eps = normal(0, "test", torch.arange(5), (1, 8, 8))
    net = SnapshotFeatures(snapshot, snapshot.data["header"], noise_time=0.1)
    # 16 patches, and the largest number below 1 is none behind the last
    place = torch.tensor([0.0, 0.06, 0.07, 0.5, 1 - 2**-24])
    (found,) = net.of_layers(x0, eps, [2], place)
    x, tau = 0.9 * x0 + 0.1 * eps, torch.full((5,), 0.1)
    tokens = snapshot.student.backbone.features(x, tau, Condition.unconditional(5), 2)
    for number, patch in enumerate((0, 0, 1, 8, 15)):
        torch.testing.assert_close(found[number], tokens[number, patch])


def test_a_probe_is_not_tested_on_the_shards_that_it_is_trained_on(snapshot: Snapshot) -> None:
    root = snapshot.data["root"]
    with pytest.raises(UserError, match=f"evaluation.shards={root} are the shards .* leave"):
        Labelled(root=root, test_root=root, most=30, seed=0)


def test_places_of_patches_are_even_and_anew_at_each_pass(snapshot: Snapshot) -> None:
    data = Labelled(root=snapshot.data["root"], test_root=None, most=30, seed=0)
    net = SnapshotFeatures(snapshot, snapshot.data["header"])
    batches = Batches(data, net, RankStatus(), size=200)
    (first,), (second,), (again,) = (list(batches.shuffled(number)) for number in (0, 1, 0))
    assert torch.equal(first.place, again.place)
    assert not set(first.place.tolist()) & set(second.place.tolist())
    assert 0.4 < first.place.mean() < 0.6 and first.place.min() < 0.1 < 0.9 < first.place.max()


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ((), 0.0),
        (("data.flip=true",), 0.5),
        # it takes the place of data.flip: DDAE++ compares probes with and without it
        (("augment=edm",), 0.5),
    ],
)
def test_training_images_are_mirrored_where_the_model_saw_them_so(
    data: Path, tmp_path: Path, settings: tuple[str, ...], share: float
) -> None:
    folder = write_snapshot(tmp_path / "one", data, *SETTINGS, *settings)
    net = SnapshotFeatures(
        load(folder), manifests.load(data).header, layer="1", noise_time=0.1, pooling="mean"
    )
    labelled_data = Labelled(root=str(data), test_root=None, most=30, seed=0)
    batches = Batches(labelled_data, net, RankStatus(), size=16)
    whole, seen = (
        torch.cat([batch.x0 for batch in made])
        for made in (batches.plain("train"), batches.shuffled(0))
    )
    turned = [any(torch.equal(image.flip(-1), each) for each in whole) for image in seen]
    kept = [any(torch.equal(image, each) for each in whole) for image in seen]
    assert all(a or b for a, b in zip(turned, kept, strict=True))
    assert np.mean(turned) == pytest.approx(share, abs=0.15 if share else 0)


def test_probe_job_publishes_one_record_that_leaves_the_model_label_free(
    run: RunFolder, snapshot: Snapshot, alone: Probed
) -> None:
    about = {"data": snapshot.data, "guidance": snapshot.guidance}
    protocol = Protocol.of(snapshot.config, about)
    key = record_key(7, protocol)
    request = run.evals / "request.json"
    request.parent.mkdir(exist_ok=True)
    wanted = {"run": str(run.root), "images": 7, "key": key, "attempt": 1}
    request.write_text(json.dumps({**wanted, "config": plain(snapshot.config)}))
    job.main(request, RankStatus())
    (found,) = records(run)
    assert (found.done, found.key, found.metric) == (True, key, "linear_accuracy")
    assert found.score == alone.scores["linear_accuracy"]
    assert found.scores == alone.scores
    assert found.probe == json.loads(json.dumps(alone.table))
    assert found.label_free
    assert found.nets is None
    assert not list((run.evals / ".parts").glob("*"))


def test_digits_and_a_probe_both_score_a_snapshot_of_a_run_with_both(
    digits: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "runs" / "both" / "0123")
    manifest = manifests.load(digits)
    write_snapshot(
        run.snapshot(7), digits, "evaluation=[fd_digits,probe_digits]", "evaluation.samples=60", "sampler.steps=1",
        data={"root": str(digits), "header": manifest.header, "manifest": manifest.hash},
    )  # fmt: skip
    run.run_json.write_text(json.dumps({"id": "0123", "images": 7}))
    snapshot = load(run.snapshot(7))
    scores_digits, probes = snapshot.config.scored_by
    # as little of it as shows a record
    less = replace(probes.evaluation, passes=1, noise_times=(0.1,), layers=("block_1",))
    for config in (scores_digits, replace(probes, evaluation=less)):
        protocol = Protocol.of(config, {"data": snapshot.data, "guidance": snapshot.guidance})
        wanted = {"run": str(run.root), "images": 7, "key": record_key(7, protocol), "attempt": 1}
        request = tmp_path / "request.json"
        request.write_text(json.dumps({**wanted, "config": plain(config)}))
        job.main(request, RankStatus())
    found = {record.metric: record for record in records(run)}
    assert found.keys() == {"fd_digits", "linear_accuracy"}
    assert all(record.done and np.isfinite(record.score) for record in found.values())
    assert [set(record.scores) & {"floor", "knn_accuracy"} for record in found.values()] == [
        {"floor"} if metric == "fd_digits" else {"knn_accuracy"} for metric in found
    ]


@pytest.mark.parametrize(
    ("change", "of"),
    [
        ("evaluation.noise_times=[0.2]", "noise_times"),
        ("evaluation.layers=[block_1]", "layers"),
        ("evaluation.passes=4", "passes"),
        ("evaluation.seed=1", "seed"),
        ("evaluation.samples=29", "samples"),
        ("evaluation.pooling=token", "pooling"),
        ("evaluation.average=1", "average"),
    ],
)
def test_protocol_of_a_probe_has_a_key_of_each_setting(change: str, of: str) -> None:
    def key(*more: str) -> str:
        averages = "train.ema_halflife=[20000,5000]"
        config = compose(["experiment=digits_uncond", "cluster=local", averages, *SETTINGS, *more])
        return Protocol.of(config, {"data": {"manifest": "m"}, "guidance": {}}).key

    assert key(change) != key(), of
    # the same layers by other words
    assert key("evaluation.layers=[1,block_4]") == key()
    # how samples are drawn is nothing to a probe, on the board either
    assert key("sampler.steps=7", "sampler.g=2") == key()
    config = compose(["experiment=digits_uncond", "cluster=local", *SETTINGS])
    about = Protocol.of(config, {"data": {"manifest": "m"}, "guidance": {}}).plain()
    assert summary(about) == "linear_accuracy v1 · noise-times 0.1, 0.4"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("evaluation.layers=[block_9]", "evaluation.layers"),
        ("evaluation.layers=[0]", "evaluation.layers"),
        ("evaluation.layers=[1,block_1]", "evaluation.layers"),
        ("evaluation.noise_times=[1.5]", "evaluation.noise_times[0]=1.5"),
        ("evaluation.noise_times=[-0.1]", "evaluation.noise_times[0]=-0.1"),
        ("evaluation.noise_times=[]", "evaluation.noise_times"),
        ("evaluation.noise_times=[0.1,0.1]", "evaluation.noise_times"),
        ("evaluation.pooling=cls", "evaluation.pooling=cls"),
        ("evaluation.learning_rate=0", "evaluation.learning_rate"),
    ],
)
def test_settings_of_a_probe_that_cannot_be_are_refused_before_a_job(
    change: str, field: str
) -> None:
    with pytest.raises(UserError, match=field.replace("[", r"\[").replace("]", r"\]")):
        validate(compose(["experiment=digits_uncond", "cluster=local", *SETTINGS, change]))


def test_settings_of_a_probe_are_refused_with_another_protocol() -> None:
    with pytest.raises(UserError, match=r"evaluation\.passes=3"):
        validate(compose(["experiment=digits_uncond", "cluster=local", "evaluation.passes=3"]))


@pytest.mark.parametrize("labels", [None, np.zeros(40, dtype=np.int64)])
def test_shards_whose_labels_tell_nothing_are_refused_before_a_job(
    tmp_path: Path, snapshot: Snapshot, labels: np.ndarray | None
) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8)).astype(np.uint8)
    classes = 0 if labels is None else 3
    source = ArraySource.of("plain", x, labels=labels, classes=classes)
    writer.write(tmp_path / "data", source, header=PIXELS)
    root = str(tmp_path / "data")
    settings = ["experiment=digits_uncond", *SETTINGS, f"data.root={root}"]
    config = compose([*settings, f"data.classes={classes}"])
    with pytest.raises(UserError, match="evaluation=none"):
        check_fit(config, [manifests.load(root)])
    given = compose(
        ["experiment=digits_uncond", "cluster=local", *SETTINGS, f"evaluation.shards={root}"]
    )
    with pytest.raises(UserError, match=root):
        with_reference(given)
    with pytest.raises(UserError, match=root):
        probe(snapshot, config.evaluation, RankStatus(), tmp_path / "work", root=root)
    assert not (tmp_path / "work").exists()


def test_training_part_of_one_class_is_refused(tmp_path: Path) -> None:
    def held(labels: np.ndarray, name: str) -> labelled.Labelled:
        root = str(write(tmp_path / name, labels))
        return labelled.Labelled(root=root, test_root=None, most=9, seed=0)

    first = held(np.arange(60) % 2, "both").parts["test"][0]
    rare = held((np.arange(60) == first).astype(np.int64), "rare")
    with pytest.raises(UserError, match="all of class 0"):
        _ = rare.parts


def test_shards_of_another_shape_are_refused_before_work(
    tmp_path: Path, snapshot: Snapshot
) -> None:
    root = str(write(tmp_path / "large", np.arange(60) % 3, size=16))
    with pytest.raises(UserError, match=r"\[1, 16, 16\].*\[1, 8, 8\]"):
        probe(snapshot, snapshot.config.evaluation, RankStatus(), tmp_path / "work", root=root)
    given = compose(
        ["experiment=digits_uncond", "cluster=local", *SETTINGS, f"evaluation.shards={root}"]
    )
    with pytest.raises(UserError, match=r"evaluation\.shards"):
        with_reference(given)
    assert not (tmp_path / "work").exists()


def test_shards_to_test_on_with_other_classes_are_refused_before_work(
    tmp_path: Path, snapshot: Snapshot
) -> None:
    x = np.zeros((60, 1, 8, 8), dtype=np.uint8)
    source = ArraySource.of("two", x, labels=np.arange(60) % 2, classes=2)
    writer.write(tmp_path / "two", source, header=PIXELS)
    root = str(tmp_path / "two")
    with pytest.raises(UserError, match="classes"):
        probed(snapshot, tmp_path / "work", shards=root)
    assert not (tmp_path / "work").exists()


def test_other_shards_at_the_root_are_refused(tmp_path: Path, snapshot: Snapshot) -> None:
    other = str(write(tmp_path / "other", np.arange(150) % 3, seed=5))
    with pytest.raises(UserError, match="manifest"):
        probed(replace(snapshot, data=snapshot.data | {"root": other}), tmp_path / "work")
