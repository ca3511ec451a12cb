"""Execution settings change time and memory, never the numbers or the names of the weights."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import callback
from torch._dynamo.utils import counters

from selfguide.diffusion.conditions import Condition
from selfguide.distributed import RankInfo
from selfguide.models import build
from selfguide.models.backbone import Backbone
from selfguide.models.execution import configure_execution, tell_of_compiling
from selfguide.networks.student import build_student
from selfguide.spec.config import Config, EngineConfig, ModelConfig, NoGuidance
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.validate import validate
from selfguide.training.engine.build import build_engine
from selfguide.training.teacher import Teacher
from shards.errors import UserError
from tests.selfguide.test_engines import BATCH, perturbed, step
from tests.selfguide.test_engines import config as engine_config
from tests.selfguide.test_online import online_config
from tests.selfguide.test_training import assert_same, attempt, weights
from tests.selfguide.test_training import config as training_config

CPU = torch.device("cpu")
NETS: dict[str, dict[str, Any]] = {
    "dit_digits": {"width": 32, "depth": 3},
    "lightningdit_b_1": {
        "size": 4, "channels": 2, "width": 32, "depth": 3, "heads": 2, "classes": 10, "qk_norm": True,
    },
    "uvit_s_2": {"size": 8, "channels": 1, "width": 32, "depth": 4, "heads": 2, "classes": 10},
    "unet_ddpm": {"size": 16, "base": 8, "groups": 4, "blocks": 1, "classes": 10},
    "unet_edm_32": {"size": 8, "base": 8, "groups": 4, "blocks": 1, "classes": 10},
    "unet_sgdm_32": {"size": 8, "base": 8, "groups": 4, "heads": 2, "blocks": 1, "classes": 10},
}  # fmt: skip
UNETS = [name for name in NETS if name.startswith("unet")]


def net(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Backbone:
    """Tiny, and nothing at zero."""
    torch.manual_seed(0)
    made = build(name, **NETS[name] | changes)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.to(dtype)


def inputs(of: Backbone, batch: int = 4) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, of.net.channels, of.net.size, of.net.size, generator=generator)
    tau = torch.linspace(0.1, 0.9, batch)
    condition = Condition.of(id=torch.arange(batch)).drop(torch.arange(batch) == 1)
    return x.to(next(of.parameters()).dtype), tau, condition


def trained(of: Backbone, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction, and the gradient of every parameter."""
    of.zero_grad()
    torch.manual_seed(seed)  # dropout
    out = of(*inputs(of))
    out.float().square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in of.named_parameters()}  # type: ignore[union-attr]


