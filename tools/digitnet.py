"""Fits the feature net of `fd_digits` on a fixed half of the digits and writes its weights.

python -m tools.digitnet                 fit, test on the other half, write the weights into the package
python -m tools.digitnet --check         only test the committed weights
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

import selfguide.evaluation.features.digitnet as digitnet
from selfguide.evaluation.features.digitnet import WEIGHTS, DigitNet, half, load_digitnet
from shards import cli
from tools import flags

LEAST = 0.97  # right on the half it has not seen


def digits() -> tuple[Tensor, Tensor]:
    """All scans, uint8 (1797, 1, 8, 8), and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.as_tensor(data.images).to(torch.uint8)[:, None], torch.as_tensor(data.target)


def fit(images: Tensor, labels: Tensor, epochs: int = 60) -> DigitNet:
    """Adam with one cycle over the even half; fixed seed, one thread: the same bits."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, batch = DigitNet(), 64
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
            loss = F.cross_entropy(net(images[chosen]), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: DigitNet, images: Tensor, labels: Tensor) -> float:
    return (net(images).argmax(1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = flags.command(
        "tools.digitnet",
        __doc__,
        ("--check", bool, False, "only test the committed weights"),
        flags.JSON,
    )
    options = parser.parse_args(argv)
    images, labels = digits()
    even, odd = half(len(images))
    if options.check:
        net, sha256 = load_digitnet()
    else:
        net = fit(images[even], labels[even])
        data = save(dict(net.state_dict()))
        sha256 = hashlib.sha256(data).hexdigest()
    right = accuracy(net, images[odd], labels[odd])
    if right >= LEAST and not options.check:
        path = Path(digitnet.__file__).parent / "weights" / WEIGHTS
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    found = {"right_on_other_half": right, "least": LEAST, "sha256": sha256}
    print(
        json.dumps(found)
        if options.json
        else f"{right:.2%} right on the other half, sha256 {sha256}"
    )
    return 0 if right >= LEAST else 1


if __name__ == "__main__":
    cli.run(main)
