"""`tools.same`: engines that train alike, and one whose reduction loses something."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from launcher.compose import compose
from selfguide.distributed import RankInfo
from selfguide.spec.config import Config
from selfguide.spec.initial_weights import check_weights
from selfguide.training.engine.torch import TorchEngine
from shards.errors import UserError
from tests.selfguide.snapshots import write_snapshot
from tools import same

# its gradient is not zero in the first step, as those behind the blocks' zero gates are
NAME = "backbone.final.weight"


def both(rank_info: RankInfo, variants: list[same.Variant], folder: str) -> None:
    """Trains the variants one after the other, and torch's again with a reduction that drops a second use."""
    for index, variant in enumerate(variants):
        into = Path(folder) / str(index)
        into.mkdir(exist_ok=True)
        same.trained(rank_info, variant, 2, str(into))
    if variants[0].config.engine.backend != "torch":
        return
    (into := Path(folder) / "broken").mkdir(exist_ok=True)
    backward = TorchEngine.backward

    def dropped(self: TorchEngine, loss: Tensor) -> None:
        held = self.layout.split(self._gradient)[NAME]
        first_use = held.clone()
        backward(self, loss)
        if self._micro and dist.get_rank() == 1:
            held.copy_(first_use)

    TorchEngine.backward = dropped  # type: ignore[method-assign]
    try:
        same.trained(rank_info, variants[0], 2, str(into))
    finally:
        TorchEngine.backward = backward  # type: ignore[method-assign]


def config(root: Path) -> Config:
    return compose(
        ["experiment=digits_dit", f"data.root={root}", "cluster=local", "cluster.gpus_per_node=2", "train.batch=64",
         "train.images=6400", "train.ema_halflife=[500]",
         # as many parameters as no whole number of vectors of a CPU holds, nor half of them
         "model.width=32", "model.depth=2", "model.heads=2", "guidance.layer=1"]
    )  # fmt: skip


def test_engines_train_alike_and_a_reduction_that_drops_a_second_use_is_named(
    digits: Path, tmp_path: Path, ranks: Any
) -> None:
    """With accumulation, whose micro-batches are the uses, and with every module used twice in each of them."""
    tried = [replace(v, reused=True) for v in same.variants(config(digits), 2, ("accumulated",))]
    assert [v.exact for v in tried] == [True, True, True, False, False]
    assert [v.config.engine.zero_stage for v in tried[1:]] == [0, 1, 2, 3]
    together, alone = (tried[0], tried[2], tried[3]), tried[4:]
    for name, variants in (("together", together), ("alone", alone)):
        (tmp_path / name).mkdir()
        ranks(2, both, variants, str(tmp_path / name))
    reference = tmp_path / "together" / "0"
    for variant, folder in (
        (tried[2], "together/1"),
        (together[2], "together/2"),
        (tried[4], "alone/0"),
    ):
        verdict = same.judge(variant, reference, tmp_path / folder, 2, 1e-6)
        assert verdict.same, verdict
    verdict = same.judge(tried[0], reference, tmp_path / "together" / "broken", 2, 0.0)
    assert (verdict.same, verdict.step, verdict.tensor) == (False, 1, NAME)
    assert verdict.difference > 0
    # nor where sums are taken in another order, whatever the losses
    for engine in (tried[0].config.engine, replace(tried[0].config.engine, dtype="bf16")):
        rounded = replace(tried[0], exact=False, config=replace(tried[0].config, engine=engine))
        broken = same.judge(rounded, reference, tmp_path / "together" / "broken", 2, math.inf)
        assert (broken.same, broken.tensor) == (False, f"first moment of {NAME}"), broken
        assert same.judge(rounded, reference, tmp_path / "alone" / "0", 2, 1e-6).same


