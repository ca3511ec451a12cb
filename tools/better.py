"""`python -m tools.better A B`: which of two models is better, from as few samples as that takes.

Both draw image i from the same noise, so that their difference is known far better than either score; the drawing ends
as soon as an interval that holds at all looks together excludes 0. A and B are runs, or folders of snapshots, of one
data set. Digits are measured by fd_digits, other images by --protocol, or by the protocol of A's run, and compared with
what that one is compared with, where that is a file of another protocol with A's training images; each is drawn by its
run's own sampler.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shards
from selfguide.data.normaliser import Normaliser
from selfguide.evaluation import images
from selfguide.evaluation.features.digitnet import DigitNet, embed, load_digitnet
from selfguide.evaluation.features.net import load_feature_net
from selfguide.evaluation.images import Work, reference_of
from selfguide.evaluation.job import REFERENCES
from selfguide.evaluation.metrics.frechet import Reference
from selfguide.evaluation.metrics.moments import BLOCKS, Moments
from selfguide.evaluation.paired import Comparison, Draw, compare
from selfguide.sampling.condition_sampler import condition_sampler
from selfguide.sampling.generate import generate_each
from selfguide.snapshot import Snapshot
from selfguide.spec.config import EvaluationConfig
from selfguide.spec.metrics import FEATURES
from selfguide.spec.run import RunFolder
from selfguide.spec.selections import select
from selfguide.spec.timm_nets import pinned
from shards import cli
from shards.errors import UserError
from tools import flags
from tools.feature_flags import PROTOCOLS
from tools.sample_run import load_snapshot

EPILOG = """examples:
  python -m tools.better RUN1 RUN2                        the newest snapshots of two runs
  python -m tools.better RUN/snapshots/img-000100000 RUN  whether it got better since
  python -m tools.better RUN1 RUN2 --alpha 0.01           be surer before you stop
  python -m tools.better RUN1 RUN2 --protocol fd_effnet   of other images than digits
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    flags.check_least(options, 1, "looks", "batch")
    flags.check_image_seed(options, options.most)
    if options.most < options.looks * BLOCKS:
        raise UserError(
            f"--most {options.most} in {options.looks} looks: each takes at least {BLOCKS} images, one for each "
            f"block of the jackknife; give --most {options.looks * BLOCKS} or more"
        )
    if not 0 < options.alpha < 1:
        raise UserError(f"--alpha {options.alpha:g} is a probability of error: give 0.05")
    (a, of_a), (b, of_b) = (load_snapshot(name, options.runs) for name in (options.a, options.b))
    protocol = options.protocol or _protocol_of(a)
    _check(a, b, options.a, options.b, protocol)
    if options.select:
        for folder in (of_a, of_b):
            _run_of(folder)
    for snapshot in (a, b):
        flags.moved(snapshot.student, options.device)
    reference, draws = (_digits if protocol == "fd_digits" else _images)(a, b, protocol, options)
    found = compare(reference, *draws, most=options.most, looks=options.looks, alpha=options.alpha)
    if options.select and found.better:
        chosen, folder = (a, of_a) if found.better == "A" else (b, of_b)
        _select(folder, chosen, protocol, a.config.evaluation, among=(options.a, options.b))
    print(json.dumps(plain(found, protocol)) if options.json else words(found, protocol))
    return 0


def _select(
    folder: Path,
    chosen: Snapshot,
    protocol: str,
    evaluation: EvaluationConfig,
    among: tuple[str, ...],
) -> None:
    """Writes into the run of the better one by which net it was chosen."""
    of_timm = protocol == "fd_timm"
    measured = {
        "metric": protocol,
        "net": evaluation.net if of_timm else None,
        "feature_sha256": str(pinned(evaluation).sha256) if of_timm else FEATURES[protocol].sha256,
    }
    run = _run_of(folder)
    select(run, measured, by="tools.better", images=chosen.images, among=among)


def _run_of(folder: Path) -> RunFolder:
    """The run of a snapshot's folder.

    Raises:
        UserError: it lies in none.
    """
    run = RunFolder(folder.resolve().parent.parent)
    if not run.run_json.is_file():
        raise UserError(
            f"--select with {folder}: this snapshot lies in no run's folder, where the choice would be written down; "
            "drop --select, or name a run"
        )
    return run


def _digits(
    a: Snapshot, b: Snapshot, protocol: str, options: argparse.Namespace
) -> tuple[Reference, list[Draw]]:
    net, _ = load_digitnet()
    scans = torch.as_tensor(shards.read_all(a.data["root"])["x"])
    reference = Reference.of(Moments.of(embed(net, scans)[0]))
    return reference, [drawn(each, net, options.seed, options.batch or 500) for each in (a, b)]