def saved_bytes(of: Backbone) -> int:
    """What autograd keeps between forward and backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in of.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        of(*inputs(of))
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_recomputed_activations_give_the_same_bits_for_less_memory(
    name: str, dtype: torch.dtype
) -> None:
    kept, again = net(name, dtype), net(name, dtype)
    configure_execution(again, EngineConfig(recompute=True), CPU)
    (out, gradients), (out_again, gradients_again) = trained(kept), trained(again)
    assert torch.equal(out, out_again)
    assert_same(gradients, gradients_again)
    assert saved_bytes(again) < 0.5 * saved_bytes(kept)


def test_nothing_is_recomputed_where_nothing_is_trained() -> None:
    again = net("dit_digits")
    configure_execution(again, EngineConfig(recompute=True), CPU)
    ran: list[int] = []
    next(iter(again.repeated())).register_forward_pre_hook(lambda *_: ran.append(1))
    trained(again)
    assert len(ran) == 2, "the hook counts recomputation"
    again.eval()
    trained(again)
    assert len(ran) == 3


def compiled(name: str, **changes: Any) -> Backbone:
    made = net(name, **changes)
    configure_execution(made, EngineConfig(compile=True), CPU)
    return made


# of training; the blocks of a UNet are of more kinds than torch compiles unasked
GRAPHS = {
    "dit_digits": 1, "lightningdit_b_1": 1, "uvit_s_2": 2, "unet_ddpm": 11, "unet_edm_32": 13, "unet_sgdm_32": 14,
}  # fmt: skip


slow = pytest.mark.slow  # minutes of g++


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        # the same graphs, run by torch's own kernels
        *((name, "aot_eager") for name in ("dit_digits", "uvit_s_2", "unet_ddpm")),
        *(
            pytest.param(name, "aot_eager", marks=slow)
            for name in ("lightningdit_b_1", "unet_edm_32", "unet_sgdm_32")
        ),
        ("dit_digits", "inductor"),
        pytest.param("uvit_s_2", "inductor", marks=slow),
        pytest.param("unet_ddpm", "inductor", marks=slow),
    ],
)
def test_compiled_blocks_equal_eager_ones_and_share_graphs(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "inductor":  # which alone knows the options
        by = partial(torch.compile, backend=backend)
        monkeypatch.setattr(torch, "compile", lambda *a, options=None, **k: by(*a, **k))
    torch._dynamo.reset()
    # a compiled dropout draws other numbers
    changes = {"dropout": 0.0} if name in UNETS else {}
    eager, made = net(name, **changes), compiled(name, **changes)
    assert made.state_dict().keys() == eager.state_dict().keys()
    counters.clear()
    (out, gradients), (out_made, gradients_made) = trained(eager), trained(made)
    torch.testing.assert_close(out_made, out, rtol=1e-4, atol=1e-5)
    assert_same(gradients_made, gradients, tolerance=1e-4)
    assert counters["stats"]["unique_graphs"] == GRAPHS[name]

    def features() -> Tensor:
        """As the teacher reads them."""
        with torch.no_grad():
            return made.eval().features(*inputs(made), made.net.middle)

    torch.testing.assert_close(
        features(), eager.features(*inputs(eager), eager.net.middle), rtol=1e-4, atol=1e-5
    )
    both = counters["stats"]["unique_graphs"]
    for _ in range(2):  # nothing is compiled again
        trained(made.train()), features()
    assert counters["stats"]["unique_graphs"] == both <= 2 * GRAPHS[name]
    assert not counters["graph_break"]


def test_a_teacher_copied_from_a_compiled_student_stands_alone() -> None:
    config = online_config()
    student = build_student(config, 0)
    configure_execution(student.backbone, EngineConfig(compile=True, recompute=True), CPU)
    x, tau = torch.randn(4, 1, 8, 8), torch.rand(4)
    unconditional = Condition.unconditional(4)
    student(x, tau, unconditional, torch.randn(4, 1024)).prediction.sum().backward()
    teacher = Teacher(student)
    before = teacher.module.features(x, tau, unconditional)
    torch.testing.assert_close(
        before, student.features(x, tau, unconditional), rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert torch.equal(teacher.module.features(x, tau, unconditional), before)
    assert not torch.allclose(student.features(x, tau, unconditional), before)


def is_compiled(backbone: Backbone) -> bool:
    return any(block._compiled_call_impl is not None for block in backbone.repeated())


def test_a_snapshot_is_sampled_from_a_plain_net() -> None:
    """Its batches differ from training's, and each would compile the blocks anew."""
    config = replace(online_config(), engine=EngineConfig(compile=True))
    assert not is_compiled(build_student(config, 0).backbone)
    assert not is_compiled(copy.deepcopy(compiled("dit_digits")))
    assert is_compiled(compiled("dit_digits"))


SCRIPT = """
from selfguide.distributed import RankInfo
from selfguide.spec.config import EngineConfig
from selfguide.training.engine.build import build_engine
from tests.selfguide.test_engines import config, perturbed
from dataclasses import replace
from functools import partial
cfg = replace(config("torch"), engine=EngineConfig(backend="torch", compile=True))
build_engine(cfg, perturbed(cfg), RankInfo(0, 0, 1))
"""


