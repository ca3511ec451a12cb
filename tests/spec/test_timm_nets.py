"""Nets of timm by name alone: which there are, where their weights are looked for, and what is pinned of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import timm

from selfguide.spec import checksums
from selfguide.spec.config import EvaluationConfig
from selfguide.spec.timm_nets import check_net, models, pinned
from selfguide.spec.weight_files import lacking, locate, timm_weights
from shards import storage
from shards.errors import UserError
from tests.selfguide import hub_cache
from tests.selfguide.hub_cache import NET

BY_NAME = EvaluationConfig(protocol="fd_timm", net=NET)


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights, whose caches lie below this folder."""
    hub_cache.use(tmp_path, monkeypatch)
    return tmp_path


def test_names_read_as_text_are_those_that_timm_registers() -> None:
    found = models()
    assert found.keys() == {*timm.list_models()}
    for name in timm.list_pretrained():
        named = found[name.partition(".")[0]]
        assert not named or name in named


@pytest.mark.parametrize(
    ("net", "said"),
    [
        ("resnet5O.a1_in1k", "is no model of timm; did you mean 'resnet50.a1_in1k'?"),
        ("test_resnett", "is no model of timm; did you mean 'test_resnet'?"),
        ("resnet50.a1_in1", "of resnet50; did you mean 'resnet50.a1_in1k'?"),
        (
            "resnet50",
            "give evaluation.weights=FILE, or one of these: evaluation.net=resnet50.a1_in1k",
        ),
        ("botnet50ts_256", "none of its weights; give evaluation.weights=FILE"),
    ],
)
def test_name_that_stands_for_no_weights_is_refused_with_the_nearest(net: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_net(net, None)
    assert f"evaluation.net={net}" in str(error.value)
    assert said in str(error.value)


def test_model_without_published_weights_takes_a_file() -> None:
    for net in ("resnet50", "botnet50ts_256", NET):
        check_net(net, "net.safetensors")
    check_net(NET, None)


def test_weights_are_looked_for_in_the_folder_then_torchs_cache_then_the_hubs(caches: Path) -> None:
    there = [caches / "weights", caches / "torch" / "hub" / "checkpoints"]
    files = [folder / f"{NET}.safetensors" for folder in there]
    hub, _ = hub_cache.add(caches)
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    for file in (*files, hub):
        assert locate(timm_weights(NET)) == file
        file.unlink()
    assert locate(timm_weights(NET)) is None
    sentence = lacking(timm_weights(NET))
    pattern = hub.parents[1] / "*" / hub.name
    for part in (*map(str, files), str(pattern), f"`python -m tools.reference fetch {NET}`"):
        assert part in sentence


def test_name_alone_is_pinned_to_the_sha256_of_what_is_here(caches: Path) -> None:
    assert pinned(BY_NAME) == BY_NAME
    _, sha256 = hub_cache.add(caches)
    assert pinned(BY_NAME) == replace(BY_NAME, sha256=sha256)
    # what is pinned stays
    typed = replace(BY_NAME, sha256="0" * 64)
    assert pinned(typed) == typed


def test_file_without_a_sha256_is_pinned_to_its_own(caches: Path) -> None:
    file = caches / "net.safetensors"
    given = replace(BY_NAME, weights=str(file))
    assert pinned(given) == given
    sha256 = hub_cache.save(file)
    assert pinned(given).sha256 == sha256


def test_cached_file_that_is_not_what_its_blob_is_called_is_refused_with_both(caches: Path) -> None:
    file, called = hub_cache.add(caches)
    file.write_bytes(b"cut")
    with pytest.raises(UserError) as error:
        pinned(BY_NAME)
    for part in (str(file), called, storage.sha256(str(file))):
        assert part in str(error.value)


def test_sha256_is_read_once_until_the_file_is_another(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest = storage.sha256

    def counted(url: str) -> str:
        read.append(url)
        return digest(url)

    monkeypatch.setattr(checksums.storage, "sha256", counted)
    file = caches / "net.pth"
    for content, age in ((b"one", 60), (b"two", 50)):
        file.write_bytes(content)
        then = file.stat().st_mtime_ns - age * 10**9
        os.utime(file, ns=(then, then))
        for _ in range(2):
            assert checksums.remembered_sha256(file) == digest(str(file))
    assert len(read) == 2
    # one that may still be written is read each time
    file.write_bytes(b"three")
    for _ in range(2):
        assert checksums.remembered_sha256(file) == digest(str(file))
    assert len(read) == 4


def test_folder_of_remembered_checksums_that_cannot_be_written_is_done_without(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (caches / "remembered").touch()
    _, sha256 = hub_cache.add(caches)
    assert pinned(BY_NAME).sha256 == sha256
