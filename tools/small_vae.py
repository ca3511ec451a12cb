"""Fits the small autoencoder to image shards, for `python -m tools.vae SHARDS`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import shards
from selfguide.data.autoencoders import load_autoencoder
from selfguide.data.autoencoders.autoencoder import TOP
from selfguide.data.autoencoders.small import SmallArchitecture, SmallVAE, to_bytes
from selfguide.data.crop_flip import mirrored
from selfguide.data.normaliser import Normaliser, posterior_mean, sample_posterior
from selfguide.discovery import resumable
from selfguide.sampling.grid import write_grid
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.format.manifest import Manifest
from shards.read.reader import Reader
from tools import flags

HELD_OUT = 0.1  # of the samples, at most MOST of them
MOST = 1_000
SHOWN = 16  # held out samples in the picture
KEPT_EVERY = 30.0  # seconds between two states that another call could go on from
LINES = 10  # lines of progress
WARM_UP = 0.05  # of the images, before the rate falls as a cosine does
KL_WEIGHT = 5e-4  # of a latent value's divergence against a pixel's squared error
DECAY = 1e-4


@dataclass(frozen=True, kw_only=True)
class Fit:
    """All that decides the weights, up to the order of sums."""

    manifest: str
    architecture: SmallArchitecture
    images: int
    batch: int
    rate: float
    dtype: str
    seed: int

    def rate_at(self, position: int) -> float:
        """Of AdamW, once `position` images were seen."""
        done = position / self.images
        if done < WARM_UP:
            return self.rate * max(done / WARM_UP, 1e-3)
        return self.rate * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def run(options: argparse.Namespace) -> int:
    manifest = manifests.load(options.shards)
    if manifest.count < 2:
        raise UserError(
            f"{options.shards} holds one image: give two or more, to fit to and to test on"
        )
    cuda = torch.cuda.is_available()
    wanted = ("cuda" if cuda else "cpu") if options.device == "auto" else options.device
    device = flags.moved(torch.zeros(()), wanted).device
    fit = Fit(
        manifest=manifest.hash,
        architecture=_architecture(options, manifest),
        images=options.images,
        batch=options.batch,
        rate=options.rate,
        dtype=options.dtype,
        seed=options.seed,
    )
    out, started = Path(options.out), time.process_time()
    state = out.parent / f".{out.name}.{manifests.digest(asdict(fit))[:12]}"
    unseen = levels(manifest, _read(options.shards, manifest, held_out(manifest.count)))
    net = train(fit, options.shards, manifest, state, device, lambda net: psnr_of(net, unseen))
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        # from where it stands nothing better comes
        state.unlink(missing_ok=True)
        raise UserError(
            f"the fit has diverged at --rate {options.rate:g}, and {out} is as it was: take a lower rate"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    storage.publish(out, to_bytes(net), replace=True)
    state.unlink(missing_ok=True)
    codec = load_autoencoder("small", out)
    made = codec.decode(posterior_mean(codec.encode(unseen)))
    picture = out.with_suffix(".png")
    pairs = torch.stack([unseen[:SHOWN], made[:SHOWN]]).flatten(0, 1)
    # of other channels than those of a picture the first ones
    write_grid(picture, pairs[:, : 3 if pairs.shape[1] >= 3 else 1], columns=SHOWN, zoom=3)
    found: dict[str, Any] = {
        "psnr": psnr(made, unseen),
        "held_out": len(unseen),
        "parameters": sum(p.numel() for p in net.parameters()),
        "latent": [*codec.header().model_shape(tuple(latent_shape(fit, manifest)))],
        "processor_seconds": round(time.process_time() - started, 1),
        "sha256": codec.sha256,
        "file": str(out),
        "picture": str(picture),
    }
    print(
        json.dumps(found)
        if options.json
        else f"{found['psnr']:.1f} dB on {found['held_out']} held out images, {found['parameters']:,} parameters, "
        f"{found['processor_seconds']:,.0f} s of processor time, sha256 {codec.sha256}\n"
        f"{out}\n{picture}: held out images above, what became of them below"
    )
    return 0


def _architecture(options: argparse.Namespace, manifest: Manifest) -> SmallArchitecture:
    """
    Raises:
        UserError: shards of latents, of both mirror images, or of an indivisible size.
    """
    header = Header.of(manifest.header)
    if header.kind != "image" or header.flips:
        raise UserError(f"{options.shards} holds no plain images: name the shards of the images")
    _ = Normaliser.of(header).top  # raises where nobody knows the levels
    channels, height, width = manifest.model_shape
    if height % options.factor or width % options.factor:
        raise UserError(
            f"--factor {options.factor}, and images in {options.shards} are {height} x {width}: give a factor that "
            "divides both, or write the shards with another --size"
        )
    return SmallArchitecture(
        image_channels=channels,
        channels=options.channels,
        factor=options.factor,
        width=options.width,
    )


def latent_shape(fit: Fit, manifest: Manifest) -> tuple[int, int, int]:
    """Of an image's moments, (2c, h, w)."""
    a = fit.architecture
    _, height, width = manifest.model_shape
    return 2 * a.channels, height // a.factor, width // a.factor


