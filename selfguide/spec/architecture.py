"""What every backbone states about itself, torch-free: its input, the conditions it takes, its layers, its cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from selfguide.spec.suggest import nearest
from shards.errors import UserError

# How noise-time tau reaches the net, by the source that feeds it so. Weights fit one of them only.
TimeInput = Literal[
    "noise",  # tau (DDAE, REPA)
    "data",  # 1 - tau (SGFM, SiT, LightningDiT)
    "index",  # 1000 tau - 1, the integer 0..999 of DDPM's table (DiT)
    "noise_999",  # 999 tau (U-ViT)
    "noise_1000",  # 1000 tau
    "log_sigma",  # ln(sigma) / 4 with sigma = tau / (1 - tau) (EDM)
    "log_half_sigma",  # ln(sigma / 2) (VE)
]

# of learned tokens at the start (DiT's label rows)
TOKEN_STD = 0.02

# the first block, from 1, that routed tokens skip; as many blocks before it and at the end see all (TREAD begins after
# two, and SPRINT's encoder and decoder have two each)
ROUTED_FROM = 3

# sizes that may be 0: the net goes without
_ABSENT = frozenset(
    {"classes", "dense", "spatial", "dense_patch", "augment", "context", "out_groups", "head_width"}
)


class Layer(NamedTuple):
    """What `features` hands out there: `tokens` of `width` each, the first `extras` of them not of the image."""

    name: str
    tokens: int
    width: int
    extras: int = 0


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """A backbone to the last number: what `selfguide.models.build` builds."""

    size: int  # edge of the square input
    channels: int
    learn_sigma: bool = (
        False  # twice the output channels; the second half is cut off before the loss
    )
    classes: int = 0  # K of ids and multi-hots, without null and unconditional
    dense: int = 0  # width of a dense condition (a feature or prototype), 0 for none
    spatial: int = 0  # channels of a spatial condition: 1 for boxes, K for masks
    dense_patch: int = 0  # width of a vector for each patch
    augment: int = 0  # numbers that say how an image was augmented
    time: TimeInput = "noise_1000"
    whole_index: bool = False  # an index that fp32 missed is that of the table; see `time_input`
    # the layer whose mean feature, projected, joins what later layers read of time and condition (Xiang et al. 2025,
    # section 4.1), by number from 1 or by name, which it is kept as; None for none
    self_condition: int | str | None = None
    # scaled by a vector that is learned of the time, or as it is
    self_add: Literal["adaptive", "direct"] = "adaptive"

    def __post_init__(self) -> None:
        """Each field by itself, by its type; a family calls this before its laws between fields, which divide by sizes.

        Raises:
            UserError: a size that is no size, a switch that is neither on nor off, a word that is not known.
        """
        for field, hint in _hints(type(self)).items():
            _check(field, hint, getattr(self, field))

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def accepts(self) -> frozenset[str]:
        """Names of the `Condition` fields that this network was built for."""
        fields = {"id": self.classes, "multi_hot": self.classes, "dense": self.dense}
        fields |= {"spatial": self.spatial, "patch": self.dense_patch, "augment": self.augment}
        return frozenset(name for name, width in fields.items() if width)

    @property
    @abstractmethod
    def layers(self) -> tuple[Layer, ...]:
        """Everything `features` can return, in the order of the forward; counted from 1."""

    @abstractmethod
    def parameters(self) -> int:
        """Trainable scalars, exactly."""

    @abstractmethod
    def forward_macs(self) -> int:
        """Multiply-adds of one image's forward; training costs three times that, a MAC is two FLOPs."""

    def training_macs(self) -> int:
        """Multiply-adds of one image's forward in training, where tokens may be routed past blocks."""
        return self.forward_macs()

    @property
    def middle(self) -> int:
        """The layer halfway, where U-shaped nets have their middle block."""
        return (len(self.layers) + 1) // 2

    def layer_of(self, which: int | str | None, field: str = "layer") -> Layer:
        """That layer; None is the middle. `field` is what an error calls it."""
        return self.layers[(self.middle if which is None else self.layer(which, field)) - 1]

    def layer(self, which: int | str, field: str = "layer") -> int:
        """Number, from 1, of a layer given by number, also as text, or by name."""
        return self._number(which, field, [layer.name for layer in self.layers])

    @staticmethod
    def _number(which: int | str, field: str, names: list[str]) -> int:
        if isinstance(which, str) and which.removeprefix("-").isdecimal():
            which = int(which)
        if isinstance(which, str) and which in names:
            return names.index(which) + 1
        if isinstance(which, int) and 1 <= which <= len(names):
            return which
        if isinstance(which, str):
            hint = nearest(which, names) or f"; take {field}={names[(len(names) - 1) // 2]}"
        else:
            hint = f"; take {field}={min(max(which, 1), len(names))}"
        raise UserError(
            f"{field}={which!r} is not one of this network's 1 to {len(names)} ({names[0]} to {names[-1]}){hint}"
        )

    def _settle_self_condition(self) -> None:
        """The layer of `self_condition` by its name; families whose blocks read a vector call this after their laws.

        Raises:
            UserError: no such layer, or the last one.
        """
        if self.self_condition is None:
            return
        *names, last = (layer.name for layer in self.layers)
        given = self.self_condition
        cure = f"take model.self_condition={names[-1]}" if names else "drop it"
        require(
            str(given) not in (last, str(len(self.layers))),
            "self_condition",
            given,
            f"is this network's last layer, and no later one would read it; {cure}",
        )
        number = self._number(given, "model.self_condition", names or [last])
        object.__setattr__(self, "self_condition", names[number - 1])

    def _self_maps(self, frequencies: int, embedding: int) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear maps, each with a bias, from a layer to a vector (B, embedding).

        The feature's, and with `adaptive` the two of a second embedding of the time, whose sinusoid is `frequencies`
        wide: the form with the published counts, +460,288 for 256 channels, 128 frequencies and an embedding of 512,
        and +1,378,560 for DiT-B.
        """
        if self.self_condition is None:
            return []
        time = [(frequencies, embedding), (embedding, embedding)]
        feature = (self.layer_of(self.self_condition).width, embedding)
        return [feature, *time] if self.self_add == "adaptive" else [feature]


@dataclass(frozen=True, kw_only=True)
class PatchTransformer(Architecture):
    """A transformer over the square patches of its input."""

    patch: int
    width: int
    depth: int
    heads: int
    cls_token: bool = False  # a learned token that collects what self-guidance reads
    token_std: float = TOKEN_STD  # of [CLS], null, unconditional and label rows at the start
    # the share of the patch tokens that skips the middle blocks in training; TREAD's is 0.5
    route: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.size % self.patch == 0,
            "patch",
            self.patch,
            f"does not divide the input edge {self.size}; take model.patch={divisor(self.size, self.patch)}",
        )
        require(self.token_std > 0, "token_std", self.token_std, "must be a positive number")
        require(
            0 <= self.route < 1, "route", self.route, "is a share: take 0 (none) or more, below 1"
        )
        least = 2 * ROUTED_FROM - 1
        require(
            self.route == 0 or len(self.layers) >= least,
            "route",
            self.route,
            f"skips blocks between the first two and the last two: it needs {least} blocks or more, here are "
            f"{len(self.layers)}; take model.route=0",
        )
        require(
            self.width % self.heads == 0,
            "heads",
            self.heads,
            f"does not divide model.width={self.width}; take model.heads={divisor(self.width, self.heads)}",
        )

    @property
    def edge(self) -> int:
        """Patches along one side."""
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        """Patch tokens, without those before them."""
        return self.edge**2

    @property
    def routed_tokens(self) -> int:
        """Patch tokens that go through the middle blocks in training."""
        return max(1, round((1 - self.route) * self.tokens))

    def forward_macs(self) -> int:
        return self._macs(self.tokens)

    def training_macs(self) -> int:
        return self._macs(self.routed_tokens)

    @abstractmethod
    def _macs(self, routed: int) -> int:
        """Multiply-adds of one image's forward with so many patch tokens in the middle blocks."""


