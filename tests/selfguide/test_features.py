"""Features are those of a plain forward; an extraction is the same rows on any number of ranks, killed or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import shards
from selfguide.data.autoencoders import load_autoencoder
from selfguide.diffusion.conditions import Condition
from selfguide.discovery.extraction import extract
from selfguide.discovery.features import PixelFeatures, SnapshotFeatures, TimmFeatures
from selfguide.discovery.vit import load_vit
from selfguide.randomness import normal
from selfguide.snapshot import Snapshot, load
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from tests.selfguide.snapshots import write_snapshot

DIGITS = Header(kind="image", shift=8.0, scale=0.125)


@pytest.fixture(scope="module")
def snapshot(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return load(write_snapshot(tmp_path_factory.mktemp("snapshot") / "img-7", digits))


@pytest.fixture(scope="module")
def stored(digits: Path) -> Tensor:
    return torch.from_numpy(shards.read_all(digits)["x"])


def hooked(snapshot: Snapshot, block: int, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
    """Tokens behind a block of the full forward."""
    seen: list[Tensor] = []
    blocks = list(snapshot.student.backbone.repeated())
    hook = blocks[block - 1].register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        snapshot.student.predict(x, tau, condition)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("layer", "block"), [(1, 1), ("block_3", 3), (None, 2), (4, 4)])
def test_a_snapshots_features_are_those_of_a_plain_forward(
    snapshot: Snapshot, stored: Tensor, layer: int | str | None, block: int
) -> None:
    ordinals = torch.tensor([5, 1700, 3])
    x0 = (stored[ordinals].float() - 8) / 8
    eps = normal(4, "extraction-noise", ordinals, (1, 8, 8))
    tau = torch.full((3,), 0.3)
    tokens = hooked(snapshot, block, 0.7 * x0 + 0.3 * eps, tau, Condition.unconditional(3))
    for pooling, expected in {"mean": tokens.mean(1), "flat": tokens.flatten(1)}.items():
        net = SnapshotFeatures(
            snapshot, DIGITS, layer=layer, noise_time=0.3, pooling=pooling, seed=4
        )
        torch.testing.assert_close(net(stored[ordinals], ordinals), expected)
        assert net.provenance["layer"] == f"block_{block}"


def test_noise_is_a_function_of_the_ordinal_alone(snapshot: Snapshot, stored: Tensor) -> None:
    net = SnapshotFeatures(snapshot, DIGITS, pooling="flat")
    ordinals = torch.arange(8)
    together = net(stored[:8], ordinals)
    backwards = net(stored[:8].flip(0), ordinals.flip(0)).flip(0)
    alone = torch.cat([net(stored[i : i + 1], ordinals[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, backwards)
    torch.testing.assert_close(together, alone)
    same_image = net(stored[:1].expand(2, -1, -1, -1), ordinals[:2])
    assert not torch.allclose(same_image[0], same_image[1])
    other_seed = SnapshotFeatures(snapshot, DIGITS, pooling="flat", seed=1)
    assert not torch.allclose(other_seed(stored[:8], ordinals), together)


def test_features_use_the_unconditional_row_that_the_student_knows(
    digits: Path, tmp_path: Path, stored: Tensor
) -> None:
    """A student of labels learned its null row, never the row of the unconditional."""
    labelled = {"source": "labels", "told": True, "p": [0.1] * 10, "label_free": False}
    folder = write_snapshot(
        tmp_path / "s", digits, "guidance=labels", "data.classes=10", guidance=labelled
    )
    known, ordinals = load(folder), torch.arange(4)
    online = replace(known, guidance=known.guidance | {"source": "online"})
    x = 0.8 * (stored[:4].float() - 8) / 8
    x += 0.2 * normal(0, "extraction-noise", ordinals, (1, 8, 8))
    nothing = Condition.unconditional(4)
    null = Condition.of(id=torch.zeros(4, dtype=torch.int64)).null()
    for snapshot, condition, state in ((known, null, "null"), (online, nothing, "unconditional")):
        net = SnapshotFeatures(snapshot, DIGITS, layer=2, pooling="mean")
        expected = hooked(snapshot, 2, x, torch.full((4,), 0.2), condition).mean(1)
        torch.testing.assert_close(net(stored[:4], ordinals), expected)
        assert net.provenance["told"] == state


def test_cls_is_the_default_where_there_is_one(
    digits: Path, tmp_path: Path, stored: Tensor
) -> None:
    snapshot = load(write_snapshot(tmp_path / "s", digits, "model.cls_token=true"))
    ordinals = torch.arange(3)
    net = SnapshotFeatures(snapshot, DIGITS, layer=2)
    assert net.provenance["pooling"] == "cls"
    flat = SnapshotFeatures(snapshot, DIGITS, layer=2, pooling="flat")(stored[:3], ordinals)
    mean = SnapshotFeatures(snapshot, DIGITS, layer=2, pooling="mean")(stored[:3], ordinals)
    width = mean.shape[1]
    torch.testing.assert_close(flat.unflatten(1, (-1, width)).mean(1), mean)
    found = net(stored[:3], ordinals)
    assert found.shape == mean.shape and not torch.allclose(found, mean)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"layer": 5}, "layer=5 is not one of this network's 1 to 4"),
        ({"layer": "block3"}, "did you mean 'block_3'"),
        ({"noise_time": 1.2}, "noise_time=1.2 is not on this snapshot's path; take 0 to 1"),
        ({"noise_time": -0.1}, "noise_time=-0.1"),
        ({"noise_time": float("nan")}, "noise_time=nan"),
        ({"pooling": "cls"}, "no \\[CLS\\]"),
        ({"pooling": "means"}, "did you mean 'mean'"),
    ],
)
def test_what_a_snapshot_cannot_give_is_named(
    snapshot: Snapshot, setting: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        SnapshotFeatures(snapshot, DIGITS, **setting)


@pytest.mark.parametrize(
    "header",
    [
        Header(kind="image", shift=127.5, scale=1 / 127.5),
        Header(kind="latent", shift=8.0, scale=0.125, encoder="tiny"),
    ],
)
def test_shards_that_a_snapshot_was_not_made_for_are_refused(
    snapshot: Snapshot, header: Header
) -> None:
    with pytest.raises(UserError, match="and the snapshot was trained on"):
        SnapshotFeatures(snapshot, header)


def test_pixels_are_the_images_as_a_model_sees_them(stored: Tensor) -> None:
    found = PixelFeatures(DIGITS)(stored[:3], torch.arange(3))
    np.testing.assert_allclose(found.numpy(), (stored[:3].numpy().reshape(3, 64) - 8.0) / 8)
    with pytest.raises(UserError, match="hold latents"):
        PixelFeatures(Header(kind="latent", encoder="tiny"))


def test_a_vit_sees_images_and_decoded_latents(stored: Tensor) -> None:
    vit = load_vit("test_vit", "random:0")
    levels = (stored[:3].float() * 255 / 16).round().byte()
    found = TimmFeatures(vit, DIGITS, pooling="mean")(stored[:3], torch.arange(3))
    torch.testing.assert_close(found, vit.pooled(levels, "mean"))

    codec = load_autoencoder("tiny")
    latents = codec.encode(levels)
    header = codec.header()
    decoded = codec.decode(latents.chunk(2, dim=1)[0])
    net = TimmFeatures(vit, header, pooling="mean", autoencoder=codec)
    torch.testing.assert_close(
        net(latents, torch.arange(3)), vit.pooled(decoded, "mean"), atol=1e-3, rtol=1e-3
    )
    assert net.provenance["decoder_sha256"] == codec.sha256
    with pytest.raises(
        UserError, match="latents of tiny: a network of images needs its autoencoder"
    ):
        TimmFeatures(vit, header)


class Counting:
    """Features by hand, (ordinal, first pixel, 1): how often they were asked for, and what may go wrong."""

    def __init__(self, name: str = "counting", dies_at: int | None = None) -> None:
        self.provenance = {"net": name, "saw_labels": False}
        self.asked: list[int] = []
        self.dies_at, self.spoil = dies_at, {}

    def __call__(self, stored: Tensor, ordinals: Tensor) -> Tensor:
        if self.dies_at is not None and self.dies_at in ordinals:
            raise KeyboardInterrupt
        self.asked += ordinals.tolist()
        rows = torch.stack((ordinals, stored[:, 0, 0, 2], torch.ones(len(ordinals))), dim=1)
        for ordinal, value in self.spoil.items():
            rows[ordinals == ordinal] = value
        return rows.float()


def expected(stored: Tensor) -> np.ndarray:
    return np.stack((np.arange(1797), stored[:, 0, 0, 2].numpy(), np.ones(1797)), axis=1)


@pytest.mark.parametrize("world", [1, 2, 5, 40])
@pytest.mark.parametrize("backwards", [False, True])
def test_any_number_of_ranks_makes_the_same_rows(
    digits: Path, tmp_path: Path, stored: Tensor, world: int, backwards: bool
) -> None:
    """40 ranks are more than there are chunks. Only the last rank that is done publishes."""
    order = list(range(world))[:: -1 if backwards else 1]
    asked: list[int] = []
    for place, rank in enumerate(order):
        net = Counting()
        made = extract(digits, net, tmp_path / "f", rank=rank, world=world, batch=30, chunk=64)
        asked += net.asked
        holds = [r for r in order if r < 29]  # ceil(1797 / 64) chunks
        done = place >= order.index(holds[-1])
        assert (made is not None) == done
    assert sorted(asked) == list(range(1797))
    found = sidecar.read(tmp_path / "f", manifest=manifests.load(digits).hash)
    assert found.kind == "dense" and found.rows().dtype == np.float32
    np.testing.assert_array_equal(found.rows(), expected(stored))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"], "parts are left over"


def test_a_killed_extraction_goes_on_where_it_was(
    digits: Path, tmp_path: Path, stored: Tensor
) -> None:
    dying = Counting(dies_at=700)
    with pytest.raises(KeyboardInterrupt):
        extract(digits, dying, tmp_path / "f", batch=16, chunk=128)
    assert not (tmp_path / "f").exists()
    again = Counting()
    for rank in (1, 0):  # and on another number of ranks
        made = extract(digits, again, tmp_path / "f", rank=rank, world=2, batch=16, chunk=128)
    assert sorted(again.asked) == list(range(640, 1797))  # five whole chunks were there
    assert made is not None
    np.testing.assert_array_equal(made.rows(), expected(stored))


def test_killed_while_rows_were_joined(digits: Path, tmp_path: Path, stored: Tensor) -> None:
    extract(digits, Counting(), tmp_path / "f", rank=0, world=2, chunk=128)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "rows.npy").write_bytes(b"torn")
    made = extract(digits, Counting(), tmp_path / "f", rank=1, world=2, chunk=128)
    assert made is not None
    np.testing.assert_array_equal(made.rows(), expected(stored))


def test_what_is_published_is_not_made_again(digits: Path, tmp_path: Path) -> None:
    first = extract(digits, Counting(), tmp_path / "f")
    again = Counting()
    assert extract(digits, again, tmp_path / "f") == first and again.asked == []
    with pytest.raises(UserError, match="holds rows with net=counting, and these have net=oth"):
        extract(digits, Counting("other"), tmp_path / "f")


def test_parts_of_other_settings_are_never_mixed_in(
    digits: Path, tmp_path: Path, stored: Tensor
) -> None:
    extract(digits, Counting("one"), tmp_path / "f", rank=0, world=2, chunk=128)
    extract(digits, Counting("two"), tmp_path / "f", rank=0, world=2, chunk=64)
    other = Counting("two")
    assert extract(digits, other, tmp_path / "f", rank=1, world=2, chunk=128) is None
    made = extract(digits, other, tmp_path / "f", rank=0, world=2, chunk=128)
    assert made is not None and made.provenance["net"] == "two"
    assert sorted(other.asked) == list(range(1797))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(
    digits: Path, tmp_path: Path, value: float
) -> None:
    net = Counting()
    net.spoil = {1300: value}
    with pytest.raises(UserError, match="the features of sample 1300 are NaN or infinite"):
        extract(digits, net, tmp_path / "f", batch=100)
    assert not (tmp_path / "f").exists()


def test_features_that_are_all_the_same_are_refused(digits: Path, tmp_path: Path) -> None:
    net = Counting()
    net.spoil = dict.fromkeys(range(1797), 3.0)
    with pytest.raises(UserError, match="of all 1,797 samples are the same"):
        extract(digits, net, tmp_path / "f", chunk=256)
    assert not (tmp_path / "f").exists()
    one = Counting("one differs")
    one.spoil = dict.fromkeys(range(1796), 3.0)
    assert extract(digits, one, tmp_path / "f", chunk=256) is not None


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"rank": 2, "world": 2}, "rank=2 of world=2: ranks go from 0 to 1"),
        ({"rank": -1}, "rank=-1"),
        ({"batch": 0}, "batch=0"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_shares_that_cannot_be_are_named(
    digits: Path, tmp_path: Path, setting: dict[str, int], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        extract(digits, Counting(), tmp_path / "f", **setting)


def test_a_target_that_holds_something_else_is_left_alone(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "thesis.tex").write_text("years")
    net = Counting()
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        extract(digits, net, tmp_path / "f")
    assert net.asked == []


def test_the_record_says_all_that_decided_the_features(
    digits: Path, snapshot: Snapshot, tmp_path: Path
) -> None:
    net = SnapshotFeatures(snapshot, DIGITS, layer=3, noise_time=0.1, pooling="mean", seed=2)
    made = extract(digits, net, tmp_path / "f")
    assert made is not None and made.provenance == json.loads(json.dumps(net.provenance))
    assert made.provenance == {
        "net": "dit_digits",
        "experiment": "digits_uncond",
        "images": 7,
        "ema_halflife": snapshot.ema,
        "sha256": snapshot.sha256,
        "layer": "block_3",
        "noise_time": 0.1,
        "pooling": "mean",
        "told": "unconditional",
        "noise_seed": 2,
        "saw_labels": False,
    }
    labelled = replace(snapshot, saw_labels=True)
    net = SnapshotFeatures(labelled, DIGITS, layer=3)
    assert extract(digits, net, tmp_path / "g").saw_labels  # type: ignore[union-attr]
