"""Whether the engines train an experiment alike: the same steps on bare torch and under ZeRO, tensor by tensor.

    python -m tools.same experiment=digits_dit
    python -m tools.same experiment=in1k_dit data.root=/data/latents model=dit_s_2 --steps 3 --ranks 4

Every engine begins from the same weights, reads the same shards and draws the same noise, on ranks of this machine's
CPU. Weights are first ones with a little noise, since behind the zeros that networks begin with a gradient could be
lost unseen, and with online guidance in fp32 the second stage begins after half of the steps. Engines are torch, on one
rank and data-parallel, and DeepSpeed's ZeRO in all stages that the experiment may take; one that it may not take is
named on stderr with the reason. They do so as configured, with a network whose modules are all used twice a step, with
accumulation, and in bf16 (--cases). After each step the fp32 weights, both moments of the optimiser, every average and
the buffers are compared with those of the torch engine in the same case, and the first tensor that differs is named.
In fp32 they must be equal to the bit; for this gradients are not clipped, since each engine takes their norm in an
order of its own, and the last numbers of each tensor are rounded as all others, which Adam's kernels on CPUs do not do.
In bf16, and where the batch is cut otherwise, all sums are taken in another order: then losses and gradient norms must
agree within --tolerance, and the first moment of each tensor, which its gradients make, within a share of its length
(0.001, in bf16 0.1). Exit code 1 says that something differs.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import shards
from launcher.compose import compose
from selfguide.data.normaliser import Normaliser
from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.objectives import build_objective
from selfguide.distributed import RankInfo
from selfguide.networks.student import Outputs, Student, build_student
from selfguide.spec.accumulation import cut_batch
from selfguide.spec.config import Config, OnlineGuidance
from selfguide.spec.initial_weights import check_weights
from selfguide.spec.run import Lease, RunFolder, strict_json
from selfguide.spec.suggest import check_known
from selfguide.spec.validate import validate
from selfguide.training.initialise import initialise
from selfguide.training.job import build_state
from selfguide.training.loop import advance
from selfguide.training.state import State
from selfguide.training.telemetry import Telemetry
from selfguide.training.work import Training
from shards import cli
from shards.errors import UserError
from shards.read.mixing import label_rates, load_alike
from shards.read.options import ReadOptions
from tools import flags
from tools.awake import awake
from tools.even_rounding import even_rounding
from tools.ranks import run_ranks

_COMPARED = {"bits": "all tensors, to the bit", "numbers": "losses, norms and gradients"}
_FIRST = "first moment of "
# of a first moment's length, how far it may be from the reference's where sums are taken in another order; and of the
# longest one, below which a moment is rounding alone, as that of a bias before a norm
_SHARES, _NOTHING = {"fp32": 1e-3, "bf16": 0.1}, 1e-3
_ORDER = "order.json"
CASES = ("configured", "reused", "accumulated", "bf16")


@dataclass(frozen=True)
class Variant:
    """One way to take the same steps; `exact` says that it owes the reference every bit."""

    name: str
    config: Config
    ranks: int
    exact: bool
    # the name of the variant that it is compared with; None of a reference itself
    reference: str | None = None
    # the backbone runs twice in every forward, and learns from both
    reused: bool = False


class Reusing(Student):
    """A student whose backbone reads its own first prediction, so that each of its modules is used twice in a step."""

    def forward(self, x: Tensor, tau: Tensor, condition: Condition, *rest: Any) -> Outputs:
        again = x + 0.1 * self.predict(x, tau, condition)
        return super().forward(again, tau, condition, *rest)


@dataclass(frozen=True)
class Verdict:
    """What a variant did beside the reference."""

    name: str
    same: bool
    # bits: all tensors were compared; numbers: losses, gradient norms, and first moments by their length
    compared: str
    # the first step, from 1, and tensor that differ, None where none does, and the largest difference there
    step: int | None = None
    tensor: str | None = None
    difference: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = flags.command(
        "tools.same",
        __doc__,
        (
            "settings KEY=VALUE*",
            str,
            None,
            "as for launcher.submit: experiment=... and what differs from it",
        ),
        ("--steps N", int, 6, "optimiser steps (6)"),
        ("--ranks N", int, 2, "processes of this machine, without a GPU (2)"),
        ("--tolerance X", float, 1e-4, "relative, where bits cannot be equal (1e-4)"),
        (
            "--cases WORDS",
            str,
            ",".join(CASES),
            f"what to try, of {','.join(CASES)} (all)",
        ),
        flags.JSON,
    )
    options = parser.parse_args(arguments)
    for name in ("steps", "ranks"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: take 1 or more")
    if not options.tolerance >= 0:
        raise UserError(f"--tolerance={options.tolerance:g}: take 0 or more")
    config = compose(
        [*options.settings, "cluster=local", f"cluster.gpus_per_node={options.ranks}", "nodes=1"]
    )
    validate(config)
    weights = check_weights(config)
    cases = tuple(word for word in options.cases.split(",") if word)
    for case in cases:
        check_known("--cases", case, CASES)
    tried = variants(_switching(config, options.steps), options.ranks, cases, config)
    if not tried:
        raise UserError(
            f"--ranks={options.ranks} --cases={options.cases}: that leaves nothing to compare; take --ranks 2 or more, "
            f"and some of --cases {','.join(CASES)}"
        )
    found = compare(tried, options.steps, options.tolerance, weights)
    if options.json:
        print(
            strict_json(
                {
                    "steps": options.steps,
                    "ranks": options.ranks,
                    "variants": [asdict(v) for v in found],
                }
            )
        )
    else:
        _print(found, options.steps)
    return 0 if all(verdict.same for verdict in found) else 1


def _switching(config: Config, steps: int) -> Config:
    """The config with the switch of online guidance after half of the steps; as it is where it has none, or is in bf16.

    In bf16 a prototype that is nearly as near as another is another one's, and all that follows differs.
    """
    guidance, train = config.guidance, config.train
    if not isinstance(guidance, OnlineGuidance):
        return config
    if config.engine.dtype == "bf16" or steps < 2:
        _say_not_tried(config)
        return config
    share = steps // 2 * train.batch / train.images
    return replace(config, guidance=replace(guidance, switch=share))


def _say_not_tried(config: Config, where: str = "") -> None:
    guidance = config.guidance
    assert isinstance(guidance, OnlineGuidance)
    print(
        f"{where}the second stage of guidance begins after {guidance.switch_images(config.train):,} images and is not "
        "tried: it takes 2 steps and fp32",
        file=sys.stderr,
    )


def variants(
    config: Config, ranks: int, cases: Sequence[str] = CASES, plain: Config | None = None
) -> list[Variant]:
    """All that is tried: in each case the torch engine on `ranks` ranks, which is the reference, and others beside it.

    `plain` is the config as it was before `_switching`, which the case of bf16 takes.

    An engine owes every bit in fp32 and without clipping, for which each takes the gradient's norm in its own order.
    A case in which there is nothing to compare is left out, and named on stderr.
    """
    found = []
    for case in (case for case in CASES if case in cases):
        of = plain or config if case == "bf16" else config
        if of.guidance != config.guidance:
            _say_not_tried(of, "case bf16: ")
        made = _of_case(case, replace(of, train=replace(of.train, clip=None)), ranks)
        if isinstance(made, list) and any(each.reference is not None for each in made):
            found += made
            continue
        why = made if isinstance(made, str) else f"no other engine takes it on --ranks={ranks}"
        print(f"case {case} is not tried: {why}", file=sys.stderr)
    return found


def _of_case(case: str, config: Config, ranks: int) -> list[Variant] | str:
    """The variants of a case, or why the experiment has none."""
    if case == "configured":
        return _engines("", config, ranks) + _cut_otherwise(config, ranks)
    if case == "reused":
        return [replace(v, reused=True) for v in _engines(", reused", config, ranks)]
    if case == "bf16":
        if config.engine.dtype == "bf16":
            return "the experiment is in bf16 as it is configured"
        return _engines(", bf16", _on(config, dtype="bf16"), ranks)
    if cut_batch(config, ranks).accumulation > 1:
        return "the experiment accumulates as it is configured"
    batch = config.train.batch
    half = batch // ranks // 2
    if not half or batch % (half * ranks):
        return f"train.batch={batch} on --ranks={ranks} does not divide by smaller micro-batches"
    halved = replace(config, train=replace(config.train, micro_batch=half))
    return _engines(", accumulated", halved, ranks)


def _engines(case: str, config: Config, ranks: int) -> list[Variant]:
    """The torch engine, then DeepSpeed's stages as far as `validate` allows them."""
    accumulates = cut_batch(config, ranks).accumulation > 1
    reference = f"torch{case}, {ranks} ranks"
    found = [Variant(reference, _on(config, backend="torch", zero_stage=1), ranks, True)]
    for stage in (0, 1, 2, 3) if ranks > 1 else ():
        tried = _on(config, backend="deepspeed", zero_stage=stage)
        try:
            validate(tried)
        except UserError as error:
            # of this experiment's settings: that it is refused is no difference
            print(f"ZeRO-{stage}{case} is not tried: {error}", file=sys.stderr)
            continue
        # stages 2 and 3 reduce each micro-batch, and add up what is reduced: the same terms in another order
        exact = config.engine.dtype == "fp32" and not (accumulates and stage >= 2)
        name = f"DeepSpeed ZeRO-{stage}{case}, {ranks} ranks"
        found.append(Variant(name, tried, ranks, exact, reference))
    return found


