"""Ids, identities and files of the commit before a refactoring mean what they meant."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.guard.make import COUNT, SCRIPTS, identity_of, manifest_hash, sampled, script
from tests.guard.names import compose, digest, experiments, identity, read_config, sidecar
from tests.guard.runs import FIXTURES, command, where

CONFIGS = json.loads((FIXTURES / "configs.json").read_text())
MADE_HERE = where() == json.loads((FIXTURES / "hashes.json").read_text())["where"]
IDS = json.loads((FIXTURES / "ids.json").read_text())


# Choices that were corrected since: beside each what has to be typed for the runs of before, which keep their ids.
CORRECTED = {
    # the last norm of DDAE's UNets has 8 groups, and their first weights are torch's
    "model=unet_ddpm": ["model.out_groups=null", "model.plain_init=null"],
    "model=unet_ddpmpp": ["model.out_groups=null", "model.plain_init=null"],
    # the map of EDM's labels has a bias
    "model=unet_edm_32": ["model.label_bias=null"],
    "model=unet_edm_64": ["model.label_bias=null"],
    # nets that learned on a table of steps are fed whole numbers; norms of q and k, if any, are timm's
    **{
        f"model=dit_{size}_{patch}": ["model.whole_index=null", "model.qk_bias=null"]
        for size in ("s", "b", "l", "xl")
        for patch in (1, 2, 4, 8)
    },
    **{
        f"model={name}": ["model.whole_index=null"]
        for name in (
            "unet_sgdm_32",
            "unet_sgdm_64",
            "unet_sgdm_cross_64",
            "unet_sgdm_256",
        )
    },
    # EDM2's head of the uncertainty
    "path=edm2": ["path.uncertainty=affine"],
    # U-ViT's sampling on VP ends at 1e-4
    "path=vp": ["path.last=1e-3"],
    # U-ViT's label rows begin with a std of 1
    **{
        f"model=uvit_{size}": ["model.token_std=null"]
        for size in ("s_2", "s_4", "m_4", "l_2", "l_4")
    },
    **{
        f"model=uvit_{size}": ["model.token_std=null", "model.whole_index=null"]
        for size in ("s_deep_2", "h_2", "h_4")
    },
    # weight decay spared nothing
    "train.weight_decay=0.01": ["train.decayed=all"],
    # SGFM's code: ids, average, step and first weights of prototypes and tokens
    "guidance=sgfm_code": [
        "guidance.id_rows=unit", "guidance.prototype_gradient=tangent", "guidance.teacher_rate=null",
        "guidance.teacher_refresh=1024", "guidance.snapshot_buffers=student", "guidance.token_std=null",
        "guidance.head_std=null", "guidance.official_tokens=taken", "guidance.query_noise=shared",
    ],
}  # fmt: skip


def before(words: list[str]) -> list[str]:
    """What has to be typed beside these choices for what they meant before."""
    return [word for choice in words for word in CORRECTED.get(choice, [])]


@pytest.mark.parametrize("settings", sorted(IDS))
def test_an_identity_is_what_it_was(settings: str) -> None:
    words = settings.split()
    what = identity_of([*words, *before(words)])
    assert what == IDS[settings]["identity"]
    assert digest(what) == IDS[settings]["id"]
    assert (identity_of(words) != what) == bool(before(words))


def test_every_experiment_is_in_the_table_of_ids() -> None:
    known = {words.split()[0].partition("=")[2] for words in IDS}
    missing = sorted(set(experiments()) - known)
    assert not missing, f"add {missing} to ids.json"


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_a_config_of_before_is_read_as_the_settings_it_was_made_of(number: int) -> None:
    was = read_config(FIXTURES / "configs" / f"{number:02d}.yaml")
    words = CONFIGS[number].split()
    # it named no evaluation and no published numbers then, and no evaluation is a part of a run
    unscored = ["evaluation=none"] if words[0] == "experiment=in1k_dit" else []
    found = compose([*words, *before(words), *unscored])
    if not was.train.weight_decay:  # which then changes nothing by what it spares
        found = replace(found, train=replace(found.train, decayed=was.train.decayed))
    of_then = {"reference": was.evaluation.reference, "expected": was.evaluation.expected}
    assert was == replace(found, evaluation=replace(found.evaluation, **of_then))


@pytest.mark.parametrize(
    "path", sorted(FIXTURES.glob("*/**/config.yaml")), ids=lambda p: str(p.relative_to(FIXTURES))
)
def test_the_config_of_a_run_of_before_is_the_run_that_its_record_names(path: Path) -> None:
    said = json.loads((FIXTURES / path.relative_to(FIXTURES).parts[0] / "run.json").read_text())
    what = identity(read_config(path), said["identity"]["data"]["manifest"])
    assert json.loads(json.dumps(what, default=str)) == said["identity"]


def test_a_manifest_of_before_is_read_and_verifies() -> None:
    command([sys.executable, "-m", "tools.shards", "verify", str(FIXTURES / "digits")])


def test_a_sidecar_of_before_is_read() -> None:
    found = sidecar.read(FIXTURES / "sidecar", manifest=manifest_hash(FIXTURES / "digits"))
    assert (found.kind, found.groups, found.saw_labels) == ("id", 10, False)
    assert np.array_equal(found.rows(), np.arange(COUNT) % 10)


def test_a_snapshot_of_before_draws_the_same_samples(tmp_path: Path) -> None:
    """Bit for bit on the kind of machine that made them; elsewhere to what rounding may move, and that is said."""
    was, now = (
        np.asarray(Image.open(p), dtype=int)
        for p in (FIXTURES / "samples.png", sampled(FIXTURES / "zero1_online", tmp_path / "made"))
    )
    assert was.shape == now.shape
    if not MADE_HERE:
        warnings.warn(f"compared to 2 grey levels, not bit for bit, on {where()}", stacklevel=1)
    assert abs(was - now).max() <= (0 if MADE_HERE else 2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_batch_script_is_what_it_was(name: str) -> None:
    assert script(SCRIPTS[name]) == (FIXTURES / f"{name}.sh").read_text()
