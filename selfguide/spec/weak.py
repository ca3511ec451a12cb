"""The weak model of guidance by one word, in configs, command lines and records.

    condition          the same weights without their condition (classifier-free guidance, Ho & Salimans 2022)
    average-KEY        another average of the same snapshot (autoguidance, Karras et al. 2024, arXiv 2406.02507)
    snapshot-IMAGES    an earlier snapshot of the same run, with the same average
    head               the auxiliary head at one of its layers (internal guidance, Zhou et al. 2025, arXiv 2512.24176)
    routed             the way through the network that skips tokens, as it trained with model.route

None of them needs a label or another training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfguide.spec.averages import AverageSpec
from selfguide.spec.suggest import nearest
from shards.errors import UserError

Kind = Literal["condition", "average", "snapshot", "head", "routed"]
PLAIN: tuple[Kind, ...] = ("condition", "head", "routed")
CONDITION = "condition"
_WAYS = "condition, head, routed, average-KEY with the key of an average, or snapshot-IMAGES"


@dataclass(frozen=True, kw_only=True)
class WeakModel:
    """What `sampler.weak` names."""

    kind: Kind
    # of kind average
    average: AverageSpec | None = None
    # of kind snapshot: images seen
    images: int | None = None

    @property
    def word(self) -> str:
        """As it is written."""
        if self.average is not None:
            return f"average-{self.average.key}"
        return self.kind if self.images is None else f"snapshot-{self.images}"

    @staticmethod
    def of(word: str, field: str = "sampler.weak") -> WeakModel:
        """The weak model of that word.

        Raises:
            UserError: it names none.
        """
        for kind in PLAIN:
            if word == kind:
                return WeakModel(kind=kind)
        stem, _, which = word.partition("-")
        if stem == "average" and which:
            try:
                return WeakModel(kind="average", average=AverageSpec.of(which))
            except UserError as error:
                raise UserError(f"{field}={word}: {error}") from error
        if stem == "snapshot" and which.isdecimal():
            return WeakModel(kind="snapshot", images=int(which))
        near = nearest(stem, (*PLAIN, "average", "snapshot"))
        raise UserError(f"{field}={word} is no weak model{near}; take one of {_WAYS}")
