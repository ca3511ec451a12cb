"""Several data sets in one run: an order as pure as that of one, exact shares, and every source's epochs proven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.format.order import Mixture, Order
from shards.read.audit import EpochAudit, check_epoch
from shards.read.mixing import Blend, make_blend
from shards.read.options import ReadOptions
from shards.sources.source import ArraySource
from shards.write import writer
from tests.shards.data import LATENT, flip, payload, source, write

COUNTS, WEIGHTS = (700, 300, 90), (5.0, 2.0, 1.0)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("mixture") / str(count) for count in COUNTS]
    for path, count in zip(paths, COUNTS, strict=True):
        write(path, count)
    return paths


Found = dict[int, tuple[int, int, str]]  # position -> source, ordinal, key


def _read(
    roots: list[Path], world: int, micro: int, start: int, stop: int, **options: Any
) -> tuple[Found, list[list[EpochAudit]]]:
    """What every position in [start, stop) was, over all ranks; and each rank's accounts that ended."""
    found: Found = {}
    ended, states = [], []
    for rank in range(world):
        with shards.open(
            roots, weights=WEIGHTS, global_batch=120, micro_batch=micro, rank=rank, world=world, seed=7,
            position=start, **options,
        ) as stream:  # fmt: skip
            while stream.position < stop:
                batch = next(stream)
                columns = (batch[n].tolist() for n in ("source", "ordinal", "key"))
                rows = dict(
                    zip(batch["position"].tolist(), zip(*columns, strict=True), strict=True)
                )
                assert not rows.keys() & found.keys()
                found |= rows
            ended.append(stream.ended)
            states.append((stream.state(), [a.key for a in stream.under_way()]))
    assert all(state == states[0] for state in states)
    return found, ended


def test_ranks_restarts_and_threads_change_nothing_and_shares_are_exact(roots: list[Path]) -> None:
    whole, _ = _read(roots, 1, 120, 0, 6000)
    keys = [shards.read_all(root)["key"] for root in roots]
    sources = np.array([whole[p][0] for p in range(6000)])
    for block in sources.reshape(6, 1000):
        assert np.bincount(block).tolist() == [625, 250, 125]
    assert all(key == keys[s][o] for s, o, key in whole.values())
    for s, (count, share) in enumerate(zip(COUNTS, (3750, 1500, 750), strict=True)):
        times = np.bincount([o for t, o, _ in whole.values() if t == s], minlength=count)
        assert times.sum() == share and times.max() - times.min() <= 2
    parts: Found = {}
    for world, micro, start, stop, threads in (
        (3, 10, 0, 1320, 1), (2, 60, 1320, 1440, 4), (12, 5, 1440, 4800, 2), (4, 30, 4800, 6000, 4)
    ):  # fmt: skip
        parts |= _read(roots, world, micro, start, stop, threads=threads)[0]
    assert parts == whole


def test_what_a_position_is_does_not_depend_on_how_it_was_come_to() -> None:
    """Against a plain loop that counts."""
    orders = tuple(Order(count=n, seed=i, block=16, window=2) for i, n in enumerate(COUNTS))
    mixture = Mixture(weights=WEIGHTS, seed=3, block=80)
    blend = Blend(orders=orders, mixture=mixture)
    samples, epochs = blend.plan(np.arange(600))
    sources, ordinals = blend.locate(samples)
    for p in range(600):
        source, within = (int(n[()]) for n in mixture.at(p))
        assert sources[p] == source and epochs[p] == within // COUNTS[source]
        assert ordinals[p] == orders[source].ordinals(within)
    again = blend.plan(np.arange(600).reshape(12, 50)[::-1])
    assert np.array_equal(again[0][::-1].ravel(), samples)


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    position=st.integers(0, 400),
    block=st.integers(8, 60),
    data=st.data(),
)
def test_an_epoch_counts_as_ended_when_all_of_it_was_used(
    counts: list[int], position: int, block: int, data: st.DataObject
) -> None:
    # the least of them has a place in a block of 8
    weights = tuple(data.draw(st.floats(0.75, 2)) for _ in counts)
    mixture = Mixture(weights=weights, seed=1, block=block) if len(counts) > 1 else None
    blend = Blend(orders=tuple(Order(count=n, seed=0) for n in counts), mixture=mixture)
    samples, epochs = blend.plan(np.arange(1200))
    sources, _ = blend.locate(samples)
    of = list(zip(sources.tolist(), epochs.tolist(), strict=True))
    before, after = set(of[:position]), set(of[position : position + 800])
    ended = {(s, e) for s, n in enumerate(blend.ended(position)) for e in range(n)}
    under_way = blend.under_way(position)
    assert ended <= before and not ended & after
    for s, e in ended:
        assert of[:position].count((s, e)) == counts[s]
    assert before <= ended | {*under_way} and under_way == sorted(set(under_way))
    if mixture is None:  # of one source to the very sample
        assert before & after == {*under_way}