def test_compile_without_a_compiler_is_named_before_the_first_batch(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(Path.cwd()), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=240
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("shards.errors.UserError: engine.compile=true needs a C++ compiler")
    assert "No working C++ compiler" in last and "engine.compile=false" in last


def run_of(rank_info: RankInfo, configs: list[Config]) -> list[list[float]]:
    """The weights after four steps with each of the configs."""
    ends = []
    for cfg in configs:
        engine = build_engine(cfg, perturbed(cfg), rank_info)
        for number in range(4):
            step(engine, rank_info, number, BATCH // rank_info.world)
        flat = [p.detach().flatten() for p in engine.module.parameters()]
        ends.append(torch.cat(flat).tolist())
    return ends


CASES: tuple[tuple[str, int], ...] = (("torch", 1), ("deepspeed", 1), ("deepspeed", 2))


@pytest.mark.slow
def test_two_ranks_train_alike_under_every_engine(ranks: Any) -> None:
    configs = []
    for backend, stage in CASES:
        plain = engine_config(backend, stage)
        for settings in ({}, {"recompute": True}, {"recompute": True, "compile": True}):
            configs.append(replace(plain, engine=replace(plain.engine, **settings)))
    mine, theirs = ranks(2, run_of, configs)
    assert mine == theirs
    for index in range(0, len(configs), 3):
        plain, recomputed, both = (torch.tensor(end) for end in mine[index : index + 3])
        assert torch.equal(recomputed, plain)
        # Adam divides by gradients that are nearly zero, which blows rounding up
        assert (both - plain).abs().median() < 1e-6
        torch.testing.assert_close(both, plain, atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_a_compiled_run_resumes_with_the_same_bits(
    backend: str, ranks: Any, digits: Path, tmp_path: Path
) -> None:
    cfg = training_config(digits, backend)
    cfg = replace(cfg, engine=replace(cfg.engine, compile=True, recompute=True))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks(2, attempt, cfg, str(whole))
    ranks(2, attempt, cfg, str(parts))
    for folder in [*(parts / "checkpoints").glob("img-*"), *(parts / "snapshots").glob("img-*")]:
        if int(folder.name[4:]) > 256:
            (folder / "MANIFEST.json").unlink()
    assert ranks(2, attempt, cfg, str(parts)) == [2, 2]
    assert_same(weights(parts), weights(whole))


@pytest.mark.parametrize("name", UNETS)
def test_images_lie_channels_last_from_the_first_block_to_the_last(name: str) -> None:
    """Under an engine, whose flat weights are in torch's own layout."""
    usual, made = net(name).eval(), net(name).eval()  # dropout would draw in another order
    configure_execution(made, EngineConfig(channels_last=True), CPU)
    wrong: list[str] = []
    for path, module in made.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm) and path != "stages.0":

            def look(_: Any, given: Any, path: str = path) -> None:
                if not given[0].is_contiguous(memory_format=torch.channels_last):
                    wrong.append(path)

            module.register_forward_pre_hook(look)
    (out, gradients), (out_made, gradients_made) = trained(usual), trained(made)
    assert not wrong
    torch.testing.assert_close(out_made, out, rtol=1e-4, atol=1e-5)
    assert_same(gradients_made, gradients, tolerance=1e-4)
    assert all(p.is_contiguous() for p in made.parameters())
    torch.testing.assert_close(
        made.features(*inputs(made), "mid"), usual.features(*inputs(usual), "mid")
    )


def test_channels_last_is_for_unets() -> None:
    settings = EngineConfig(channels_last=True, compile=True, recompute=True)
    cfg = replace(training_config(Path("data")), engine=settings)
    with pytest.raises(UserError, match=r"engine.channels_last=true .* engine.channels_last=false"):
        validate(cfg)
    validate(replace(cfg, engine=replace(cfg.engine, channels_last=False)))
    unet = ModelConfig(name="unet_ddpm", size=8, channels=1)
    validate(replace(cfg, model=unet, guidance=NoGuidance()))


def test_a_step_that_compiles_says_so_while_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback, "callback_handler", callback.CompilationCallbackHandler())
    status = RankStatus()
    status.start(0, compiles=True)
    entered: list[str] = []
    enter = status.enter
    monkeypatch.setattr(status, "enter", lambda section: (entered.append(section), enter(section)))
    tell_of_compiling(status)
    first, later = callback.CallbackTrigger.DYNAMO, callback.CallbackTrigger.LAZY_BACKWARD
    with callback.callback_handler.install_callbacks(first, "0/0"):
        assert status.section == "compile"
    status.advance(128)
    assert (entered, status.section) == ([], "train")
    with callback.callback_handler.install_callbacks(later, "0/1"):
        assert status.section == "compile"
    assert entered == ["compile", "train"]
