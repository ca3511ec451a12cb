"""The engines: ZeRO against bare torch bit for bit, real stages and shards, averages where the masters are."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shards
from selfguide.data.normaliser import Normaliser
from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.objectives import build_objective
from selfguide.distributed import RankInfo
from selfguide.networks.student import Student, build_student
from selfguide.spec.averages import AverageSpec
from selfguide.spec.config import Config, EngineConfig, TrainConfig
from selfguide.spec.initial_weights import SCRATCH
from selfguide.spec.run import Lease, RunFolder
from selfguide.training.ema import Averages
from selfguide.training.engine.build import build_engine
from selfguide.training.engine.deepspeed import DeepSpeedEngine, PartitionedEngine, check_version
from selfguide.training.engine.layout import Layout, length
from selfguide.training.engine.protocol import Engine
from selfguide.training.job import build_state
from selfguide.training.loop import advance
from selfguide.training.state import State
from selfguide.training.telemetry import Telemetry
from selfguide.training.work import Training
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.host_reads import HostReads
from tests.selfguide.test_online import online_config

BATCH = 16


def config(
    backend: str, stage: int = 1, dtype: str = "fp32", micro: int | None = None, clip: float = 0.0
) -> Config:
    from dataclasses import replace

    base = online_config()
    return replace(
        base,
        train=TrainConfig(
            images=1024,
            batch=BATCH,
            micro_batch=micro,
            learning_rate=1e-2,
            clip=clip,
            weight_decay=0.01,
            decayed="all",
        ),
        engine=EngineConfig(backend=backend, zero_stage=stage, dtype=dtype),  # type: ignore[arg-type]
    )


def perturbed(cfg: Config) -> Student:
    """Same on every rank; nothing at zero, so that every parameter moves."""
    student = build_student(cfg, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student


def loss_of(
    forward: Callable[..., Any], rank_info: RankInfo, number: int, micro: int, m: int
) -> torch.Tensor:
    """Of this rank's micro-batch `m` in step `number`."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(BATCH, 1, 8, 8, generator=generator)
    tau, features = (
        torch.rand(BATCH, generator=generator),
        torch.randn(BATCH, 1024, generator=generator),
    )
    owner = forward if isinstance(forward, nn.Module) else forward.__self__  # type: ignore[attr-defined]
    weight = next(owner.parameters() if isinstance(owner, nn.Module) else owner.module.parameters())
    dtype, first = weight.dtype, (m * rank_info.world + rank_info.rank) * micro
    rows = slice(first, first + micro)
    outputs = forward(
        x[rows].to(dtype), tau[rows], Condition.unconditional(micro), features[rows].to(dtype)
    )
    assert outputs.scores is not None
    return outputs.prediction.float().square().mean() + outputs.scores.square().mean()


def step(engine: Engine, rank_info: RankInfo, number: int, micro: int, poison: bool = False) -> Any:
    done, m = None, 0
    while done is None:
        loss = loss_of(engine.forward, rank_info, number, micro, m)
        engine.backward(loss * float("nan") if poison and rank_info.rank == 1 else loss)
        done, m = engine.step(1e-2), m + 1
    return done


def optimiser_elements(engine: Engine) -> int:
    """Elements that the live optimiser of this rank holds, steps aside."""
    if isinstance(engine, PartitionedEngine):
        optimiser = engine._zero.optimizer
    else:
        optimiser = engine._optimiser.adam  # type: ignore[attr-defined]
    return sum(t.numel() for state in optimiser.state.values() for t in state.values() if t.ndim)


def live(engine: Engine) -> torch.Tensor:
    """The weights that a forward reads, end to end as the module has them; all ranks call."""
    parameters, gathered = list(engine.module.parameters()), nullcontext()
    if isinstance(engine, DeepSpeedEngine) and engine.zero_stage == 3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parameters)
    with gathered:
        return torch.cat([p.detach().float().flatten() for p in parameters])


