"""Scores that are asked for afterwards against other shards, and with files of their own, are those that were meant.

The evaluations are real ones, of few images in a small net with random weights, and run where they are submitted.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_evaluate import Memory, a_run, launched, memory, statistics

from launcher import evaluate, watch
from launcher.compose import changed, compose
from launcher.reconcile.view import read
from selfguide.data.autoencoders.encoding import EncodedSource, Encoding
from selfguide.evaluation import job
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import records
from selfguide.spec.run import RunFolder
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.sources.source import ArraySource
from shards.write.writer import write
from tests.selfguide.snapshots import write_snapshot

__all__ = ["launched", "memory"]

NET = "test_resnet.r160_in1k"  # the smallest of timm
FEW = ["evaluation.samples=40", "evaluation.batch=20"]


@dataclass(frozen=True)
class Data:
    folder: Path
    images: Path
    darker: Path
    brighter: Path
    latents: Path
    # settings that name the net
    net: tuple[str, ...]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Shards of digits' size, their latents, and a net."""
    folder = tmp_path_factory.mktemp("made")
    rng, header = np.random.default_rng(0), Header(kind="image", shift=8.0, scale=0.125)
    for name, least, most in (("images", 0, 17), ("darker", 0, 5), ("brighter", 12, 17)):
        x = rng.integers(least, most, (40, 1, 8, 8)).astype(np.uint8)
        write(folder / name, ArraySource.of(name, x), header=header)
    with closing(
        EncodedSource.of(str(folder / "images"), Encoding(encoder="tiny", content="mean"))
    ) as source:
        write(folder / "latents", source, header=source.header)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(NET).state_dict(), folder / "net.safetensors")
    file = folder / "net.safetensors"
    net = (
        "evaluation=fd_timm",
        f"evaluation.net={NET}",
        f"evaluation.weights={file}",
        f"evaluation.sha256={storage.sha256(str(file))}",
    )
    images, darker, brighter, latents = (
        folder / name for name in ("images", "darker", "brighter", "latents")
    )
    return Data(folder, images, darker, brighter, latents, net)


def run_on(root: Path, runs: Path, memory: Memory, *more: str) -> RunFolder:
    """A run on these shards with one snapshot."""
    memory.evaluate = lambda request: job.main(request, RankStatus())
    manifest = manifests.load(root)
    shape = f"data.shape=[{','.join(map(str, manifest.model_shape))}]"
    model = [shape, "data.classes=0", "sampler.steps=2"]
    words = ["experiment=digits_uncond", "cluster=local", f"data.root={root}", f"runs={runs}"]
    found = a_run(runs, [*words, *model, "evaluation.in_flight=9"], memory, *more)
    data = {"root": str(root), "header": manifest.header, "manifest": manifest.hash}
    write_snapshot(found.snapshot(640), root, *model, images=640, data=data)
    return found


def asked(run: RunFolder) -> list[dict[str, Any]]:
    """What jobs were to evaluate by, in any order."""
    requests = run.evals.glob("jobs/*/request.json")
    return [json.loads(path.read_text())["config"]["evaluation"] for path in requests]


def refused(run: RunFolder, memory: Memory, words: list[str], *parts: str, **more: Any) -> None:
    begun = len(memory.jobs)
    with pytest.raises(UserError) as raised:
        evaluate.sweep(run, words, **more)
    assert all(part in str(raised.value) for part in parts), raised.value
    assert len(memory.jobs) == begun and not read(run).sweeps


