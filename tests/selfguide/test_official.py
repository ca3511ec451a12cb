"""Official checkpoints compute here what they compute where they come from, and whatever does not fit is named."""

from __future__ import annotations

import argparse
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.models import assemble
from selfguide.models.backbone import Backbone
from selfguide.models.blocks import time_input
from selfguide.networks.official import adopt
from selfguide.spec import pickled
from selfguide.spec.config import Config, InitConfig
from selfguide.spec.dit import DiTArchitecture
from selfguide.spec.initial_weights import check_weights
from selfguide.spec.official import FORMS, POSITIONS, contents
from selfguide.spec.sizes import TABLE, override
from selfguide.spec.uvit import UViTArchitecture
from selfguide.weights import read_weights
from shards.errors import UserError
from tests.selfguide import published
from tests.selfguide.published import Weights
from tests.selfguide.test_online import online_config

CLASSES, BATCH = 10, 6  # as many as the digits' models are published with
SMALL: dict[str, Any] = {"size": 8, "channels": 3, "patch": 2, "width": 32, "depth": 4}


def init(form: str = "dit", **more: Any) -> Config:
    """A run that begins from such a file; the name says how many classes its model is published with."""
    base = online_config()
    begin = InitConfig(**{"source": "official", "path": "weights.pt", "form": form} | more)
    name = "uvit_digits" if form == "uvit" else "dit_digits"
    return replace(base, init=begin, model=replace(base.model, name=name))


def dit_weights(**changes: Any) -> Weights:
    torch.manual_seed(1)
    return published.dit_weights(**SMALL | {"rows": CLASSES + 1, "sigma": True} | changes)


def uvit_weights(**changes: Any) -> Weights:
    torch.manual_seed(1)
    return published.uvit_weights(**SMALL | {"rows": CLASSES + 1, "conv": True} | changes)


def small(name: str = "dit_s_2", **changes: Any) -> Backbone:
    torch.manual_seed(2)
    net = override(name, **SMALL | {"heads": 4, "classes": CLASSES} | changes)
    backbone = assemble(net).eval()
    for parameter in backbone.parameters():  # an untrained net has zeros that would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return backbone


def images(channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, channels, 8, 8, generator=generator)
    return x, torch.linspace(0.01, 0.99, BATCH), torch.tensor([0, 1, 2, 3, 4, 0])


def unconditioned() -> tuple[Condition, Condition]:
    return Condition.of(id=torch.zeros(BATCH, dtype=torch.int64)).null(), Condition.unconditional(
        BATCH
    )


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1  # else nothing is compared
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sigma", [True, False])
def test_dit_is_dit(sigma: bool) -> None:
    weights, (x, tau, y) = dit_weights(), images()
    ours = small(learn_sigma=sigma)
    found = adopt(ours, weights, init(labels="keep"))
    assert found.saw_labels and found.sigma
    null = torch.full_like(y, CLASSES)
    pairs = [(Condition.of(id=y), y), *((condition, null) for condition in unconditioned())]
    with torch.no_grad():
        for condition, rows in pairs:
            expected = published.dit(weights, x, 1000 * tau - 1, rows, patch=2, heads=4)
            assert expected.shape[1] == 6
            close(ours(x, tau, condition), expected if sigma else expected[:, :3])


@pytest.mark.parametrize("sigma", [True, False])
def test_sit_predicts_the_derivative_by_its_data_time(sigma: bool) -> None:
    weights, (x, tau, y) = dit_weights(sigma=sigma), images()
    ours = small(time="data", learn_sigma=False)
    adopt(ours, weights, init("sit", labels="keep"))
    with torch.no_grad():
        theirs = published.dit(weights, x, 1 - tau, y, patch=2, heads=4)[:, :3]
        close(ours(x, tau, Condition.of(id=y)), -theirs)


@pytest.mark.parametrize("conv", [True, False])
def test_uvit_is_uvit(conv: bool) -> None:
    weights, (x, tau, y) = uvit_weights(conv=conv), images()
    ours = small("uvit_l_2", conv=conv)
    adopt(ours, weights, init("uvit", labels="keep"))
    null = torch.full_like(y, CLASSES)
    pairs = [(Condition.of(id=y), y), *((condition, null) for condition in unconditioned())]
    with torch.no_grad():
        for condition, rows in pairs:
            expected = published.uvit(weights, x, 999 * tau, rows, patch=2, heads=4)
            close(ours(x, tau, condition), expected)


def test_an_unconditional_uvit_has_no_token_of_condition() -> None:
    weights, (x, tau, _) = uvit_weights(rows=0), images()
    ours = small("uvit_s_2", classes=0)
    assert not adopt(ours, weights, init("uvit")).saw_labels
    with torch.no_grad():
        expected = published.uvit(weights, x, 999 * tau, None, patch=2, heads=4)
        close(ours(x, tau, Condition.unconditional(BATCH)), expected)


def test_new_tokens_are_fresh_and_the_others_keep_their_place() -> None:
    """SGFM's order is [CLS, time, condition, patches], U-ViT's [label, time, patches]."""
    weights = uvit_weights()
    ours = small("uvit_l_2", classes=0, dense=32, cls_token=True)
    fresh = {n: t.clone() for n, t in ours.state_dict().items()}
    adopt(ours, weights, init("uvit"))
    table, theirs = ours.get_parameter("positions"), weights[POSITIONS][0]
    assert torch.equal(table[0], fresh["positions"][0])
    assert torch.equal(table[1:], torch.cat((theirs[1:2], theirs[0:1], theirs[2:])))
    assert torch.equal(ours.get_parameter("cls"), fresh["cls"])
    # a net without labels is conditioned by the token that the label had
    null = weights["label_emb.weight"][-1]
    assert torch.equal(ours.get_parameter("condition.null"), null)
    assert torch.equal(ours.get_parameter("condition.unconditional"), null)


def test_masks_are_read_beside_an_image_that_is_read_as_before() -> None:
    weights, (x, tau, _) = dit_weights(), images()
    ours = small(spatial=2, classes=0, learn_sigma=True)
    fresh = ours.get_parameter("patchify.weight").clone()
    adopt(ours, weights, init())
    assert torch.equal(ours.get_parameter("patchify.weight")[:, 3:], fresh[:, 3:])
    with torch.no_grad():
        rows = torch.full((BATCH,), CLASSES)
        expected = published.dit(weights, x, 1000 * tau - 1, rows, patch=2, heads=4)
        close(ours(x, tau, Condition.unconditional(BATCH)), expected)


def test_a_dropped_table_leaves_its_null_row_and_its_memory() -> None:
    weights, ours = dit_weights(), small()
    fresh = ours.get_parameter("condition.labels.weight").clone()
    found = adopt(ours, weights, init(labels="drop"))
    assert found.saw_labels  # what it learned from them is still in the blocks
    assert torch.equal(ours.get_parameter("condition.labels.weight"), fresh)
    null = weights["y_embedder.embedding_table.weight"][-1]
    assert torch.equal(ours.get_parameter("condition.null"), null)
    alone = adopt(small(classes=0), dit_weights(rows=1), init())
    assert not alone.saw_labels


def condition_rows(backbone: Backbone) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in backbone.state_dict().items() if n.startswith("condition.")}


@pytest.mark.parametrize("form", ["dit", "uvit"])
@pytest.mark.parametrize("labels", ["drop", "keep"])
def test_without_a_null_row_no_class_becomes_null(form: str, labels: str) -> None:
    """Trained without dropping labels: as many rows as classes."""
    make, name = (dit_weights, "dit_s_2") if form == "dit" else (uvit_weights, "uvit_l_2")
    weights, ours = make(rows=CLASSES), small(name)
    fresh = condition_rows(ours)
    found = adopt(ours, weights, init(form, labels=labels))
    assert found.saw_labels and not found.null and found.classes == CLASSES
    if labels == "keep":
        fresh["condition.labels.weight"] = weights[found.form.table]
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in condition_rows(ours).items())


def test_a_table_of_who_knows_how_many_classes() -> None:
    """Of 7 rows nobody can say whether the last is a class; a run that keeps 6 or 7 classes can."""
    weights = dit_weights(rows=7)
    ours = small()
    fresh = condition_rows(ours)
    assert not adopt(ours, weights, init()).null
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in condition_rows(ours).items())
    table = weights[FORMS["dit"].table]
    for classes in (6, 7):
        ours = small(classes=classes)
        found = adopt(ours, weights, init(labels="keep"))
        assert torch.equal(ours.get_parameter("condition.labels.weight"), table[:classes])
        assert found.null is (classes == 6)
    with pytest.raises(UserError, match=r"has 7 classes, this network 5; set init\.labels=drop"):
        adopt(small(classes=5), weights, init(labels="keep"))
    # the publisher's 10 classes and null are likelier than a run's 11
    with pytest.raises(UserError, match="has 10 classes and a null row, this network 11"):
        adopt(small(classes=11), dit_weights(), init(labels="keep"))


