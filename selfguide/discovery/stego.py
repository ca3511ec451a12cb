"""STEGO: patches of one meaning get one code, learned from how a frozen net's features correspond.

Hamilton et al. 2022 (arXiv 2203.08414). A small head maps features f to codes s, so that codes correspond where
features do, within an image, with an image of its nearest neighbours, and with others at random:

    L(b) = -mean[ max(S, 0) (F' - b) ],   S, F cosines between the two images' points, F' = F centred over space (eq. 4)

Beside it a probe learns K centroids of the codes, which the loss of the head never sees; each pixel belongs to one of
them. SGDM (Hu et al. 2023, arXiv 2210.06462) conditions a model on the one-hot mask, and on its maximum over all pixels
as a multi-hot. Two parts of the published form are left out: its linear probe, which needs labels, and the conditional
random field after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.data.crop_flip import Size
from selfguide.discovery.corrected import Was
from selfguide.randomness import stream_seed
from selfguide.spec.config.laws import Neutral
from shards.errors import UserError

Dropouts = Literal["each", "one"]
Resize = Literal["published", "smooth"]
Maps = Callable[[Tensor], Tensor]  # indices (B,) of crops -> their features (B, D, h, w), fp32


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """One number for an image with itself, with a neighbour, and with a random other."""

    own: float
    knn: float
    random: float


@dataclass(frozen=True, kw_only=True)
class StegoConfig:
    """Defaults are those published for COCO-Stuff 27 on ViT-S, but for `revive`; `PRESETS` has others."""

    groups: int = 27
    shifts: Pairs = Pairs(own=0.08, knn=0.02, random=0.66)  # b; to be found anew for other data
    weights: Pairs = Pairs(own=0.67, knn=0.25, random=0.63)  # lambda
    width: int = 70  # of a code
    dropout: float = 0.1  # of feature channels, for the head
    neighbours: int = 7
    randoms: int = 5  # random others for each image
    points: int = 11  # an edge of the grid of random points in each image
    learning_rate: float = 5e-4  # Adam
    probe_rate: float = 5e-3
    # steps without a patch after which a centroid begins again where codes are served worst; 0 leaves it, as published
    revive: int = 50
    batch: Annotated[int, Was(64)] = 16
    steps: Annotated[int | None, Neutral(None)] = 5000  # None is `epochs`
    epochs: int = 10  # over all crops, where no steps are given
    # what is dropped: linear map, non-linear map and compared features each channels of their own, as published, or
    # both maps the same and the compared features none
    dropouts: Annotated[Dropouts, Neutral("one")] = "each"
    # how images come to the net's size: by the nearest pixel, and of a crop the centre square, as published, or
    # bicubic and squashed to a square
    resize: Annotated[Resize, Neutral("smooth")] = "published"
    # codes of an image and of its mirror image are averaged
    mirror: Annotated[bool, Neutral(False)] = True


DEAD = 0.02  # of an even share of patches: a centroid that has less in a step has none

PRESETS = {
    "cocostuff27": StegoConfig(),
    # the shifts of SGDM's authors, who trained it on Pascal VOC; weights as above
    "voc": StegoConfig(groups=21, shifts=Pairs(own=0.18, knn=0.12, random=0.46)),
}


class Segmenter(nn.Module):
    """The head, f -> s, and the probe's centroids (K, C)."""

    def __init__(self, features: int, config: StegoConfig) -> None:
        super().__init__()
        self.dropout, self.dropouts = nn.Dropout2d(config.dropout), config.dropouts
        self.linear = nn.Conv2d(features, config.width, 1)
        self.bend = nn.Sequential(
            nn.Conv2d(features, features, 1), nn.ReLU(), nn.Conv2d(features, config.width, 1)
        )
        self.centroids = nn.Parameter(torch.randn(config.groups, config.width))
        self.idle: Tensor  # steps since each centroid had patches
        self.register_buffer("idle", torch.zeros(config.groups, dtype=torch.int64))

    def codes(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C, h, w)."""
        kept = self.dropout(features)
        linear = self.linear(kept)
        return linear + self.bend(kept if self.dropouts == "one" else self.dropout(features))

    def compared(self, features: Tensor) -> Tensor:
        """What of these features the loss compares."""
        return features if self.dropouts == "one" else self.dropout(features)

    @torch.no_grad()
    def masks(self, features: Tensor, size: Size, mirrored: Tensor | None = None) -> Tensor:
        """The group of each pixel of images with these features, (B, H, W) int64.

        Args:
            mirrored: features of the mirror images, whose codes are averaged with those of the images.
        """
        codes = self.codes(features)
        if mirrored is not None:
            codes = (codes + self.codes(mirrored).flip(3)) / 2
        return segment(codes, self.centroids, size)

    def cosines(self, codes: Tensor) -> Tensor:
        """(B, K, h, w) of codes (B, C, h, w) to centroids; codes learn nothing of it."""
        fixed = F.normalize(codes.detach(), dim=1)
        return torch.einsum("bchw,kc->bkhw", fixed, F.normalize(self.centroids, dim=1))

    @torch.no_grad()
    def revive(self, codes: Tensor, cosines: Tensor, patience: int) -> Tensor:
        """Moves centroids that had no patch for `patience` steps to codes far from any; which, (K,) bool.

        Winners take all, so a centroid that begins beside the codes would never learn, and two groups share another.
        """
        best, winner = cosines.max(1)
        count = torch.bincount(winner.flatten(), minlength=len(self.centroids))
        won = count > DEAD * winner.numel() / len(self.centroids)
        self.idle = torch.where(won, 0, self.idle + 1)
        dead = self.idle >= patience
        if patience and dead.any():
            far = (1 - best.flatten()).clamp_min(1e-6).square()
            chosen = torch.multinomial(far, int(dead.sum()))
            rows = codes.detach().movedim(1, -1).flatten(0, 2)[chosen]
            self.centroids[dead] = F.normalize(rows, dim=1) * self.centroids[dead].norm(
                dim=1, keepdim=True
            )
            self.idle = torch.where(dead, 0, self.idle)
        return dead & (patience > 0)


def segment(codes: Tensor, centroids: Tensor, size: Size) -> Tensor:
    """The group of each pixel, (B, H, W) int64: the centroid with the largest cosine.

    Of STEGO's codes this is its cluster probe. Of a frozen net's own features, with centroids of k-means, it is a plain
    stand-in that must be called by its name.

    Args:
        codes: (B, C, h, w) of patches that tile the image.
        centroids: (K, C), of any length.
        size: (H, W), to which codes are brought bilinearly before they are compared.
    """
    wide = F.interpolate(codes, size=size, mode="bilinear", align_corners=False)
    # the length of a code changes no argmax, so only centroids are normalised
    cosines = torch.einsum("bchw,kc->bkhw", wide, F.normalize(centroids, dim=1))
    return cosines.argmax(1)


def correspondence(first: Tensor, second: Tensor) -> Tensor:
    """Cosines between all points of two maps (B, C, h, w) and (B, C, i, j): (B, h, w, i, j)."""
    return torch.einsum("bchw,bcij->bhwij", F.normalize(first, dim=1), F.normalize(second, dim=1))


def centred(cosines: Tensor) -> Tensor:
    """Less the mean over the second map's points, plus the mean of all: no point is near to everything."""
    return cosines - cosines.mean((3, 4), keepdim=True) + cosines.mean()


