"""Scores of a snapshot's images: the same bytes by any ranks, after any kill, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from selfguide.data.autoencoders.encoding import EncodedSource, Encoding
from selfguide.evaluation import images as evaluation
from selfguide.evaluation import job, scores
from selfguide.evaluation.features.net import FeatureNet, load_feature_net
from selfguide.evaluation.images import Scored, Work, score_images
from selfguide.evaluation.metrics.frechet import Reference, jackknifed, parted
from selfguide.evaluation.metrics.kid import kid
from selfguide.evaluation.metrics.moments import Moments
from selfguide.evaluation.metrics.precision_recall import precision_recall
from selfguide.evaluation.scores import (
    NEIGHBOURS,
    Known,
    fill,
    make_reference,
    parts_in,
    read_reference,
    scores_of,
)
from selfguide.snapshot import Snapshot, load
from selfguide.spec.config import Config, build
from selfguide.spec.files import plain
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import Protocol, record_key, records
from selfguide.spec.run import RunFolder
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import PIXELS
from shards.lock import lock
from shards.sources.source import ArraySource
from shards.wait import wait_until
from shards.write import writer
from tests.selfguide.snapshots import write_snapshot

NET = "test_resnet.r160_in1k"  # the smallest of timm


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings that name a small net with random weights."""
    file = tmp_path_factory.mktemp("net") / "net.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(NET).state_dict(), file)
    return {
        "evaluation.net": NET,
        "evaluation.weights": str(file),
        "evaluation.sha256": storage.sha256(str(file)),
    }


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 90 colour images of 8 x 8."""
    x = np.random.default_rng(0).integers(0, 256, (90, 3, 8, 8)).astype(np.uint8)
    root = tmp_path_factory.mktemp("data") / "colours"
    writer.write(root, ArraySource.of("colours", x), header=PIXELS)
    return root


@pytest.fixture(scope="module")
def run(colours: Path, net: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with one snapshot of a colour model, scored by fd_timm."""
    found = RunFolder(tmp_path_factory.mktemp("runs") / "colours" / "0123")
    manifest = manifests.load(colours)
    write_snapshot(
        found.snapshot(7), colours,
        "data.shape=[3,8,8]", "sampler.steps=3", "evaluation=fd_timm", "evaluation.samples=45",
        "evaluation.batch=10", *(f"{name}={value}" for name, value in net.items()),
        data={"root": str(colours), "header": manifest.header, "manifest": manifest.hash},
    )  # fmt: skip
    found.run_json.write_text(json.dumps({"id": "0123", "images": 7}))
    return found


@pytest.fixture(scope="module")
def snapshot(run: RunFolder) -> Snapshot:
    return load(run.snapshot(7))


def scored(
    snapshot: Snapshot, folder: Path, *, rank: int = 0, world: int = 1, **changes: Any
) -> Scored | None:
    config = changed(snapshot.config, **changes)
    protocol = Protocol.of(config, {"data": snapshot.data, "guidance": snapshot.guidance})
    work = Work(parts=folder / "parts", references=folder / "known", rank=rank, world=world)
    return score_images(snapshot, config, protocol, RankStatus(), work)


def changed(config: Config, **changes: Any) -> Config:
    values = plain(config)
    values["evaluation"] |= changes
    return build(Config, values)


def parts(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "parts").glob("*.npy"))}


