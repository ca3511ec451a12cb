"""The condition of a batch: every field of it in one object, so that one mask drops all of them.

An image is in one of three states: conditioned, null (its condition was dropped, for classifier-free guidance), or
unconditional (nothing is known yet, or never will be). Null and unconditional have embeddings of their own: SGFM
extracts features with the latter and trains guidance with the former.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from selfguide.spec.architecture import Architecture
from shards.errors import UserError

CONDITIONED, NULL, UNCONDITIONAL = 0, 1, 2


@dataclass(frozen=True)
class Condition:
    """state (B,) of CONDITIONED | NULL | UNCONDITIONAL, and the fields to condition on, one or several.

    Where only patches are conditioned, state may be (B, L): SGFM drops them one by one.
    id (B,) int64; multi_hot (B, K), non-negative; dense (B, P), a prototype or feature; spatial (B, M, H, W), masks at
    the input's size; patch (B, L, P), one vector for each patch in row order. augment (B, 9) says how each image was
    augmented, whatever its state; zeros, or nothing given, that it was not.
    """

    state: Tensor
    id: Tensor | None = None
    multi_hot: Tensor | None = None
    dense: Tensor | None = None
    spatial: Tensor | None = None
    patch: Tensor | None = None
    augment: Tensor | None = None

    @staticmethod
    def unconditional(count: int, device: torch.device | str = "cpu") -> Condition:
        return Condition(torch.full((count,), UNCONDITIONAL, device=device))

    @staticmethod
    def of(**fields: Tensor) -> Condition:
        """Every image conditioned on these fields, each a tensor as above; one at least."""
        first = next(iter(fields.values()))
        return Condition(torch.full((len(first),), CONDITIONED, device=first.device), **fields)

    @property
    def given(self) -> dict[str, Tensor]:
        """The fields that are set, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "state"}
        return {name: value for name, value in named.items() if value is not None}

    def drop(self, dropped: Tensor) -> Condition:
        """Sets conditioned images to null where `dropped` (B,) bool says so, or their patches where it is (B, L)."""
        state = self.state
        if dropped.dim() > state.dim():
            state = state[:, None]
        elif dropped.dim() < state.dim():
            dropped = dropped[:, None]
        return replace(self, state=torch.where(dropped & (state == CONDITIONED), NULL, state))

    def null(self) -> Condition:
        """The unguided half of classifier-free guidance: conditioned becomes null, unconditional stays."""
        return self.drop(torch.ones_like(self.state, dtype=torch.bool))

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """Applies `change` to every tensor: to a device, a slice, a repetition."""
        return Condition(
            change(self.state), **{name: change(value) for name, value in self.given.items()}
        )

    def values(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Field `name` (B, *shape) in the type of `like`, with zeros for images that are not conditioned on it."""
        value = getattr(self, name)
        if value is None:
            return like.new_zeros(len(self), *shape)
        return zero_unconditioned(value, self.state).to(like.dtype)

    def __len__(self) -> int:
        return len(self.state)


def concatenate(first: Condition, second: Condition) -> Condition:
    """Concatenates two batches to (2B, ...); both have the same fields."""
    if first.given.keys() != second.given.keys():
        raise ValueError(
            f"one batch has the fields {sorted(first.given)}, the other {sorted(second.given)}"
        )
    joined = {name: torch.cat((value, second.given[name])) for name, value in first.given.items()}
    return Condition(torch.cat((first.state, second.state)), **joined)


def mirrored_labels(mirrored: Tensor) -> Tensor:
    """(B, 9) the field `augment` of images of which those in `mirrored` (B,) are mirrored and nothing else is done."""
    labels = torch.zeros(len(mirrored), 9, device=mirrored.device)
    labels[:, 0] = mirrored
    return labels


def zero_unconditioned(value: Tensor, state: Tensor) -> Tensor:
    """`value` (B, ...) with zeros for images that are not conditioned: what was dropped may hold anything, NaN too."""
    conditioned = (state == CONDITIONED).view(*state.shape, *[1] * (value.dim() - state.dim()))
    return torch.where(conditioned, value, value.new_zeros(()))


def check_condition(condition: Condition, net: Architecture) -> None:
    """Checks that `net` can take the condition, values included; once before the first forward, since it reads them.

    Values of images that are not conditioned are never used, and not checked.

    Raises:
        UserError: a field the network was not built for, a wrong shape or type, an id beyond its classes, a value
            that is not finite, a negative share of a group.
    """
    check_fields(condition, net)
    conditioned = {
        name: value if name == "augment" else value[condition.state == CONDITIONED]
        for name, value in condition.given.items()
    }
    for name, value in conditioned.items():
        if name == "id":
            check_numbers("group", value, net.classes)
        elif not value.isfinite().all():
            wrong = float(value[~value.isfinite()][0])
            raise UserError(
                f"condition.{name} holds {wrong}; give finite numbers, or drop the image"
            )
        elif name == "multi_hot" and (value < 0).any():
            raise UserError(
                f"condition.multi_hot holds {float(value.min())}, the share of a group; take 0 or more"
            )


def check_numbers(what: str, numbers: Tensor, count: int) -> None:
    """Raises UserError where one of `numbers` (N,), each of a `what`, is not one of 0 to `count` - 1."""
    outside = numbers[(numbers < 0) | (numbers >= count)]
    if len(outside):
        raise UserError(f"{what} {int(outside[0])} is not one of 0 to {count - 1}")


def check_fields(condition: Condition, net: Architecture) -> None:
    """Checks fields, shapes and the type of ids, without reading values: cheap enough for every forward."""
    batch = len(condition)
    shapes: dict[str, tuple[int, ...]] = {
        "id": (batch,),
        "multi_hot": (batch, net.classes),
        "dense": (batch, net.dense),
        "spatial": (batch, net.spatial, net.size, net.size),
        "patch": (batch, -1, net.dense_patch),
        "augment": (batch, net.augment),
    }
    if condition.state.dim() > 1 and net.accepts != {"patch"}:
        takes = ", ".join(sorted(net.accepts)) or "no condition"
        raise UserError(
            f"condition.state has shape {tuple(condition.state.shape)}, one for each patch, and this network takes "
            f"{takes}; give ({batch},)"
        )
    for name, value in condition.given.items():
        if name not in net.accepts:
            takes = ", ".join(sorted(net.accepts)) or "no condition"
            raise UserError(f"condition.{name} was given, and this network takes {takes}")
        wanted, found = shapes[name], tuple(value.shape)
        fits = len(wanted) == len(found) and all(
            w in (-1, f) for w, f in zip(wanted, found, strict=True)
        )
        if not fits:
            raise UserError(f"condition.{name} has shape {found}; this network takes {wanted}")
    if condition.id is not None and condition.id.dtype not in (torch.int64, torch.int32):
        raise UserError(
            f"condition.id has type {condition.id.dtype}; give numbers of groups as int64"
        )
