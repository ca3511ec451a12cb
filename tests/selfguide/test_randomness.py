"""Random numbers: the published vectors, the moments, and nothing but (seed, purpose, position)."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selfguide.randomness import normal, philox, uniform

# Known-answer vectors of Philox 4x32-10 that Random123 publishes
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_philox_gives_the_published_words() -> None:
    for counter, key, expected in VECTORS:
        words = philox(tuple(torch.tensor(c) for c in counter), key)  # type: ignore[arg-type]
        assert tuple(int(w) for w in words) == expected


@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(0, 3))
def test_a_draw_depends_on_its_position_alone(start: int, count: int, cut: int) -> None:
    positions = torch.arange(start, start + 5)
    whole = normal(3, "noise", positions, (count,))
    assert torch.equal(whole[cut : cut + 2], normal(3, "noise", positions[cut : cut + 2], (count,)))


def test_seeds_purposes_and_positions_give_unrelated_numbers() -> None:
    positions = torch.arange(2000)
    base = normal(0, "noise", positions, (8,)).flatten()
    for other in (
        normal(1, "noise", positions, (8,)),
        normal(0, "drop", positions, (8,)),
        normal(0, "noise", positions + 2000, (8,)),
    ):
        assert abs(torch.corrcoef(torch.stack((base, other.flatten())))[0, 1]) < 0.03


def test_distributions_pass_kolmogorov_smirnov() -> None:
    positions = torch.arange(5000)
    assert stats.kstest(uniform(0, "u", positions, 4).flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal(0, "n", positions, (4,)).flatten().numpy(), "norm").pvalue > 1e-3


def test_uniform_stays_inside_the_open_interval() -> None:
    drawn = uniform(0, "u", torch.arange(200_000), 4)
    assert drawn.min() > 0 and drawn.max() < 1