def held_out(count: int) -> np.ndarray:
    """Ordinals that are tested on and never fitted to: they lie evenly, for shards may be sorted."""
    wanted = min(MOST, max(1, round(HELD_OUT * count)))
    return np.unique(np.linspace(0, count - 1, wanted).astype(np.int64))


def _read(root: str, manifest: Manifest, ordinals: np.ndarray) -> np.ndarray:
    reader = Reader(root, manifest)
    try:
        return reader.gather(ordinals)["x"]
    finally:
        reader.close()


def levels(manifest: Manifest, stored: np.ndarray) -> Tensor:
    """Stored images as levels 0..255, uint8."""
    top = Normaliser.of(manifest.header).top
    return (torch.from_numpy(stored).float() * (TOP / top)).round().to(torch.uint8)


def train(
    fit: Fit,
    root: str,
    manifest: Manifest,
    state: Path,
    device: torch.device,
    test: Callable[[SmallVAE], float],
) -> SmallVAE:
    """The fitted network with the statistics of its latents; `state` keeps what a second call goes on from.

    It minimises a pixel's squared error and a little of a latent value's divergence from N(0, 1) (Kingma and Welling
    2014) by AdamW, over images and their mirror images in the data's own order. Order and noise are functions of the
    seed and of how many images were seen, so one that was ended sees what it would have seen.
    """
    torch.manual_seed(fit.seed)
    net = SmallVAE(fit.architecture).to(device).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=DECAY, betas=(0.9, 0.99))
    position, unfit = 0, held_out(manifest.count)
    moments = Moments.empty(fit.architecture.channels)
    if (kept := resumable.load(state, device)) is not None:
        net.load_state_dict(kept["net"])
        optimiser.load_state_dict(kept["optimiser"])
        position, moments = kept["position"], Moments(*kept["moments"])

    def keep() -> None:
        plain = [moments.count, moments.sums, moments.squares, moments.variances]
        held = {"net": net.state_dict(), "optimiser": optimiser.state_dict()}
        resumable.save(state, {**held, "position": position, "moments": plain})

    progress = Progress(fit.images, position)
    saved, batch = time.monotonic(), fit.batch
    with shards.open(
        root,
        global_batch=batch,
        micro_batch=batch,
        rank=0,
        world=1,
        seed=fit.seed,
        position=position,
        loaded=[manifest],
    ) as stream:
        while position < fit.images:
            found = next(stream)
            fresh = ~np.isin(found["ordinal"], unfit)
            places = torch.from_numpy(found["position"][fresh]).to(device)
            if len(places):
                x = levels(manifest, found["x"][fresh]).to(device).float() * (2 / TOP) - 1
                for group in optimiser.param_groups:
                    group["lr"] = fit.rate_at(position)
                looked = step(net, optimiser, x, fit, places)
                # of the last tenth, where the latents hardly move any more
                if position >= 0.9 * fit.images or position + batch >= fit.images:
                    moments = moments.with_batch(looked)
            position += batch
            progress.at(position, lambda: test(net))
            if time.monotonic() - saved >= KEPT_EVERY:
                keep()
                saved = time.monotonic()
    if not moments.count:
        raise UserError(
            f"--images {fit.images:,}: all of the last tenth, of which latents' mean and std are taken, were held out: "
            "give more, or a larger --batch"
        )
    mean, std = moments.normal()
    net.mean.copy_(mean)
    net.std.copy_(std)
    return net.eval()


