"""Agreement with labels is by definition, blind to names, and 0 by chance where it says so."""

import numpy as np
import pytest
from scipy.stats import contingency

from selfguide.discovery.agreement import agreement


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
