"""The command line of `python -m tools.sample`: examples, a table of flags, and which go together."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args, get_type_hints

from selfguide.spec.config import EngineConfig
from selfguide.spec.config.sampler import Spacing
from shards.errors import UserError
from tools import flags

EPILOG = """examples:
  python -m tools.sample RUN                              64 images, groups at their frequency
  python -m tools.sample RUN --group 3 7 --g 2            rows of two groups, guidance weight 2
  python -m tools.sample RUN --g 0.4 --convention sgfm    the same weight as its paper writes it
  python -m tools.sample RUN --weak snapshot-96000 --g 2  autoguidance by an earlier snapshot of the run
  python -m tools.sample RUN --weak condition+head --g 2  away from both at once
  python -m tools.sample RUN --recipe fd_digits           sampled as a sweep of it chose by this metric
  python -m tools.sample RUN --prior uniform              every group as often as any other
  python -m tools.sample RUN --row 17 42                  the conditions of these two training images
  python -m tools.sample RUN --row 17 42 --beside         these images and their layouts before the samples
  python -m tools.sample RUN --group zeros                a group by its name in the run's groups.yaml
  python -m tools.sample RUN --row 5 --shards data/val --annotations layout=notes/val-boxes      of a validation image
  python -m tools.sample RUN --label flags 3              a class by its name, and one by its number
  python -m tools.sample RUN --like photo.png             the group nearest to an image
  python -m tools.sample RUN --between 3 7 --count 8      from one prototype to another, one noise
  python -m tools.sample RUN --count 50000 --npz          for evaluators; again goes on where it was ended
  torchrun --nproc-per-node 8 -m tools.sample RUN --count 50000 --npz     the same bits, from 8 GPUs
  python -m tools.sample RUN --chain --count 6            six images, noise to data
  python -m tools.sample RUN --chain --what x0            the data as estimated at each of these steps
  python -m tools.sample RUN --grid g=0,1,2,3 --count 6   six noises, each at four guidance weights
  python -m tools.sample RUN --grid runs=RUN,OTHER        each noise of two runs, side by side
  python -m tools.sample RUN --grid runs=RUN,OTHER --matched 0 1 2     a label, and the group that is matched with it
