"""The verbs that look at data sets and move them: what they say is what lies there, and damage never travels."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import shards
from shards import storage, transfer
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.order import Order
from shards.verify import verify
from tests.shards.data import LATENT, flip, names, payload, source, write
from tools.shards.__main__ import main
from tools.shards.simulate import block_bytes, fetched, mixing, simulate


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "data", 1000)
    return tmp_path / "data"


def _json(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_inspect_finds_a_sample_by_key_ordinal_and_position(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything, png = shards.read_all(root), tmp_path / "a.png"
    for ordinal in (0, 255, 256, 999):
        key = str(everything["key"][ordinal])
        found = _json(capsys, "inspect", root, key, "--png", png)
        assert found == _json(capsys, "inspect", root, f"ordinal:{ordinal}", "--png", png)
        assert (found["key"], found["y"]) == (key, everything["y"][ordinal])
        assert [found["block"], found["row"]] == [ordinal // 256, ordinal % 256]
        x = everything["x"][ordinal].astype(float)
        assert found["range"] == [x.min(), x.max()] and found["mean"] == pytest.approx(x.mean())
        # two channels of 3 x 4 side by side, a line between, magnified by a whole number
        assert Image.open(png).size == (9 * 28, 3 * 28)
    order = Order(count=1000, seed=4, mode="global")
    found = _json(capsys, "inspect", root, "position:1234", "--seed", 4, "--mode", "global")
    assert found["ordinal"] == order.ordinals(1234)


def test_a_picture_of_an_image_is_the_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["make", "digits", "--out", str(tmp_path / "d")]) == 0
    png = tmp_path / "a.png"
    found = _json(capsys, "inspect", tmp_path / "d", "digits-0042", "--png", png)
    scan = shards.read_all(tmp_path / "d")["x"][found["ordinal"], 0]
    shown = np.asarray(Image.open(png))
    assert shown.shape == (256, 256)
    assert np.array_equal(shown[::32, ::32], np.round(scan / 16 * 255).astype(np.uint8))


def test_explain_names_the_batch_that_a_run_was_given(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with shards.open(root, global_batch=50, micro_batch=50, rank=0, world=1, seed=9) as stream:
        batches = [next(stream) for _ in range(30)]
    png = tmp_path / "batch.png"
    found = _json(
        capsys, "explain", root, "--images", 1500, "--batch", 50, "--seed", 9, "--png", png
    )
    for name, column in (
        ("position", "position"),
        ("key", "key"),
        ("ordinal", "ordinal"),
        ("y", "y"),
    ):
        assert [s[name] for s in found["samples"]] == batches[-1][column].tolist()
    assert found["epoch"] == 1 and Image.open(png).size[0] > 100
    manifest = manifests.load(root)
    lies = manifest.blocks["shard"][batches[-1]["ordinal"] // 256]
    assert [s["shard"] for s in found["samples"]] == [manifest.shards[s].name for s in lies]
    assert main(["explain", str(root), "--images", "3", "--batch", "5"]) == 0
    assert "epoch 0, seed 0, window" in capsys.readouterr().out
    assert main(["explain", str(root), "--images", "1001", "--batch", "2"]) == 0
    assert "epochs 0 to 1, seed 0, window" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--images 1e\+30: .* at most 1e18"):
        main(["explain", str(root), "--images", "1e30"])


def test_diff_says_what_differs(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root, tmp_path / "same")
    assert _json(capsys, "diff", root, tmp_path / "same")["same"] is True
    from shards.write import writer

    given = source(1000)
    other = type(given).of(
        "test", given.x[:900], labels=given.labels[:900], classes=5,
        keys=[k.decode() for k in given.keys[:899].tolist()] + ["new"],
    )  # fmt: skip
    writer.write(tmp_path / "other", other, header=LATENT, seed=3, shard_bytes=40_000)
    found = _json(capsys, "diff", root, tmp_path / "other", code=1)
    assert found["facts"]["count"] == [1000, 900] and "header.scale" not in found["facts"]
    assert found["shards"] == {"both": 0, "only_a": 2, "only_b": 2}
    keys = found["keys"]
    assert (keys["both"], keys["only_a"], keys["only_b"]) == (899, 101, 1)
    assert keys["some_only_b"] == ["new"] and keys["same_order"] is False
    assert main(["diff", str(root), str(tmp_path / "other")]) == 1
    assert "keys: 899 in both" in capsys.readouterr().out


def test_copy_is_the_same_bytes_and_goes_on_where_it_stopped(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "copy"
    first, second = manifests.load(root).shards

    class Stop(Exception):
        pass

    def stop_after_one(items: Any, total: int) -> Any:
        yield next(iter(items))
        raise Stop

    with pytest.raises(Stop):
        transfer.copy(root, target, watch=stop_after_one)
    with pytest.raises(UserError, match="no LATEST, which is written last"):
        manifests.load(target)
    found = _json(capsys, "copy", root, target)
    assert found["written"] == [second.name] and found["kept"] == 1
    assert found["bytes"] == second.bytes
    for name in (*names(root), *(f"shards/{n}" for n in names(root / "shards"))):
        if (root / name).is_file():
            assert (root / name).read_bytes() == (target / name).read_bytes()
    assert names(root / "shards") == names(target / "shards")
    assert _json(capsys, "copy", root, target)["kept"] == 2
    (target / second.name).unlink()
    assert _json(capsys, "copy", root, target)["written"] == [second.name]
    assert first.name.endswith("00000-of-00002.tar") and verify(target).problems == ()


def test_copy_refuses_damage_and_other_data(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", 700)
    with pytest.raises(UserError, match="holds another data set"):
        transfer.copy(root, tmp_path / "other")
    flip(*payload(root, 3, "x"))
    with pytest.raises(DamagedError, match="does not have its sha256: it cannot be copied"):
        transfer.copy(root, tmp_path / "copy")
    assert not (tmp_path / "copy" / "LATEST").exists()


DAMAGE: dict[str, Any] = {
    "payload": lambda root: flip(*payload(root, 2, "x")),
    "tar header": lambda root: flip(root / manifests.load(root).shards[0].name, 100),
    "truncated": lambda root: os.truncate(root / manifests.load(root).shards[1].name, 5000),
    "missing": lambda root: (root / manifests.load(root).shards[1].name).unlink(),
    "sidecar": lambda root: next((root / "shards").glob("*.json")).write_text("{}"),
    "no sidecar": lambda root: next((root / "shards").glob("*.json")).unlink(),
    "manifest": lambda root: flip(next(root.glob("manifest-*.json")), 40),
    "index": lambda root: flip(next(root.glob("index-*.npy")), 400),
    "no index": lambda root: next(root.glob("index-*.npy")).unlink(),
    "pointer": lambda root: (root / "LATEST").write_text("x"),
    "pointer to nothing": lambda root: (root / "LATEST").write_text("0" * 64),
}
WHOLE_TARS = ("manifest", "index", "no index", "pointer", "pointer to nothing")


@pytest.mark.parametrize("damage", DAMAGE)
def test_repair_mends_every_kind_of_damage(
    root: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good"
    transfer.copy(root, good)
    DAMAGE[damage](root)
    try:
        assert verify(root).problems
    except DamagedError:
        assert damage in WHOLE_TARS
    found = _json(capsys, "repair", root, "--from", good)
    assert len(found["written"]) == (damage not in WHOLE_TARS)
    assert verify(root).problems == ()
    assert _json(capsys, "repair", root, "--from", good)["kept"] == 2


@pytest.mark.parametrize("damage", ["no index", "pointer", "pointer to nothing"])
def test_copy_writes_again_what_its_target_lost_and_nothing_over_others(
    root: Path, tmp_path: Path, damage: str
) -> None:
    transfer.copy(root, tmp_path / "copy")
    write(tmp_path / "other", 700)
    for target in (tmp_path / "copy", tmp_path / "other"):
        DAMAGE[damage](target)
    assert transfer.copy(root, tmp_path / "copy").kept == 2
    assert verify(tmp_path / "copy").problems == ()
    with pytest.raises((UserError, DamagedError)):
        transfer.copy(root, tmp_path / "other")
    with pytest.raises((UserError, DamagedError)):
        transfer.repair(tmp_path / "other", root)
    assert len(names(tmp_path / "other" / "shards")) == 4


def test_repair_takes_only_a_good_copy_of_the_same(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", 700)
    with pytest.raises(UserError, match="name a copy of the same data set"):
        transfer.repair(root, tmp_path / "other")
    transfer.copy(root, tmp_path / "good")
    for place in (root, tmp_path / "good"):
        flip(*payload(place, 0, "x"))
    before = payload(root, 0, "x")[0].read_bytes()
    with pytest.raises(DamagedError, match=r"good.* does not have its sha256"):
        transfer.repair(root, tmp_path / "good")
    assert payload(root, 0, "x")[0].read_bytes() == before


def test_a_full_disk_leaves_no_data_set(root: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom shards import transfer\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "transfer.copy(sys.argv[1], sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), str(tmp_path / "copy")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "File too large" in done.stderr
    assert names(tmp_path / "copy" / "shards") == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_simulated_bytes_are_the_bytes_that_reading_takes(root: Path, tmp_path: Path) -> None:
    """Against a real reader and a real cache, epoch by epoch."""
    from shards.read.cache import Cache
    from shards.read.reader import Reader

    root = tmp_path / "more"
    manifest = write(root, 4000)
    order, sizes = Order(count=4000, seed=5, window=2), block_bytes(manifest)
    budget = 9 * int(sizes.max())
    reader = Reader(root, manifest, mapped=False, cache=Cache(tmp_path / "cache", budget),
                    needed=order.next_need)  # fmt: skip
    reader._idle_most = 0
    took, before = [], 0
    for epoch in range(4):
        for start in range(epoch * 4000, (epoch + 1) * 4000, 32):
            reader.position = start
            reader.gather(order.ordinals(np.arange(start, start + 32)))
        took.append(reader.counts["bytes"] - before)
        before = reader.counts["bytes"]
    reader.close()
    said = fetched(manifest, order, budget, ranks=1)
    assert took[0] == pytest.approx(said[0], rel=0.1) and said[0] == sizes.sum()
    assert sum(took[1:]) == pytest.approx(sum(said[1:]), rel=0.15)
    assert fetched(manifest, order, int(sizes.sum()), ranks=1) == [sizes.sum(), 0, 0, 0]
    assert fetched(manifest, order, 0, ranks=3) == [3 * sizes.sum()] * 4


def test_a_global_order_mixes_as_a_draw_from_all_and_a_window_does_not(root: Path) -> None:
    drawn = Order(count=100_000, seed=0, mode="global")
    blocks, pairs = mixing(drawn, 200)
    chance = 391 * (1 - (1 - 1 / 391) ** 200)  # of balls in bins
    assert blocks == pytest.approx(chance, rel=0.02) and pairs == pytest.approx(1, abs=0.15)
    _, pairs = mixing(Order(count=100_000, seed=0, window=4), 200)
    assert pairs == pytest.approx(391 / 4, rel=0.1)
    manifest = manifests.load(root)
    order = Order(count=1000, seed=0, mode="global")
    found = simulate(manifest, order, 50, 1, 10**9)
    assert (found["first_epoch_bytes"], found["later_epochs_bytes"]) == (found["data_bytes"], 0)


def test_simulate_draws_and_prints(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "cost.png"
    assert main(["simulate", str(root), "--batch", "32", "--window", "2", "--png", str(png)]) == 0
    assert "pairs of one block" in capsys.readouterr().out and Image.open(png).size == (720, 480)
    found = _json(capsys, "simulate", root, "--batch", 32, "--world", 4, "--cache", 0)
    assert found["later_epochs_bytes"] == 4 * found["data_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "{root}", "test-00"), "no sample has the key 'test-00'; did you mean 'test-0"),
        (("inspect", "{root}", "ordinal:1000"), "there are 1,000 samples, from 0 on"),
        (("inspect", "{root}", "position:x"), "give a whole number"),
        (("inspect", "{root}", "ordinal:1", "--weights", "w"), "--weights without --png"),
        (("inspect", "{root}", "ordinal:1", "--png", "a.jpg"), "ends in .png"),
        (("explain", "{root}", "--images", "0"), "--images 0"),
        (("explain", "{root}", "--images", "1.5"), "--images 1.5"),
        (("explain", "{root}", "--images", "5", "--batch", "0"), "--batch 0"),
        (("explain", "{root}", "--images", "5", "--png", "no/such/a.png"), "no folder no/such"),
        (("simulate", "{root}", "--batch", "10", "--world", "4"), "no multiple of --world 4"),
        (("simulate", "{root}", "--batch", "8", "--world", "4", "--ranks", "5"), "--ranks 5"),
        (("diff", "{root}", "{root}/none"), "no shards at {root}/none"),
        (("copy", "{root}/none", "{root}/x"), "no shards at {root}/none"),
    ],
)
def test_mistakes_are_named(root: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as found:
        main([a.format(root=root) for a in arguments])
    assert message.format(root=root) in str(found.value)
    assert not storage.exists(root / "x")