def _cut_otherwise(config: Config, ranks: int) -> list[Variant]:
    """The torch engine without accumulation and on one rank, where statistics do not depend on that."""
    whole = _on(
        replace(config, train=replace(config.train, micro_batch=None)),
        backend="torch",
        zero_stage=1,
    )
    cut, online, reference = (
        cut_batch(config, ranks),
        config.guidance.learns_online,
        f"torch, {ranks} ranks",
    )
    found = []
    if cut.accumulation > 1 and not online:
        found.append(Variant("torch, without accumulation", whole, ranks, False, reference))
    if ranks > 1 and not (cut.accumulation > 1 and online):
        found.append(Variant("torch, 1 rank", whole, 1, False, reference))
    return found


def _on(config: Config, **engine: object) -> Config:
    return replace(config, engine=replace(config.engine, **engine))  # type: ignore[arg-type]


def compare(
    tried: Sequence[Variant], steps: int, tolerance: float, weights: str | None = None
) -> list[Verdict]:
    """Trains every variant for `steps` steps and compares each with its reference.

    `weights` is the hash of those that they begin from (`check_weights`).
    """
    with tempfile.TemporaryDirectory(prefix="same-") as scratch:
        folders = {each.name: Path(scratch) / str(index) for index, each in enumerate(tried)}
        for variant in cli.track(tried, len(tried), "engines"):
            folder = folders[variant.name]
            folder.mkdir()
            # engines of their own processes: DeepSpeed changes torch in those where it starts
            words = (variant, steps, str(folder), weights)
            run_ranks(variant.ranks, trained, *words, timeout=None, on_cpu=True)
        return [
            judge(each, folders[each.reference], folders[each.name], steps, tolerance)
            for each in tried
            if each.reference is not None
        ]


