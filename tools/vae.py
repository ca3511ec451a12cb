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

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import selfguide.data.autoencoders.tiny as tiny
from selfguide.data.autoencoders import Autoencoder, load_autoencoder
from selfguide.data.autoencoders.tiny import WEIGHTS, TinyVAE
from selfguide.data.normaliser import posterior_mean
from selfguide.evaluation.features.digitnet import half
from shards import cli, storage
from shards.errors import UserError
from tools import flags, small_vae
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.command(
        "tools.vae",
        __doc__,
        ("shards SHARDS?", str, None, "folder or s3:// prefix of image shards (the digits)"),
        ("--out FILE", str, None, "the file of weights, *.safetensors (of digits the package's)"),
        flags.JSON,
    )
    of_digits = parser.add_argument_group("of the digits")
    flags.add(
        of_digits,
        ("--check", bool, False, "only test weights"),
        ("--epochs N", int, 200, "passes over the half (200)"),
    )
    small_vae.add(parser.add_argument_group("of SHARDS"))
    options = parser.parse_args(argv)
    flags.check_least(options, 1, "epochs")
    if options.out is not None and not options.out.endswith(".safetensors"):
        raise UserError(f"--out {options.out}: the file's name must end in .safetensors")
    others = small_vae.OPTIONS if options.shards is None else ("check", "epochs")
    for name in others:
        if getattr(options, name) != parser.get_default(name):
            owner = (
                "SHARDS: name them" if options.shards is None else "the digits: leave SHARDS out"
            )
            raise UserError(f"--{name} is of {owner}")
    if options.shards is not None:
        return small_vae.run(options)
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


if __name__ == "__main__":
    cli.run(main)