@pytest.mark.parametrize("shape", [(), (32,), (1, 11, 32)])
def test_a_label_table_that_is_no_table_is_named(shape: tuple[int, ...]) -> None:
    for form, weights in (("dit", dit_weights()), ("uvit", uvit_weights())):
        weights[FORMS[form].table] = torch.zeros(shape)
        ours = small("uvit_l_2" if form == "uvit" else "dit_s_2")
        with pytest.raises(UserError, match=r"of shape \(.*a table of labels is \(rows, 32\)"):
            adopt(ours, weights, init(form))


NEVER_DROPPED = ("uvit_m_4",)  # ImageNet 64: no null row (Bao et al. 2023)


@pytest.mark.parametrize("name", [n for n in TABLE if n.startswith(("dit_", "uvit_"))])
def test_every_published_size_has_a_place_for_every_tensor(name: str) -> None:
    """On the meta device: names and shapes of the tables are those of the modules, and nothing of ours is left out."""
    net = TABLE[name]
    form = "dit" if isinstance(net, DiTArchitecture) else "uvit"
    with torch.device("meta"):
        own = {n: tuple(t.shape) for n, t in assemble(net).state_dict().items()}
        make = published.dit_weights if form == "dit" else published.uvit_weights
        flag = {"sigma": net.learn_sigma} if form == "dit" else {"conv": net.conv}  # type: ignore
        sizes = {k: getattr(net, k) for k in SMALL}
        rows = net.classes + 1 if net.classes else int(form == "dit")
        if name in NEVER_DROPPED:
            rows = net.classes
        theirs = make(**sizes, rows=rows, **flag)  # type: ignore[arg-type]
    shapes = {n: tuple(t.shape) for n, t in theirs.items()}
    found = contents(shapes, form, net, "file", (net.classes,))
    assert found.classes == net.classes and found.null is (rows > net.classes)
    assert all(own[ours] == shapes[name] for name, ours in found.names.items())
    apart = {"positions", "condition.null", "condition.unconditional", "condition.labels.weight"}
    assert own.keys() - set(found.names.values()) <= apart
    assert shapes.keys() - found.names.keys() <= {POSITIONS, FORMS[form].table}
    assert len(set(found.names.values())) == len(found.names)


