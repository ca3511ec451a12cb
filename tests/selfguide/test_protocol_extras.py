"""Metrics that a protocol of images names beside its score: each reaches a record, with its settings in the key."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from launcher.compose import compose
from selfguide.evaluation import images, job
from selfguide.evaluation.beside import over_sets
from selfguide.evaluation.clusters import clustering
from selfguide.evaluation.features.net import load_feature_net
from selfguide.evaluation.images import Scored, Work, score_images
from selfguide.evaluation.metrics.density_coverage import density_coverage
from selfguide.evaluation.metrics.frechet import Reference
from selfguide.evaluation.metrics.kid import kid
from selfguide.evaluation.metrics.moments import Moments
from selfguide.evaluation.metrics.nearest import nearest_reference
from selfguide.evaluation.metrics.ood import ood_auroc
from selfguide.evaluation.metrics.precision_recall import ICGAN, precision_recall
from selfguide.evaluation.scores import Crop
from selfguide.sampling.condition_sampler import (
    clusters_of,
    condition_sampler,
    drawn_groups,
    sample_ordinals,
)
from selfguide.snapshot import Snapshot, load
from selfguide.spec.config import Config, build
from selfguide.spec.extras import SETTINGS
from selfguide.spec.files import plain
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import Protocol, label_policy, record_key, records
from selfguide.spec.run import RunFolder
from selfguide.spec.validate import validate
from shards import read_all, sidecar, storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import PIXELS
from shards.sources.source import ArraySource
from shards.write import writer
from tests.selfguide.snapshots import write_snapshot
from tools.reference.__main__ import main as reference

NET = "test_resnet.r160_in1k"
CLASSES = 3


def shards_of(root: Path, seed: int, count: int, edge: int = 8) -> Path:
    """Colour images of three classes, whose brightness tells them apart."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, count)
    x = rng.integers(0, 120, (count, 3, edge, edge)) + 60 * y[:, None, None, None]
    source = ArraySource.of(root.name, x.astype(np.uint8), labels=y, classes=CLASSES)
    writer.write(root, source, header=PIXELS)
    return root


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("data") / "train", 0, 90)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("data") / "test", 1, 60)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("net") / "net.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(NET).state_dict(), file)
    return {"net": NET, "weights": str(file), "sha256": storage.sha256(str(file))}