def test_evaluate_against_other_shards_gives_a_score_of_each(
    made: Data, runs: Path, memory: Memory, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (f"evaluation.shards={made.images}", f"evaluation.manifest={hash_of(made.images)}")
    run = run_on(made.images, runs, memory, *made.net, *FEW, *own)
    watch.watch(run.root)
    monkeypatch.chdir(made.folder)
    told = evaluate.sweep(run, ["evaluation.shards=darker,brighter"])
    assert [each["state"] for each in told["points"]] == ["done", "done"]
    by = {each.protocol["reference"]: each for each in records(run)}
    assert by.keys() == {*map(hash_of, (made.images, made.darker, made.brighter))}
    assert len({each.score for each in by.values()}) == 3
    # jobs start elsewhere
    roots = {each["shards"] for each in asked(run)}
    assert roots == {*map(str, (made.images, made.darker, made.brighter))}
    # settings of the sampler alone keep what the run is compared with, and its own score
    begun = len(memory.jobs)
    (point,) = evaluate.sweep(run, ["sampler.steps=2"])["points"]
    assert point["score"] == by[hash_of(made.images)].score and len(memory.jobs) == begun


def test_latent_run_without_evaluation_is_scored_afterwards_against_its_images(
    made: Data, runs: Path, memory: Memory, launched: list[int]
) -> None:
    run = run_on(made.latents, runs, memory, "evaluation=none")
    words = [*made.net, *FEW]
    refused(run, memory, words, "hold latents of tiny", "give evaluation.shards=ROOT")
    (point,) = evaluate.sweep(run, [*words, f"evaluation.shards={made.images}"])["points"]
    assert point["state"] == "done", point["message"]
    (record,) = records(run)
    assert record.protocol["reference"] == hash_of(made.images)


def test_evaluate_against_what_is_no_shards_of_images_is_refused(
    made: Data, runs: Path, memory: Memory, launched: list[int], tmp_path: Path
) -> None:
    run = run_on(made.images, runs, memory, *made.net, *FEW)
    nothing = tmp_path / "nothing"
    said = f"evaluation.shards={nothing}: no shards at {nothing} (no such folder): "
    refused(run, memory, [f"evaluation.shards={made.darker},{nothing}"], said)
    refused(
        run,
        memory,
        [f"evaluation.shards={made.latents}"],
        f"evaluation.shards={made.latents} holds latents: name the shards of the images",
    )
    extra = ["evaluation.metrics=[ood_auroc]", f"evaluation.test={nothing}"]
    refused(run, memory, extra, f"evaluation.test={nothing}: no shards at")


def test_score_of_too_few_images_is_refused_before_the_sweep(
    made: Data, runs: Path, memory: Memory, launched: list[int], tmp_path: Path
) -> None:
    few, x = tmp_path / "few", np.zeros((39, 1, 8, 8), np.uint8)
    write(few, ArraySource.of("few", x), header=Header(kind="image", shift=8.0, scale=0.125))
    run = run_on(made.latents, runs, memory, "evaluation=none")
    words = [*made.net, "evaluation.batch=20", f"evaluation.shards={made.images}"]
    said = "take evaluation.samples=40 or more"
    refused(run, memory, [*words, "evaluation.samples=39"], "evaluation.samples=39", said)
    swept = [*words, "evaluation.samples=40", "sampler.steps=2,3"]
    refused(run, memory, swept, "--confirm 39: evaluation.samples=39", said, confirm=39)
    given = [*made.net, *FEW, f"evaluation.shards={few}"]
    refused(run, memory, given, f"evaluation.shards={few} holds 39 images")


def test_metrics_of_too_few_real_images_are_refused_before_anything_is_queued(
    made: Data, runs: Path, memory: Memory, launched: list[int], tmp_path: Path
) -> None:
    run = run_on(made.images, runs, memory, *made.net, *FEW)
    words = ["evaluation.samples=100", "evaluation.metrics=[kid]", "evaluation.kid_size=50"]
    said = "evaluation.kid_size=40 or less"
    refused(run, memory, words, f"data.root={made.images} holds 40 images", said)
    refused(run, memory, [*words, f"evaluation.shards={made.darker}"], str(made.darker), said)
    part, said = "evaluation.reference_count=41", "evaluation.reference_count=40 or less"
    refused(run, memory, [part], f"data.root={made.images} holds 40 images", said)
    refused(run, memory, [part, f"evaluation.shards={made.darker}"], str(made.darker), said)
    (point,) = evaluate.sweep(run, [*words[:2], "evaluation.kid_size=40"])["points"]
    assert point["state"] == "done"


def test_evaluate_with_relative_paths_gives_jobs_absolute_ones(
    made: Data, runs: Path, memory: Memory, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_on(made.images, runs, memory, *made.net, *FEW)
    memory.evaluate = lambda request: None
    names = {
        name: f"{name}.npz" for name in ("decoder", "weights", "reference", "unconditional")
    } | {"test": "darker"}
    monkeypatch.chdir(made.folder)
    for name in ("decoder", "weights"):
        Path(names[name]).touch()
    for name in ("reference", "unconditional"):
        statistics(Path(names[name]), run="3f2a9c41")
    words = [f"evaluation.{key}={value}" for key, value in names.items()]
    evaluate.sweep(run, [*words, "evaluation.metrics=[ufid,ood_auroc]"])
    (found,) = (each for each in asked(run) if each["metrics"])
    assert {key: found[key] for key in names} == {
        key: str(made.folder / value) for key, value in names.items()
    }
    assert found["test_manifest"] == hash_of(made.darker)


def test_confirming_by_too_few_samples_is_refused_before_the_sweep(
    made: Data, runs: Path, memory: Memory
) -> None:
    run = run_on(made.images, runs, memory, *made.net, "evaluation.samples=40")
    swept = ["sampler.steps=2,3"]
    few = "--confirm 19: evaluation.samples=19: "
    refused(run, memory, swept, few, "take 20 or more", confirm=19)
    kid = [*swept, "evaluation.metrics=[kid]", "evaluation.kid_size=30"]
    refused(run, memory, kid, "--confirm 25: evaluation.kid_size=30 ", confirm=25)


@pytest.mark.parametrize("field", ["shards", "test"])
def test_change_of_shards_leaves_no_hash_of_the_former_ones(field: str) -> None:
    hash = {"shards": "manifest", "test": "test_manifest"}[field]
    base = ["experiment=digits_uncond", "cluster=local", "evaluation=fdd"]
    config = compose([*base, f"evaluation.{field}=one", f"evaluation.{hash}=first"])
    for words in (
        [f"evaluation.{field}=two"],
        [f"evaluation.{field}=null"],
        # as the note of a submission prints it
        [f"evaluation.{field}=two", f"evaluation.{hash}=second"],
    ):
        assert getattr(changed(config, words).evaluation, hash) is None
    assert getattr(changed(config, ["sampler.steps=3"]).evaluation, hash) == "first"


def hash_of(root: Path) -> str:
    return manifests.load(root).hash