WRONG = [
    ("width", {}, {"width": 64}, "x_embedder.proj.weight is (32, 3, 2, 2) there, and this model takes (64, 3, 2, 2)"),
    ("patch", {}, {"patch": 4}, "x_embedder.proj.weight is (32, 3, 2, 2) there, and this model takes (32, 3, 4, 4)"),
    ("channels", {}, {"channels": 4}, "(32, 4, 2, 2)"),
    ("input", {}, {"size": 16}, "pos_embed is (1, 16, 32) there, and this model takes (1, 64, 32)"),
    ("deeper", {}, {"depth": 5}, "lacks blocks.4.attn.qkv.weight and 9 more"),
    ("shallower", {}, {"depth": 3}, "holds blocks.3.attn.qkv.weight and 9 more"),
    ("classes", {}, {"classes": 4}, "has 10 classes and a null row, this network 4; set init.labels=drop"),
    ("sigma", {"sigma": False}, {}, "predicts no sigma and model.learn_sigma=true"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "ours", "said"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_another_size_is_named(theirs: dict[str, Any], ours: dict[str, Any], said: str) -> None:
    backbone = small(**{"learn_sigma": True} | ours)
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    with pytest.raises(UserError) as error:
        adopt(backbone, dit_weights(**theirs), init(labels="keep"))
    assert said in str(error.value) and "init.path=weights.pt" in str(error.value)
    assert all(torch.equal(before[n], t) for n, t in backbone.state_dict().items())


def test_what_the_file_has_beside_is_not_ignored() -> None:
    weights = uvit_weights() | {"context_embed.weight": torch.zeros(32, 768)}
    with pytest.raises(UserError, match=r"holds context_embed\.weight"):
        adopt(small("uvit_l_2"), weights, init("uvit"))
    weights = uvit_weights(conv=False)
    with pytest.raises(UserError, match=r"lacks final_layer\.weight and 1 more"):
        adopt(small("uvit_l_2"), weights, init("uvit"))


def test_values_that_are_no_numbers_are_named() -> None:
    weights = dit_weights()
    weights["blocks.1.mlp.fc1.bias"][3] = float("nan")
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc1\.bias has 1 of 128 values"):
        adopt(small(), weights, init())


def test_dit_with_other_positions_is_refused() -> None:
    weights = dit_weights()
    rows_first = weights[POSITIONS].unflatten(2, (2, -1)).flip(2).flatten(2)
    with pytest.raises(UserError, match="not DiT's fixed sinusoid"):
        adopt(small(), weights | {POSITIONS: rows_first}, init())
    adopt(small(), weights | {POSITIONS: weights[POSITIONS].bfloat16().float()}, init())


@pytest.mark.parametrize("kind", ["bare.pt", "trained.pt", "nested.pth", "file.safetensors"])
def test_files_of_every_kind_hold_the_same(kind: str, tmp_path: Path) -> None:
    weights, path = dit_weights(), tmp_path / kind
    other = {name: torch.zeros_like(t) for name, t in weights.items()}
    arguments = argparse.Namespace(model="DiT-XL/2", global_batch_size=256)
    if kind == "file.safetensors":
        save_file({n: t.half() for n, t in weights.items()}, path)
    else:
        held: Any = {
            "bare.pt": weights,
            "trained.pt": {"model": other, "ema": weights, "opt": {"lr": 0.1}, "args": arguments},
            "nested.pth": {"state_dict": {"model": weights}, "step": 7},
        }[kind]
        torch.save(held, path)
    read = read_weights(path, "weights")
    assert read.keys() == weights.keys()
    tolerance = 2e-3 if kind == "file.safetensors" else 0.0
    for name, tensor in weights.items():
        assert read[name].dtype == torch.float32
        torch.testing.assert_close(read[name], tensor, atol=tolerance, rtol=tolerance)


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["bare.pt", "nested.pth", "parameters.bin"])
def test_shapes_of_a_checkpoint_are_known_without_torch(
    kind: str, prefix: str, tmp_path: Path
) -> None:
    weights = {f"{prefix}{name}": tensor for name, tensor in dit_weights().items()}
    held: Any = {
        "bare.pt": weights,
        "nested.pth": {"state_dict": {"ema": weights}, "args": argparse.Namespace(lr=1)},
        "parameters.bin": {n: torch.nn.Parameter(t.half()) for n, t in weights.items()},
    }[kind]
    torch.save(held, tmp_path / kind)
    found = pickled.shapes(tmp_path / kind)
    assert found == {name: tuple(t.shape) for name, t in dit_weights().items()}
    assert read_weights(tmp_path / kind, "weights").keys() == found.keys()
    with pytest.raises(UserError, match="is of another size"):
        check_weights(init(path=str(tmp_path / kind)))


@pytest.mark.parametrize("held", [b"", b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"\x80\x02}."])
def test_bytes_that_are_no_checkpoint_have_no_shapes(held: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(held)
    assert pickled.shapes(tmp_path / "a.pt") is None
    torch.save({"weights": Trap()}, tmp_path / "trap.pt")
    assert pickled.shapes(tmp_path / "trap.pt") is None
    assert not (tmp_path / "sprung").exists()


def test_a_file_that_would_run_something_is_only_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    names = ["trap.pt", "trap.pth", "module.pt", "torn.pt", "empty.pt", "torn.safetensors"]
    # what the unpickler ends in: IndexError, KeyError, UnicodeDecodeError, ...
    for i, held in enumerate((b"0", b"garbage", b"h\x07.", b"X\x02\0\0\0\xff\xfe.")):
        (tmp_path / f"garbage_{i}.pt").write_bytes(held)
        names.append(f"garbage_{i}.pt")
    for name in names:
        with pytest.raises(
            UserError, match=r"^init\.path=X cannot be read as tensors only"
        ) as error:
            read_weights(tmp_path / name, "init.path=X")
        assert "weights_only" not in str(error.value)
        assert "must be a safetensors file, or a torch file of tensors" in str(error.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        read_weights(tmp_path / "list.pt", "init.path=X")
    assert not (tmp_path / "sprung").exists()


def test_what_a_published_net_was_fed_is_what_ours_is_fed() -> None:
    """The inputs that the forwards above were given: DiT's index, SiT's data-time, U-ViT's 999 t."""
    tau = torch.tensor([0.001, 0.5, 1.0])
    fed = {form: time_input(FORMS[form].trained[0].time, tau) for form in FORMS}
    torch.testing.assert_close(fed["dit"], torch.tensor([0.0, 499.0, 999.0]))
    torch.testing.assert_close(fed["sit"], torch.tensor([0.999, 0.5, 0.0]))
    torch.testing.assert_close(fed["uvit"], torch.tensor([0.999, 499.5, 999.0]))
    assert isinstance(TABLE["uvit_l_2"], UViTArchitecture)