def trained(rank_info: RankInfo, cfg: Config, steps: int = 6) -> dict[str, Any]:
    engine = build_engine(cfg, perturbed(cfg), rank_info)
    specs = (AverageSpec(halflife=64), AverageSpec(width=0.2), AverageSpec(rate=0.01))
    averages, wholes = Averages(engine, specs, 0.0), [engine.gather(engine.masters).clone()] * 3
    norms = []
    micro = cfg.train.micro_batch or BATCH // rank_info.world
    for number in range(steps):
        done = step(engine, rank_info, number, micro)
        norms.append(done.grad_norm.item())
        averages.update(BATCH, (number + 1) * BATCH, done.applied)
        stepped = engine.gather(engine.masters)
        for index, spec in enumerate(specs):
            share = 1 - spec.decay(BATCH, (number + 1) * BATCH, 0.0)
            wholes[index] = torch.lerp(wholes[index], stepped, share)
    weights = live(engine)
    return {
        "weights": weights.tolist(),
        "norms": norms,
        "shard": length(engine.ranges),
        "total": engine.layout.total,
        "stage": getattr(engine, "zero_stage", 0),
        "optimiser": optimiser_elements(engine),
        "ema": [engine.gather(shard).tolist() for shard in averages.shards]
        == [whole.tolist() for whole in wholes],
        "masters": torch.equal(engine.gather(engine.masters).to(weights.dtype), weights)
        or cfg.engine.dtype == "bf16",
    }


