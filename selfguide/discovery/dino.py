"""DINO's loss on a data set of one's own: a ViT that was trained elsewhere learns to see these images the same way.

Caron et al. 2021 (arXiv 2104.14294). A student sees several crops of an image and is to say of each what its own
average, the teacher, says of the two large ones; both say it as a distribution over prototypes:

    L = mean over pairs of different crops of  -softmax((teacher - c) / T_t) . log softmax(student / T_s)

The teacher's outputs are centred by c, their average over steps, and sharpened by a low T_t: without the one all images
come to one prototype, without the other to an even share of all. C-EDM (Adaloglou et al. 2024, arXiv 2403.00570, table
3) adapts DINO so for 15 epochs before it clusters; what else it set is not printed, so other defaults are DINO's own
but for a learning rate that is ours, since the net has learned already.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.transforms import v2

from selfguide.randomness import stream_seed
from shards.errors import UserError

GLOBAL = 2  # large crops, which the teacher sees
LOCAL_EDGE = 96 / 224  # of a small crop, over a large one's


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """Defaults are C-EDM's number of epochs, and otherwise DINO's but for the learning rate."""

    epochs: int = 15
    batch: int = 64
    learning_rate: float = (
        5e-5  # the highest, for 256 images a step, scaled linearly; DINO's 5e-4 is from scratch
    )
    final_rate: float = 1e-6
    warmup: float = 1.0  # epochs
    weight_decay: float = 0.04
    final_decay: float = 0.4
    momentum: float = 0.996  # of the teacher at the beginning; 1 at the end
    prototypes: int = 65_536
    hidden: int = 2048
    bottleneck: int = 256
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    centre_momentum: float = 0.9
    clip: float = 3.0  # of the gradient of each parameter
    frozen: int = 1  # epochs in which prototypes stay as they were drawn
    small_crops: int = 8
    large_share: tuple[float, float] = (0.4, 1.0)  # of the image's area
    small_share: tuple[float, float] = (0.05, 0.4)

    def steps(self, count: int) -> int:
        """Of the whole fit to so many images; what an epoch leaves over comes in another."""
        return self.epochs * self.epoch(count)

    def epoch(self, count: int) -> int:
        return max(1, count // self.batch)


class Head(nn.Module):
    """[CLS] (B, F) -> scores of prototypes (B, K), cosines times one."""

    def __init__(self, features: int, config: DinoConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(features, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = weight_norm(nn.Linear(config.bottleneck, config.prototypes, bias=False))
        lengths = self.last.parametrizations.weight.original0
        nn.init.ones_(lengths)
        lengths.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))


class Judge(nn.Module):
    """A ViT and its head."""

    def __init__(self, vit: Any, config: DinoConfig) -> None:
        super().__init__()
        self.vit = vit
        self.head = Head(int(vit.embed_dim), config)

    def forward(self, crops: Iterable[Tensor]) -> Tensor:
        """Normalised crops, each (B, 3, e, e), large before small -> (V, B, K)."""
        seen = [self.vit.forward_features(crop)[:, 0] for crop in crops]
        return torch.stack([self.head(cls) for cls in seen])


def loss_of(student: Tensor, teacher: Tensor, centre: Tensor, config: DinoConfig) -> Tensor:
    """The mean cross-entropy over pairs of different crops.

    Args:
        student: (V, B, K) of all crops, the teacher's first.
        teacher: (2, B, K) of the large crops.
        centre: (K,).
    """
    target = ((teacher - centre) / config.teacher_temperature).softmax(-1).detach()
    said = (student / config.student_temperature).log_softmax(-1)
    each = -torch.einsum("tbk,vbk->tv", target, said) / student.shape[1]
    apart = 1 - torch.eye(len(teacher), len(student), device=each.device)
    return (each * apart).sum() / apart.sum()


def centred(centre: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """The centre (K,) after a step in which the teacher said (2, B, K)."""
    return momentum * centre + (1 - momentum) * teacher.flatten(0, 1).mean(0)


def cosine(begin: float, end: float, share: float) -> float:
    """From `begin` to `end` by half a wave; `share` of the way is in [0, 1]."""
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


class Views:
    """An image's crops, as DINO draws them: two large ones, then small ones; by torch's own generator."""

    def __init__(self, edge: int, patch: int, config: DinoConfig) -> None:
        small = max(1, round(LOCAL_EDGE * edge / patch)) * patch
        blur = v2.GaussianBlur(13, (0.1, 2.0))
        colour = [
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
        ]

        def cut(edge: int, share: tuple[float, float], *more: nn.Module) -> v2.Compose:
            how = v2.InterpolationMode.BICUBIC
            crop = v2.RandomResizedCrop(edge, share, interpolation=how, antialias=True)
            return v2.Compose([crop, *colour, *more])

        solarise = v2.RandomSolarize(128, p=0.2)
        first = cut(edge, config.large_share, blur)
        second = cut(edge, config.large_share, v2.RandomApply([blur], p=0.1), solarise)
        local = cut(small, config.small_share, v2.RandomApply([blur], p=0.5))
        self.cuts = [first, second, *(local for _ in range(config.small_crops))]

    def __call__(self, image: Tensor) -> list[Tensor]:
        """uint8 (3, H, W) -> uint8 crops, two (3, edge, edge) and small ones."""
        return [cut(image) for cut in self.cuts]


# the step to begin with -> crops of each step from there, each uint8 (B, 3, e, e)
Crops = Callable[[int], Iterable[list[Tensor]]]


class Fit:
    """Training in progress: student, teacher, centre, and the step that goes on from there."""

    def __init__(
        self,
        vit: nn.Module,
        normal: Callable[[Tensor], Tensor],
        crops: Crops,
        count: int,
        config: DinoConfig,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """`vit` is where both begin, with a [CLS]; `normal` takes uint8 crops to what it reads; `count` images."""
        self.normal, self.crops, self.config, self.device = normal, crops, config, device
        self.epoch, self.steps = config.epoch(count), config.steps(count)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "dino-weights", 0))
            self.student = Judge(copy.deepcopy(vit).requires_grad_(True), config)
        self.student.to(device).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.centre = torch.zeros(config.prototypes, device=device)
        learned = [p for p in self.student.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in learned if p.ndim > 1]},
            # biases and norms
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=0.0)
        self.step = 0

    def run(self) -> Iterator[float]:
        """The loss of each step that is left; a step is a function of its crops and of what was learned."""
        for crops in self.crops(self.step):
            loss = self._learn([self.normal(crop.to(self.device)) for crop in crops])
            self.step += 1
            yield loss

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        return {**parts, "centre": self.centre, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.centre, self.step = state["centre"].to(self.device), state["step"]

    def rates(self, step: int) -> tuple[float, float, float]:
        """Learning rate, weight decay and the teacher's momentum of a step."""
        config, warm = self.config, round(self.config.warmup * self.epoch)
        highest = config.learning_rate * config.batch / 256
        share = step / max(1, self.steps)
        if step < warm:
            rate = highest * (step + 1) / warm
        else:
            rate = cosine(highest, config.final_rate, (step - warm) / max(1, self.steps - warm))
        decay = cosine(config.weight_decay, config.final_decay, share)
        return rate, decay, cosine(config.momentum, 1.0, share)

    def _learn(self, crops: list[Tensor]) -> float:
        config = self.config
        rate, decay, momentum = self.rates(self.step)
        decayed, rest = self.optimiser.param_groups
        decayed["lr"], rest["lr"], decayed["weight_decay"] = rate, rate, decay
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            with torch.no_grad():
                teacher = self.teacher(crops[:GLOBAL])
            student = self.student(crops)
        teacher, student = teacher.float(), student.float()
        loss = loss_of(student, teacher, self.centre, config)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"DINO's loss is {value} at step {self.step}: give a lower learning rate"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_(parameter, config.clip)
        if self.step < config.frozen * self.epoch:
            self.student.head.last.parametrizations.weight.original1.grad = None
        self.optimiser.step()
        with torch.no_grad():
            self.centre = centred(self.centre, teacher, config.centre_momentum)
            torch._foreach_lerp_(
                list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum
            )
        return value


_PARTS = ("student", "teacher", "optimiser")