def correspondence_loss(features: Tensor, codes: Tensor, shift: float) -> Tensor:
    """L(b) for cosines of features and of codes, both (B, h, w, i, j)."""
    return -(codes.clamp_min(0) * (centred(features) - shift)).mean()


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """(B, C, h, w) at `points` (B, i, j, 2) in [-1, 1], bilinearly: (B, C, i, j)."""
    return F.grid_sample(maps, points, mode="bilinear", padding_mode="border", align_corners=True)


def others(count: int, device: torch.device | str = "cpu") -> Tensor:
    """A random order of a batch in which nobody keeps its place, for 2 or more: a cycle through a random order."""
    order = torch.randperm(count, device=device)
    found = torch.empty_like(order)
    found[order] = order.roll(1)
    return found


@dataclass
class Watched:
    """Mean cosine of codes over pairs, an average over the last hundred steps or so.

    Shifts fit the data when neighbours' codes agree and those of random pairs do not.
    """

    knn: float = 0.0
    random: float = 0.0
    steps: int = 0

    def see(self, knn: float, random: float) -> None:
        self.steps += 1
        share = max(1 / self.steps, 0.01)
        self.knn += share * (knn - self.knn)
        self.random += share * (random - self.random)

    def warnings(self, shifts: Pairs) -> list[str]:
        found = []
        if not self.knn > 0:
            found.append(
                f"codes of neighbours do not agree (mean cosine {self.knn:.2f}, should be above 0): "
                f"lower the shift of neighbours, now {shifts.knn:g}"
            )
        if not self.random < 0:
            found.append(
                f"codes of random pairs agree (mean cosine {self.random:.2f}, should be below 0): "
                f"raise the shift of random pairs, now {shifts.random:g}"
            )
        return found