"""


DTYPES = get_args(get_type_hints(EngineConfig)["dtype"])
_SNAPSHOT: tuple[flags.Flag, ...] = (
    ("run RUN", str, None, flags.RUN),
    ("--images N", int, None, "the snapshot at N images seen (default: the newest)"),
    ("--ema I", int, 0, "index of the average, from 0 (0)"),
    ("--runs DIR", str, "runs", "folder of runs (runs)"),
)
# of which one at most is given
_CONDITION: tuple[flags.Flag, ...] = (
    ("--group K+", str, None, "these groups, as many images of each"),
    ("--label K+", str, None, "these human labels, by number or by the class's name"),
    (
        "--matched K+",
        str,
        None,
        "the groups that the training images match with these labels, one to one",
    ),
    ("--row ORDINAL+", int, None, "the conditions of these training images"),
    ("--like IMAGE+", str, None, "the groups nearest to image files or ordinals"),
    ("--between A B", str, None, "from one group to another, or one image's feature to another's"),
    ("--uncond", bool, False, "unconditional"),
)
_OTHERS: tuple[flags.Flag, ...] = (
    ("--shards ROOT", str, None, "shards of these (those of training)"),
    (
        "--annotations FIELD=FOLDER+",
        str,
        (),
        "their sidecars, where images are conditioned on sidecars: ids=, layout= or dense=",
    ),
)
_IMAGES: tuple[flags.Flag, ...] = (
    (
        "--prior",
        ("empirical", "uniform"),
        None,
        "sample groups at their frequency in training, or uniformly (empirical)",
    ),
    ("--count N", int, 64, "number of images (64)"),
    ("--chain", bool, False, "show intermediate states of each image from noise to data"),
    ("--what", ("state", "x0"), None, "of a chain: states, or the data estimated there (state)"),
    (
        "--grid KEY=A,B",
        str,
        None,
        "one noise a row, one value a column: g=0,1,2 or steps=5,10 or images=N,M or runs=A,B",
    ),
    (
        "--beside",
        bool,
        False,
        "begin each row with its image of --row or --like, and the layout found there",
    ),
    ("--npz", bool, False, "write samples.npz, as ADM's evaluator reads it, in place of pictures"),
    ("--rank R", int, None, "of this process, with --world: ranks share out --npz (torchrun's)"),
    ("--world W", int, None, "processes that make one samples.npz together"),
    ("--columns N", int, 8, "columns of the grid (8)"),
    ("--seed", int, 0, "image i is a function of seed + i (0)"),
    ("--device", str, None, "where the network runs (a GPU where there is one)"),
    (
        "--dtype",
        DTYPES,
        "fp32",
        "of the network; the sampler's state is fp32 (fp32)",
    ),
    ("--batch N", int, 64, "batch size (64)"),
    ("--out DIR", flags.here, "samples", "output folder (samples)"),
    flags.JSON,
)
_LATENTS: tuple[flags.Flag, ...] = (
    ("--autoencoder NAME", str, None, "autoencoder (the one of the data)"),
    ("--weights PATH", str, None, "its weights"),
)
_SAMPLER: tuple[flags.Flag, ...] = (
    ("--recipe METRIC", str, None, "as sweeps chose by this metric"),
    (
        "--sampler NAME",
        str,
        None,
        "euler, heun, ddim, dpm1, dpm2, dpm_fast, dpmpp, euler_maruyama or dopri5",
    ),
    ("--steps X", int, None, "number of steps, of a fixed-step sampler"),
    ("--g X", float, None, "total guidance weight: 1 is none, 0 unconditional"),
    (
        "--weak MODEL",
        str,
        None,
        "what guidance leads away from: condition, head, routed, average-KEY or snapshot-IMAGES; several as A+B, or "
        "with shares as A:0.25+B:0.75",
    ),
    ("--interval LOW HIGH", float, None, "noise-times in which the weight applies"),
    ("--guided-channels X", int, None, "guide only the first so many"),
    ("--shift X", float, None, "of the schedule; above 1 spends more steps at high noise"),
    (
        "--spacing",
        get_args(Spacing),
        None,
        "which noise levels of a discrete table are visited; log_snr of vp, ve and edm",
    ),
    ("--rtol X", float, None, "of dopri5"),
    ("--atol X", float, None, "of dopri5"),
    ("--clip X", float, None, "of ddim: clamp x0 estimates to +-X, in model space"),
    ("--clipped-noise", ("reread", "kept"), None, "of ddim: the noise beside a clipped estimate"),
    ("--eta X", float, None, "of ddim: 0 deterministic, 1 ancestral"),
    ("--churn X", float, None, "of heun: EDM's S_churn"),
    ("--churn-sigma LOW HIGH", float, None, "noise levels in which heun churns"),
    ("--churn-noise X", float, None, "EDM's S_noise"),
    ("--diffusion NAME", str, None, "of euler_maruyama: sit, repa or sbdm"),
    (
        "--convention PAPER",
        str,
        None,
        "read --g, --interval and --shift as this paper writes them: sgfm, dit, lightningdit, ...",
    ),
)


def parser(about: str | None) -> argparse.ArgumentParser:
    """Returns the parser of `python -m tools.sample`; `about` is what its help begins with."""
    made = flags.command("tools.sample", about, *_SNAPSHOT, epilog=EPILOG)
    flags.add(made.add_argument_group("condition").add_mutually_exclusive_group(), *_CONDITION)
    others = made.add_argument_group("ordinals count other images, such as validation images")
    flags.add(others, *_OTHERS)
    flags.add(made, *_IMAGES)
    flags.add(made.add_argument_group("decoding latents"), *_LATENTS)
    flags.add(made.add_argument_group("sampler (the run's own where not given)"), *_SAMPLER)
    return made


def check(options: argparse.Namespace) -> None:
    """Returns where options have values that go together.

    Raises:
        UserError: they have not.
    """
    flags.check_least(options, 1, "count", "columns", "batch")
    flags.check_image_seed(options, options.count or 1)
    _check_beside(options)
    _check_chain(options)
    if not options.grid:
        rank_of(options)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {options.out} is a file: name a folder")


def _check_beside(options: argparse.Namespace) -> None:
    if not options.beside:
        return
    if not (options.row or options.like):
        raise UserError(
            "--beside shows training images or query images: give --row ORDINAL or --like IMAGE"
        )
    for name in ("chain", "npz", "grid"):
        if getattr(options, name):
            raise UserError(f"--beside and --{name} are pictures of other kinds: drop one")


def _check_chain(options: argparse.Namespace) -> None:
    if options.what and not options.chain:
        raise UserError(f"--what {options.what} is of the way from noise to data: give --chain too")


def rank_of(options: argparse.Namespace) -> tuple[int, int]:
    """Rank and number of ranks: as said, or as torchrun sets them.

    Raises:
        UserError: ranks that do not exist, or several that would write pictures.
    """
    if (options.rank is None) != (options.world is None):
        raise UserError("--rank and --world come together")
    rank, world = options.rank, options.world
    if rank is None:
        if not options.npz:
            return 0, 1
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise UserError(f"--rank {rank} --world {world}: ranks go from 0 to world - 1")
    if not options.npz:
        raise UserError("--rank and --world share out the images of a file: give --npz")
    if options.chain:
        raise UserError("--chain shows how pictures become, and --npz writes none: drop one")
    return rank, world
