"""Agreement with labels is by definition, blind to names, and 0 by chance where it says so."""

import itertools

import numpy as np
import pytest
from scipy.stats import contingency

from selfguide.discovery.agreement import agreement, matched


def test_nmi_is_by_definition_and_names_say_nothing() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 300)
    ids = np.where(random.random(300) < 0.6, labels, random.integers(0, 6, 300))
    said = agreement(labels, ids)
    joint = contingency.crosstab(labels, ids).count / 300
    p, q = joint.sum(1), joint.sum(0)
    held = joint > 0
    mutual = (joint[held] * np.log(joint[held] / np.outer(p, q)[held])).sum()
    entropies = -(p * np.log(p)).sum() - (q * np.log(q)).sum()
    assert said["nmi"] == pytest.approx(2 * mutual / entropies)
    assert agreement(labels, 100 - ids) == pytest.approx(said)
    assert set(agreement(labels, labels * 3).values()) == {1.0}


def test_many_groups_drawn_at_random_agree_by_nmi_only() -> None:
    random = np.random.default_rng(1)
    said = agreement(random.integers(0, 10, 2000), random.integers(0, 400, 2000))
    assert said["nmi"] > 0.2 and abs(said["ari"]) < 0.01 and abs(said["ami"]) < 0.02


def test_the_one_to_one_map_is_the_best_of_all() -> None:
    random = np.random.default_rng(2)
    labels, ids = random.integers(0, 4, 200), random.integers(0, 4, 200)
    found = matched(labels, ids)
    best = max(
        float((np.asarray(order)[ids] == labels).mean())
        for order in itertools.permutations(range(4))
    )
    assert found.accuracy == pytest.approx(best)
    mapped = np.asarray([found.one_to_one[each] for each in ids])
    assert (mapped == labels).mean() == pytest.approx(found.accuracy)


def test_more_groups_than_classes_are_compared_by_their_majority() -> None:
    labels = np.repeat(np.arange(3), 40)
    # each class in four pure groups, of which number 5 is empty
    ids = labels * 5 + np.arange(120) % 4
    found = matched(labels, ids)
    assert found.majority_accuracy == 1.0 and set(found.majority) == set(ids.tolist())
    assert found.accuracy == pytest.approx(0.25) and len(found.one_to_one) == 3
