"""Runs that begin from weights: what is taken, what is refused before training, and what later snapshots remember."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher import submission
from launcher.compose import compose
from selfguide import snapshot
from selfguide.diffusion.conditions import Condition
from selfguide.distributed import RankInfo
from selfguide.models import assemble
from selfguide.networks.student import Student, build_student
from selfguide.spec.averages import averages_of
from selfguide.spec.config import Config, InitConfig, LabelGuidance, NoGuidance, TrainConfig
from selfguide.spec.config.align import AlignConfig
from selfguide.spec.config.auxiliary import AuxiliaryConfig
from selfguide.spec.config.contrastive import ContrastiveConfig
from selfguide.spec.files import to_yaml
from selfguide.spec.identity import digest, identity
from selfguide.spec.initial_weights import (
    SCRATCH,
    agree,
    begins_fresh,
    check_weights,
    validate_init,
)
from selfguide.spec.run import Lease, RunFolder, write_record
from selfguide.spec.sizes import architecture, override
from selfguide.spec.validate import validate
from selfguide.training import job
from selfguide.training.initialise import initialise, transplant
from selfguide.training.telemetry import Telemetry
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide import published
from tests.selfguide.test_online import online_config

IMAGES, SEEN = 256, 128
# `dit_digits` in its publisher's words
DIGITS: dict[str, Any] = {"size": 8, "channels": 1, "patch": 2, "width": 64, "depth": 4}


def config(root: Path | str, init: InitConfig | None = None, **changes: Any) -> Config:
    base = online_config(switch=0.5, teacher_refresh=64)
    base = replace(
        base,
        data=replace(base.data, root=str(root), mode="global"),
        train=TrainConfig(
            images=IMAGES, batch=64, learning_rate=1e-3, ema_halflife=(500,), log_every=64,
            snapshot_every=SEEN, checkpoint_every=SEEN, keep_checkpoints=8,
        ),
        engine=replace(base.engine, backend="torch"),
    )  # fmt: skip
    return replace(base, init=init or InitConfig(), **changes)


def official_file(path: Path, seed: int = 0, **changes: Any) -> Path:
    torch.manual_seed(seed)
    sizes = DIGITS | {"rows": 11, "sigma": True} | changes
    weights = published.dit_weights(**sizes)
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return path


def official(path: Path, **changes: Any) -> InitConfig:
    return InitConfig(
        **{"source": "official", "form": "dit", "path": str(path), "time": "relearn"} | changes
    )


# --- whole runs --------------------------------------------------------------------------------


def attempt(rank_info: RankInfo, cfg: Config, root: Path) -> None:
    """One attempt of the run in `root`, submitted by rank 0 as the launcher does."""
    run = RunFolder(root)
    dist.barrier()
    if rank_info.rank == 0:
        number = run.open_attempt()
        if number == 1:
            what = identity(cfg, manifests.load(cfg.data.root).hash, check_weights(cfg))
            write_record(run.run_json, {"images": IMAGES, "identity": what})
    dist.barrier()
    lease = Lease(run, run.attempt_numbers()[-1])
    job.work(cfg, rank_info, lease, Telemetry(run, lease.number, rank_info, cfg.train.images))


def story(rank_info: RankInfo, digits: str, root: Path) -> list[str]:
    """A run with labels; an online one from its snapshot; the same, interrupted, and the snapshot is gone by then."""
    end = f"img-{IMAGES:09d}"
    attempt(rank_info, config(digits, guidance=LabelGuidance()), root / "labels")
    begin = InitConfig(source="snapshot", path=str(root / "labels" / "snapshots" / end))
    for name in ("whole", "parts"):
        attempt(rank_info, config(digits, begin), root / name)
    dist.barrier()
    if rank_info.rank == 0:
        for kind in ("checkpoints", "snapshots"):
            shutil.rmtree(root / "parts" / kind / end)
        (root / "labels").rename(root / "moved")
    dist.barrier()
    attempt(rank_info, config(digits, begin), root / "parts")
    path = root / "dit.pt"
    if rank_info.rank == 0:
        official_file(path)
    dist.barrier()
    return [
        alike(rank_info, config(digits, official(path)), backend)
        for backend in ("torch", "deepspeed")
    ]


def alike(rank_info: RankInfo, cfg: Config, backend: str) -> str:
    """The digest of all that this rank starts from: live weights, averages, the teacher's."""
    cfg = replace(cfg, engine=replace(cfg.engine, backend=backend))
    student = build_student(cfg, cfg.seed)
    origin = initialise(student, cfg, check_weights(cfg))
    wanted = {n: p.detach().clone() for n, p in student.named_parameters()}
    state = job.build_state(cfg, rank_info, student, [], origin)
    assert state.teacher is not None
    live = state.engine.layout.split(state.engine.gather(state.engine.masters))
    sums = hashlib.sha256()
    for held in (live, state.averages.weights(), dict(state.teacher.module.named_parameters())):
        for name, tensor in wanted.items():
            assert torch.equal(held[name].detach().cpu(), tensor), (backend, name)
            sums.update(tensor.numpy().tobytes())
    return sums.hexdigest()


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    from tools.ranks import run_ranks

    root = tmp_path_factory.mktemp("story")
    return root, run_ranks(2, story, str(digits), root, timeout=500)