class Fit:
    """Training in progress: what is learned, how far it is, and the step that goes on from there."""

    def __init__(
        self,
        maps: Maps,
        near: Tensor,
        features: int,
        config: StegoConfig,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """`near` (N, neighbours) are the indices of each crop's nearest; `features` counts their channels."""
        self.maps, self.near, self.config, self.seed = maps, near, config, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "stego-weights", 0))
            self.net = Segmenter(features, config)
        self.net.to(device)
        probe = [self.net.centroids]
        head = [p for p in self.net.parameters() if p is not self.net.centroids]
        self.optimiser = torch.optim.Adam(
            [
                {"params": head, "lr": config.learning_rate},
                {"params": probe, "lr": config.probe_rate},
            ]
        )
        self.step, self.watched = 0, Watched()
        self.batch = min(config.batch, len(near))
        self.epoch = len(near) // self.batch  # steps; what is left over comes in another epoch

    @property
    def steps(self) -> int:
        steps = self.config.steps
        return self.epoch * self.config.epochs if steps is None else steps

    def run(self) -> Iterator[float]:
        """The loss of each step that is left; a step is a function of (seed, step) and of what was learned."""
        self.net.train()
        while self.step < self.steps:
            crops = self._crops()
            # partners, points and dropout come of torch's own generator
            torch.manual_seed(stream_seed(self.seed, "stego", self.step))
            loss = self._learn(crops)
            self.step += 1
            yield loss

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "watched": vars(self.watched),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.watched = state["step"], Watched(**state["watched"])

    def _crops(self) -> Tensor:
        """(B,) of this step, of an order that is new in every epoch."""
        epoch, within = divmod(self.step, self.epoch)
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "stego-order", epoch))
        order = torch.randperm(len(self.near), generator=generator)
        return order[within * self.batch : (within + 1) * self.batch]

    def _learn(self, crops: Tensor) -> float:
        column = torch.randint(self.near.shape[1], (len(crops),))
        features = self.maps(torch.cat((crops, self.near[crops, column])))  # (2B, D, h, w)
        codes = self.net.codes(features)
        cosines = self.net.cosines(codes)
        # the probe's own loss: each patch draws the centroid that it is nearest to
        pairs = (*self.net.compared(features).chunk(2), *codes.chunk(2))
        loss = self.pair_loss(*pairs) - cosines.amax(1).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.net.revive(codes, cosines, self.config.revive)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"STEGO's loss is {value} at step {self.step}: features are not finite, or the rates too large"
            )
        return value

    def pair_loss(self, f: Tensor, f_near: Tensor, s: Tensor, s_near: Tensor) -> Tensor:
        """The weighted sum over a batch's pairs: with itself, with its neighbour, with random others.

        Every image is looked at in `points` x `points` random places; as the first of a pair in one set of them, as
        the neighbour or the other in another.
        """
        config, (count, device) = self.config, (len(f), f.device)
        shape = (count, config.points, config.points, 2)
        here, there = (2 * torch.rand(shape, device=device) - 1 for _ in range(2))
        f_here, s_here = sample(f, here), sample(s, here)

        def loss(f_other: Tensor, s_other: Tensor, shift: float) -> tuple[Tensor, Tensor]:
            agree = correspondence(s_here, s_other)
            alike = correspondence(f_here, f_other)
            return correspondence_loss(alike, agree, shift), agree.detach().mean()

        own, _ = loss(f_here, s_here, config.shifts.own)
        knn, knn_cosine = loss(sample(f_near, there), sample(s_near, there), config.shifts.knn)
        f_there, s_there = sample(f, there), sample(s, there)
        orders = [others(count, device) for _ in range(config.randoms)]
        drawn = [loss(f_there[o], s_there[o], config.shifts.random) for o in orders]
        random = torch.stack([value for value, _ in drawn]).mean()
        random_cosine = torch.stack([cosine for _, cosine in drawn]).mean()
        self.watched.see(float(knn_cosine), float(random_cosine))
        weights = config.weights
        return weights.own * own + weights.knn * knn + weights.random * random