def trained(
    rank_info: RankInfo, variant: Variant, steps: int, folder: str, weights: str | None = None
) -> None:
    """Takes `steps` steps from image 0; rank 0 leaves what every one of them made in `folder`."""
    config = variant.config
    _, sources = load_alike(config.data.roots, config.data.shares)
    student = build_student(config, config.seed)
    if config.init.source == "scratch":
        awake(student)
    if variant.reused:
        student.__class__ = Reusing
    origin = initialise(student, config, weights)
    state = build_state(
        config, rank_info, student, label_rates(sources, config.data.shares), origin
    )
    stream = shards.open(
        config.data.roots,
        global_batch=config.train.batch,
        micro_batch=cut_batch(config, rank_info.world).micro_batch,
        rank=rank_info.rank,
        world=rank_info.world,
        seed=config.seed,
        options=ReadOptions.of(config.data, weights=config.data.shares),
        loaded=sources,
    )
    run = RunFolder(Path(folder) / "run")
    telemetry = Telemetry(run, 1, rank_info, config.train.images)
    header = sources[0].header
    job = Training(
        config,
        rank_info,
        state,
        stream,
        build_objective(config.path),
        Normaliser.of(header),
        {},
        telemetry,
        Lease(run, 1),
    )
    if rank_info.rank == 0:
        # safetensors sorts names as text
        (Path(folder) / _ORDER).write_text(json.dumps([n for n, _ in student.named_parameters()]))
    try:
        for step in range(1, steps + 1):
            with even_rounding():
                advance(job)
            line, held = telemetry.report(state.images), tensors(state)
            if rank_info.rank == 0:
                numbers = {
                    n: torch.tensor(v)
                    for n, v in line.items()
                    if n == "grad_norm" or n.endswith("loss")
                }
                save_file(held, Path(folder) / f"{step}.tensors")
                save_file(numbers, Path(folder) / f"{step}.numbers")
    finally:
        stream.close()