@pytest.mark.parametrize(("world", "micro"), [(1, 40), (4, 10)])
def test_every_sources_epochs_are_proven(roots: list[Path], world: int, micro: int) -> None:
    _, ended = _read(roots, world, micro, 0, 6000)
    totals = [
        check_epoch(accounts, COUNTS[accounts[0].source]) for accounts in zip(*ended, strict=True)
    ]
    epochs = [[t.epoch for t in totals if t.source == s] for s in range(3)]
    assert epochs == [[*range(3750 // 700)], [*range(1500 // 300)], [*range(750 // 90)]]
    twice = next(t for t in totals if t.key == (0, 0)) + EpochAudit(epoch=0, seen=1)
    with pytest.raises(DamagedError, match="epoch 0: 701 samples seen"):
        check_epoch([twice], 700)
    with pytest.raises(DamagedError, match="epoch 3 of source 2"):
        check_epoch([EpochAudit(source=2, epoch=3, seen=90)], 90)


def test_what_stands_in_comes_from_the_same_source(tmp_path: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    write(roots[0], 600), write(roots[1], 520)
    flip(*payload(roots[1], 1, "x"))
    options = {"global_batch": 100, "micro_batch": 100, "rank": 0, "world": 1, "seed": 7}
    with shards.open(
        roots, weights=[1, 1], **options, on_damage="substitute", damaged=0.5
    ) as stream:
        while len(stream.ended) < 2:
            batch = next(stream)
            assert not ((batch["source"] == 1) & (batch["ordinal"] // 256 == 1)).any()
        assert [(a.source, a.seen, a.substituted) for a in stream.ended] == [(0, 600, 0), (1, 264, 256)]  # fmt: skip
        assert stream.substituted > 0
    with shards.open(roots, weights=[1, 1], **options) as stream, pytest.raises(DamagedError):
        for _ in range(12):
            next(stream)


def test_sources_of_one_size_have_orders_of_their_own(roots: list[Path]) -> None:
    manifest = manifests.load(roots[0])
    made = make_blend([manifest] * 2, ReadOptions(weights=[1, 1], mode="global", window=1), seed=4)
    one, other = (order.ordinals(np.arange(700)) for order in made.orders)
    assert (one == other).sum() < 20
    alone = make_blend([manifest], ReadOptions(mode="global", window=1), seed=4)
    assert np.array_equal(
        alone.plan(np.arange(900))[0],
        Order(count=700, seed=4, mode="global").ordinals(np.arange(900)),
    )


def test_the_state_names_all_that_is_read(roots: list[Path]) -> None:
    options = {"global_batch": 8, "micro_batch": 8, "rank": 0, "world": 1, "seed": 7}

    def named(given: list[Path], weights: list[float]) -> str:
        with shards.open(given, weights=weights, **options) as stream:
            state = stream.state()
        assert state.keys() == {"manifest", "seed", "mode", "window", "position"}
        assert state["seed"] == 7
        return str(state["manifest"])

    one = named(roots[:2], [1, 2])
    assert one == named(roots[:2], [2, 4]), "only shares matter"
    others = [named(roots[:2], [2, 1]), named(roots[1::-1], [1, 2]), named(roots[::2], [1, 2])]
    assert len({one, *others}) == 4


def test_what_cannot_be_mixed_is_named(roots: list[Path], tmp_path: Path) -> None:
    options = {"global_batch": 8, "micro_batch": 8, "rank": 0, "world": 1, "seed": 7}

    def refused(message: str, given: Any, weights: Any) -> None:
        with pytest.raises(UserError, match=message):
            shards.open(given, weights=weights, **options)

    other = {}
    for name, header, more in (
        ("scale", Header(kind="latent", scale=0.25, encoder="test"), {}),
        ("encoder", Header(kind="latent", scale=0.5, encoder="other"), {}),
        ("shape", LATENT, {"shape": (2, 4, 4)}),
        ("unlabelled", LATENT, {"labels": False}),
    ):
        writer.write(tmp_path / name, source(50, **more), header=header, seed=0)
        other[name] = [roots[0], tmp_path / name]
    x = np.zeros((20, 2, 3, 4), dtype=np.float16)
    many = ArraySource.of("many", x, labels=np.arange(20) % 7, classes=7)
    writer.write(tmp_path / "classes", many, header=LATENT, seed=0)
    refused("header scale is 0.25 in the one and 0.5 in the other", other["scale"], [1, 1])
    refused("header encoder is other", other["encoder"], [1, 1])
    refused(r"x is <f2 \(2, 4, 4\).*in the one and <f2 \(2, 3, 4\)", other["shape"], [1, 1])
    refused("y is None in the one", other["unlabelled"], [1, 1])
    refused("classes is 7 in the one and 5", [roots[0], tmp_path / "classes"], [1, 1])
    refused("hold the same shards", [roots[0], roots[0]], [1, 1])
    refused("weights=none for 2 roots", roots[:2], None)
    refused(r"weights=\[1\] for 2 roots", roots[:2], [1])
    refused(r"weights=\[1\] for 1 roots", roots[:1], [1])
    refused(r"weights=\[1, 1\] with one root", roots[0], [1, 1])
    refused(r"weights=\(1, 0\): give each source a positive weight", roots[:2], [1, 0])
    refused("no shards at", [roots[0], tmp_path / "nowhere"], [1, 1])
