"""Weak models: what guidance leads away from, what each of them is, what it costs, and what is refused."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.compose import compose
from selfguide.diffusion.conditions import CONDITIONED, UNCONDITIONAL, Condition
from selfguide.diffusion.denoiser import DROPPED, Denoiser, Head, Mixed, Other, Routed, Weak
from selfguide.diffusion.paths import RectifiedFlow
from selfguide.models import assemble
from selfguide.networks.auxiliary import AuxiliaryHead
from selfguide.sampling.condition_sampler import condition_sampler
from selfguide.sampling.cost import cost
from selfguide.sampling.generate import generate_each
from selfguide.sampling.weak import build_denoiser, check, same_groups
from selfguide.snapshot import Snapshot, load
from selfguide.spec import weak as words
from selfguide.spec.config import SamplerConfig
from selfguide.spec.config.sampler import plain_sampler, protocol_settings
from selfguide.spec.recipe import sampler_of
from selfguide.spec.sizes import override
from selfguide.spec.validate import validate
from selfguide.spec.weak import WeakModel
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.snapshots import write_snapshot

NET = override("dit_digits", depth=6, route=0.5, classes=10)
LAYER = 2
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
SEEDS = torch.tensor([5, 1, 9])
IDS = Condition.of(id=torch.tensor([0, 4, 9]))


def drawn(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return module.eval().requires_grad_(False)


BACKBONE, HEAD = drawn(assemble(NET), 0), drawn(AuxiliaryHead(NET, LAYER), 1)


def denoiser(weak: Weak = DROPPED, g: float = 1.0, **settings: Any) -> Denoiser:
    return Denoiser(BACKBONE, RectifiedFlow(), IDS, g, weak=weak, **settings)


def weak_models() -> dict[str, Weak]:
    other = Denoiser(drawn(assemble(NET), 7), RectifiedFlow(), IDS)
    alone = {"head": Head(LAYER, HEAD), "routed": Routed(SEEDS), "other": Other(other)}
    return {**alone, "mixed": Mixed([(alone["head"], 0.3), (alone["other"], 0.5), (DROPPED, 0.2)])}


NAMES = ["head", "routed", "other", "mixed"]


@pytest.mark.parametrize("name", NAMES)
def test_guidance_is_the_weak_model_plus_g_times_what_it_lacks(name: str) -> None:
    weak = weak_models()[name]
    strong, its = denoiser().velocity(X, 0.4), denoiser(weak, 0.0).velocity(X, 0.4)
    assert (strong - its).abs().max() > 1e-3
    found = denoiser(weak, 2.5).velocity(X, 0.4)
    torch.testing.assert_close(found, its + 2.5 * (strong - its))


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_one_is_the_strong_model_to_the_bit_and_runs_no_weak_one(name: str) -> None:
    guided = denoiser(weak_models()[name])
    assert torch.equal(guided.velocity(X, 0.4), denoiser().velocity(X, 0.4))
    assert guided.ran == {"strong": 1}


@pytest.mark.parametrize("name", NAMES)
def test_outside_of_its_interval_a_weak_model_is_not_run(name: str) -> None:
    guided = denoiser(weak_models()[name], 2.0, interval=(0.2, 0.6))
    for tau, ran in ((0.1, "strong"), (0.2, "both"), (0.6, "both"), (0.7, "strong")):
        before = guided.ran[ran]
        found = guided.velocity(X, tau)
        assert guided.ran[ran] == before + 1
        assert torch.equal(found, denoiser().velocity(X, tau)) == (ran == "strong")
    assert guided.evaluations == 4


@pytest.mark.parametrize("g", [0.0, 0.5, 3.0, 40.0])
def test_a_weak_model_that_is_the_strong_one_changes_nothing_at_any_weight(g: float) -> None:
    same = Other(denoiser())
    torch.testing.assert_close(
        denoiser(same, g).velocity(X, 0.4), denoiser().velocity(X, 0.4), rtol=0, atol=0
    )


def test_a_head_alone_is_what_it_is_beside_the_network() -> None:
    both = Head(LAYER, HEAD).both(denoiser(), X, 0.4)
    alone = Head(LAYER, HEAD).alone(denoiser(), X, 0.4)
    assert torch.equal(both[1], alone)
    assert torch.equal(both[0], denoiser().velocity(X, 0.4))


def test_away_from_several_is_the_sum_of_the_ways_away_from_each_by_its_share() -> None:
    strong = denoiser().velocity(X, 0.4)
    parts = [(Head(LAYER, HEAD), 0.25), (weak_models()["other"], 0.75)]
    expected = strong + sum(
        1.5 * share * (strong - denoiser(part, 0.0).velocity(X, 0.4)) for part, share in parts
    )
    found = denoiser(Mixed(parts), 2.5).velocity(X, 0.4)
    torch.testing.assert_close(found, expected)


def test_the_routed_way_is_that_of_training_for_the_tokens_that_it_draws() -> None:
    tau = torch.full((3,), 0.4)
    torch.manual_seed(3)
    trained = BACKBONE.train()(X, tau, IDS)
    BACKBONE.eval()
    torch.manual_seed(3)
    with BACKBONE.routed(torch.rand(3, NET.tokens)):
        assert torch.equal(BACKBONE(X, tau, IDS), trained)
    dense = BACKBONE(X, tau, IDS)
    assert (dense - trained).abs().max() > 1e-3


def test_which_tokens_skip_is_a_function_of_seed_and_noise_time_alone() -> None:
    whole = Routed(SEEDS).alone(denoiser(), X, 0.4)
    order = torch.tensor([2, 0, 1])
    turned = replace(denoiser(), condition=IDS.map(lambda each: each[order]))
    torch.testing.assert_close(
        Routed(SEEDS[order]).alone(turned, X[order], 0.4), whole[order], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(Routed(SEEDS).alone(denoiser(), X, 0.4), whole)
    others = Routed(SEEDS + 1).alone(denoiser(), X, 0.4)
    assert (others - whole).abs().max() > 1e-3


def test_a_forward_after_one_that_failed_on_the_routed_way_is_dense_again() -> None:
    before = denoiser().velocity(X, 0.4)
    with pytest.raises(RuntimeError), BACKBONE.routed(torch.rand(3, NET.tokens)):
        raise RuntimeError
    assert torch.equal(denoiser().velocity(X, 0.4), before)


def test_a_network_that_never_skipped_tokens_has_no_routed_way() -> None:
    net = drawn(assemble(replace(NET, route=0.0)), 0)
    with pytest.raises(UserError, match=r"without model\.route"), net.routed(torch.rand(3, 16)):
        pass


# ---- of snapshots ------------------------------------------------------------------------------------

GROUPS = 30
P = [1 / GROUPS] * GROUPS
ONLINE = {"source": "online", "told": True, "p": P, "level": "image"}


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of snapshots of a run: at 7 images, before the switch, and at 9 and 14."""
    root = tmp_path_factory.mktemp("weak")
    manifest = manifests.load(digits)
    data = {"root": str(digits), "header": manifest.header, "manifest": manifest.hash}
    for images in (7, 9, 14):
        told = ONLINE if images > 7 else {**ONLINE, "told": False, "p": None}
        write_snapshot(
            root / f"img-{images:09d}", digits, experiment="digits_guide", images=images, data=data,
            guidance=told, seed=images,
        )  # fmt: skip
    other = {**data, "manifest": "other"}
    write_snapshot(root / "img-000000008", digits, experiment="digits_guide", images=8, data=other)
    return root


