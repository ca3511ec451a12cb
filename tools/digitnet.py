"""Fits the feature net of `fd_digits` on a fixed half of the digits and writes its weights.

python -m tools.digitnet                 fit, test on the other half, write the weights into the package
python -m tools.digitnet --half odd      the same for fd_digits_odd, fitted on the scans that test the first
python -m tools.digitnet --check         only test the committed weights
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

import selfguide.evaluation.features.digitnet as digitnet
from selfguide.evaluation.features.digitnet import FITTED_ON, WEIGHTS, DigitNet, half, load_digitnet
from shards import cli
from tools import flags

LEAST = 0.97  # right on the half it has not seen


def digits() -> tuple[Tensor, Tensor]:
    """All scans, uint8 (1797, 1, 8, 8), and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.as_tensor(data.images).to(torch.uint8)[:, None], torch.as_tensor(data.target)


def fit(images: Tensor, labels: Tensor, epochs: int = 60) -> DigitNet:
    """Fits a net to scans by cross-entropy; fixed seed, one thread: the same bits."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = DigitNet()
    one_cycle(
        net,
        lambda chosen: F.cross_entropy(net(images[chosen]), labels[chosen]),
        count=len(images),
        epochs=range(epochs),
        rate=3e-3,
        weight_decay=1e-2,
    )
    return net.eval()


def one_cycle(
    net: nn.Module,
    loss: Callable[[Tensor], Tensor],
    *,
    count: int,
    epochs: Collection[int],
    rate: float,
    weight_decay: float,
    batch: int = 64,
) -> None:
    """AdamW with one cycle of its rate over `epochs`, each in batches of a random order of `count` samples."""
    steps = count // batch
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=rate, total_steps=len(epochs) * steps
    )
    for _ in cli.track(epochs, len(epochs), "fitting"):
        for chosen in torch.randperm(count).split(batch)[:steps]:
            optimiser.zero_grad()
            loss(chosen).backward()
            optimiser.step()
            schedule.step()


@torch.no_grad()
def accuracy(net: DigitNet, images: Tensor, labels: Tensor) -> float:
    """The share of scans (N, 1, 8, 8) whose label is the likeliest class."""
    return (net(images).argmax(1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = flags.command(
        "tools.digitnet",
        __doc__,
        ("--half H", tuple(WEIGHTS), "even", "the scans that fit it: even or odd (even)"),
        ("--check", bool, False, "only test the committed weights"),
        flags.JSON,
    )
    options = parser.parse_args(argv)
    images, labels = digits()
    seen, unseen = half(len(images))
    if options.half == "odd":
        seen, unseen = unseen, seen
    if options.check:
        protocol = next(name for name, fitted in FITTED_ON.items() if fitted == options.half)
        net, sha256 = load_digitnet(protocol)
    else:
        net = fit(images[seen], labels[seen])
        data = save(dict(net.state_dict()))
        sha256 = hashlib.sha256(data).hexdigest()
    right = accuracy(net, images[unseen], labels[unseen])
    if right >= LEAST and not options.check:
        path = Path(digitnet.__file__).parent / "weights" / WEIGHTS[options.half]
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
