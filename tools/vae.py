"""Fits small autoencoders of images and writes their weights.

python -m tools.vae SHARDS --out FILE    of any image shards: `encode --encoder small --weights FILE` reads them. Tested
                                         on samples held out, whose reconstructions are drawn beside FILE. Ended by
                                         Ctrl-C or a kill, it goes on when the same command is given again, and has
                                         lost half a minute at most
python -m tools.vae                      of scikit-learn's digits: fit on a fixed half, test on the other, write the
                                         weights into the package
python -m tools.vae --out FILE           write them elsewhere, for load_autoencoder("tiny", FILE)
python -m tools.vae --check              only test the committed weights
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from shards import cli
from shards.errors import UserError
from tools import flags

# of SHARDS alone
OPTIONS = ("factor", "channels", "width", "images", "batch", "rate", "dtype", "seed", "device")


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.command(
        "tools.vae",
        __doc__,
        ("shards SHARDS?", str, None, "folder or s3:// prefix of image shards (the digits)"),
        (
            "--out FILE",
            flags.here,
            None,
            "the file of weights, *.safetensors (of digits the package's)",
        ),
        flags.JSON,
    )
    of_digits = parser.add_argument_group("of the digits")
    flags.add(
        of_digits,
        ("--check", bool, False, "only test the committed weights, or those at --out"),
        ("--epochs N", int, 200, "passes over the half (200)"),
    )
    _add_small(parser.add_argument_group("of SHARDS"))
    options = parser.parse_args(argv)
    flags.check_least(options, 1, "epochs")
    if options.out is not None and not options.out.endswith(".safetensors"):
        raise UserError(f"--out {options.out}: the file's name must end in .safetensors")
    if options.out is not None and Path(options.out).is_dir():
        raise UserError(
            f"--out {options.out} is a folder: name a file, such as {options.out}/vae.safetensors"
        )
    others = OPTIONS if options.shards is None else ("check", "epochs")
    for name in others:
        if getattr(options, name) != parser.get_default(name):
            owner = (
                "SHARDS: name them" if options.shards is None else "the digits: leave SHARDS out"
            )
            raise UserError(f"--{name} is of {owner}")
    # torch takes seconds to import: not for help or a mistake
    if options.shards is None:
        from tools import digit_vae

        return digit_vae.run(options)
    flags.check_least(options, 1, "channels", "width", "images", "batch")
    if options.out is None:
        raise UserError("--out is missing: name the file of weights, FILE.safetensors")
    if not 0 < options.rate < math.inf:
        raise UserError(f"--rate {options.rate:g}: give a positive number")
    if options.batch > options.images:
        raise UserError(
            f"--batch {options.batch} is more than --images {options.images}: take {options.images} or less"
        )
    from tools import small_vae

    return small_vae.run(options)


def _add_small(to: argparse._ActionsContainer) -> None:
    flags.add(
        to,
        ("--factor", (2, 4, 8), 4, "image pixels to a latent pixel, along one side (4)"),
        ("--channels N", int, 4, "of a latent (4)"),
        ("--width N", int, 48, "of the network at half the image's edge (48)"),
        ("--images N", int, 96_000, "images seen (96000)"),
        ("--batch N", int, 32, "images a step (32)"),
        ("--rate X", float, 2e-3, "learning rate at its greatest (2e-3)"),
        (
            "--dtype",
            ("fp32", "bf16"),
            "fp32",
            "of convolutions; bf16 is faster on GPUs, and on processors that multiply it (fp32)",
        ),
        ("--seed N", int, 0, "of weights, order and noise (0)"),
        ("--device NAME", str, "auto", "cpu, cuda or cuda:N (a GPU if there is one)"),
    )
    # `choices` compares what `type` made
    next(a for a in to._actions if a.dest == "factor").type = int


if __name__ == "__main__":
    cli.run(main)