@pytest.fixture
def newest(run: Path) -> Snapshot:
    return load(run / "img-000000014")


def asked(weak: str, g: float = 2.0, **settings: Any) -> SamplerConfig:
    return SamplerConfig(steps=3, g=g, weak=weak, **settings)


def conditions(snapshot: Snapshot) -> Condition:
    return condition_sampler(snapshot)(SEEDS)


WORDS = [
    "condition", "average-5000", "snapshot-9", "snapshot-7", "head", "routed",
    "condition+snapshot-9", "routed:0.1+head:0.9",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_image_i_is_a_function_of_its_seed_whatever_its_batch(newest: Snapshot, word: str) -> None:
    def made(batch: int) -> Tensor:
        parts = generate_each(newest, asked(word), conditions(newest), SEEDS, batch=batch)
        return torch.cat([x for x, _ in parts])

    plain = torch.cat(
        [x for x, _ in generate_each(newest, asked(word, 1.0), conditions(newest), SEEDS, batch=3)]
    )
    torch.testing.assert_close(made(3), made(2), rtol=1e-3, atol=1e-3)
    assert (made(3) - plain).abs().max() > 1e-2


@pytest.mark.parametrize(("word", "which"), [("average-5000", 1), ("snapshot-9", 0)])
def test_another_average_or_snapshot_is_read_and_asked_for_the_same_groups(
    run: Path, newest: Snapshot, word: str, which: int
) -> None:
    weak = build_denoiser(newest, conditions(newest), asked(word), SEEDS).weak
    assert isinstance(weak, Other)
    folder = run / ("img-000000014" if word.startswith("average") else "img-000000009")
    expected = load(folder, which)
    for name, parameter in expected.student.backbone.named_parameters():
        assert torch.equal(weak.denoiser.model.get_parameter(name), parameter)
    ids = newest.student.head.condition_rows() @ conditions(newest).dense.T
    rows = expected.student.head.condition_rows()[ids.argmax(0)]
    assert torch.equal(weak.denoiser.condition.dense, rows)
    assert weak.denoiser.g == 1


def test_joined_words_are_their_models_with_the_head_in_the_forward_of_the_network(
    newest: Snapshot,
) -> None:
    weak = build_denoiser(newest, conditions(newest), asked("routed:0.1+head:0.9"), SEEDS).weak
    assert isinstance(weak, Mixed)
    kinds = [(type(part), share) for part, share in weak.parts]
    assert kinds == [(Head, 0.9), (Routed, 0.1)]


def test_a_snapshot_from_before_the_switch_gets_no_condition(newest: Snapshot) -> None:
    weak = build_denoiser(newest, conditions(newest), asked("snapshot-7"), SEEDS).weak
    assert isinstance(weak, Other)
    assert weak.denoiser.condition.state.tolist() == [UNCONDITIONAL] * 3


def test_prototypes_are_translated_by_their_number_and_states_stay(newest: Snapshot) -> None:
    student = newest.student
    order = torch.arange(GROUPS).roll(3)
    turned = replace(newest, student=_with_prototypes(newest, order))
    ids = torch.tensor([4, 0, 29])
    condition = Condition.of(dense=student.head.condition_rows()[ids])
    dropped = condition.drop(torch.tensor([False, True, False]))
    moved = same_groups(newest, turned, dropped)
    assert torch.equal(moved.dense, turned.student.head.condition_rows()[ids])
    assert torch.equal(moved.state, dropped.state) and CONDITIONED in moved.state


def test_a_prototype_stands_for_itself_beside_a_longer_one_that_is_near(newest: Snapshot) -> None:
    """As in averages of unit rows, which are not of one length."""
    rows = torch.eye(4, 8)
    rows[0], rows[1] = 0.9 * rows[0], 0.99 * F.normalize(rows[0] + 0.2 * rows[1], dim=0)
    head = SimpleNamespace(condition_rows=lambda: rows)
    averaged: Any = SimpleNamespace(student=SimpleNamespace(head=head), conditioned=True)
    moved = same_groups(averaged, averaged, Condition.of(dense=rows[:2]))
    assert torch.equal(moved.dense, rows[:2])


def _with_prototypes(snapshot: Snapshot, order: Tensor) -> Any:
    assert snapshot.folder is not None
    student = load(snapshot.folder).student
    student.head.prototypes.data = student.head.prototypes.data[order]
    return student


REFUSED = [
    ("average-4000", "5000"),
    ("average-20000", "is guided itself"),
    ("snapshot-14", "before that at 14; take sampler.weak=snapshot-8 or sampler.weak=snapshot-9$"),
    ("snapshot-10", "no snapshot at 10 images before that at 14"),
    ("snapshot-6:0.5+head:0.5", "take sampler.weak=snapshot-7:0.5[+]head:0.5 or"),
    ("snapshot-8", "other data"),
]


@pytest.mark.parametrize(("word", "names"), REFUSED)
def test_what_the_run_does_not_have_is_refused_with_what_it_has(
    newest: Snapshot, word: str, names: str
) -> None:
    with pytest.raises(UserError, match=f"sampler.weak={re.escape(word)}.*{names}"):
        build_denoiser(newest, conditions(newest), asked(word), SEEDS)


def test_a_snapshot_that_was_not_published_to_its_end_or_was_damaged_is_refused(
    run: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "snapshots"
    shutil.copytree(run, copied)
    (copied / "img-000000007" / "MANIFEST.json").unlink()
    weights = next((copied / "img-000000009").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[::-1])
    strong = load(copied / "img-000000014")
    with pytest.raises(UserError, match=r"no snapshot at 7 images.*sampler\.weak=snapshot-8 or"):
        check(strong, asked("snapshot-7"))
    with pytest.raises(UserError, match=r"sampler\.weak=snapshot-9.*was damaged"):
        check(strong, asked("snapshot-9"))


@pytest.mark.parametrize("word", ["head", "routed"])
def test_a_head_or_a_way_that_was_not_trained_is_refused(
    digits: Path, tmp_path: Path, word: str
) -> None:
    plain = load(write_snapshot(tmp_path / "plain", digits))
    with pytest.raises(UserError, match=f"sampler.weak={word}"):
        build_denoiser(plain, Condition.unconditional(3), asked(word), SEEDS)


# ---- cost --------------------------------------------------------------------------------------------


def _head_macs() -> int:
    d, out = NET.width, NET.patch**2 * NET.channels
    return 256 * d + d * d + 2 * d * d + NET.tokens * d * out


def test_cost_counts_the_forwards_that_each_weak_model_takes(newest: Snapshot) -> None:
    net = newest.student.backbone.net
    forward, routed = net.forward_macs(), net.training_macs()
    assert routed < forward
    extra = {
        "condition": forward,
        "average-5000": forward,
        "snapshot-9": forward,
        "routed": routed,
        "head": _head_macs(),
        "routed:0.1+head:0.9": routed + _head_macs(),
    }
    for word, macs in extra.items():
        assert cost(newest, asked(word)).flops == 2 * 3 * (forward + macs), word
        assert cost(newest, asked(word, 1.0)).flops == 2 * 3 * forward
        # steps of 3 begin at 1, 2/3 and 1/3
        some = cost(newest, asked(word, interval=(0.5, 0.9)))
        assert (some.evaluations, some.flops) == (3, 2 * (3 * forward + macs)), word


def test_the_weak_model_alone_costs_no_forward_of_the_strong_one(newest: Snapshot) -> None:
    net = newest.student.backbone.net
    assert cost(newest, asked("routed", 0.0)).flops == 2 * 3 * net.training_macs()
    assert cost(newest, asked("head", 0.0)).flops < 2 * 3 * net.forward_macs() / 2


# ---- words, protocols, configs -----------------------------------------------------------------------


@pytest.mark.parametrize("word", [*WORDS[:6], "average-power-0.05", "average-rate-0.0001"])
def test_a_weak_model_is_its_word(word: str) -> None:
    assert WeakModel.of(word).word == word
    assert words.weak_models(word) == {WeakModel.of(word): 1}


def test_joined_words_have_equal_shares_or_those_behind_them() -> None:
    head, dropped = WeakModel.of("head"), WeakModel.of("condition")
    assert words.weak_models("condition+head") == {dropped: 0.5, head: 0.5}
    assert words.weak_models("condition:0.25+head:0.75") == {dropped: 0.25, head: 0.75}


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("condition+", "plus without a weak model.*take sampler.weak=condition$"),
        ("", "is no weak model"),
        ("condition+banana:0.5", "banana is no weak model"),
        ("head+head", "head twice"),
        ("head:1", "take sampler.weak=head$"),
        ("condition:0.5+head", "take sampler.weak=condition.head for equal"),
        ("condition:0.5+head:0.6", "add up to 1"),
        ("condition:-0.5+head:1.5", "above 0"),
        ("condition:nan+head:1", "add up to 1"),
        ("condition:x+head:1", "add up to 1"),
    ],
)
def test_words_that_do_not_join_are_refused_with_what_to_type(word: str, names: str) -> None:
    with pytest.raises(UserError, match=names):
        words.weak_models(word)