def test_numbers_agree_within_a_tolerance_and_beyond_it_do_not(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    variant = same.Variant("", None, 1, False)  # type: ignore[arg-type]
    for folder, loss in (("a", 1.0), ("b", 1.00005), ("c", 1.01)):
        (tmp_path / folder).mkdir()
        save_file({"loss": torch.tensor(loss)}, tmp_path / folder / "1.numbers")
        save_file({"weight": torch.tensor([loss])}, tmp_path / folder / "1.tensors")
        (tmp_path / folder / "order.json").write_text('["weight"]')
    assert same.judge(variant, tmp_path / "a", tmp_path / "b", 1, 1e-4).same
    found = same.judge(variant, tmp_path / "a", tmp_path / "c", 1, 1e-4)
    assert (found.same, found.tensor) == (False, "loss")


def test_tensors_are_compared_in_the_order_of_the_network() -> None:
    order = ["backbone.patchify.weight", "backbone.blocks.10.weight", "head.weight"]
    held = [*order, *(f"first moment of {name}" for name in order), "buffer head.mean", "loss"]
    found = same._in_order(dict.fromkeys(sorted(held), torch.zeros(1)), order)
    assert found == ["loss", *held[:-1]]


def test_the_case_of_bf16_tries_no_second_stage(digits: Path, capsys: Any) -> None:
    plain = config(digits)
    tried = same.variants(same._switching(plain, 6), 2, ("configured", "bf16"), plain)
    switches = {
        each.config.engine.dtype: each.config.guidance.switch_images(each.config.train)
        for each in tried
    }
    assert switches == {"fp32": 3 * 64, "bf16": 960}
    assert "case bf16: the second stage of guidance begins after 960" in capsys.readouterr().err


def test_engines_begin_from_the_weights_that_the_experiment_names(
    digits: Path, tmp_path: Path, ranks: Any
) -> None:
    begun = write_snapshot(tmp_path / "begun", digits, "model.width=32", "model.depth=2")
    asked = compose(
        ["experiment=digits_uncond", f"data.root={digits}", "cluster=local", "train.learning_rate=1e-12",
         "model.width=32", "model.depth=2", "init=snapshot", f"init.path={begun}", "engine=torch"]
    )  # fmt: skip
    (tmp_path / "made").mkdir()
    variant = same.Variant("torch", asked, 1, True)
    ranks(1, same.trained, variant, 1, str(tmp_path / "made"), check_weights(asked))
    made, (weights,) = load_file(tmp_path / "made" / "1.tensors"), begun.glob("ema-*.safetensors")
    for name, tensor in load_file(weights).items():
        if name in made:
            assert torch.allclose(made[name], tensor, atol=1e-9), name
    assert "backbone.patchify.weight" in made


def test_the_second_stage_begins_halfway_where_it_can(digits: Path, capsys: Any) -> None:
    online = config(digits)
    assert same._switching(online, 6).guidance.switch_images(online.train) == 3 * 64
    bf16 = replace(online, engine=replace(online.engine, dtype="bf16"))
    for left in (same._switching(online, 1), same._switching(bf16, 6)):
        assert left.guidance.switch_images(left.train) == 960
    said = capsys.readouterr().err
    assert said.count("second stage of guidance begins after 960 images and is not tried") == 2


def test_a_tolerance_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="--tolerance=-1"):
        same.main(["experiment=digits_dit", "--tolerance", "-1"])


def test_no_steps_are_refused() -> None:
    with pytest.raises(UserError, match="--steps=0"):
        same.main(["experiment=digits_dit", "--steps", "0"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "1"], "--ranks=1"),
        (["--cases", ""], "--cases="),
        (["--cases", "bf16", "engine=zero1_bf16"], "--cases=bf16"),
        (["--cases", "accumulated", "train.micro_batch=16"], "--cases=accumulated"),
    ],
)
def test_what_would_compare_nothing_is_no_success(
    words: list[str], said: str, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=f"{said}.* nothing to compare"):
        same.main(["experiment=digits_uncond", f"data.root={digits}", *words])
    named = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    wanted = words[1] if words[0] == "--cases" else ",".join(same.CASES)
    assert named == [case for case in wanted.split(",") if case]


def test_unknown_case_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(UserError, match="reused"):
        same.main(["experiment=digits_dit", "--cases", "reuse"])


def test_variants_are_what_the_experiment_may_take_in_every_case(digits: Path) -> None:
    every = same.variants(config(digits), 2)
    assert len({v.name for v in every}) == len(every)
    references = [v for v in every if v.reference is None]
    assert [v.name for v in references] == [
        "torch, 2 ranks",
        "torch, reused, 2 ranks",
        "torch, accumulated, 2 ranks",
        "torch, bf16, 2 ranks",
    ]
    assert all(v.config.engine.backend == "torch" for v in references)
    bf16 = [v for v in every if v.reference == "torch, bf16, 2 ranks"]
    assert [v.config.engine.zero_stage for v in bf16] == [1, 2, 3]
    assert not any(v.exact for v in bf16)
    muon = replace(config(digits).train, optimiser="muon")
    alone = same.variants(replace(config(digits), train=muon), 2)
    assert {v.config.engine.backend for v in alone} == {"torch"}


def test_variants_cut_the_batch_otherwise_where_statistics_allow_it(digits: Path) -> None:
    online = config(digits)
    plain = compose(
        [
            "experiment=digits_uncond",
            f"data.root={digits}",
            "cluster=local",
            "cluster.gpus_per_node=2",
        ]
    )
    cut = replace(plain, train=replace(plain.train, micro_batch=16))
    assert same.variants(online, 2, ("configured",))[-1].name == "torch, 1 rank"
    assert [v.name for v in same.variants(cut, 2, ("configured",))][-2:] == [
        "torch, without accumulation",
        "torch, 1 rank",
    ]
    assert not same.variants(cut, 2, ("accumulated",)), "as configured"


@pytest.mark.slow
def test_the_command_compares_every_engine_and_says_so_as_json(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "experiment=digits_dit",
        f"data.root={digits}",
        "train.batch=64",
        "train.images=6400",
        "train.ema_halflife=[500]",
        "model.width=32",
        "model.depth=2",
        "model.heads=2",
        "guidance.layer=1",
    ]
    cases = ["--cases", "configured,bf16", "--steps", "1", "--json"]
    assert same.main([*words, *cases]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out, parse_constant=pytest.fail)
    names = [each["name"] for each in found["variants"]]
    assert names == [
        *(f"DeepSpeed ZeRO-{stage}, 2 ranks" for stage in range(4)),
        "torch, 1 rank",
        *(f"DeepSpeed ZeRO-{stage}, bf16, 2 ranks" for stage in (1, 2, 3)),
    ]
    assert all(each["same"] for each in found["variants"])
    assert [each["compared"] for each in found["variants"]] == ["bits"] * 4 + ["numbers"] * 4
    assert "ZeRO-0, bf16 is not tried: " in said.err
