"""How the ranks cut a global batch into micro-batches, also where there are fewer of them than asked for.

With fewer ranks a step takes more micro-batches, not larger ones, which may not fit. What sees several images at once,
the head's BatchNorm and Sinkhorn, sees the same ones at any number of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

from selfguide.spec.config import Config


class Cut(NamedTuple):
    """Of each rank."""

    # images of a forward
    micro_batch: int
    # micro-batches in a step
    accumulation: int
    # of these, how many in a row share their statistics
    together: int


def cut_batch(config: Config, world: int) -> Cut:
    """Returns how a run of `config` trains on so many ranks.

    Raises:
        ValueError: it cannot; `node_counts` says where it can.
    """
    batch = config.train.batch
    if not config.elastic or world >= config.ranks:
        images = config.train.micro_batch or batch // world
        return Cut(images, batch // (world * images), 1)
    cut = _split(config, world)
    if cut is None:
        raise ValueError(f"train.batch={batch} on {world} ranks")
    images, count = cut
    online = config.guidance.learns_online
    return Cut(images, batch // (world * images), count if online else 1)


def node_counts(config: Config, least: int | None = None) -> tuple[int, ...]:
    """Returns the numbers of nodes on which the run may train, from `least`, or its fewest, to `nodes`."""
    counts = range(least or config.min_nodes or config.nodes, config.nodes + 1)
    return tuple(n for n in counts if _split(config, n * config.cluster.gpus_per_node))


def _split(config: Config, world: int) -> tuple[int, int] | None:
    """Images of a micro-batch, and micro-batches of a rank until all have the images that share statistics.

    None where that takes micro-batches of less than half of what fits, which would be slow.
    """
    largest = config.micro_batch
    unit = config.ranks * largest if config.guidance.learns_online else config.train.batch
    for count in range(1, unit // world + 1):
        images, rest = divmod(unit, world * count)
        if not rest and images <= largest:
            return (images, count) if 2 * images >= largest else None
    return None
