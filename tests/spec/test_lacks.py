"""Which files evaluations wait for, without torch."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launcher.compose import compose
from selfguide.spec.lacks import lacks
from selfguide.spec.weight_files import FOLDER, INCEPTION


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds Inception's weights alone, on a machine without caches."""
    for name in ("TORCH_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    for name in ("SELFGUIDE_SD_VAE", "SELFGUIDE_SMALL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    (tmp_path / INCEPTION.files[0]).touch()
    return tmp_path


def found(*words: str, encoder: str | None) -> list[str]:
    config = compose(["experiment=in1k_dit", "nodes=4", "cluster=slurm", *words])
    return [lack.what for lack in lacks(config, encoder)]


def test_the_flagship_waits_for_its_reference_and_what_decodes_its_latents(weights: Path) -> None:
    name = "VIRTUAL_imagenet256_labeled.npz"
    assert found(encoder="small") == [f"reference {name}", "small weights"]
    (weights / name).touch()
    decoder = f"evaluation.decoder={weights / INCEPTION.files[0]}"
    assert found(decoder, encoder="small") == []
    assert found(encoder="tiny") == []
    assert found(encoder=None) == []


def test_no_evaluation_waits_for_nothing(weights: Path) -> None:
    assert found("evaluation=none", encoder="small") == []
    assert found("evaluation=fdd", encoder=None)[0] == "dinov2 weights"


@pytest.mark.parametrize(
    ("setting", "makes"),
    [("metrics=[ufid] unconditional", "samples RUN"), ("reference", "make SHARDS")],
)
def test_missing_statistics_are_found_where_the_printed_command_writes_them(
    weights: Path, setting: str, makes: str
) -> None:
    (weights / "vit.pth").touch()
    words = [
        f"{setting}=own.npz",
        "net=vit",
        f"weights={weights / 'vit.pth'}",
        "sha256=" + 64 * "a",
    ]
    asked = [f"evaluation.{word}" for several in words for word in several.split()]
    config = compose(
        ["experiment=in1k_dit", "nodes=4", "cluster=slurm", "evaluation=fd_timm", *asked]
    )
    (lack,) = (each for each in lacks(config, None) if "own.npz" in each.what)
    (command,) = re.findall(r"`python -m tools\.reference ([^`]*)`", lack.sentence)
    typed = shlex.split(command)
    assert " ".join(typed[:2]) == makes
    options = dict(zip(typed[2::2], typed[3::2], strict=True))
    net = {"--net": "vit", "--weights": str(weights / "vit.pth"), "--sha256": 64 * "a"}
    assert options == {"--protocol": "fd_timm", **net, "--out": options["--out"]}
    Path(options["--out"]).touch()
    assert lack not in lacks(config, None)