def last(run: Path) -> snapshot.Snapshot:
    return snapshot.load(run / "snapshots" / f"img-{IMAGES:09d}")


def test_resuming_needs_the_first_weights_no_more_and_ends_with_the_same_bits(trained: Any) -> None:
    root, _ = trained
    whole, parts = (last(root / name).student.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert RunFolder(root / "parts").attempt_numbers() == [1, 2]
    first, second = (
        json.loads((root / name / "snapshots" / f"img-{IMAGES:09d}" / "MANIFEST.json").read_text())
        for name in ("whole", "parts")
    )
    assert (
        first["origin"] == second["origin"] and first["saw_labels"] is second["saw_labels"] is True
    )


def test_every_rank_and_engine_begins_from_the_same(trained: Any) -> None:
    _, digests = trained
    assert len({each for rank in digests for each in rank}) == 1


def test_a_run_from_labels_is_not_label_free_however_it_goes_on(trained: Any) -> None:
    root, _ = trained
    before = last(root / "moved")
    assert before.saw_labels and dict(before.origin) == dict(SCRATCH)
    for images in (SEEN, IMAGES):
        found = snapshot.load(root / "whole" / "snapshots" / f"img-{images:09d}")
        assert found.saw_labels and not found.guidance["label_free"]
        assert found.guidance["source"] == "online" and found.origin["sha256"] == before.sha256
        assert found.origin["origin"] == dict(SCRATCH) and found.origin["parts"] == ["backbone"]


# --- from snapshots ----------------------------------------------------------------------------


def publish(folder: Path, cfg: Config, label_free: bool = True, **extra: Any) -> Student:
    """A snapshot of a student whose every value is random, as the trainer leaves it."""
    student = build_student(cfg, 0)
    torch.manual_seed(3)
    for tensor in student.state_dict().values():
        tensor.copy_(torch.randn_like(tensor))
    folder.mkdir(parents=True)
    save_file(dict(student.state_dict()), folder / averages_of(cfg)[0].file)
    (folder / "config.yaml").write_text(to_yaml(cfg))
    guidance = {"source": "none", "told": False, "p": None, "label_free": label_free}
    data = {"manifest": "", "root": "", "header": {}}
    about = {"images": 7, "guidance": guidance, "data": data}
    about |= {"saw_labels": not label_free, "origin": dict(SCRATCH)}
    storage.publish_folder(folder, extra=about | extra)
    return student


def begin(cfg: Config) -> tuple[Student, dict[str, Any], Student]:
    """(initialised, record, fresh)"""
    student = build_student(cfg, cfg.seed)
    return student, initialise(student, cfg, check_weights(cfg)), build_student(cfg, cfg.seed)


def from_snapshot(folder: Path, **changes: Any) -> InitConfig:
    return InitConfig(source="snapshot", path=str(folder), **changes)


def test_an_online_snapshot_is_taken_whole(tmp_path: Path) -> None:
    theirs = publish(tmp_path / "s", config("d"))
    ours, record, _ = begin(config("d", from_snapshot(tmp_path / "s")))
    assert all(torch.equal(t, ours.state_dict()[n]) for n, t in theirs.state_dict().items())
    assert record["parts"] == ["backbone", "head"] and not record["saw_labels"]
    assert record["trained"]["path"] == "rectified_flow" and record["trained"]["prediction"] == "v"
    assert (record["source"], record["path"], record["images"]) == (
        "snapshot",
        str(tmp_path / "s"),
        7,
    )


def test_weights_that_a_feature_net_guided_name_it_and_others_name_none(tmp_path: Path) -> None:
    net = {"net": "vit_tiny", "sha256": "5f" * 32}
    guidance = {"source": "sidecar", "told": False, "p": None, "label_free": True}
    guidance["sidecars"] = {"ids": {"kind": "id", "sha256": "0", "nets": [net]}}
    publish(tmp_path / "guided", config("d"), guidance=guidance)
    _, record, _ = begin(config("d", from_snapshot(tmp_path / "guided")))
    assert record["nets"] == [net]
    # and from then on, whatever guides
    publish(tmp_path / "later", config("d"), origin=record)
    _, record, _ = begin(config("d", from_snapshot(tmp_path / "later")))
    assert record["nets"] == [net]
    publish(tmp_path / "free", config("d"))
    assert "nets" not in begin(config("d", from_snapshot(tmp_path / "free")))[1]


def test_a_head_of_other_shapes_stays_fresh(tmp_path: Path) -> None:
    base = config("d")
    theirs = publish(tmp_path / "s", base)
    more = replace(base.guidance, groups=13)  # type: ignore[type-var]
    ours, record, fresh = begin(config("d", from_snapshot(tmp_path / "s"), guidance=more))
    assert record["parts"] == ["backbone"]
    for name, tensor in ours.state_dict().items():
        source = theirs if name.startswith("backbone.") else fresh
        assert torch.equal(tensor, source.state_dict()[name]), name


COMPONENTS: dict[str, Any] = {
    "auxiliary": AuxiliaryConfig(weight=0.5, layer=2),
    "align": AlignConfig(weight=0.2, layer=2, teacher_layer=3, teacher_refresh=64),
    "contrastive": ContrastiveConfig(weight=0.01, layer="2", hidden=16, width=4),
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_branch_that_the_snapshot_has_not_begins_anew_and_is_said(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = publish(tmp_path / "s", config("d"))
    cfg = config("d", from_snapshot(tmp_path / "s"), **{name: COMPONENTS[name]})
    ours, record, fresh = begin(cfg)
    assert record["parts"] == ["backbone", "head"]
    for key, tensor in ours.state_dict().items():
        source = fresh if key.startswith("branches.") else theirs
        assert torch.equal(tensor, source.state_dict()[key]), key
    (said,) = begins_fresh(cfg)
    assert said.startswith(f"{name}: ") and f"{tmp_path / 's'} has none" in said
    assert [each.message for each in caplog.records if each.levelname == "WARNING"] == [said]


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_branch_is_taken_where_it_reads_the_same_layer_and_begins_anew_elsewhere(
    name: str, tmp_path: Path
) -> None:
    theirs = publish(tmp_path / "s", config("d", **{name: COMPONENTS[name]}))
    same = config("d", from_snapshot(tmp_path / "s"), **{name: COMPONENTS[name]})
    ours, record, _ = begin(same)
    assert record["parts"] == ["backbone", "head", f"branches.{name}"]
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in ours.state_dict().items())
    assert begins_fresh(same) == ()
    layer = type(COMPONENTS[name].layer)(1)
    moved = replace(same, **{name: replace(COMPONENTS[name], layer=layer)})
    assert begin(moved)[1]["parts"] == ["backbone", "head"]
    (said,) = begins_fresh(moved)
    assert "it read layer 2, and here 1" in said
    plain = replace(same, **{name: type(COMPONENTS[name])()})
    assert begin(plain)[1]["parts"] == ["backbone", "head"] and begins_fresh(plain) == ()


def test_a_token_that_the_snapshot_has_not_is_said(tmp_path: Path) -> None:
    publish(tmp_path / "s", config("d"))
    cfg = config(
        "d", from_snapshot(tmp_path / "s"), model=replace(config("d").model, cls_token=True)
    )
    begin(cfg)
    (said,) = begins_fresh(cfg)
    assert said.startswith("model.cls_token=true: its token is new") and "a little" in said


def test_a_dense_run_begins_from_a_routed_one_and_the_other_way(tmp_path: Path) -> None:
    dense = config("d")
    deep = replace(dense, model=replace(dense.model, depth=6))
    routed = replace(deep, model=replace(deep.model, route=0.5))
    for theirs, ours in ((routed, deep), (deep, routed)):
        folder = tmp_path / str(ours.model.route)
        found = publish(folder, theirs)
        student, _, _ = begin(replace(ours, init=from_snapshot(folder)))
        assert all(torch.equal(t, found.state_dict()[n]) for n, t in student.state_dict().items())


def test_self_conditioning_that_the_snapshot_has_not_begins_as_zeros_and_is_said(
    tmp_path: Path,
) -> None:
    theirs = publish(tmp_path / "s", config("d"))
    model = replace(config("d").model, self_condition=2)
    cfg = config("d", from_snapshot(tmp_path / "s"), model=model)
    ours, _, _ = begin(cfg)
    (said,) = begins_fresh(cfg)
    assert said.startswith("model.self_condition=block_2 begins as zeros")
    x, tau = torch.randn(2, 1, 8, 8), torch.rand(2)
    seen = [each.backbone.eval()(x, tau, Condition.unconditional(2)) for each in (ours, theirs)]
    assert torch.equal(*seen)


def test_what_begins_anew_is_a_note_of_the_submission(digits: Path, tmp_path: Path) -> None:
    manifest = manifests.load(digits)
    data = {"manifest": manifest.hash, "root": str(digits), "header": manifest.header}
    publish(tmp_path / "s", config(digits), data=data)
    cfg = config(digits, from_snapshot(tmp_path / "s"), auxiliary=COMPONENTS["auxiliary"])
    cfg = replace(cfg, runs=str(tmp_path / "runs"))
    assert [each for each in submission.meant(cfg).warnings if "begins anew" in each]


@pytest.mark.parametrize("labels", ["drop", "keep"])
def test_the_label_table_is_dropped_or_kept(labels: Any, tmp_path: Path) -> None:
    labelled = config("d", guidance=LabelGuidance())
    theirs = publish(tmp_path / "s", labelled, label_free=False)
    ours, record, fresh = begin(
        replace(labelled, init=from_snapshot(tmp_path / "s", labels=labels))
    )
    table = "backbone.condition.labels.weight"
    for name, tensor in ours.state_dict().items():
        source = fresh if name == table and labels == "drop" else theirs
        assert torch.equal(tensor, source.state_dict()[name]), name
    assert record["saw_labels"] and record["labels"] == labels


def test_the_condition_may_change_and_positions_go_by_token(tmp_path: Path) -> None:
    """From an unconditional U-ViT to one with [CLS] and prototypes: only new tokens are fresh."""
    model = {"name": "uvit_s_2", "size": 8, "channels": 1, "width": 32, "depth": 2, "heads": 4}
    plain = replace(config("d").model, **model)
    base = config("d", guidance=NoGuidance(), model=plain)
    theirs = publish(tmp_path / "s", base).backbone
    online = replace(config("d").guidance, prototype_width=32, pooling="cls", layer=None)  # type: ignore[type-var]
    with_cls = replace(plain, cls_token=True)
    cfg = config("d", from_snapshot(tmp_path / "s"), guidance=online, model=with_cls)
    ours, _, fresh = begin(cfg)
    table, old = ours.backbone.get_parameter("positions"), theirs.get_parameter("positions")
    kept = fresh.backbone.get_parameter("positions")
    assert torch.equal(table, torch.stack([kept[0], old[0], kept[2], *old[1:]]))
    new = {"positions", "cls", "condition.null", "condition.unconditional"}
    for name, tensor in ours.backbone.state_dict().items():
        if name not in new:
            assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_unets_keep_their_rows_apart() -> None:
    sizes: dict[str, Any] = {"size": 8, "channels": 1, "base": 32, "mult": (1, 2), "blocks": 1}
    nets = [
        override("unet_sgdm_32", **sizes, classes=classes, attention=()) for classes in (4, 4, 7)
    ]
    torch.manual_seed(0)
    theirs, same, other = (Student(assemble(net), None) for net in nets)
    rows = [name for name in same.state_dict() if name.endswith(".rows")]
    assert rows
    fresh = {name: same.state_dict()[name].clone() for name in rows}
    transplant(theirs, same, keep_labels=False)
    assert all(torch.equal(same.state_dict()[name], fresh[name]) for name in rows)
    transplant(theirs, same, keep_labels=True)
    assert all(torch.equal(same.state_dict()[n], t) for n, t in theirs.state_dict().items())
    transplant(theirs, other, keep_labels=False)


DISAGREE = [
    ({"width": 32}, "has model.width=64, and this run 32"),
    ({"depth": 3}, "has model.depth=4, and this run 3"),
    ({"time": "data"}, "model.time=data, and the weights .* were fed noise_1000"),
    ({"name": "uvit_s_2", "size": 8, "channels": 1}, "another family"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), DISAGREE)
def test_a_snapshot_of_another_network_is_named_before_anything_is_queued(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = config("d", guidance=NoGuidance())
    publish(tmp_path / "s", base)
    other = replace(base, init=from_snapshot(tmp_path / "s"))
    promised = check_weights(other)
    other = replace(other, model=replace(other.model, **changes))
    with pytest.raises(UserError, match=said):
        check_weights(other)
    with pytest.raises(UserError, match=said):
        initialise(build_student(other, 0), other, promised)
    relearn = replace(other, init=replace(other.init, time="relearn"))
    if "time" in changes:
        assert check_weights(relearn)


PATHS = [
    ({"name": "vp", "prediction": "eps"}, "path.name=vp path.prediction=eps, and the weights .* learned "
     "path.name=rectified_flow path.prediction=v; set .*, or init.time=relearn"),
    ({"prediction": "x0"}, "path.name=rectified_flow path.prediction=x0, and"),
    ({"prediction": "edm"}, "path.prediction=edm path.sigma_data=0.5, and"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), PATHS)
def test_a_snapshot_that_learned_something_else_is_learned_anew_or_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    publish(tmp_path / "s", config("d"))
    cfg = config("d", from_snapshot(tmp_path / "s"))
    assert check_weights(cfg)
    other = replace(cfg, path=replace(cfg.path, **changes))
    with pytest.raises(UserError, match=said):
        check_weights(other)
    relearn = replace(other, init=replace(other.init, time="relearn"))
    _, record, _ = begin(relearn)
    assert record["trained"]["path"] == "rectified_flow" and record["trained"]["prediction"] == "v"


def test_a_scale_that_the_weights_were_preconditioned_by_is_compared(tmp_path: Path) -> None:
    base = config("d")
    edm = replace(base, path=replace(base.path, name="edm", prediction="edm", sigma_data=0.5))
    publish(tmp_path / "s", edm)
    same = replace(edm, init=from_snapshot(tmp_path / "s"))
    assert check_weights(same)
    with pytest.raises(UserError, match=r"sigma_data=0\.4, and .*learned .*sigma_data=0\.5; set"):
        check_weights(replace(same, path=replace(same.path, sigma_data=0.4)))


UNETS = ["unet_sgdm_32", "unet_sgdm_cross_64", "unet_digits", "unet_ddpmpp"]


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("labelled_first", [True, False])
def test_unets_of_other_guidance_fit_or_are_refused_at_submission(
    name: str, labelled_first: bool, tmp_path: Path
) -> None:
    """What `agree` lets through can be transplanted; blocks change width only where the condition is beside time."""
    small: dict[str, Any] = {"base": 32, "mult": (1, 2), "blocks": 1, "attention": ()}
    base = config("d")
    base = replace(base, model=replace(base.model, name=name, **small))
    none, labels = (replace(base, guidance=g()) for g in (NoGuidance, LabelGuidance))
    theirs, ours = (labels, none) if labelled_first else (none, labels)
    given, fresh = build_student(theirs, 0), build_student(ours, 1)
    run = replace(ours, init=from_snapshot(tmp_path))
    if name == "unet_sgdm_32":
        with pytest.raises(UserError, match=r"was trained with .*; set guidance="):
            agree(theirs, run)
        with pytest.raises(UserError, match="take a snapshot of this model"):
            transplant(given, fresh, keep_labels=False)
    else:
        agree(theirs, run)
        assert transplant(given, fresh, keep_labels=False) == ["backbone"]


def test_a_snapshot_is_hashed_once_and_other_bytes_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "s", config("d"))
    cfg = config("d", from_snapshot(tmp_path / "s"))
    promised, student = check_weights(cfg), build_student(cfg, 0)
    weights = tmp_path / "s" / "ema-500.safetensors"
    hashed, plain = [], storage.hashes

    def counted(path: Any, *kinds: Any) -> Any:
        hashed.append(Path(path).name)
        return plain(path, *kinds)

    monkeypatch.setattr("shards.storage.complete.hashes", counted)
    initialise(student, cfg, promised)
    assert hashed.count(weights.name) == 1
    held = bytearray(weights.read_bytes())
    held[-1] ^= 1
    weights.write_bytes(held)
    with pytest.raises(UserError, match="holds other bytes than its manifest says"):
        initialise(student, cfg, promised)


def test_tables_of_other_labels_cannot_be_kept(tmp_path: Path) -> None:
    labelled = config("d", guidance=LabelGuidance())
    publish(tmp_path / "s", labelled, label_free=False)
    fewer = replace(labelled, data=replace(labelled.data, classes=9))
    kept = replace(fewer, init=from_snapshot(tmp_path / "s", labels="keep"))
    with pytest.raises(
        UserError, match=r"a table of 10 labels and this network of 9.*init\.labels=drop"
    ):
        check_weights(kept)
    assert check_weights(replace(fewer, init=from_snapshot(tmp_path / "s")))


def test_no_snapshot_or_half_of_one_is_named(tmp_path: Path) -> None:
    publish(tmp_path / "s", config("d"))
    cfg = config("d", from_snapshot(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"nothing is not a complete snapshot; .*img-<images>"):
        check_weights(cfg)
    (tmp_path / "s" / "config.yaml").unlink()
    with pytest.raises(UserError, match="is not a complete snapshot"):
        check_weights(config("d", from_snapshot(tmp_path / "s")))


# --- snapshots that are broken -----------------------------------------------------------------


def spoiled(folder: Path, change: Any) -> Path:
    """A snapshot whose weights were changed before it was published."""
    publish(folder, config("d"))
    path = folder / "ema-500.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    about = json.loads((folder / "MANIFEST.json").read_text())
    (folder / "MANIFEST.json").unlink()
    storage.publish_folder(folder, extra={k: v for k, v in about.items() if k != "files"})
    return folder


BROKEN = [
    ("backbone.final.bias", torch.tensor([1.0, float("nan"), float("inf"), 2.0]),
     r"backbone\.final\.bias has 2 of 4 values that are NaN or infinite"),
    ("backbone.cls", torch.zeros(3), r"holds backbone\.cls, which its config has no place for"),
    ("head.prototypes", torch.zeros(12, 31), r"head\.prototypes is \(12, 31\), .* makes it \(12, 32\)"),
    ("backbone.patchify.weight", None, r"lacks backbone\.patchify\.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "said"), BROKEN, ids=["nan", "extra", "shape", "lacking"]
)
def test_a_broken_snapshot_is_named_before_its_first_forward(
    name: str, value: Tensor | None, said: str, tmp_path: Path
) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights.pop(name, None)
        if value is not None:
            weights[name] = value

    folder = spoiled(tmp_path / "s", change)
    with pytest.raises(UserError, match=said) as error:
        snapshot.load(folder)
    assert "ema-500.safetensors" in str(error.value)
    with pytest.raises(UserError, match=said):
        begin(config("d", from_snapshot(folder)))


# --- from official files -----------------------------------------------------------------------


def test_an_official_file_marks_every_later_snapshot(tmp_path: Path) -> None:
    path = official_file(tmp_path / "dit.pt")
    ours, record, fresh = begin(config("d", official(path)))
    assert record["saw_labels"] and record["form"] == "dit" and record["labels"] == "drop"
    assert record["null"] == "taken"
    trained = {k: record["trained"][k] for k in ("time", "path", "betas", "prediction")}
    assert trained == {"time": "index", "path": "ddpm", "betas": "linear", "prediction": "eps"}
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    weights = torch.load(path, weights_only=True)
    qkv = ours.backbone.get_parameter("blocks.3.attention.qkv.weight")
    assert torch.equal(qkv, weights["blocks.3.attn.qkv.weight"])
    assert torch.equal(ours.head.prototypes, fresh.head.prototypes)  # type: ignore[union-attr]
    never_dropped = official_file(tmp_path / "rows.pt", rows=10)
    assert begin(config("d", official(never_dropped)))[1]["null"] == "fresh"
    unlabelled = official_file(tmp_path / "null.pt", rows=1)
    assert not begin(config("d", official(unlabelled)))[1]["saw_labels"]


def test_other_weights_than_were_submitted_are_refused(tmp_path: Path) -> None:
    path = official_file(tmp_path / "dit.pt")
    cfg = config("d", official(path))
    promised = check_weights(cfg)
    official_file(path, seed=1)
    with pytest.raises(UserError, match="this run was begun on"):
        initialise(build_student(cfg, 0), cfg, promised)
    path.unlink()
    with pytest.raises(UserError, match="is not a file on this node"):
        initialise(build_student(cfg, 0), cfg, promised)


def test_a_run_is_its_weights_and_not_their_path(tmp_path: Path) -> None:
    def hashed(cfg: Config) -> str:
        return digest(identity(cfg, "data", check_weights(cfg)))

    first, other = official_file(tmp_path / "a.pt"), official_file(tmp_path / "b.pt", seed=1)
    moved = tmp_path / "elsewhere.pt"
    shutil.copy(first, moved)
    labelled = config("d", official(first), guidance=LabelGuidance())
    assert hashed(replace(labelled, init=official(moved))) == hashed(labelled)
    others = [InitConfig(), official(other), official(first, labels="keep")]
    others += [official(first, form="sit")]
    ids = {hashed(replace(labelled, init=each)) for each in others} | {hashed(labelled)}
    assert len(ids) == 5


def test_submission_names_a_file_that_does_not_fit_without_torch(tmp_path: Path) -> None:
    fits = official_file(tmp_path / "fits.safetensors")
    wide = official_file(tmp_path / "wide.safetensors", width=32)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(fits.read_bytes()[:100])
    (tmp_path / "cfg").mkdir()
    names = {"fits": fits, "wide": wide, "torn": torn, "gone": tmp_path / "gone.pt"}
    for name, path in names.items():
        (tmp_path / "cfg" / name).write_text(to_yaml(config("d", official(path))))
    publish(tmp_path / "s", config("d"))
    (tmp_path / "cfg" / "snapshot").write_text(to_yaml(config("d", from_snapshot(tmp_path / "s"))))
    program = (
        "import sys, pathlib\n"
        "from selfguide.spec.files import read_config\n"
        "from selfguide.spec.initial_weights import check_weights\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: print(path.name, len(check_weights(read_config(path))))\n"
        "    except ValueError as error: print(path.name, type(error).__name__, error)\n"
        "print('torch' in sys.modules)\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "cfg")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said[0] == "fits 64"
    assert said[1].startswith("gone UserError") and "gone.pt is not a file" in said[1]
    assert said[2] == "snapshot 64"
    assert said[3].startswith("torn UserError") and "no whole safetensors file" in said[3]
    assert (
        "x_embedder.proj.weight is (32, 1, 2, 2) there, and this model takes (64, 1, 2, 2)"
        in said[4]
    )
    assert said[5] == "False"


def test_a_name_in_a_hub_cache_is_kept_though_it_is_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = official_file(tmp_path / "wide.safetensors", width=32).rename(tmp_path / "abc123")
    link = tmp_path / "model.safetensors"
    link.symlink_to(wide)
    monkeypatch.chdir(tmp_path)
    found = submission.absolute(config("d", official(Path("model.safetensors"))))
    assert found.init.path == str(link)
    with pytest.raises(UserError, match="of another size"):  # its header was read
        check_weights(found)
    monkeypatch.setenv("HOME", str(tmp_path))
    home = submission.absolute(config("d", official(Path("~/model.safetensors"))))
    assert home.init.path == str(link)


def test_a_run_that_has_a_checkpoint_is_resubmitted_without_its_first_weights(
    tmp_path: Path,
) -> None:
    path = official_file(tmp_path / "dit.pt")
    cfg = config("d", official(path), runs=str(tmp_path / "runs"))
    new = RunFolder(tmp_path / "runs" / cfg.experiment / "new")
    sha256 = submission.first_weights(cfg, new)
    what = identity(cfg, "data", sha256)
    run = RunFolder(tmp_path / "runs" / cfg.experiment / digest(what))
    run.root.mkdir(parents=True)
    write_record(run.run_json, {"id": run.root.name, "identity": what})
    named = replace(cfg, name=run.root.name)
    path.unlink()
    with pytest.raises(UserError, match=r"is not a file; .* to go on with a run, name=RUN"):
        submission.first_weights(cfg, new)
    with pytest.raises(UserError, match="has no checkpoint yet; put the weights back"):
        submission.first_weights(named, run)
    checkpoint = run.checkpoint(64)
    checkpoint.mkdir(parents=True)
    (checkpoint / "state").write_bytes(b"held")
    storage.publish_folder(checkpoint, extra={})
    assert submission.first_weights(named, run) == sha256
    # weights that are there are asked, whatever the run says
    official_file(path, seed=1)
    assert submission.first_weights(named, run) != sha256


# --- laws --------------------------------------------------------------------------------------

BASE = ["experiment=digits_dit", "cluster=local"]
LAWS = [
    ("init.path=x", "init.path=x is read with init.source=snapshot or init.source=official only"),
    ("init.form=dit", "init.form=dit is read with init.source=official only"),
    ("init.labels=keep", "init.labels=keep is read with init.source=snapshot or init.source=official only"),
    ("init.time=relearn", "init.time=relearn is read with init.source=snapshot or init.source=official only"),
    ("init=snapshot", "init.source=snapshot needs weights; give 'init.path="),
    ("init=dit init.path=''", "init.source=official needs weights; give 'init.path="),
    ("init=dit init.path=s3://b/dit.pt", "copy them there"),
    ("init=snapshot init.path=x init.form=sit", "init.form=sit is read with init.source=official only"),
    ("init.source=official init.path=x.pt", "give init.form=dit or sit or uvit"),
    ("init=dit init.path=x.zip", "init.path=x.zip is not one of .safetensors"),
    ("init=uvit init.path=x.pt", "holds the weights of a U-ViT, and model.name=dit_digits"),
    ("init=dit init.path=x.pt", "model.time=noise_1000, and the weights of init.path=x.pt were fed index; set "
     "model.time=index, or init.time=relearn"),
    ("init=sit init.path=x.pt model.time=index", "were fed data; set model.time=data"),
    ("init=dit init.path=x.pt model.time=index model.norm=rms", "model.norm=rms, and a published DiT has layer; "
     "set model.norm=layer"),
    ("init=dit init.path=x.pt model.time=index model.qk_norm=true", "set model.qk_norm=false"),
    ("init=dit init.path=x.pt model.time=index init.labels=keep", "not conditioned on labels; set init.labels=drop, or "
     "guidance=labels"),
    ("init=dit init.path=x.pt model.time=index", "path.name=rectified_flow path.prediction=v, and the weights of "
     "init.path=x.pt learned path.name=ddpm path.betas=linear path.prediction=eps; set path.name=ddpm "
     "path.betas=linear path.prediction=eps, or init.time=relearn"),
    ("init=dit init.path=x.pt model.time=index path=ddpm_scaled", "path.betas=scaled_linear path.prediction=eps, and"),
    ("init=sit init.path=x.pt model.time=data path=vp", "learned path.name=rectified_flow path.prediction=v; set"),
    ("init=uvit init.path=x.pt model=uvit_s_2 guidance=none path=ddpm_scaled",
     "learned path.name=vp path.prediction=eps; set"),
    ("init=uvit init.path=x.pt model=uvit_s_2 guidance=none model.time=noise_1000 path=vp",
     "learned path.name=ddpm path.betas=scaled_linear path.prediction=eps; set"),
    ("init=keep", "init=keep does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "said"), LAWS)
def test_a_broken_law_names_field_value_and_cure(typed: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        validate(compose([*BASE, *typed.split()]))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "init=dit init.path=x.pt model.time=index path=ddpm",
        "init=sit init.path=x.safetensors model.time=data",
        "init=sit init.path=x.safetensors model.time=data path=sgfm",
        "init=uvit init.path=x.pt model=uvit_s_2 guidance=none path=vp",
        "init=uvit init.path=x.pt model=uvit_s_2 guidance=none model.time=noise_1000 path=ddpm_scaled",
        "init=dit init.path=x.pt init.time=relearn model.time=data",
        "init=dit init.path=x.pt model.time=index path=ddpm guidance=labels init.labels=keep",
        "init=snapshot init.path=some/folder",
    ],
)
def test_what_fits_is_let_through(typed: str) -> None:
    cfg = compose([*BASE, *typed.split()])
    validate(cfg)
    validate_init(cfg, architecture(cfg))