def require(holds: bool, field: str, value: Any, law: str) -> None:
    """The one form of an impossible size: the field, its value, the law it breaks."""
    if not holds:
        raise UserError(f"model.{field}={value} {law}")


def divisor(number: int, most: int) -> int:
    """The greatest divisor of `number` that is no greater than `most`; 1 where there is none."""
    return max((d for d in range(1, min(number, most) + 1) if number % d == 0), default=1)


_hints = cache(get_type_hints)


def _check(field: str, hint: Any, value: Any) -> None:
    """One field alone."""
    if get_origin(hint) is Literal:
        known = get_args(hint)
        if value not in known:
            law = f"is not one of: {', '.join(known)}{nearest(str(value), known)}"
            require(False, field, value, law)
    elif get_origin(hint) in (Union, UnionType):  # a layer
        named = isinstance(value, get_args(hint)) and not isinstance(value, bool)
        require(named, field, value, "must be a layer's number or name, or null for none")
    elif get_origin(hint) is tuple:  # of sizes
        require(isinstance(value, tuple | list), field, value, "must be a list of integers")
        for i, size in enumerate(value):
            _check_size(f"{field}[{i}]", size, 1)
    elif hint is int:
        _check_size(field, value, 0 if field in _ABSENT else 1)
    elif hint is bool:
        require(isinstance(value, bool), field, value, "must be true or false")
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(number, field, value, "must be a number")


def _check_size(field: str, value: Any, low: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole, field, value, f"must be a whole number; take {low} or more")
    require(value >= low, field, value, f"is too small; take {low} or more")
