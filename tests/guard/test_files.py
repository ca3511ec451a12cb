"""Ids, identities and files of the commit before a refactoring mean what they meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.guard.make import COUNT, SCRIPTS, identity_of, manifest_hash, sampled, script
from tests.guard.names import digest, experiments, read_config, sidecar

FIXTURES = Path(__file__).parent / "fixtures"
IDS = json.loads((FIXTURES / "ids.json").read_text())


@pytest.mark.parametrize("settings", sorted(IDS))
def test_an_identity_is_what_it_was(settings: str) -> None:
    what = identity_of(settings.split())
    assert what == IDS[settings]["identity"]
    assert digest(what) == IDS[settings]["id"]


def test_every_experiment_is_in_the_table_of_ids() -> None:
    known = {words.split()[0].partition("=")[2] for words in IDS}
    missing = sorted(set(experiments()) - known)
    assert not missing, f"run `python -m tests.guard.make` or add {missing} to ids.json"


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/**/config.yaml")), ids=str)
def test_a_config_of_before_is_read(path: Path) -> None:
    assert read_config(path).experiment == "digits_dit"


def test_a_manifest_of_before_is_read_and_verifies() -> None:
    command = [sys.executable, "-m", "tools.shards", "verify", str(FIXTURES / "digits")]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_sidecar_of_before_is_read() -> None:
    found = sidecar.read(FIXTURES / "sidecar", manifest=manifest_hash(FIXTURES / "digits"))
    assert (found.kind, found.groups, found.saw_labels) == ("id", 10, False)
    assert np.array_equal(found.rows(), np.arange(COUNT) % 10)


def test_a_snapshot_of_before_draws_the_same_samples(tmp_path: Path) -> None:
    """To one grey level, which rounding on another CPU may change."""
    was, now = (
        np.asarray(Image.open(p), dtype=int)
        for p in (FIXTURES / "samples.png", sampled(FIXTURES / "zero1_online", tmp_path / "made"))
    )
    assert was.shape == now.shape and abs(was - now).max() <= 16


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_batch_script_is_what_it_was(name: str) -> None:
    assert script(SCRIPTS[name]) == (FIXTURES / f"{name}.sh").read_text()
