"""What DDIM's noise levels and its clip do to narrow data: the spread of samples over steps, a line a source.

    python -m tools.spacing --out docs/spacing.png

Data are a Gaussian of standard deviation 0.05, six grey levels of 255, whose best denoiser is known: no network is
trained, and what is missing from 0.05 is the sampler's own error. A line is a preset of `configs/sampler` at other
numbers of steps. Noise is one value for each of many even quantiles, so nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from launcher.compose import compose
from selfguide.diffusion.paths import DDPM
from selfguide.diffusion.samplers import sample, settings
from selfguide.spec.config import SamplerConfig
from shards import cli
from tools import drawing, flags

SD = 0.05
COUNT = 4096
STEPS = (10, 20, 50, 100, 250, 500)
SHOWN = (10, 50, 250)
# where the clip at 1 never acts, and where it is a standard deviation away
MEANS = {0.0: "mean 0: no clip acts", 0.95: "mean 0.95, nearly white: clips at 1 cut a tail"}
LOOKS = {
    "ddim": ("trailing, no clip", "#222222"),
    "ddim_dit": ("linspace, no clip (DiT)", "#4c78a8"),
    "ddim_adm": ("leading, clipped (guided-diffusion)", "#e1812c"),
    "ddim_sgdm": ("leading_offset, clipped, noise kept (SGDM)", "#59a14f"),
}
PATH = DDPM()


def spread(sampler: SamplerConfig, mean: float) -> float:
    """The standard deviation of samples of N(mean, SD^2) under the best denoiser, unguided."""
    quantiles = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    noise = torch.distributions.Normal(0.0, 1.0).icdf(quantiles).view(-1, 1, 1, 1).double()

    def best(x: Tensor, times: Tensor) -> Tensor:
        a, b, _, _ = PATH.coefficients(times[:1].double())
        centred = (x - a * mean) / (a * a * SD**2 + b * b)
        return mean + a * SD**2 * centred

    made = sample(denoiser=best, noise=noise, path=PATH, **settings(sampler))
    return float(made.std())


def measured(mean: float) -> dict[str, list[float]]:
    """Of each preset, the spread at each number of STEPS."""
    found = {}
    for name in LOOKS:
        config = compose(
            ["experiment=digits_dit", "cluster=local", "path=ddpm", f"sampler={name}"]
        ).sampler
        found[name] = [spread(replace(config, steps=steps), mean) for steps in STEPS]
    return found


def plot(found: dict[float, dict[str, list[float]]], file: Path) -> None:
    """Writes the PNG."""
    with drawing.figure(file, 1, len(found), size=(10, 3.8), sharey=True) as (_, axes):
        for axis, (mean, lines) in zip(axes[0], found.items(), strict=True):
            for name, values in lines.items():
                label, colour = LOOKS[name]
                axis.plot(STEPS, values, "o-", color=colour, label=label, markersize=4)
            axis.axhline(SD, color="#b0b7c0", linewidth=1)
            axis.set(xscale="log", ylim=(0, 1.08 * SD), xlabel="steps", title=MEANS[mean])
            axis.set_xticks(STEPS, [str(steps) for steps in STEPS], fontsize=8)
            axis.minorticks_off()
            drawing.open_frame(axis)
        axes[0, 0].set_ylabel("std of samples; of the data 0.05")
        axes[0, 0].legend(frameon=False, fontsize=9, loc="lower right")


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.command(
        "tools.spacing", __doc__, ("--out", Path, None, "write the picture here")
    )
    options = parser.parse_args(argv)
    found = {mean: measured(mean) for mean in MEANS}
    rows = [
        {"sampler": name, "mean": f"{mean:g}"}
        | {str(steps): f"{values[STEPS.index(steps)]:.4f}" for steps in SHOWN}
        for mean, lines in found.items()
        for name, values in lines.items()
    ]
    cli.console().print(drawing.table(f"std of samples of N(mean, {SD}^2), by steps", rows, 2))
    if options.out:
        plot(found, options.out)
        print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
