"""What a score costs: features of an image, and once they are there the Frechet distance and the sums behind it.

Features are of nets with random weights, on images of 256 pixels; as many a second as 1 over the median. The distance
is taken against other packages: all get the same statistics of features as wide as Inception's. A reference keeps its
square root, so that it is none of the distance's cost; the packages begin from both covariances each time. Then the
leaderboard with many runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from selfguide.evaluation.features.effnet import SIZE as EFFNET_SIZE
from selfguide.evaluation.features.effnet import WIDTH as EFFNET_WIDTH
from selfguide.evaluation.features.effnet import EffNet
from selfguide.evaluation.features.inception import SIZE as INCEPTION_SIZE
from selfguide.evaluation.features.inception import WIDTH as INCEPTION_WIDTH
from selfguide.evaluation.features.inception import Inception
from selfguide.evaluation.features.net import FeatureNet
from selfguide.evaluation.metrics.frechet import Reference, distance, frechet
from selfguide.evaluation.metrics.moments import BLOCKS, Array, Moments
from shards.errors import UserError
from tools.bench import board
from tools.bench.harness import Row, Variant, measure

WIDTH, BATCH = 2048, 4096
IMAGES, EDGE = 16, 256
TITLE = (
    "evaluation: features of an image, fp32; Frechet distance and its sums at 2,048 features, float64, on the CPU "
    "(ratio to the first of each group); the board with many runs (ratio to its limit)"
)


def suite(repeats: int) -> list[Row]:
    generator = np.random.default_rng(0)
    real, made = (generator.normal(size=(4 * WIDTH, WIDTH)) * scale for scale in (1.0, 1.1))
    reference = Reference.of(Moments.of(real))
    blocks = Moments.of(made, reference.mean, BLOCKS)
    ours = partial(reference.distance, *blocks.gaussian())
    gaussians = (reference.mean, reference.covariance, *blocks.gaussian())
    variants = [
        Variant("Frechet: ours", ours),
        Variant("Frechet: ours, root not cached", partial(distance, *gaussians)),
        Variant("Frechet: ours, jackknife of 10 blocks", partial(frechet, reference, blocks)),
        *(Variant(f"Frechet: {name}", call) for name, call in packages(*gaussians).items()),
    ]
    batch = made[:BATCH].astype(np.float32)
    sums = [
        Variant(
            f"sums of {BATCH:,} features: ours, 10 blocks", partial(_stream, reference.mean, batch)
        ),
        Variant(
            f"sums of {BATCH:,} features: numpy.cov, all at hand",
            partial(np.cov, batch, rowvar=False),
        ),
    ]
    images = torch.from_numpy(generator.integers(0, 256, (IMAGES, 3, EDGE, EDGE), np.uint8))
    features = [
        Variant(f"features of an image, {IMAGES} at once: {net.name}", partial(net.embed, images))
        for net in nets()
    ]
    return [
        *measure(features, repeats=repeats, warmup=1, units=IMAGES),
        *measure(variants, repeats=repeats, warmup=1),
        *measure(sums, repeats=repeats, warmup=1),
        *board.suite(repeats),
    ]


def nets() -> list[FeatureNet]:
    """The nets of fid_adm and of fd_effnet, of random weights: a second image costs what the first does."""
    inception = FeatureNet(
        name="Inception (fid_adm)",
        sha256="",
        resize="TF1 bilinear",
        size=INCEPTION_SIZE,
        mean=(128.0,) * 3,
        std=(128.0,) * 3,
        width=INCEPTION_WIDTH,
        net=Inception().eval().requires_grad_(False),
    )
    effnet = FeatureNet(
        name="EfficientNet-Lite0 (fd_effnet)",
        sha256="",
        resize="bicubic, antialiased, float",
        size=EFFNET_SIZE,
        mean=(127.5,) * 3,
        std=(127.5,) * 3,
        width=EFFNET_WIDTH,
        net=EffNet().eval().requires_grad_(False),
    )
    return [inception, effnet]


def packages(
    mean1: Array, covariance1: Array, mean2: Array, covariance2: Array
) -> dict[str, Callable[[], float]]:
    """Calls that give the distance as other packages compute it.

    Raises:
        UserError: one of them is not installed.
    """
    try:
        from cleanfid.fid import frechet_distance
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
        from torchmetrics.image.fid import _compute_fid
    except ImportError as error:
        raise UserError(
            f"this suite times other packages' distances ({error}): pip install 'selfguide[dev]'"
        ) from error

    one, other = ({"mu": m, "sigma": s} for m, s in ((mean1, covariance1), (mean2, covariance2)))
    tensors = [torch.from_numpy(x) for x in (mean1, covariance1, mean2, covariance2)]
    return {
        "torchmetrics": lambda: _compute_fid(*tensors).item(),
        "torch-fidelity": lambda: fid_statistics_to_metric(one, other, False)[KEY_METRIC_FID],
        "clean-fid": lambda: float(frechet_distance(mean1, covariance1, mean2, covariance2)),
    }


def _stream(shift: Array, batch: np.ndarray) -> Array:
    made = Moments(shift)
    made.update(batch, 0)
    return made.sums
