"""The weak model of guidance by one word, in configs, command lines and records.

    condition          the same weights without their condition (classifier-free guidance, Ho & Salimans 2022)
    average-KEY        another average of the same snapshot (autoguidance, Karras et al. 2024, arXiv 2406.02507)
    snapshot-IMAGES    an earlier snapshot of the same run, with the same average
    head               the auxiliary head at one of its layers (internal guidance, Zhou et al. 2025, arXiv 2512.24176)
    routed             the way through the network that skips tokens, as it trained with model.route

None of them needs a label or another training. Several are joined by a plus, in equal shares or in those behind their
colons, which add up to 1: condition+head, condition:0.25+snapshot-64000:0.75.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Mapping
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
    """One that `sampler.weak` names."""

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


def weak_models(words: str, field: str = "sampler.weak") -> Mapping[WeakModel, float]:
    """The weak models that are joined in `words`, and the share of each in f_weak.

    Raises:
        UserError: a word that names none, one that comes twice, or shares that do not add up to 1.
    """
    parts = [each.partition(":") for each in words.split("+")]
    if len(parts) > 1 and not all(word for word, _, _ in parts):
        meant = "+".join(each for each in words.split("+") if each.partition(":")[0])
        raise UserError(
            f"{field}={words} has a plus without a weak model beside it; take {field}={meant}"
        )
    found = [WeakModel.of(word, field) for word, _, _ in parts]
    if twice := next((each for each in found if found.count(each) > 1), None):
        raise UserError(f"{field}={words} has {twice.word} twice; name each weak model once")
    given = [share for _, colon, share in parts if colon]
    if not given:
        return dict.fromkeys(found, 1 / len(found))
    try:
        shares = [float(share) for share in given]
    except ValueError:
        shares = []
    whole = len(shares) == len(found) > 1 and math.isclose(sum(shares), 1, abs_tol=1e-6)
    if not whole or min(shares) <= 0:
        equal = "+".join(each.word for each in found)
        raise UserError(
            f"{field}={words}: shares stand behind every one of several weak models, are above 0 and add up to 1; take "
            f"{field}={equal}{' for equal ones' if len(found) > 1 else ''}"
        )
    return dict(zip(found, shares, strict=True))


def check_snapshots(
    words: str, last: int, published: Collection[int] = (), planned: range = range(0)
) -> None:
    """Returns when every snapshot that `words` names is there, or will be, before the one at `last` images.

    Args:
        published: images of the run's snapshots.
        planned: images of those that it will publish.

    Raises:
        UserError: one that is not; names the nearest that are.
    """
    asked = [weak.images for weak in weak_models(words) if weak.images is not None]
    for images in asked:
        if images < last and (images in published or images in planned):
            continue
        # two that are not named already
        at, reach = bisect.bisect(planned, images), 2 + len(asked)
        known = {*published, *planned[max(0, at - reach) : at + reach]}.difference(asked)
        near = sorted((n for n in known if n < last), key=lambda n: abs(n - images))[:2]
        others = [f"sampler.weak={_instead(words, images, n)}" for n in sorted(near)]
        none = "" if others else ", and no other one"
        raise UserError(
            f"sampler.weak={words}: the run has no snapshot at {images} images{none} before that at {last}; take "
            f"{' or '.join(others) or 'another weak model'}"
        )


def _instead(words: str, old: int, new: int) -> str:
    """The words with the snapshot at `new` images in place of that at `old`, in the same share."""
    parts = (each.partition(":") for each in words.split("+"))
    return "+".join(
        (f"snapshot-{new}" if WeakModel.of(word).images == old else word) + colon + share
        for word, colon, share in parts
    )