def tensors(state: State) -> dict[str, Tensor]:
    """Everything that a step changes, by name, in the order of the network; all ranks call."""
    engine, moments = state.engine, state.engine.moments()
    held = {
        "": engine.masters,
        _FIRST: moments.first,
        "second moment of ": moments.second,
    }
    averages = zip(state.averages.specs, state.averages.shards, strict=True)
    held |= {f"average {spec.key} of ": shard for spec, shard in averages}
    found = {
        f"{what}{name}": tensor.clone()
        for what, shard in held.items()
        for name, tensor in engine.layout.split(engine.gather(shard)).items()
    }
    return found | {f"buffer {n}": b.detach().clone() for n, b in engine.module.named_buffers()}


def judge(variant: Variant, reference: Path, folder: Path, steps: int, tolerance: float) -> Verdict:
    """Compares what `trained` left in two folders, step by step, until something differs."""
    what = "bits" if variant.exact else "numbers"
    order = json.loads((reference / _ORDER).read_text())
    for step in range(1, steps + 1):
        theirs, mine = (_held(at, step, variant) for at in (reference, folder))
        if missing := theirs.keys() ^ mine.keys():
            return Verdict(variant.name, False, what, step, min(missing), math.inf)
        lengths = [float(theirs[key].norm()) for key in theirs if key.startswith(_FIRST)]
        least = _NOTHING * max(lengths, default=0.0)
        for key in _in_order(theirs, order):
            one, other = theirs[key].double(), mine[key].double()
            if torch.equal(one, other):
                continue
            if variant.exact or not _close(variant, key, one, other, tolerance, least):
                gap = (one - other).abs().max().item()
                return Verdict(variant.name, False, what, step, key, gap)
    return Verdict(variant.name, True, what)


def _held(folder: Path, step: int, variant: Variant) -> dict[str, Tensor]:
    """What is compared of a step: all tensors, or numbers and first moments."""
    tensors = load_file(folder / f"{step}.tensors")
    if variant.exact:
        return tensors
    moments = {name: value for name, value in tensors.items() if name.startswith(_FIRST)}
    return load_file(folder / f"{step}.numbers") | moments


def _in_order(held: dict[str, Tensor], order: Sequence[str]) -> list[str]:
    """Weights before what follows from them, each in the `order` of the network's parameters."""
    places = {name: number for number, name in enumerate(order)}
    # numbers come first, and buffers last
    last = len(order)

    def place(name: str) -> tuple[bool, int, str]:
        return " " in name, places.get(name.rpartition(" ")[2], last if " " in name else -1), name

    return sorted(held, key=place)


def _close(
    variant: Variant, key: str, one: Tensor, other: Tensor, tolerance: float, least: float
) -> bool:
    """Whether two numbers, or two first moments of which the shorter ones are taken to be `least` long, are near."""
    if not key.startswith(_FIRST):
        return math.isclose(float(one), float(other), rel_tol=tolerance)
    share = _SHARES[variant.config.engine.dtype]
    return bool((one - other).norm() <= share * one.norm().clamp(min=least))


def _print(found: Sequence[Verdict], steps: int) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("", "compared", f"after {steps} steps"):
        table.add_column(head)
    for each in found:
        said = "the same"
        if not each.same:
            said = (
                f"step {each.step} differs by up to {each.difference:.3g}, first in\n{each.tensor}"
            )
        table.add_row(each.name, _COMPARED[each.compared], said)
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