def step(
    net: SmallVAE, optimiser: torch.optim.Optimizer, x: Tensor, fit: Fit, places: Tensor
) -> Tensor:
    """One step on images (B, C, H, W) in [-1, 1] at these positions (B,); returns their moments."""
    mirror = mirrored(fit.seed, places)[:, None, None, None]
    x = torch.where(mirror, x.flip(-1), x).contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=fit.dtype == "bf16"):
        looked = net.encode(x).float()
        made = net.decode(sample_posterior(looked, fit.seed, places)).float()
    centre, log_variance = looked.chunk(2, dim=1)
    divergence = (centre.square() + log_variance.exp() - 1 - log_variance) / 2
    loss = (made - x).square().mean() + KL_WEIGHT * divergence.mean()
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimiser.step()
    return looked.detach()


@dataclass(frozen=True)
class Moments:
    """Sums over latents, a value for each channel."""

    count: int
    sums: Tensor
    squares: Tensor
    variances: Tensor

    @staticmethod
    def empty(channels: int) -> Moments:
        zero = torch.zeros(channels, dtype=torch.float64)
        return Moments(0, zero, zero, zero)

    def with_batch(self, moments: Tensor) -> Moments:
        """With those of moments (B, 2c, h, w) added."""
        centre, log_variance = moments.double().cpu().chunk(2, dim=1)
        over = (0, 2, 3)
        return replace(
            self,
            count=self.count + centre.numel() // centre.shape[1],
            sums=self.sums + centre.sum(over),
            squares=self.squares + centre.square().sum(over),
            variances=self.variances + log_variance.exp().sum(over),
        )

    def normal(self) -> tuple[Tensor, Tensor]:
        """Mean and std of sampled latents, whose variance is that of the means and the mean of theirs."""
        mean = self.sums / self.count
        spread = self.squares / self.count - mean.square()
        return mean, (spread + self.variances / self.count).sqrt()


@torch.no_grad()
def psnr_of(net: SmallVAE, images: Tensor) -> float:
    """Of uint8 images there and back."""
    device = next(net.parameters()).device
    x = images.to(device).float() * (2 / TOP) - 1
    made = torch.cat([net.decode(posterior_mean(net.encode(part))) for part in x.split(100)])
    return psnr(((made + 1) * (TOP / 2)).round().clamp(0, TOP).cpu(), images)


def psnr(pictures: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of levels 0..255, over all pixels of all images."""
    error = (pictures.float() - others.float()).square().mean().item()
    return 10 * math.log10(TOP**2 / error) if error else math.inf


class Progress:
    """Says on stderr, a few times in all, how far a fit is, how good, and how long it will still take."""

    def __init__(self, images: int, position: int) -> None:
        self.images, self.first, self.started = images, position, time.monotonic()
        self.printed = LINES * position // images

    def at(self, position: int, test: Callable[[], float]) -> None:
        now = min(LINES, LINES * position // self.images)
        if now == self.printed:
            return
        self.printed = now
        left = (time.monotonic() - self.started) * max(0, self.images - position)
        left /= position - self.first
        print(
            f"{now * 100 // LINES:3d} %  {test():.2f} dB on held out images, {left:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )
