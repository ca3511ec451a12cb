"""The suite that times the Frechet distance times calls that agree."""

import json
import sys

import numpy as np
import pytest

from selfguide.evaluation.metrics.frechet import distance
from shards.errors import UserError
from tools.bench import __main__ as command
from tools.bench import board, evaluation


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_the_evaluation_suite_times_every_package_on_the_same_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "WIDTH", 12)
    monkeypatch.setattr(evaluation, "IMAGES", 1)
    monkeypatch.setattr(evaluation, "EDGE", 32)
    monkeypatch.setattr(board, "RUNS", 6)
    # tests/browser opens pages
    monkeypatch.setattr(board, "sorting", lambda root, repeats: [])
    assert command.main(["evaluation", "--repeats", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["suites"]["evaluation"]
    names = " ".join(row["name"] for row in found)
    calls = evaluation.packages(np.zeros(3), np.eye(3), np.ones(3), 4 * np.eye(3))
    assert all(name in names for name in calls) and len(found) == 7 + 3 + 3 + 4
    assert all(net.name in names for net in evaluation.nets())
    values = [call() for call in calls.values()]
    assert values == pytest.approx(
        [distance(np.zeros(3), np.eye(3), np.ones(3), 4 * np.eye(3))] * 3
    )
    assert values == pytest.approx([6] * 3)


def test_a_package_that_is_not_installed_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_fid", None)
    with pytest.raises(UserError, match=r"torch_fidelity.*pip install 'selfguide\[dev\]'"):
        evaluation.packages(np.zeros(3), np.eye(3), np.ones(3), 4 * np.eye(3))
