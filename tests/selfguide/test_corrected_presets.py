"""Snapshots of before a path or sampler was corrected: they load and sample under its old value, and say so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import yaml

from launcher.compose import compose
from selfguide.diffusion.paths import build_path
from selfguide.diffusion.samplers import settings
from selfguide.sampling.generate import generate_each
from selfguide.sampling.queries import without_condition
from selfguide.snapshot import CONFIG, load
from selfguide.spec.corrections import kept_from_before
from shards import storage
from tests.selfguide.snapshots import write_snapshot

# choice -> what else is typed for the digits, the key that was corrected, and what it was before
CORRECTED = {
    "path=vp": (["model.time=noise_999"], "path.last", 1e-3),
    "path=edm2": (["model.time=log_sigma"], "path.uncertainty", "affine"),
    "sampler=lightning": (["sampler.g=1"], "sampler.steps", 250),
    "sampler=dopri5_sit": ([], "sampler.guided_channels", None),
}


def of_before(folder: Path, digits: Path, choice: str) -> Path:
    """A snapshot whose config is as it was written before; a key that did not exist is not in it."""
    more, key, old = CORRECTED[choice]
    typed = f"{key}={'null' if old is None else old}"
    snapshot = write_snapshot(folder, digits, choice, *more, typed)
    manifest = storage.read_complete(snapshot, verify="hashes")
    assert manifest is not None
    values = yaml.safe_load((snapshot / CONFIG).read_text())
    group, name = key.split(".")
    if group == "path":
        del values[group][name]
    (snapshot / CONFIG).write_text(yaml.safe_dump(values))
    (snapshot / "MANIFEST.json").unlink()
    more = {name: manifest[name] for name in ("images", "guidance", "data", "saw_labels", "origin")}
    storage.publish_folder(snapshot, extra=more)
    return snapshot


@pytest.mark.parametrize("choice", CORRECTED)
def test_a_snapshot_of_before_keeps_the_old_value_and_says_so(
    choice: str, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, key, old = CORRECTED[choice]
    group, name = key.split(".")
    snapshot = of_before(tmp_path / "snapshot", digits, choice)
    with caplog.at_level(logging.WARNING):
        loaded = load(snapshot)
    assert getattr(getattr(loaded.config, group), name) == old
    config = compose(["experiment=digits_uncond", "cluster=local", choice])
    today = getattr(getattr(config, group), name)
    (said,) = [r.getMessage() for r in caplog.records if choice in r.getMessage()]
    assert f"{key}={'null' if old is None else old}" in said and f"{key}={today}" in said


@pytest.mark.parametrize("choice", CORRECTED)
def test_a_new_run_of_a_corrected_choice_has_nothing_to_say(choice: str) -> None:
    config = compose(["experiment=digits_uncond", "cluster=local", choice])
    assert not list(kept_from_before(config))


def test_a_vp_snapshot_of_before_samples_down_to_its_old_end(digits: Path, tmp_path: Path) -> None:
    snapshot = load(of_before(tmp_path / "snapshot", digits, "path=vp"))
    ends: list[float] = []
    drawn = generate_each(
        snapshot,
        snapshot.config.sampler,
        without_condition(snapshot, 2),
        torch.arange(2),
        batch=2,
        callback=lambda step, tau, x: ends.append(tau),
    )
    assert all(x.isfinite().all() for x, _ in drawn)
    assert ends[-1] == 1e-3 == build_path(snapshot.config.path).last


def test_a_lightning_snapshot_of_before_takes_its_250_steps(digits: Path, tmp_path: Path) -> None:
    snapshot = load(of_before(tmp_path / "snapshot", digits, "sampler=lightning"))
    assert settings(snapshot.config.sampler)["steps"] == 250
