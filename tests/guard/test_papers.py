"""The experiments of four papers keep their ids: each file of configs/experiment/PAPER is the run that it was.

`python -m tests.guard.test_papers` adds the ids of new experiments to the fixture, and changes none that is there.
"""

from __future__ import annotations

import json

import pytest

from tests.guard.names import compose, digest, identity, papers
from tests.guard.runs import FIXTURES, MANIFEST, WEIGHTS

FILE = FIXTURES / "papers.json"
PINNED = json.loads(FILE.read_text()) if FILE.exists() else {}


def identity_of(experiment: str) -> dict[str, object]:
    """Its identity on fixed data, weights and annotations."""
    config = compose([f"experiment={experiment}", "cluster=slurm"])
    sidecars = {name: f"the {name}" for name in config.guidance.folders} | {"saw_labels": False}
    return json.loads(json.dumps(identity(config, MANIFEST, WEIGHTS, sidecars), default=str))


@pytest.mark.parametrize("paper", ["cedm", "ddaepp", "sgdm", "sgfm"])
def test_an_experiment_of_a_paper_is_the_run_that_it_was(paper: str) -> None:
    pinned = [name for name in PINNED if name.startswith(f"{paper}/")]
    # their identities too, so that a failure says what changed
    now = {name: identity_of(name) for name in pinned}
    assert now == {name: PINNED[name]["identity"] for name in pinned}
    assert {name: digest(now[name]) for name in pinned} == {
        name: PINNED[name]["id"] for name in pinned
    }


def test_no_two_experiments_of_papers_are_one_run_or_lost() -> None:
    assert len({each["id"] for each in PINNED.values()}) == len(PINNED) >= 80
    assert set(PINNED) <= set(papers())


def main() -> None:
    """Adds what is new."""
    new = {name: identity_of(name) for name in papers() if name not in PINNED}
    rows = PINNED | {name: {"id": digest(what), "identity": what} for name, what in new.items()}
    lines = [
        f"{json.dumps(name)}: {json.dumps(rows[name], sort_keys=True)}" for name in sorted(rows)
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