def _images(
    a: Snapshot, b: Snapshot, protocol: str, options: argparse.Namespace
) -> tuple[Reference, list[Draw]]:
    evaluation = a.config.evaluation
    if protocol != evaluation.protocol:
        # they are of the net of the run's own protocol
        evaluation = replace(evaluation, reference=None, weights=None, net=None, sha256=None)
    asked: dict[str, Any] = {"protocol": protocol, "seed": options.seed}
    # weights may have come since the run was submitted
    evaluation = pinned(replace(evaluation, **asked, batch=options.batch or evaluation.batch))
    net = load_feature_net(
        protocol, evaluation.weights, net=evaluation.net, sha256=evaluation.sha256
    ).to(options.device)
    references = Path(options.runs) / REFERENCES
    known = reference_of(a, evaluation, net, Work(parts=references, references=references))
    assert known is not None  # this is the only rank
    return known.main, [
        images.drawn(each, replace(each.config, evaluation=evaluation), net) for each in (a, b)
    ]


def drawn(snapshot: Snapshot, net: DigitNet, seed: int, batch: int) -> Draw:
    """Features of a snapshot's samples; image i is a function of the snapshot and `seed + i`."""
    pixels = drawn_pixels(snapshot, seed, batch)
    return lambda first, last: embed(net, pixels(first, last))[0]


def drawn_pixels(snapshot: Snapshot, seed: int, batch: int) -> Callable[[int, int], Tensor]:
    """The samples themselves as stored values, from the first to before the last."""
    conditions = condition_sampler(snapshot, "empirical")
    normaliser = Normaliser.of(snapshot.data["header"])

    def draw(first: int, last: int) -> Tensor:
        seeds = seed + torch.arange(first, last)
        made = generate_each(
            snapshot, snapshot.config.sampler, conditions(seeds), seeds, batch=batch
        )
        x = torch.cat([x for x, _ in made])
        images.check_finite(x, first)
        return normaliser.pixels(x)

    return draw


def plain(found: Comparison, protocol: str) -> dict[str, object]:
    """As JSON: the answer, and how it came about."""
    looks = [asdict(look) for look in found.looks]
    said = {"better": found.better, "saved": found.saved, "most": found.most, "alpha": found.alpha}
    return {**said, "metric": protocol, "looks": looks}


def words(found: Comparison, protocol: str) -> str:
    last = found.looks[-1]
    answer = f"{found.better} is better" if found.better else "no difference is known"
    saved = f"; {found.saved:,} images saved" if found.saved else ""
    return (
        f"{answer}: {protocol} of A less that of B is {last.difference:.4g} ± {last.se:.2g}, between {last.low:.4g} "
        f"and {last.high:.4g} at {1 - found.alpha:.0%}, after {last.images:,} of {found.most:,} images each{saved}"
    )


def _protocol_of(snapshot: Snapshot) -> str:
    """fd_digits of digits, else the protocol of the snapshot's run.

    Raises:
        UserError: it has none.
    """
    protocol = "fd_digits" if _of_digits(snapshot) else snapshot.config.evaluation.protocol
    if protocol == "none":
        raise UserError(
            f"A is of a run with evaluation=none: say by --protocol what to measure by, {' or '.join(PROTOCOLS)}"
        )
    return protocol


def _of_digits(snapshot: Snapshot) -> bool:
    net = snapshot.student.backbone.net
    return snapshot.data["header"]["kind"] == "image" and (net.channels, net.size) == (1, 8)


def _check(a: Snapshot, b: Snapshot, name_a: str, name_b: str, protocol: str) -> None:
    """
    Raises:
        UserError: the two are of other data, or of data that the digit net does not know.
    """
    for snapshot, name in ((a, name_a), (b, name_b)):
        net = snapshot.student.backbone.net
        if protocol == "fd_digits" and not _of_digits(snapshot):
            raise UserError(
                f"{name} makes {net.channels}x{net.size}x{net.size} {snapshot.data['header']['kind']}s, and fd_digits "
                "measures images of 1x8x8; give runs on the digits, or another --protocol"
            )
    if a.data["root"] != b.data["root"] and a.data.get("manifest") != b.data.get("manifest"):
        raise UserError(
            f"{name_a} and {name_b} are of other data, {a.data['root']} and {b.data['root']}: give two of one"
        )


def _parser() -> argparse.ArgumentParser:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return flags.command(
        "tools.better",
        __doc__,
        ("a A", str, None, flags.RUN),
        ("b B", str, None, flags.RUN),
        flags.RUNS,
        (
            "--protocol P",
            ("fd_digits", *PROTOCOLS),
            None,
            "what to measure by (of digits fd_digits, else A's run's)",
        ),
        ("--most N", int, 5000, "images of each at most (5000)"),
        ("--looks N", int, 10, "times to look, evenly spread (10)"),
        ("--alpha X", float, 0.05, "probability of naming one where they are equal (0.05)"),
        ("--seed N", int, 0, "image i is a function of seed + i (0)"),
        ("--batch N", int, None, "batch size (500, or that of the protocol of A's run)"),
        ("--device", str, device, f"where the networks run ({device})"),
        (
            "--select",
            bool,
            False,
            "choose the better one: scores in that net say less of it from then on",
        ),
        flags.JSON,
        epilog=EPILOG,
    )


if __name__ == "__main__":
    cli.run(main)