@pytest.mark.parametrize(
    "word", ["", "heads", "average", "average-", "average-x", "snapshot-", "snapshot-x"]
)
def test_another_word_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"sampler\.weak="):
        WeakModel.of(word)


def test_classifier_free_guidance_leaves_no_trace_in_protocols_and_hashes() -> None:
    assert "weak" not in protocol_settings(asked("condition"))
    assert "weak" not in plain_sampler(asked("condition"))
    assert "weak" not in protocol_settings(asked("head", 1.0))
    assert protocol_settings(asked("head"))["weak"] == "head"


def test_a_protocol_gives_back_its_weak_model() -> None:
    for word in WORDS:
        sampler = asked(word)
        protocol = {
            "sampler": sampler.name, "steps": sampler.steps, "g": sampler.g,
            "interval": sampler.interval, "settings": protocol_settings(sampler),
        }  # fmt: skip
        assert sampler_of(protocol) == sampler


SUBMITTED = [
    ("digits_dit", "head", "auxiliary.weight"),
    ("digits_dit", "routed", "model.route"),
    ("digits_guide", "average-7", "take sampler.weak=average-5000, or a new run"),
    ("digits_guide", "average-20000", "take sampler.weak=average-5000$"),
    ("digits_guide", "snapshot-256000", "before that at 256000; take sampler.weak=snapshot-"),
    ("digits_uncond", "condition", "guidance=online"),
    ("digits_dit", "banana", "no weak model"),
    ("digits_dit", "condition+head", "auxiliary.weight"),
]


@pytest.mark.parametrize(("experiment", "word", "names"), SUBMITTED)
def test_a_submission_with_a_weak_model_that_cannot_be_is_refused(
    experiment: str, word: str, names: str
) -> None:
    words = [f"experiment={experiment}", "cluster=local", f"sampler.weak={word}", "sampler.g=2"]
    with pytest.raises(UserError, match=names):
        validate(compose(words))


@pytest.mark.parametrize(
    "word",
    [
        *("head", "routed", "average-5000", "snapshot-128000", "condition"),
        "condition:0.25+snapshot-128000:0.75",
    ],
)
def test_a_submission_with_a_weak_model_that_the_run_will_have_is_taken(word: str) -> None:
    words = ["experiment=digits_guide", "cluster=local", f"sampler.weak={word}", "sampler.g=2"]
    validate(compose(words))
