"""Fits the tiny autoencoder of scikit-learn's digits, for `python -m tools.vae` without shards."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import selfguide.data.autoencoders.tiny as tiny
from selfguide.data.autoencoders import Autoencoder, load_autoencoder
from selfguide.data.autoencoders.tiny import WEIGHTS, TinyVAE
from selfguide.data.normaliser import posterior_mean
from selfguide.evaluation.features.digitnet import half
from shards import storage
from tools.digitnet import digits, one_cycle
from tools.small_vae import psnr

LEAST = 26.0  # dB on the half it has not seen
KL_WEIGHT = 1e-2  # of a latent value's divergence against a pixel's squared error
RATE = 4e-3


def images() -> Tensor:
    """All scans as uint8 images (1797, 1, 8, 8): their 17 levels stretched to 0..255."""
    found, _ = digits()
    return (found.float() * (255 / 16)).round().to(torch.uint8)


def fit(pictures: Tensor, epochs: int) -> TinyVAE:
    """Fits the evidence's lower bound (Kingma & Welling 2014); fixed seed, one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, x = TinyVAE(), pictures.float() * (2 / 255) - 1
    one_cycle(
        net,
        lambda chosen: bound(net, x[chosen]),
        count=len(x),
        epochs=range(epochs),
        rate=RATE,
        weight_decay=1e-4,
    )
    measure(net, x)
    return net.eval()


def bound(net: TinyVAE, x: Tensor) -> Tensor:
    """Squared error a pixel of one sampled latent, and the weighted divergence from N(0, 1) a latent value."""
    centre, log_variance = net.encode(x).chunk(2, dim=1)
    latents = centre + (log_variance / 2).exp() * torch.randn_like(centre)
    divergence = (centre.square() + log_variance.exp() - 1 - log_variance) / 2
    return (net.decode(latents) - x).square().mean() + KL_WEIGHT * divergence.mean()


@torch.no_grad()
def measure(net: TinyVAE, x: Tensor) -> None:
    """Mean and std of each channel of sampled latents, whose variance is that of the means and the mean of theirs."""
    centre, log_variance = net.encode(x).chunk(2, dim=1)
    variance = centre.var((0, 2, 3), unbiased=False) + log_variance.exp().mean((0, 2, 3))
    net.mean.copy_(centre.mean((0, 2, 3)))
    net.std.copy_(variance.sqrt())


def test(codec: Autoencoder, pictures: Tensor) -> dict[str, float]:
    """dB there and back on the half it has not seen, and of the one image that would be right on average."""
    even, odd = half(len(pictures))
    unseen = pictures[odd]
    blind = pictures[even].float().mean(0, keepdim=True).expand(len(odd), -1, -1, -1)
    return {
        "psnr": psnr(codec.decode(posterior_mean(codec.encode(unseen))), unseen),
        "psnr_of_mean_image": psnr(blind.round(), unseen),
    }


def run(options: argparse.Namespace) -> int:
    """Fits, tests and writes the weights, or only tests them; 1 where they are worse than they should be."""
    package = Path(tiny.__file__).parent / "weights" / WEIGHTS
    out = package if options.out is None else Path(options.out)
    pictures = images()
    with tempfile.TemporaryDirectory() as scratch:
        weights = options.out
        if not options.check:
            even, _ = half(len(pictures))
            weights = Path(scratch) / WEIGHTS
            save_file(dict(fit(pictures[even], options.epochs).state_dict()), weights)
        codec = load_autoencoder("tiny", weights)
        found = test(codec, pictures)
        good = found["psnr"] >= LEAST
        # what is worse than it should be never replaces the package's
        if not options.check and (good or options.out):
            storage.publish(out, weights.read_bytes(), replace=True)
    report = {**found, "least": LEAST, "sha256": codec.sha256, "file": str(out)}
    print(
        json.dumps(report)
        if options.json
        else f"{found['psnr']:.1f} dB on the other half (its mean image: {found['psnr_of_mean_image']:.1f} dB; "
        f"at least {LEAST} dB are needed), sha256 {codec.sha256}\n{out}"
    )
    return 0 if good else 1
