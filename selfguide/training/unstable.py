"""Stops a run that its numbers have broken, and keeps what was not finite in its last step: image, module or loss."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfguide.data.batch import Batch
from selfguide.diffusion.objectives import Objective
from selfguide.distributed import gather
from selfguide.guidance.component import Inputs
from selfguide.networks.student import Outputs, Student
from selfguide.spec.config import TrainConfig
from selfguide.spec.run import write_record
from selfguide.training.work import Training, drawn, prepare_batch

log = logging.getLogger(__name__)

# ordinals that a message names
_NAMED = 8


class Unstable(FloatingPointError):
    """Training is broken by its numbers: all ranks stop at one report, and publish nothing more."""


class RollBackError(Unstable):
    """The same of a run that is to go back to a checkpoint from before, which `training.roll_back` does."""


def judge(job: Training, loss: float | None) -> None:
    """After a report: stops a run that its numbers have broken, or has it go back, before anything of it is published.

    Raises:
        Unstable: on all ranks alike; each has left what its last step read in the attempt's folder. It says what is
            not finite on the first rank that found something, and why a rank could not leave that.
        OSError: on all ranks alike, one could not leave it, and the run would go back without it: not where
            train.save_failed=go_on.
    """
    config, rank, run = job.config, job.rank_info.rank, job.lease.run
    reason = job.state.stability.judge(loss, last=job.state.images >= config.train.images)
    if reason is None:
        # where the last steps were skipped, weights may be broken already, only not for long enough yet
        if not int(job.state.stability.row):
            job.state.stability.good = job.state.images
        return
    if config.train.unstable == "go_on":
        log.warning(f"{reason}; training goes on, since train.unstable=go_on")
        return
    found = _last_step(job)
    path = run.attempt(job.lease.number) / f"numeric-{rank}.json"
    # over all ranks and before clipping; null where the step was skipped
    done = job.done
    norm = float(done.grad_norm) if done is not None and bool(done.applied) else None
    record = {"reason": reason, "rank": rank, "gradient_norm": norm, "micro_batches": found}
    mine = next((each["finding"] for each in found if each["finding"]), None)
    told = gather((mine and f"on rank {rank} {mine}", _write(path, record)))
    finding = next((each for each, _ in told if each), "all of its forward pass is finite")
    failed = next((error for _, error in told if error is not None), None)
    back = config.train.unstable == "roll_back"
    # one that stops for its numbers says that, and what else is wrong beside it
    if failed is not None and back and config.train.save_failed == "stop":
        raise failed
    kept = f"{path} holds its images, noise-times and losses"
    if failed is not None:
        kept = f"its images, noise-times and losses are not kept, since {failed}"
    kind = RollBackError if back else Unstable
    # read with roll_back alone
    counts = TrainConfig.roll_backs
    others = "" if config.train.roll_backs == counts else f" train.roll_backs={counts}"
    raise kind(
        f"{reason}. Of the last step, {finding}; {kept}. Mend the "
        "data, or submit it again with a lower train.learning_rate or with train.clip=1. To go on as it is: "
        f"python -m launcher.resume {shlex.quote(str(run.root))} train.unstable=go_on{others}"
    )


def _write(path: Path, record: dict[str, Any]) -> OSError | None:
    """Writes what this rank leaves; returns why it cannot: the other ranks wait to hear how it went."""
    try:
        write_record(path, record, replace=True)
    except OSError as error:
        return error
    return None


def _last_step(job: Training) -> list[dict[str, Any]]:
    """The evidence of each micro-batch of the last step, as it was read."""
    state = job.state
    state.images -= job.config.train.batch
    parts = [prepare_batch(job, arrays) for arrays in job.arrays]
    inputs = [state.components.inputs(part, state.teaching) for part in parts]
    state.images += job.config.train.batch
    module, data = state.engine.module, job.config.data
    roots = (data.root, *data.mix)
    found = []
    for part, each, arrays in zip(parts, inputs, job.arrays, strict=True):
        # with the dropout and the tokens of the step itself
        with drawn(job, arrays, part.position):
            found.append(evidence(part, each, job.objective, module, _samples(arrays, roots)))
    return found


def _samples(arrays: Mapping[str, np.ndarray], roots: Sequence[str]) -> dict[str, list[Any]]:
    """How the shards know the images of a micro-batch: `ordinals`, `keys`, and in a mixture the `roots` they are of."""
    found: dict[str, list[Any]] = {"ordinals": arrays["ordinal"].tolist()}
    if "key" in arrays:
        found["keys"] = arrays["key"].tolist()
    if "source" in arrays:
        found["roots"] = [roots[source] for source in arrays["source"].tolist()]
    return found


@torch.no_grad()
def evidence(
    batch: Batch,
    inputs: Inputs,
    objective: Objective,
    module: Student,
    samples: Mapping[str, list[Any]],
) -> dict[str, Any]:
    """Returns what a micro-batch was, and in `finding` what in it is not finite first; None where all is.

    The network runs once more on the same images and noise, with its heads; all ranks call. Its weights are those of
    then where the step was skipped. `samples` is what `_samples` says of them.
    """
    layer, outputs = _watched(module, batch, inputs)
    losses = objective.losses(
        outputs.prediction, batch.x0, batch.eps, batch.tau, outputs.log_variance
    )
    bad = (~batch.x0.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    finding = None
    if bad:
        # in a mixture several images have one ordinal
        roots = samples.get("roots")
        names = [f"{samples['ordinals'][at]}{f' of {roots[at]}' if roots else ''}" for at in bad]
        more = f" and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
        of = "" if roots else " of the shards"
        finding = f"images at the ordinals {', '.join(names[:_NAMED])}{more}{of} are not finite"
    elif layer is not None:
        finding = f"the output of {layer} is not finite, though the images are"
    elif not bool(losses.isfinite().all()):
        finding = "the loss is not finite, though the network's output is"
    return {
        "finding": finding,
        "images": batch.images,
        **samples,
        "positions": batch.position.tolist(),
        "noise_times": batch.tau.tolist(),
        "norms": batch.x0.flatten(1).norm(dim=1).tolist(),
        "losses": losses.flatten(1).mean(1).tolist() if losses.dim() > 1 else losses.tolist(),
    }


def _watched(module: Student, batch: Batch, inputs: Inputs) -> tuple[str | None, Outputs]:
    """The name of the first module whose output is not finite, None where all are, and what the network makes."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple | list) else (output,)
            floats = (t for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
            if not found and not all(bool(t.isfinite().all()) for t in floats):
                found.append(name)

        return look

    hooks = [m.register_forward_hook(watch(n)) for n, m in module.named_modules() if n]
    try:
        # a compiled block does not run hooks of now, or is compiled anew with them: their `if` over values is no graph
        with torch.compiler.set_stance("force_eager"):
            outputs = module(batch.x, batch.tau, inputs.condition, inputs.features)
    finally:
        for hook in hooks:
            hook.remove()
    if not found and outputs.scores is not None and not bool(outputs.scores.isfinite().all()):
        # its rows are no module
        found.append("head.prototypes")
    return (found[0] if found else None), outputs
