"""Diffusion models that find their own guidance: training, sampling and evaluation.

    import selfguide

    model = selfguide.load("runs/digits_dit/3f2a81b09c44")
    x = model.sample(16, g=1.5, seed=0)
    model.images(x)[0].save("first.png")

Nothing heavy is imported until a function is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from selfguide.trained import TrainedModel

__all__ = ["load"]


def load(
    run: str | os.PathLike[str],
    *,
    images: int | None = None,
    average: int = 0,
    runs: str | os.PathLike[str] = "runs",
    device: str | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
) -> TrainedModel:
    """A trained model, to sample from and to look into: `selfguide.trained.TrainedModel` has its methods.

    Args:
        run: a run's folder, id, beginning of an id or name, or the folder of one snapshot.
        images: the snapshot at so many images seen; the newest by default.
        average: the index of its average of weights, from 0.
        runs: where run folders are, for ids and names.
        device: where the network runs; by default a GPU where there is one, else the CPU.
        autoencoder: the file of weights that made the latents, where it is not found by itself.

    Raises:
        UserError: no such run, snapshot or average, or one that is damaged.
    """
    from selfguide.trained import load

    return load(
        run, images=images, average=average, runs=runs, device=device, autoencoder=autoencoder
    )