def by_hand(rank_info: RankInfo, cfg: Config, steps: int = 6) -> list[float]:
    """The weights after torch's own DistributedDataParallel, with AdamW over one flat vector as ours."""
    student = perturbed(cfg)
    flat = Layout.of(student).flatten_module(student)
    network = torch.nn.parallel.DistributedDataParallel(student)
    stepped = torch.nn.Parameter(flat)
    optimiser = torch.optim.AdamW(
        [stepped], lr=1e-2, betas=cfg.train.betas, weight_decay=cfg.train.weight_decay, fused=True
    )
    for number in range(steps):
        network.zero_grad()
        loss_of(network, rank_info, number, BATCH // rank_info.world, 0).backward()
        stepped.grad = torch.cat([p.grad.flatten() for p in student.parameters()])  # type: ignore[union-attr]
        optimiser.step()
    return flat.tolist()


def each(rank_info: RankInfo, configs: list[Config]) -> list[dict[str, Any]]:
    """One process for several engines: stages 0 to 2 leave nothing behind in it."""
    return [trained(rank_info, cfg) for cfg in configs]


def and_by_hand(rank_info: RankInfo, configs: list[Config]) -> tuple[list[dict[str, Any]], Any]:
    return each(rank_info, configs), by_hand(rank_info, configs[0])


def test_every_stage_of_zero_equals_torch_and_its_ddp_bit_for_bit(ranks: Any) -> None:
    before = [config("torch"), *(config("deepspeed", stage) for stage in (0, 1, 2))]
    alone = ranks(2, each, [config("deepspeed", 3)])  # in processes of its own
    answers, hands = zip(*ranks(2, and_by_hand, before), strict=True)
    answers = [[*found, *alone[rank]] for rank, found in enumerate(answers)]
    reference = answers[0][0]
    assert hands == (reference["weights"],) * 2
    for index, stage in enumerate((0, 1, 2, 3), start=1):
        for rank in (0, 1):
            answer = answers[rank][index]
            assert answer["stage"] == stage, "no silent fall-back to another stage"
            assert answer["weights"] == reference["weights"]
            assert answer["ema"] and answer["masters"]
            # two moments for the half this rank owns, padded to whole words; in stage 0 of everything
            held = answer["total"] * (1 if stage else 2)
            assert answer["optimiser"] == pytest.approx(held, abs=64)
        shards = sum(answers[rank][index]["shard"] for rank in (0, 1))
        assert shards == reference["total"] * (1 if stage else 2)


def test_accumulation_clipping_and_bf16_agree_across_engines(ranks: Any) -> None:
    cases = {
        "micro": {"micro": 4},
        "clip": {"clip": 0.1},
        "bf16": {"dtype": "bf16"},
        "plain": {},
    }
    configs = [
        config(backend, **case) for backend in ("torch", "deepspeed") for case in cases.values()
    ]  # type: ignore
    answers = ranks(2, each, configs)[0]
    torch_ones, zero_ones = (
        dict(zip(cases, part, strict=True)) for part in (answers[:4], answers[4:])
    )
    for name, tolerance in (("micro", 1e-8), ("clip", 1e-3), ("bf16", 0.02), ("plain", 0.0)):
        ours, theirs = (
            torch.tensor(zero_ones[name]["weights"]),
            torch.tensor(torch_ones[name]["weights"]),
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4 if tolerance else 0, atol=tolerance)
        assert zero_ones[name]["ema"] and torch_ones[name]["ema"]
    # the two round the clip factor differently, so only the first step sees the same weights
    ours, theirs = (ones["clip"]["norms"] for ones in (zero_ones, torch_ones))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and ours[0] > 0.1
    assert ours == pytest.approx(theirs, rel=5e-3)
    # batch statistics are per micro-batch, so the head differs; the backbone only rounds differently
    backbone = Layout.of(build_student(config("torch"), 0).backbone).total
    whole, pieces = (torch.tensor(torch_ones[n]["weights"][:backbone]) for n in ("plain", "micro"))
    torch.testing.assert_close(pieces, whole, atol=2e-3, rtol=0)


def reads(rank_info: RankInfo, cfg: Config) -> tuple[int, int]:
    """Host reads of a step, and those of them that DeepSpeed's own step makes."""
    engine, theirs = build_engine(cfg, perturbed(cfg), rank_info), 0
    step(engine, rank_info, 0, BATCH // rank_info.world)

    def counted(own: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal theirs
        with HostReads() as inside:
            answer = own(*arguments)
        theirs += inside.total
        return answer

    if isinstance(engine, DeepSpeedEngine):
        engine.engine.step = partial(counted, engine.engine.step)
    averages = Averages(engine, [AverageSpec(halflife=64)], 0.05)
    with HostReads() as seen:
        done = step(engine, rank_info, 1, BATCH // rank_info.world)
        averages.update(BATCH, BATCH, done.applied)
    return seen.total, theirs


def test_a_step_reads_nothing_on_the_host_besides_what_deepspeed_itself_does(ranks: Any) -> None:
    for clip in (0.0, 1e-3):
        assert ranks(2, reads, config("torch", clip=clip)) == [(0, 0)] * 2
    for stage in (0, 1, 2):  # stage 3 also reads as it fetches weights
        for seen, theirs in ranks(2, reads, config("deepspeed", stage, clip=1e-3)):
            assert seen == theirs and (theirs > 0) == (stage > 0)


def grouped(rank_info: RankInfo, backends: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """The engines over two groups, of which the first is decayed strongly."""
    answers = []
    for backend, stage in backends:
        cfg = config(backend, stage)
        student = perturbed(cfg)
        layout = Layout.of(student, lambda n, p: ("matrices", 5.0) if p.ndim > 1 else ("rest", 0.0))
        begun = layout.flatten({n: p.detach().clone() for n, p in student.named_parameters()})
        engine = build_engine(cfg, student, rank_info, layout)
        averages = Averages(engine, [AverageSpec(halflife=64)], 0.0)
        for number in range(4):
            done = step(engine, rank_info, number, BATCH // rank_info.world)
            averages.update(BATCH, BATCH * (number + 1), done.applied)
        engine.load_moments(engine.moments())
        engine.refresh()
        step(engine, rank_info, 4, BATCH // rank_info.world)
        moments = engine.moments()
        trained, flat = dict(engine.module.named_parameters()), engine.gather(engine.masters)
        split = layout.split(flat)
        answers.append({
            "live": torch.equal(live(engine), torch.cat([split[n].flatten() for n in trained])),
            "begun": [begun[g.start : g.stop].norm().item() for g in layout.groups],
            "ended": [flat[g.start : g.stop].norm().item() for g in layout.groups],
            "ranges": engine.ranges, "count": moments.count, "flat": flat.tolist(),
            "first": engine.gather(moments.first).tolist(),
            "average": engine.gather(averages.shards[0]).tolist(),
        })  # fmt: skip
    return answers


def test_groups_of_parameters_decay_by_their_own_weight_in_every_engine(ranks: Any) -> None:
    together = [("torch", 1), *(("deepspeed", stage) for stage in (0, 1, 2))]
    answers, alone = ranks(2, grouped, together), ranks(2, grouped, [("deepspeed", 3)])
    for rank in (0, 1):
        reference = answers[rank][0]
        for answer in answers[rank]:
            assert len(answer["ranges"]) == 2
        for answer in (*answers[rank], *alone[rank]):
            assert answer["live"] and answer["count"] == 5
            decayed, kept = zip(answer["begun"], answer["ended"], strict=True)
            assert decayed[1] < 0.9 * decayed[0] and kept[1] == pytest.approx(kept[0], rel=0.1)
            for name in ("flat", "first", "average"):
                # fused AdamW rounds differently what is left over of its vectors of 16
                values = torch.tensor(answer[name]), torch.tensor(reference[name])
                torch.testing.assert_close(*values, rtol=0, atol=1e-6)
    assert [r[0] for r in answers[1][2]["ranges"]] > [r[0] for r in answers[0][2]["ranges"]]


def poisoned(rank_info: RankInfo, cfg: Config) -> tuple[list[bool], bool]:
    engine = build_engine(cfg, perturbed(cfg), rank_info)
    applied = [bool(step(engine, rank_info, n, 8, poison=n == 1).applied) for n in range(3)]
    return applied, all(bool(torch.isfinite(p).all()) for p in engine.module.parameters())


def _begun(rank_info: RankInfo, backend: str, stage: int = 1) -> list[float]:
    """Largest distance of masters, averages and buffers from the fp32 student an engine was given."""
    cfg = config(backend, stage, dtype="bf16")
    given = perturbed(cfg)
    for name, buffer in given.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_()
    flat = torch.cat([p.detach().flatten() for p in given.parameters()])
    buffers = {n: b.clone() for n, b in given.named_buffers()}
    engine = build_engine(cfg, given, rank_info)
    average = Averages(engine, [AverageSpec(halflife=1000)], 0.0)
    return [
        (engine.gather(engine.masters) - flat).abs().max().item(),
        (engine.gather(average.shards[0]) - flat).abs().max().item(),
        max((b - buffers[n]).abs().max().item() for n, b in engine.module.named_buffers()),
        (live(engine) - flat.bfloat16().float()).abs().max().item(),
    ]


@pytest.mark.parametrize(("backend", "stage"), [("torch", 1), ("deepspeed", 1), ("deepspeed", 3)])
def test_bf16_engines_begin_from_the_whole_fp32_weights(
    ranks: Any, backend: str, stage: int
) -> None:
    """Weights that were read from a file keep their low bits in masters, averages and buffers."""
    assert ranks(2, _begun, backend, stage) == [[0.0] * 4] * 2


def test_one_bad_rank_makes_all_skip_and_training_goes_on(ranks: Any) -> None:
    for cfg in (config("torch"), *(config("deepspeed", stage, clip=0.1) for stage in (0, 1, 3))):
        assert ranks(2, poisoned, cfg) == [([True, False, True], True)] * 2


def bootstrapped(
    rank_info: RankInfo, cases: list[Config], root: str, steps: int
) -> list[dict[str, Any]]:
    """Steps of the real loop on real digits, without its publishing."""
    manifest = manifests.load(root)
    answers = []
    for index, cfg in enumerate(cases):
        state = build_state(cfg, rank_info, build_student(cfg, 0), [], SCRATCH)
        stream = shards.open(
            root, global_batch=cfg.train.batch, micro_batch=cfg.train.batch // rank_info.world, rank=rank_info.rank,
            world=rank_info.world, seed=0, position=0, mode="global",
        )  # fmt: skip
        run = RunFolder(Path(root).parent / f"run-{index}-{rank_info.rank}-of-{rank_info.world}")
        job = Training(
            cfg, rank_info, state, stream, build_objective(cfg.path), Normaliser.of(manifest.header), {},
            Telemetry(run, 1, rank_info, cfg.train.images), Lease(run, 1),
        )  # fmt: skip
        seen = []
        for _ in range(steps):
            advance(job)
            seen.append(_observed(state))
        stream.close()
        answers.append(
            {"engine": state.engine.name, "steps": seen, "p": state.components.metadata()["p"]}
        )
    return answers


def _bits(values: torch.Tensor) -> str:
    return hashlib.sha256(values.detach().contiguous().numpy().tobytes()).hexdigest()


def _observed(state: State) -> dict[str, Any]:
    assert state.teacher is not None
    flat = state.engine.gather(state.engine.masters)
    rows = state.engine.layout.split(flat)["head.prototypes"]
    live, teacher = state.engine.module.named_buffers(), state.teacher.module.named_buffers()
    return {
        "images": state.images,
        "masters": _bits(flat),
        "average": _bits(state.engine.gather(state.averages.shards[0])),
        "teacher": _bits(torch.cat([t.flatten() for t in state.teacher.module.parameters()])),
        "lengths": rows.norm(dim=1).tolist(),
        "buffers": [b.tolist() for n, b in live if "running" in n],
        "taught": [b.tolist() for n, b in teacher if "running" in n],
    }


def bootstraps(backend: str) -> list[Config]:
    """Images; patches with all that writes to masters besides the optimiser; and SGFM's code."""
    from dataclasses import replace

    # a head of 20 makes each rank's slice whole vectors of 16: fused AdamW rounds what is left over differently
    common = {"switch": 0.5, "teacher_refresh": 128, "window": 128, "head_width": 20}
    written = {
        "level": "patch", "pooling": "cls", "revive": 0.9, "condition_rows": "averaged", "teacher_buffers": "frozen",
        "queue": 100,
    }  # fmt: skip
    code = {
        "view": "training", "view_condition": "as_trained", "codes_over": "all", "mean_over": "all", "mask": (0.0, 1.0),
        "condition_rows": "averaged", "id_rows": "averaged", "prototype_gradient": "plain", "teacher_rate": 0.01,
        "teacher_buffers": "frozen", "token_std": 1.0, "head_std": 0.02, "teacher_refresh": 64,
    }  # fmt: skip
    return [
        replace(
            online_config(**common | more),
            # the engines round a clipping factor differently
            train=TrainConfig(
                images=512, batch=64, learning_rate=3e-3, ema_halflife=(200,), clip=0.0
            ),
            engine=EngineConfig(backend=backend),  # type: ignore[arg-type]
        )
        for more in ({}, written, code)
    ]


def test_a_bootstrap_through_its_switch_is_the_same_bit_for_bit_in_both_engines(
    ranks: Any, digits: Path
) -> None:
    cases = [*bootstraps("torch"), *bootstraps("deepspeed")]
    assert all(Layout.of(build_student(case, 0)).total % 32 == 0 for case in cases)
    answers = ranks(2, bootstrapped, cases, str(digits), 8)
    for runs in answers:
        assert (runs[0]["engine"], runs[3]["engine"]) == ("torch", "DeepSpeed ZeRO-1")
        for reference, other in zip(runs[:3], runs[3:], strict=True):
            assert other["steps"] == reference["steps"] and other["p"] == reference["p"]
            assert reference["p"] is not None
    assert answers[0][0]["steps"][-1]["masters"] == answers[1][0]["steps"][-1]["masters"]
    plain, written, code = answers[0][:3]
    for case in (plain, written):
        switched = next(s for s in case["steps"] if s["images"] == 256)
        # the switch makes averages and teacher the live student, buffers included
        assert switched["average"] == switched["masters"] == switched["teacher"]
        assert switched["taught"] == switched["buffers"]
        last = case["steps"][-1]
        assert last["average"] != last["masters"] and last["buffers"] != switched["buffers"]
    assert plain["steps"][-1]["taught"] == plain["steps"][-1]["buffers"], "refreshed at 512"
    frozen = next(s for s in written["steps"] if s["images"] == 256)["taught"]
    assert written["steps"][-1]["taught"] == frozen
    for step_seen in written["steps"]:
        assert step_seen["lengths"] == pytest.approx([1.0] * 12, abs=1e-6)
    assert max(plain["steps"][-1]["lengths"]) > 1 + 1e-4, "rows are normalised when they are read"
    # the averages of the code took the rows before they became unit vectors
    for step_seen in code["steps"]:
        assert step_seen["lengths"] == pytest.approx([1.0] * 12, abs=1e-6)
    switched = next(s for s in code["steps"] if s["images"] == 256)
    assert switched["average"] == switched["teacher"] != switched["masters"]


SCRIPT = """
import os, tempfile
from pathlib import Path
from selfguide.distributed import RankInfo, join, leave
from selfguide.training.engine.build import build_engine
from tests.selfguide.test_engines import config, perturbed, step
if __name__ == "__main__":
    rank_info = RankInfo(0, 0, 1)
    os.environ["SELFGUIDE_HOST"] = "127.0.0.1"
    with tempfile.TemporaryDirectory() as folder:
        join(rank_info, Path(folder) / "rendezvous.json", 60)
        cfg = config("deepspeed")
        engine = build_engine(cfg, perturbed(cfg), rank_info)
        print("applied", bool(step(engine, rank_info, 0, 16).applied))
        leave()
"""


def without_a_compiler(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Python on a PATH with no g++, no gcc and no ninja, and with nothing compiled before."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
    environment |= {
        "PATH": str(tools), "PYTHONPATH": str(Path.cwd()), "HOME": str(tmp_path),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240
    )


def test_deepspeed_starts_without_a_compiler(tmp_path: Path) -> None:
    """And nothing is left compiled behind."""
    done = without_a_compiler(SCRIPT, tmp_path)
    assert "applied True" in done.stdout, done.stderr[-3000:]
    assert not (tmp_path / "extensions").exists()


MUON = """
import os
os.environ["DS_ACCELERATOR"] = "cpu"
import torch
from deepspeed.runtime.zero.muon.original_muon import muon_update
muon_update(torch.randn(8, 16), torch.zeros(8, 16))
"""


@pytest.mark.slow
def test_deepspeeds_own_muon_needs_a_compiler_as_its_refusal_says(tmp_path: Path) -> None:
    """Stages 1 and 2 call it in their first step. Once it does not, train.optimiser=muon may be thought of anew."""
    done = without_a_compiler(MUON, tmp_path)
    assert done.returncode and "No working C++ compiler" in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("version", ["0.18.3", "0.18.9+cu12", "0.19.3"])
def test_a_deepspeed_with_wrong_gradients_is_refused(version: str) -> None:
    with pytest.raises(UserError, match="issue 8224"):
        check_version(version)
    for fine in ("0.18.2", "0.19.4", "0.19.8", "1.0.0"):
        check_version(fine)
