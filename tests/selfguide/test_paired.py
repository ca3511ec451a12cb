"""Paired comparison: the same seeds say more, one may stop at any look, and images are saved."""

import numpy as np
import pytest

from selfguide.evaluation.metrics.frechet import Reference, frechet
from selfguide.evaluation.metrics.moments import Moments
from selfguide.evaluation.paired import (
    Comparison,
    Draw,
    compare,
    each_look,
    multiplier,
    paired_difference,
)
from selfguide.spec.recipe import difference
from selfguide.spec.records import EvaluationRecord

WIDTH = 4
REFERENCE = Reference(np.zeros(WIDTH), np.eye(WIDTH), np.eye(WIDTH))


def model(seed: int, scale: float, shift: float = 0.0, own: float = 0.0) -> Draw:
    """A generator whose image i is a function of `seed` and i, of which a share `own` of the noise is its own."""
    noise = np.random.default_rng(seed).normal(size=(4000, WIDTH))
    other = np.random.default_rng([seed, round(1e6 * scale)]).normal(size=(4000, WIDTH))
    made = scale * (np.sqrt(1 - own**2) * noise + own * other) + shift
    return lambda first, last: made[first:last]


def moments(draw: Draw, count: int = 2000) -> Moments:
    made = Moments(REFERENCE.mean)
    made.update(draw(0, count), 0)
    return made


def test_difference_of_two_records_is_the_paired_jackknife_of_their_images() -> None:
    a, b = (moments(model(0, scale)) for scale in (1.2, 1.21))
    alone = [frechet(REFERENCE, each) for each in (a, b)]
    first, second = (
        EvaluationRecord(
            status="done",
            key="",
            attempt=1,
            images=1,
            protocol={"metric": "fd"},
            scores={"fd": score.value},
            left_out=score.left_out,
        )
        for score in alone
    )
    found = paired_difference(REFERENCE, a, b)
    assert difference(first, second) == pytest.approx((found.corrected, found.se), rel=1e-9)


def test_paired_difference_of_alike_models_has_a_far_smaller_error_than_either() -> None:
    a, b = moments(model(0, 1.2)), moments(model(0, 1.21))
    found = paired_difference(REFERENCE, a, b)
    alone = frechet(REFERENCE, a)
    assert found.value == pytest.approx(alone.value - frechet(REFERENCE, b).value)
    assert found.se < 0.2 * alone.se
    with pytest.raises(ValueError, match="pairs"):
        paired_difference(REFERENCE, a, moments(model(0, 1.21), 1990))


def test_the_error_of_a_paired_difference_is_its_spread_over_fresh_seeds() -> None:
    found = [
        paired_difference(REFERENCE, *(moments(model(seed, s, own=0.5), 500) for s in (1.2, 1.3)))
        for seed in range(100)
    ]
    spread = np.std([each.corrected for each in found])
    assert 0.85 * spread < np.mean([each.se for each in found]) < 1.4 * spread
    truth = WIDTH * (0.2**2 - 0.3**2)
    assert np.mean([each.corrected for each in found]) == pytest.approx(truth, abs=3 * spread / 10)


def test_equal_models_are_called_different_no_more_often_than_alpha_at_all_looks_together() -> None:
    """Peeking ten times at fixed intervals of 95 % would be wrong four times as often."""
    wrong, peeked = 0, 0
    for seed in range(150):
        # equally good, and no image of the two alike
        a, b = model(seed, 1.1), model(10_000 + seed, 1.1)
        looks = list(each_look(REFERENCE, a, b, most=1000))
        wrong += any(look.better for look in looks)
        peeked += any(abs(look.difference) > 1.96 * look.se for look in looks)
    assert wrong <= 0.05 * 150 < peeked


def test_a_clear_difference_is_found_early_and_says_what_it_saved() -> None:
    found = compare(REFERENCE, model(0, 1.1), model(0, 1.3), most=4000)
    assert found.better == "A" and found.looks[-1].images < 2000
    assert found.saved == 2 * (4000 - found.looks[-1].images)
    turned = compare(REFERENCE, model(0, 1.3), model(0, 1.1), most=4000)
    assert turned.better == "B" and len(turned.looks) == len(found.looks)
    assert all(look.better is None for look in found.looks[:-1])


def test_equal_models_are_drawn_to_the_end() -> None:
    same = model(0, 1.1)
    found = compare(REFERENCE, same, same, most=500, looks=4)
    assert [look.images for look in found.looks] == [125, 250, 375, 500]
    assert found == Comparison(found.looks, 500, 0.05) and found.better is None and not found.saved


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_multiplier_is_that_of_the_mixture_and_narrowest_in_the_middle(alpha: float) -> None:
    many = 10**9  # degrees of freedom: Student's t is normal
    each = {n: multiplier(n, 1000, alpha, many) for n in (50, 499, 500, 501, 1000)}
    assert each[500] == min(each.values())
    x = (
        each[500] ** 2 - 1
    )  # where it is narrowest, x = log(1 + x) - 2 log alpha, and its square is 1 + x
    assert x == pytest.approx(np.log1p(x) - 2 * np.log(alpha), rel=1e-6)
    twice = np.sqrt((1 + 1 / (2 * x)) * (np.log1p(2 * x) - 2 * np.log(alpha)))
    assert each[1000] == pytest.approx(twice, rel=1e-6)
    assert multiplier(500, 1000, alpha, 9) > each[500] + 0.5