@pytest.fixture(scope="module")
def run(train: Path, net: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with one snapshot of a model conditioned on labels, scored by fd_timm."""
    found = RunFolder(tmp_path_factory.mktemp("runs") / "colours" / "0123")
    manifest = manifests.load(train)
    write_snapshot(
        found.snapshot(7), train,
        "data.shape=[3,8,8]", f"data.classes={CLASSES}", "sampler.steps=2", "guidance=labels", "evaluation=fd_timm",
        "evaluation.samples=45", "evaluation.batch=15", *(f"evaluation.{k}={v}" for k, v in net.items()),
        guidance={"source": "labels", "told": True, "p": [0.5, 0.3, 0.2], "label_free": False},
        data={"root": str(train), "header": manifest.header, "manifest": manifest.hash},
    )  # fmt: skip
    found.run_json.write_text(json.dumps({"id": "0123", "images": 7}))
    return found


@pytest.fixture(scope="module")
def snapshot(run: RunFolder) -> Snapshot:
    return load(run.snapshot(7))


def changed(config: Config, **changes: Any) -> Config:
    values = plain(config)
    values["evaluation"] |= changes
    return build(Config, values)


def protocol_of(snapshot: Snapshot, config: Config) -> Protocol:
    return Protocol.of(config, {"data": snapshot.data, "guidance": snapshot.guidance})


def scored(snapshot: Snapshot, folder: Path, **changes: Any) -> Scored:
    config = changed(snapshot.config, **changes)
    work = Work(parts=folder / "parts", references=folder / "known")
    found = score_images(snapshot, config, protocol_of(snapshot, config), RankStatus(), work)
    assert found is not None
    return found


def features(folder: Path, width: int) -> np.ndarray:
    files = sorted((folder / "parts").glob("features-*.npy"))
    return np.concatenate([np.load(file) for file in files])[:, :width]


ALL = {
    "metrics": ["precision_recall", "kid", "density_coverage", "near_copies", "ood_auroc", "fdr", "cluster_fd",
                "agreement", "drift"],
    "kid_size": 20, "kid_subsets": 5, "pr_k": 2, "dc_k": 4, "kept": 80, "drift_blocks": [1, 7],
}  # fmt: skip


def test_metrics_of_a_protocol_equal_their_functions_on_its_features(
    snapshot: Snapshot, net: dict[str, str], held_out: Path, tmp_path: Path
) -> None:
    found = scored(snapshot, tmp_path, **ALL, test=str(held_out)).scores
    width = load_feature_net("fd_timm", net["weights"], net=NET, sha256=net["sha256"]).width
    made = features(tmp_path, width)
    files = {len(np.load(f)["features"]): f for f in (tmp_path / "known").glob("*/reference.npz")}
    real, test = np.load(files[80])["features"], np.load(files[60])["features"]
    assert found["kid"] == kid(real, made, subsets=5, size=20).value
    both = precision_recall(real, made, k=2, sizes=(10_000, 50_000))
    assert (found["precision"], found["recall"]) == (both.precision, both.recall)
    dense = density_coverage(real, made, k=4)
    assert (found["density"], found["coverage"]) == (dense.density, dense.coverage)
    assert found["near_copies"] == nearest_reference(real, made).rate
    assert found["ood_auroc"] == ood_auroc(real, made, test)
    reference, other = Reference.load(files[80]), Reference.load(files[60])
    validation = reference.distance(other.mean, other.covariance)
    assert found["fdr"] == pytest.approx(found["fd_timm"] / validation, rel=1e-9)
    assert found["cluster_fd"] > 0
    assert found["cluster_fd_clusters"] == CLASSES
    # a model that is conditioned on labels has them for its groups
    assert found["nmi"] == found["ami"] == found["ari"] == pytest.approx(1)
    assert 0 <= found["drift"] < 1e-5


def test_plain_protocol_has_no_trace_of_what_came_later(snapshot: Snapshot) -> None:
    values = protocol_of(snapshot, snapshot.config).plain()
    assert not {"extras", "sets", "crop", "reference_count"} & values.keys()
    adm = compose(
        ["experiment=digits_uncond", "cluster=local", "evaluation=fid_adm", "evaluation.samples=90"]
    )
    about = {"data": snapshot.data, "guidance": snapshot.guidance}
    assert Protocol.of(adm, about).extras is None
    named = changed(adm, metrics=["inception_score", "precision_recall"])
    assert Protocol.of(named, about).key == Protocol.of(adm, about).key
    assert Protocol.of(changed(named, is_splits=1), about).key != Protocol.of(adm, about).key


def test_self_guided_diffusions_protocol_has_icgans_precision_and_recall() -> None:
    found = compose(["experiment=digits_uncond", "cluster=local", "evaluation=sgdm"]).evaluation
    assert dict(ICGAN) == {
        "k": found.pr_k, "strict": found.pr_strict, "sizes": tuple(found.pr_sizes)
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"sets": 3}, {"reference_count": 50}, {"reference_count": 50, "reference_seed": 0}, {"crop": 6},
        {"crop": 6, "crop_rule": "random"},
        {"crop": 6, "crop_rule": "random", "crop_seed": 1}, {"prior": "quota"}, {"metrics": ["kid"]},
        {"metrics": ["kid"], "kid_size": 20}, {"metrics": ["kid"], "kid_seed": 1}, {"metrics": ["kid"], "kept": 60},
        {"metrics": ["precision_recall"]}, {"metrics": ["precision_recall"], "pr_k": 5},
        {"metrics": ["precision_recall"], "pr_sizes": [50, 50]}, {"metrics": ["ufid"], "unconditional": "a.npz"},
        {"metrics": ["ufid"], "unconditional": "b.npz"}, {"metrics": ["ood_auroc"], "test": "x", "test_manifest": "1"},
        {"metrics": ["ood_auroc"], "test": "x", "test_manifest": "2"},
        {"metrics": ["fdr"], "test": "x", "test_manifest": "1", "fdr_protocols": ["fid_clean"]},
    ],
)  # fmt: skip
def test_every_setting_that_a_number_hangs_on_is_a_key_of_its_own(
    snapshot: Snapshot, change: dict[str, Any]
) -> None:
    about = {"data": snapshot.data, "guidance": snapshot.guidance}
    base = {"metrics": change["metrics"]} if len(change) > 1 and "metrics" in change else {}
    one = Protocol.of(changed(snapshot.config, **base), about)
    other = Protocol.of(changed(snapshot.config, **change), about)
    assert one.key != other.key


def test_every_metric_has_its_settings_in_the_table() -> None:
    from typing import get_args

    from selfguide.spec.config.evaluation import Extra

    assert set(get_args(Extra)) == set(SETTINGS)


def test_three_sets_are_scored_by_seeds_of_their_own_as_mean_and_deviation(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    few = {"samples": 20, "batch": 20}
    three = scored(snapshot, tmp_path, sets=3, **few).scores
    each = [
        scored(snapshot, tmp_path / f"{i}", seed=20 * i, **few).scores["fd_timm"] for i in range(3)
    ]
    assert three["fd_timm"] == pytest.approx(np.mean(each), rel=1e-12)
    assert three["fd_timm_sd"] == pytest.approx(np.std(each, ddof=1), rel=1e-9)
    assert "floor_sd" not in three


def test_standard_error_over_sets_is_that_of_their_mean() -> None:
    found = over_sets([{"a": 1.0, "a_se": 0.3}, {"a": 3.0, "a_se": 0.4}])
    assert found == {"a": 2.0, "a_sd": pytest.approx(2**0.5), "a_se": pytest.approx(0.25)}


def test_ufid_is_the_distance_to_a_named_runs_samples(
    snapshot: Snapshot, net: dict[str, str], tmp_path: Path
) -> None:
    whole = load_feature_net("fd_timm", net["weights"], net=NET, sha256=net["sha256"])
    scored(snapshot, tmp_path / "plain")
    rows = features(tmp_path / "plain", whole.width)
    file = tmp_path / "uncond.npz"
    named = {"features": whole.about, "run": "digits_uncond/77"}
    Reference.of(Moments.of(rows + 0.5), named).save(file)
    found = scored(snapshot, tmp_path / "ufid", metrics=["ufid"], unconditional=str(file))
    assert found.scores["ufid"] == pytest.approx(0.25 * whole.width, rel=1e-6)
    assert found.files == {"unconditional": storage.sha256(str(file))}
    Reference.of(Moments.of(rows), {"features": whole.about}).save(file)
    with pytest.raises(UserError, match="name no run") as refused:
        scored(snapshot, tmp_path / "ufid", metrics=["ufid"], unconditional=str(file))
    assert "tools.reference samples RUN" in str(refused.value)


def test_quota_draws_each_group_that_occurs_equally_often_in_any_batch(snapshot: Snapshot) -> None:
    drawn = condition_sampler(snapshot, "quota")(torch.arange(45)).id
    assert drawn is not None
    assert drawn.bincount().tolist() == [15, 15, 15]
    parts = [condition_sampler(snapshot, "quota")(part).id for part in torch.arange(45).split(7)]
    assert torch.equal(torch.cat([p for p in parts if p is not None]), drawn)
    assert drawn_groups([0.5, 0.0, 0.5], "quota", torch.arange(4)).tolist() == [0, 2, 0, 2]


def test_quota_over_labels_says_that_it_uses_them() -> None:
    assert label_policy({"source": "labels"}, "quota") == "equally many of each human class"
    assert label_policy({"source": "online"}, "quota") == "equally many of each group"


def test_clusters_of_images_in_a_model_of_labels_are_their_labels(
    snapshot: Snapshot, train: Path
) -> None:

    found = clusters_of(snapshot, torch.arange(90))
    assert found.tolist() == read_all(str(train))["y"].tolist()


@pytest.fixture(scope="module")
def oracle(train: Path, net: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A model that is conditioned on features of single images, which here lie about three directions."""
    root = tmp_path_factory.mktemp("oracle")
    manifest = manifests.load(train)
    y = read_all(str(train))["y"]
    rows = np.eye(4)[y] + np.random.default_rng(0).normal(0, 0.02, (90, 4))
    about = sidecar.write(
        root / "features",
        rows.astype(np.float32),
        manifest=manifest.hash,
        kind="dense",
        provenance={"saw_labels": False},
    )
    published = {"folder": str(root / "features"), "kind": "dense", "sha256": about.sha256}
    write_snapshot(
        root / "img-7", train,
        "data.shape=[3,8,8]", "sampler.steps=2", "guidance=sidecar",
        f"guidance.dense={root / 'features'}", "guidance.width=4", "evaluation=fd_timm",
        "evaluation.samples=45", "evaluation.batch=15", *(f"evaluation.{k}={v}" for k, v in net.items()),
        guidance={"source": "sidecar", "told": True, "p": None, "label_free": True, "sidecars": {"dense": published}},
        data={"root": str(train), "header": manifest.header, "manifest": manifest.hash},
    )  # fmt: skip
    return load(root / "img-7")


def test_samples_of_rows_are_in_the_clusters_of_their_rows(
    oracle: Snapshot, train: Path, tmp_path: Path
) -> None:
    config = changed(oracle.config, metrics=["cluster_fd"], cluster_count=CLASSES)
    found = clustering(oracle, config.evaluation, torch.arange(90))
    y = read_all(str(train))["y"]
    assert len(set(zip(found.real.tolist(), y.tolist(), strict=True))) == CLASSES
    seeds = torch.arange(45)
    assert found.made(seeds).tolist() == found.real[sample_ordinals(90, seeds)].tolist()
    measured = scored(oracle, tmp_path, metrics=["cluster_fd"], cluster_count=CLASSES)
    assert measured.scores["cluster_fd_clusters"] == CLASSES
    assert measured.scores["cluster_fd"] > 0
    with pytest.raises(UserError, match=r"evaluation\.cluster_count=100"):
        clustering(oracle, oracle.config.evaluation, torch.arange(90))
    validate(config)
    with pytest.raises(UserError, match=r"evaluation\.cluster_count=100"):
        validate(changed(oracle.config, metrics=["cluster_fd"]))
    first, second = (
        protocol_of(oracle, changed(oracle.config, metrics=["cluster_fd"], cluster_count=count))
        for count in (3, 4)
    )
    assert first.key != second.key


def test_an_oracle_of_features_has_ufid_and_ood_auroc_of_what_its_training_rows_give(
    oracle: Snapshot, train: Path, net: dict[str, str], held_out: Path, tmp_path: Path
) -> None:
    """C-EDM's oracle (Adaloglou et al. 2024), against samples of an unconditional run that the command draws."""
    manifest, file = manifests.load(train), tmp_path / "uncond.npz"
    unconditional = tmp_path / "runs" / "plain" / "77" / "snapshots" / "img-7"
    write_snapshot(
        unconditional, train,
        "data.shape=[3,8,8]", "sampler.steps=2", "evaluation=fd_timm", "evaluation.batch=15",
        *(f"evaluation.{k}={v}" for k, v in net.items()),
        guidance={"source": "none", "told": False, "p": None, "label_free": True},
        data={"root": str(train), "header": manifest.header, "manifest": manifest.hash},
    )  # fmt: skip
    words = ["--protocol", "fd_timm", *(w for k, v in net.items() for w in (f"--{k}", v))]
    count = ["--count", "60", "--batch", "15"]
    reference(["samples", str(unconditional), *words, *count, "--out", str(file)])
    asked = {"metrics": ["ufid", "ood_auroc"], "unconditional": str(file), "test": str(held_out)}
    found = scored(oracle, tmp_path, **asked).scores
    width = load_feature_net("fd_timm", net["weights"], net=NET, sha256=net["sha256"]).width
    made = features(tmp_path, width)
    plain = Reference.load(file)
    assert plain.about["run"] == "77"
    assert found["ufid"] == pytest.approx(plain.distance(made.mean(0), np.cov(made.T)), rel=1e-6)
    known = {len(np.load(f)["features"]): f for f in (tmp_path / "known").glob("*/reference.npz")}
    real, test = np.load(known[90])["features"], np.load(known[60])["features"]
    assert found["ood_auroc"] == ood_auroc(real, made, test)
    assert protocol_of(oracle, changed(oracle.config, **asked)).labels == "training rows"


def test_agreement_leaves_a_label_free_record_label_free(
    digits: Path, net: dict[str, str], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "runs" / "found" / "0123")
    manifest = manifests.load(digits)
    write_snapshot(
        run.snapshot(7), digits,
        "guidance=online", "model.cls_token=true", "guidance.groups=5", "sampler.steps=1", "data.classes=10",
        "evaluation=fd_timm", "evaluation.samples=20", "evaluation.batch=20",
        "evaluation.metrics=[agreement,cluster_fd]",
        "evaluation.kept=100", "evaluation.reference_count=100",
        *(f"evaluation.{k}={v}" for k, v in net.items()),
        guidance={"source": "online", "level": "image", "told": True, "p": [0.2] * 5, "label_free": True},
        data={"root": str(digits), "header": manifest.header, "manifest": manifest.hash},
    )  # fmt: skip
    run.run_json.write_text(json.dumps({"id": "0123", "images": 7}))
    snapshot = load(run.snapshot(7))
    key = record_key(7, protocol_of(snapshot, snapshot.config))
    request = run.root / "request.json"
    about = {"run": str(run.root), "images": 7, "key": key, "attempt": 1}
    request.write_text(json.dumps({**about, "config": plain(snapshot.config)}))
    job.main(request, RankStatus())
    (found,) = records(run)
    assert found.label_free
    assert {"nmi", "ari", "ami", "groups_used", "cluster_fd"} <= found.scores.keys()
    assert found.protocol["extras"]["agreement"]["labels"] == "for reporting only"


@pytest.mark.parametrize("random", [False, True])
def test_crop_of_an_image_depends_on_its_number_alone(random: bool) -> None:
    images = torch.arange(5 * 3 * 9 * 12).reshape(5, 3, 9, 12)
    crop, ordinals = Crop(edge=4, random=random), np.arange(5)
    whole = crop.of(images, ordinals)
    assert whole.shape == (5, 3, 4, 4)
    each = torch.cat([crop.of(images[i : i + 1], ordinals[i : i + 1]) for i in range(5)])
    assert torch.equal(whole, each)
    if not random:
        assert torch.equal(whole, images[:, :, 2:6, 4:8])
    with pytest.raises(UserError, match=r"evaluation\.crop=9 or less"):
        Crop(edge=10).of(images, ordinals)


def test_score_against_windows_is_that_of_images_that_were_cut_before(
    snapshot: Snapshot, net: dict[str, str], tmp_path: Path
) -> None:
    large = shards_of(tmp_path / "large", 3, 60, edge=12)
    stored = __import__("shards").read_all(str(large))["x"][:, :, 2:10, 2:10]
    cut = tmp_path / "cut"
    writer.write(cut, ArraySource.of("cut", np.ascontiguousarray(stored)), header=PIXELS)
    one = scored(
        snapshot, tmp_path / "a", shards=str(large), manifest=manifests.load(large).hash, crop=8
    )
    other = scored(snapshot, tmp_path / "b", shards=str(cut), manifest=manifests.load(cut).hash)
    # features are fp32, and a batch's sums depend on how it lies in memory
    assert one.scores["fd_timm"] == pytest.approx(other.scores["fd_timm"], rel=1e-6)


def refusal(*overrides: str) -> str:
    settings = [
        "experiment=digits_uncond",
        "cluster=local",
        "evaluation=fd_effnet",
        "evaluation.samples=40",
    ]
    with pytest.raises(UserError) as error:
        validate(compose([*settings, *overrides]))
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (["evaluation.metrics=[kid]", "evaluation.kid_size=90"], "evaluation.kid_size=40"),
        (["evaluation.kid_size=20"], "evaluation.metrics=[kid]"),
        (["evaluation.metrics=[inception_score]"], "evaluation=fid_adm"),
        (["evaluation.metrics=[ood_auroc]"], "evaluation.test=data/digits"),
        (["evaluation.metrics=[ufid]"], "evaluation.unconditional=u.npz"),
        (["evaluation.crop=4", "evaluation.reference=r.npz"], "evaluation.reference=null"),
        (["evaluation.metrics=[fdr]", "evaluation.test=x", "evaluation.fdr_protocols=[fid_clea]"],
         "evaluation.fdr_protocols=[fid_clean]"),
        (["evaluation.metrics=[density_coverage]", "evaluation.kept=5"], "evaluation.kept=6"),
        (["evaluation.metrics=[kid]", "evaluation.kid_size=30", "evaluation.kept=20"], "evaluation.kid_size=20"),
        (["evaluation.metrics=[kid]", "evaluation.kid_size=40", "evaluation.reference_count=40", "evaluation.kept=39"],
         "evaluation.kept=40"),
        (["evaluation.metrics=[precision_recall]", "evaluation.pr_k=40"], "evaluation.pr_k=3"),
        (["evaluation.metrics=[precision_recall]", "evaluation.pr_sizes=[3,50]"], "evaluation.pr_sizes=[4,50]"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_name_field_value_and_a_cure_that_works(
    given: list[str], cure: str
) -> None:
    text = refusal(*given)
    named = [each for each in given if each.partition("=")[0] in text]
    assert any(value.partition("=")[2].strip("[]") in text for value in named)
    base = [
        "experiment=digits_uncond",
        "cluster=local",
        "evaluation=fd_effnet",
        "evaluation.samples=40",
    ]
    validate(compose([*base, *given, cure]))


def test_metrics_of_a_reference_without_images_say_what_to_give(
    snapshot: Snapshot, net: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(snapshot, tmp_path / "a")
    (made,) = (tmp_path / "a" / "known").glob("*/reference.npz")
    bare = tmp_path / "bare.npz"
    replace(Reference.load(made)).save(bare)
    # before a sample is drawn
    monkeypatch.setattr(images._Samples, "images", None)
    for metric in ("kid", "precision_recall", "density_coverage"):
        with pytest.raises(UserError, match=rf"{metric}.*evaluation\.shards=ROOT"):
            scored(snapshot, tmp_path / "b", reference=str(bare), metrics=[metric], kid_size=20)


def test_metrics_of_too_few_real_images_are_refused_before_a_sample_is_drawn(
    snapshot: Snapshot, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images._Samples, "images", None)
    about = {"shards": str(held_out), "manifest": manifests.load(held_out).hash}
    with pytest.raises(UserError, match=r"60 real images are too few for kid") as error:
        scored(snapshot, tmp_path, **about, metrics=["kid"], kid_size=61)
    assert f"evaluation.shards={held_out}" in str(error.value)
    assert "evaluation.kid_size=60 or less" in str(error.value)


def test_metrics_on_two_ranks_are_those_of_one(
    snapshot: Snapshot, held_out: Path, tmp_path: Path
) -> None:
    alone = scored(snapshot, tmp_path / "1", **ALL, test=str(held_out), sets=2, samples=20)
    config = changed(snapshot.config, **ALL, test=str(held_out), sets=2, samples=20)
    found = []

    def rank(number: int) -> None:
        work = Work(
            parts=tmp_path / "2" / "parts",
            references=tmp_path / "2" / "known",
            rank=number,
            world=2,
        )
        protocol = protocol_of(snapshot, config)
        found.append(score_images(snapshot, config, protocol, RankStatus(), work))

    other = threading.Thread(target=rank, args=(1,))
    other.start()
    rank(0)
    other.join()
    assert [each.scores for each in found if each is not None] == [alone.scores]
