"""`python -m tools.sample`: images from a published snapshot.

By default conditioned on groups at their frequency in training, or on rows of training images where the model takes
layouts or features; or on given groups or labels, on the condition of a training image, on the group of a query image,
or on an interpolation of two groups. Writes a grid and single lossless PNGs, or with --npz one file of all; with
--chain the grid shows the intermediate states from noise to image. Names and bans in the run's groups.yaml are
honoured. An older set in the output folder moves into its `older/`.
"""

from __future__ import annotations

from collections.abc import Sequence

from shards import cli
from tools import sample_options


def main(argv: Sequence[str] | None = None) -> int:
    options = sample_options.parser(__doc__).parse_args(argv)
    sample_options.check(options)
    # torch takes seconds to import: not for help or a mistake
    from tools import sample_run

    return sample_run.run(options)


if __name__ == "__main__":
    cli.run(main)
