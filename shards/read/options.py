"""Options of reading: the order of samples, the resources that reading may use, and what happens on damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal, get_args

from shards import storage
from shards.errors import UserError
from shards.format.order import WINDOW, Mode
from shards.read.cache import BUDGET

OnDamage = Literal["fail", "substitute"]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options of `shards.open`. Only `mode`, `window` and `weights` change which sample stands at which position.

    Raises:
        UserError: a value that none of them can have.
    """

    mode: Mode = "window"
    """`window` permutes blocks and the samples of `window` blocks in a row, `global` all samples."""
    window: int = WINDOW
    """Blocks that are shuffled together in `window` mode."""
    weights: Sequence[float] | None = None
    """One weight for each of several data sets. Of 1,000 positions in a row, each has exactly its weight's share."""
    threads: int = 4
    """Threads that read; a store gives each stream a part of what the network can do."""
    decoders: int = 0
    """Processes that decode pictures, of shards that hold one sample per key; 0 decodes in the reading thread.
    A script that asks for some starts its work under `if __name__ == "__main__"`."""
    cache: storage.Url | None = None
    """A folder on a disk of this node in which all its processes keep blocks of remote shards, at most
    `cache_bytes` together; None keeps nothing. Local shards need none."""
    cache_bytes: int = BUDGET
    on_damage: OnDamage = "fail"
    """`fail` stops at a damaged block. `substitute` takes samples of a sound block instead, logs and counts them, and
    stops when more than the share `damaged` of all samples would be substituted."""
    damaged: float = 0.01

    @staticmethod
    def of(config: object, **more: Any) -> ReadOptions:
        """The options that `config` has as attributes of the same names, and `more`."""
        names = [f.name for f in fields(ReadOptions)]
        return ReadOptions(**{n: getattr(config, n) for n in names if hasattr(config, n)} | more)

    def __post_init__(self) -> None:
        for name in ("window", "threads", "decoders", "cache_bytes"):
            check_whole(**{name: getattr(self, name)})
        for name in ("threads", "cache_bytes"):
            if getattr(self, name) < 1:
                unit = "a number of bytes" if name == "cache_bytes" else "at least 1"
                raise UserError(f"{name}={getattr(self, name)}: give {unit}")
        if not 0 <= self.damaged <= 1:
            raise UserError(f"damaged={self.damaged}: give a share of all samples, from 0 to 1")
        if self.mode not in get_args(Mode):
            raise UserError(f"mode={self.mode!r} is no order of samples: give 'window' or 'global'")
        if self.on_damage not in get_args(OnDamage):
            raise UserError(f"on_damage={self.on_damage!r}: give 'fail' or 'substitute'")


def check_whole(**given: object) -> None:
    """Raises a UserError where a value is not a whole number."""
    for name, value in given.items():
        if not isinstance(value, Integral):
            raise UserError(f"{name}={value!r}: give a whole number")