def test_score_of_a_snapshot_has_its_error_its_floor_and_its_pictures(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    found = scored(snapshot, tmp_path)
    assert found is not None
    scores, left_out = parted(found.scores)
    assert scores.keys() == {"fd_timm", "fd_timm_se", "fd_timm_corrected", "floor"}
    # the jackknife of which is the score's own error
    assert jackknifed(scores["fd_timm"], left_out).se == scores["fd_timm_se"]
    assert found.scores["fd_timm"] > found.scores["floor"] > 0
    assert found.scores["fd_timm_se"] > 0
    assert found.images.shape == (45, 3, 8, 8)
    assert found.nfe == 3


def test_samples_on_two_and_three_ranks_are_the_bytes_of_one(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    alone = scored(snapshot, tmp_path / "1")
    assert alone is not None
    for world in (2, 3):
        folder = tmp_path / f"{world}"
        others = [
            threading.Thread(
                target=scored, args=(snapshot, folder), kwargs={"rank": r, "world": world}
            )
            for r in range(1, world)
        ]
        for each in others:
            each.start()
        found = scored(snapshot, folder, world=world)
        for each in others:
            each.join()
        assert found is not None
        assert parts(folder) == parts(tmp_path / "1")
        assert found.scores == alone.scores


def test_samples_after_a_kill_are_the_bytes_of_a_whole_run(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scored(snapshot, tmp_path / "whole")
    blocks: list[int] = []
    make = evaluation._Samples.images

    def killed(self: Any, first: int) -> Any:
        blocks.append(first)
        if blocks == [0, 10, 20]:
            raise KeyboardInterrupt
        return make(self, first)

    monkeypatch.setattr(evaluation._Samples, "images", killed)
    with pytest.raises(KeyboardInterrupt):
        scored(snapshot, tmp_path / "killed")
    again = scored(snapshot, tmp_path / "killed")
    assert whole is not None
    assert again is not None
    assert blocks == [0, 10, 20, 20, 30, 40]
    assert parts(tmp_path / "killed") == parts(tmp_path / "whole")
    assert again.scores == whole.scores
    assert torch.equal(again.images, whole.images)


def test_samples_in_blocks_of_any_size_agree_before_rounding(snapshot: Snapshot) -> None:
    from selfguide.sampling.condition_sampler import condition_sampler
    from selfguide.sampling.generate import generate_each

    def drawn(size: int) -> torch.Tensor:
        found = []
        for first in range(0, 20, size):
            seeds = first + torch.arange(size)
            condition = condition_sampler(snapshot)(seeds)
            ((x, _),) = generate_each(
                snapshot, snapshot.config.sampler, condition, seeds, batch=size
            )
            found.append(x)
        return torch.cat(found)[:20]

    expected = drawn(64)
    for size in (1, 7):
        assert (drawn(size) - expected).abs().max() < 1e-5


def test_job_publishes_one_record_and_leaves_no_parts(run: RunFolder, snapshot: Snapshot) -> None:
    config = snapshot.config
    protocol = Protocol.of(config, {"data": snapshot.data, "guidance": snapshot.guidance})
    key = record_key(7, protocol)
    request = run.root / "request.json"
    about = {"run": str(run.root), "images": 7, "key": key, "attempt": 1}
    request.write_text(json.dumps({**about, "config": plain(config)}, default=str))
    job.main(request, RankStatus())
    (found,) = records(run)
    assert (found.key, found.status, found.metric) == (key, "done", "fd_timm")
    assert found.score is not None
    assert found.protocol["net"] == NET
    assert found.grid(run) is not None
    assert not any((run.evals / ".parts").iterdir())


def test_two_nets_of_one_name_have_columns_of_their_own(snapshot: Snapshot) -> None:
    about = {"data": snapshot.data, "guidance": snapshot.guidance}
    one = Protocol.of(snapshot.config, about)
    other = Protocol.of(changed(snapshot.config, sha256="0" * 64), about)
    assert one.key != other.key


def test_reference_from_a_file_gives_the_scores_of_its_shards(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    whole = scored(snapshot, tmp_path / "a")
    (file,) = (tmp_path / "a" / "known").glob("*/reference.npz")
    found = scored(snapshot, tmp_path / "b", reference=str(file))
    assert whole is not None
    assert found is not None
    assert found.scores == whole.scores
    assert found.files == {"reference": storage.sha256(str(file))}


def test_reference_of_another_protocol_is_refused(
    snapshot: Snapshot, net: dict[str, str], tmp_path: Path
) -> None:
    here = load_feature_net(
        "fd_timm", net["evaluation.weights"], net=NET, sha256=net["evaluation.sha256"]
    )
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2000, here.width))
    for about, width in (({"features": {**here.about, "resize": "other"}}, here.width), ({}, 64)):
        file = tmp_path / f"{width}.npz"
        Reference.of(Moments.of(features[:, :width]), about).save(file)
        with pytest.raises(UserError, match=r"another protocol|of this protocol"):
            read_reference(str(file), here)


def test_samples_that_are_nan_are_refused_by_their_number(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = evaluation.generate_each

    def broken(*args: Any, **more: Any) -> Any:
        for x, n in draw(*args, **more):
            x[3, 0, 0, 0] = float("nan")
            yield x, n

    monkeypatch.setattr(evaluation, "generate_each", broken)
    with pytest.raises(UserError, match="sample 3 "):
        scored(snapshot, tmp_path)


def test_score_with_other_shards_at_the_root_is_refused(
    snapshot: Snapshot, colours: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="put those shards back"):
        scored(snapshot, tmp_path, shards=str(colours), manifest="0" * 64)


def test_snapshot_that_is_cut_short_is_not_loaded(run: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "img-7"
    folder.mkdir()
    for file in run.snapshot(7).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(FileNotFoundError):
        load(folder)


def test_feature_net_of_a_test_is_small(net: dict[str, str]) -> None:
    found = load_feature_net(
        "fd_timm", net["evaluation.weights"], net=NET, sha256=net["evaluation.sha256"]
    )
    assert isinstance(found, FeatureNet)
    assert found.width <= 384


@pytest.fixture(scope="module")
def latents(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' latents of the tiny autoencoder."""
    source = EncodedSource.of(str(digits), Encoding(encoder="tiny", content="mean"))
    root = tmp_path_factory.mktemp("data") / "latents"
    with closing(source):
        writer.write(root, source, header=source.header)
    return root


def test_score_of_latents_has_the_floor_of_what_they_decode_to(
    digits: Path, latents: Path, net: dict[str, str], tmp_path: Path
) -> None:
    manifest = manifests.load(latents)
    folder = write_snapshot(
        tmp_path / "img-7", latents,
        "data.shape=[2,4,4]", "sampler.steps=2", "evaluation=fd_timm", "evaluation.samples=40",
        "evaluation.batch=20", f"evaluation.shards={digits}",
        f"evaluation.manifest={manifests.load(digits).hash}",
        *(f"{name}={value}" for name, value in net.items()),
        data={"root": str(latents), "header": manifest.header, "manifest": manifest.hash},
    )  # fmt: skip
    made = load(folder)
    found = scored(made, tmp_path)
    assert found is not None
    assert found.images.shape == (40, 1, 8, 8)
    # 40 images are all bias, so that only the order is looked at
    assert 0 < found.scores["floor"] < found.scores["floor_reconstruction"]
    assert found.scores["floor_reconstruction"] < found.scores["fd_timm"]
    protocol = Protocol.of(made.config, {"data": made.data, "guidance": made.guidance})
    assert protocol.decoder_sha256 == manifest.header["encoder_sha256"]
    with pytest.raises(UserError, match="no such file"):
        scored(made, tmp_path / "other", decoder=str(tmp_path / "nothing.safetensors"))


class Classifier(torch.nn.Module):
    """A net with four features, two spatial ones and three classes, in place of Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.stack(
            [x[:, 0].mean((1, 2)), x[:, 1].std((1, 2)), x[:, 2, 0, 0], x[:, 0, 3, 3]], 1
        )
        return features, x[:, 0, :2, 5]

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.weight.T


@pytest.fixture
def small() -> FeatureNet:
    """A net that takes no time."""
    return FeatureNet(
        name="small", sha256="", resize="TF1 bilinear", size=8, mean=(128.0,) * 3, std=(64.0,) * 3,
        width=4, spatial=2, net=Classifier().requires_grad_(False),
    )  # fmt: skip


@dataclass
class Watched(RankStatus):
    """Keeps what `look` returned at each progress."""

    look: Callable[[], int] = int

    def __post_init__(self) -> None:
        self.seen: list[int] = []

    def enter(self, section: str) -> None:
        super().enter(section)
        self.seen.append(self.look())


def test_evaluation_that_makes_a_reference_makes_progress_with_each_block_of_it(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    protocol = Protocol.of(snapshot.config, {"data": snapshot.data, "guidance": snapshot.guidance})
    known = tmp_path / "known"
    status = Watched(look=lambda: len([*known.glob("*/parts/*.npy")]))
    score_images(
        snapshot,
        snapshot.config,
        protocol,
        status,
        Work(parts=tmp_path / "parts", references=known),
    )
    blocks, of_samples = 9, 5
    assert status.seen[:blocks] == list(range(blocks))
    # then its mean and covariance
    assert status.seen[blocks : 2 * blocks] == [blocks] * blocks
    # samples are drawn, and summed
    assert len(status.seen) == 2 * blocks + 2 * of_samples


def test_evaluation_that_waits_for_the_reference_of_another_says_so_until_it_is_there(
    colours: Path, small: FeatureNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "POLL_S", 0.01)
    folder, said = tmp_path / "known", []
    made: list[Known | None] = []
    folder.mkdir()

    def wait() -> None:
        made.append(make_reference(str(colours), small, folder, progress=lambda: said.append(0)))

    with lock(folder, create=False):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert wait_until(lambda: len(said) > 3, timeout_s=60)
        assert not made and not (folder / "parts").exists()
    waiting.join(60)
    (known,) = made
    assert known is not None and known.main.count == 90


def test_evaluation_against_images_of_a_file_makes_progress_with_each_fifty(
    small: FeatureNet, tmp_path: Path
) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3)).astype(np.uint8)
    file = tmp_path / "adm.npz"
    np.savez(file, mu=np.zeros(4), sigma=np.eye(4), arr_0=pictures)
    said: list[float] = []
    read_reference(str(file), small, progress=lambda: said.append(0))
    assert len(said) == 3


def test_metrics_of_many_features_make_progress_with_each_tile_and_subset() -> None:
    rng, said = np.random.default_rng(0), []
    real, made = rng.standard_normal((30, 4)), rng.standard_normal((50, 4))
    precision_recall(real, made, chunk=10, progress=lambda: said.append(0))
    # the neighbours within each set, and those of one in the other
    assert len(said) == 3 * 3 + 5 * 5 + 3 * 5
    said.clear()
    kid(real, made, subsets=7, size=20, progress=lambda: said.append(0))
    assert len(said) == 7


def test_scores_of_adms_protocol_are_all_that_its_evaluator_gives(
    colours: Path, small: FeatureNet, tmp_path: Path
) -> None:
    net = small
    known = make_reference(str(colours), net, tmp_path / "known", part=20)
    assert known is not None
    assert known.features is not None
    assert known.features.shape == (min(90, NEIGHBOURS), 4)
    made = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    parts = parts_in(tmp_path / "parts", 60, 20)
    fill(parts, lambda rows: net.rows(made[torch.from_numpy(rows)]), doing="")
    found, left_out = parted(scores_of("fid_adm", net, parts, known, full=True))
    assert len(left_out) == 10
    assert found.keys() == {
        "fid_adm", "fid_adm_se", "fid_adm_corrected", "floor", "sfid", "inception_score",
        "inception_score_of_splits_sd", "precision",
        "recall",
    }  # fmt: skip
    assert found["sfid"] > 0
    assert 1 <= found["inception_score"] <= 3
    assert 0 < found["precision"] <= 1
    assert parted(scores_of("fid_clean", net, parts, known, full=False))[0].keys() == {
        "fid_clean", "fid_clean_se", "fid_clean_corrected", "floor",
    }  # fmt: skip
