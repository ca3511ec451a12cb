"""What networks make of labels of augmentation: sizes, zeros, states, U-ViT's closed pair, and other first weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selfguide.diffusion.conditions import CONDITIONED, NULL, UNCONDITIONAL, Condition
from selfguide.models import assemble, build
from selfguide.models.backbone import Backbone
from selfguide.models.uvit import UViT
from selfguide.networks.student import build_student
from selfguide.spec.config import AugmentConfig
from selfguide.spec.config.augment import LABELS
from selfguide.spec.initial_weights import agree
from selfguide.spec.official import check_release
from selfguide.spec.sizes import override, row
from selfguide.spec.uvit import UViTArchitecture
from selfguide.training.initialise import transplant
from shards.errors import UserError
from tests.selfguide.test_online import online_config

FAMILIES = {
    "dit_digits": {},
    "unet_digits": {},
    "uvit_digits": {},
    "lightningdit_b_1": {"size": 4, "width": 32, "heads": 2, "depth": 2},
    "unet_ddpm": {"base": 32, "size": 16},
    "unet_adm_64": {"base": 32, "size": 16, "head_width": 16},
    "unet_sgdm_32": {"base": 32, "size": 16, "classes": 4, "heads": 2},
}


def networks(name: str, **changes: Any) -> Backbone:
    torch.manual_seed(0)
    return assemble(override(name, **FAMILIES.get(name, {}) | changes))


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_closed_formula(name: str) -> None:
    net = networks(name, augment=LABELS)
    assert sum(p.numel() for p in net.parameters()) == net.net.parameters()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("unet_edm_32", 9 * 128),  # Karras et al. 2022's release, of 55,733,891
        ("unet_ddpm", 9 * 128),
        ("unet_adm_64", 9 * 192),
        ("dit_b_1", 9 * 768),
        ("uvit_s_2", 9 * 512 + 512),  # and its place
    ],
)
def test_labels_add_so_many_parameters_to_published_nets(name: str, more: int) -> None:
    with torch.device("meta"):
        net = build(name, augment=LABELS)
    count = sum(p.numel() for p in net.parameters())
    assert count == row(name).parameters() + more == net.net.parameters()
    assert name != "unet_edm_32" or count == 55_733_891


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_equal_torchs_counter(name: str) -> None:
    net = networks(name, augment=LABELS).eval()
    x, tau = torch.randn(1, net.net.channels, net.net.size, net.net.size), torch.rand(1)
    plain, found = networks(name).eval(), []
    for each in (net, plain):
        kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), kernel:
            each(x, tau, Condition.unconditional(1))
        found.append(counter.get_total_flops())
    more = net.net.forward_macs() - plain.net.forward_macs()
    assert found[0] - found[1] == 2 * more > 0


@pytest.mark.parametrize("name", [name for name in FAMILIES if "uvit" not in name])
def test_a_net_with_labels_begins_as_one_without_and_is_it_at_zeros(name: str) -> None:
    plain, told = networks(name).eval(), networks(name, augment=LABELS).eval()
    weights = told.state_dict()
    assert all(torch.equal(t, weights[n]) for n, t in plain.state_dict().items())
    assert weights.keys() - plain.state_dict().keys() == {"augment.linear.weight"}
    x, tau = torch.randn(2, plain.net.channels, plain.net.size, plain.net.size), torch.rand(2)
    condition = Condition.unconditional(2)
    assert torch.equal(plain(x, tau, condition), told(x, tau, condition))


@pytest.mark.parametrize("name", ["dit_digits", "unet_digits", "uvit_digits"])
def test_labels_are_read_in_every_state_and_their_absence_is_zeros(name: str) -> None:
    net = networks(name, augment=LABELS, classes=3).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, tau = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1), torch.full((3,), 0.5)
    state = torch.tensor([CONDITIONED, NULL, UNCONDITIONAL])
    bare = Condition(state, id=torch.tensor([1, 1, 1]))
    labels = torch.randn(3, LABELS)
    out = net(x, tau, bare)
    assert torch.equal(out, net(x, tau, replace(bare, augment=torch.zeros(3, LABELS))))
    told = net(x, tau, replace(bare, augment=labels))
    assert (told - out).abs().flatten(1).amax(1).min() > 1e-4
    assert torch.equal(replace(bare, augment=labels).null().augment, labels)


def test_a_net_without_labels_refuses_them_and_one_with_them_other_widths() -> None:
    x, tau = torch.randn(2, 1, 8, 8), torch.rand(2)
    given = replace(Condition.unconditional(2), augment=torch.zeros(2, LABELS))
    with pytest.raises(UserError, match=r"condition.augment was given"):
        networks("dit_digits")(x, tau, given)
    with pytest.raises(UserError, match=r"condition.augment has shape \(2, 8\)"):
        networks("dit_digits", augment=LABELS)(x, tau, replace(given, augment=torch.zeros(2, 8)))


def uvit(**changes: Any) -> UViT:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"size": 8, "channels": 2, "patch": 2, "width": 16, "depth": 4}
    net = UViT(UViTArchitecture(**(shape | {"heads": 4, "augment": LABELS} | changes)))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def test_attention_is_closed_between_cls_and_augmentation_alone() -> None:
    net = uvit(cls_token=True, classes=3)
    assert net.net.extras == 4
    x = torch.randn(1, net.net.extras + net.net.tokens, 16)
    cls, augment = 0, 3
    open_to = net._open_to(x)
    assert open_to is not None and int((~open_to).sum()) == 2
    attend = net.blocks[0].attention  # type: ignore[union-attr]
    before = attend(x, open_to)
    for perturbed, unmoved in ((augment, cls), (cls, augment)):
        other = x.clone()
        other[:, perturbed] += 1
        change = (attend(other, open_to) - before).abs().amax((0, 2))
        assert change[unmoved] == 0
        change[unmoved] = 1
        assert (change > 1e-4).all(), "every other token reads it"


@pytest.mark.parametrize("changes", [{}, {"route": 0.5}])
def test_cls_reads_augmentation_through_other_tokens_only(changes: dict[str, Any]) -> None:
    """After one block nothing of it has reached [CLS], after two it has, by way of the patches."""
    net = uvit(cls_token=True, depth=6, **changes)
    net.train(bool(changes))
    x, tau = torch.randn(2, 2, 8, 8), torch.rand(2)
    found = []
    for labels in (torch.zeros(2, LABELS), torch.randn(2, LABELS)):
        torch.manual_seed(1)
        condition = replace(Condition.unconditional(2), augment=labels)
        found.append([tokens[:, 0] for tokens in net.features_of(x, tau, condition, (1, 2, 5))])
    first, second, routed = (
        float((a - b).abs().max().detach()) for a, b in zip(*found, strict=True)
    )
    assert first == 0 and second > 1e-4 and routed > 1e-4


def test_without_cls_every_token_attends_to_all() -> None:
    net = uvit()
    assert net._open_to(torch.zeros(1, 3, 16)) is None and not net.net.apart
    assert uvit(augment=0, cls_token=True)._open_to(torch.zeros(1, 3, 16)) is None


@pytest.mark.parametrize("name", ["dit_digits", "unet_digits", "uvit_digits"])
def test_a_run_may_begin_from_a_snapshot_of_images_as_they_are_and_the_other_way(
    name: str,
) -> None:
    base = replace(online_config(), model=replace(online_config().model, name=name))
    if name != "dit_digits":
        base = replace(base, guidance=replace(base.guidance, pooling="mean", prototype_width=None))
    told = replace(base, augment=AugmentConfig(probability=0.12))
    for theirs, ours in ((base, told), (told, base)):
        agree(theirs, ours)
        given, own = build_student(theirs, 1), build_student(ours, 2)
        fresh = {n: t.clone() for n, t in own.state_dict().items()}
        transplant(given, own, keep_labels=False)
        now = own.state_dict()
        assert torch.equal(
            now["backbone." + _first(name)], given.state_dict()["backbone." + _first(name)]
        )
        for each in (n for n in now if ".augment." in n):
            assert torch.equal(now[each], fresh[each])
        if name == "uvit_digits":
            here, there = (own, given) if ours is told else (given, own)
            extras = here.backbone.net.extras  # type: ignore[attr-defined]
            rows = torch.cat((torch.arange(extras - 1), torch.arange(extras, extras + 16)))
            assert torch.equal(
                here.backbone.positions[rows],
                there.backbone.positions,  # type: ignore[index]
            )


def test_a_net_with_labels_has_no_place_in_an_official_file() -> None:
    with pytest.raises(UserError, match="augment=9, labels that say how an image was augmented"):
        check_release(override("dit_b_1", augment=LABELS), "dit")


def _first(name: str) -> str:
    return "time.hidden.weight" if name != "uvit_digits" else "patchify.weight"
