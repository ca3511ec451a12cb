"""What DDIM's noise levels and its clip do to narrow data: the spread of samples over steps, a line a source.

    python -m tools.spacing --out docs/spacing.png

Data are a Gaussian of standard deviation 0.05, six grey levels of 255, whose best denoiser is known: no network is
trained, and what is missing from 0.05 is the sampler's own error. A line is a preset of `configs/sampler` on one of
`configs/path` at other numbers of steps. Noise is one value for each of many even quantiles, so nothing is drawn at
random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from launcher.compose import compose
from selfguide.diffusion import paths
from selfguide.diffusion.samplers import sample, settings
from selfguide.spec.config import SamplerConfig
from shards import cli
from tools import drawing, flags

LINEAR = paths.DDPM()
SD = 0.05
COUNT = 4096
STEPS = (10, 20, 50, 100, 250, 500)
SHOWN = (10, 50, 250)
# where the clip at 1 never acts, and where it is a standard deviation away
MEANS = {0.0: "mean 0: no clip acts", 0.95: "mean 0.95, nearly white: clips at 1 cut a tail"}
# sampler and path -> label and colour; SGDM's own table is the last, the others are on one for comparison
LOOKS = {
    ("ddim", "ddpm"): ("trailing, no clip", "#222222"),
    ("ddim_dit", "ddpm"): ("linspace, no clip (DiT)", "#4c78a8"),
    ("ddim_adm", "ddpm"): ("leading, clipped (guided-diffusion)", "#e1812c"),
    ("ddim_sgdm", "ddpm"): ("leading_offset, clipped, noise kept (SGDM)", "#59a14f"),
    ("ddim_sgdm", "ddpm_quad"): ("the same on SGDM's table, ddpm_quad", "#b07aa1"),
}
Line = tuple[str, str]


def spread(sampler: SamplerConfig, mean: float, path: paths.Path = LINEAR) -> float:
    """The standard deviation of samples of N(mean, SD^2) under the best denoiser, unguided."""
    quantiles = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    noise = torch.distributions.Normal(0.0, 1.0).icdf(quantiles).view(-1, 1, 1, 1).double()

    def best(x: Tensor, times: Tensor) -> Tensor:
        a, b, _, _ = path.coefficients(times[:1].double())
        centred = (x - a * mean) / (a * a * SD**2 + b * b)
        return mean + a * SD**2 * centred

    made = sample(denoiser=best, noise=noise, path=path, **settings(sampler))
    return float(made.std())


def measured(mean: float) -> dict[Line, list[float]]:
    """Of each of LOOKS, the spread at each number of STEPS."""
    found = {}
    for sampler, path in LOOKS:
        config = compose(
            ["experiment=digits_dit", "cluster=local", f"path={path}", f"sampler={sampler}"]
        )
        table = paths.build_path(config.path)
        found[sampler, path] = [
            spread(replace(config.sampler, steps=steps), mean, table) for steps in STEPS
        ]
    return found


def plot(found: dict[float, dict[Line, list[float]]], file: Path) -> None:
    """Writes the PNG."""
    with drawing.figure(file, 1, len(found), size=(10, 3.8), sharey=True) as (_, axes):
        for axis, (mean, lines) in zip(axes[0], found.items(), strict=True):
            for line, values in lines.items():
                label, colour = LOOKS[line]
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
        "tools.spacing", __doc__, ("--out FILE", Path, None, "the picture (none is written)")
    )
    options = parser.parse_args(argv)
    found = {mean: measured(mean) for mean in MEANS}
    rows = [
        {"sampler": sampler, "path": path, "mean": f"{mean:g}"}
        | {str(steps): f"{values[STEPS.index(steps)]:.4f}" for steps in SHOWN}
        for mean, lines in found.items()
        for (sampler, path), values in lines.items()
    ]
    cli.console().print(drawing.table(f"std of samples of N(mean, {SD}^2), by steps", rows, 3))
    if options.out:
        plot(found, options.out)
        print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
