"""What `tools.bench shards` compares is the same work: every reader delivers every sample, ours hashed each time."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.order import Order
from tests.shards import data
from tools import environments
from tools.bench import __main__ as command
from tools.bench import shards as suite
from tools.bench import shards_data, shards_pictures, shards_rivals, shards_start, shards_store
from tools.bench.rivals.worker import stacked, touch
from tools.bench.shards_data import Figure, Latents

pytestmark = pytest.mark.timeout(120)
COUNT = 600  # two whole blocks and a part


@pytest.fixture(scope="module")
def latents() -> Latents:
    return Latents.random(COUNT)


@pytest.fixture(scope="module")
def ours(latents: Latents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench") / "ours"
    shards_data.write_ours(latents, root)
    return root


def _tars(root: Path) -> list[str]:
    return sorted(str(path) for path in (root / "shards").glob("*.tar"))


def test_every_reader_delivers_every_sample_once(
    latents: Latents, ours: Path, tmp_path: Path
) -> None:
    tars = _tars(ours)
    for options in ({}, {"mtime": 0}):
        urls = shards_data.write_theirs(latents, tmp_path / "theirs", **options)
        assert shards_data.their_epoch(urls) == latents.sums
    assert shards_data.their_epoch_of_blocks(tars) == latents.sums
    assert shards_data.our_epoch(ours, COUNT) == latents.sums
    assert shards_data.our_scan(ours) == latents.sums
    assert shards_data.raw_epoch([Path(tar) for tar in tars]) == sum(
        Path(tar).stat().st_size for tar in tars
    )
    theirs = webdataset.WebDataset(tars, shardshuffle=False).decode().to_tuple("id.npy").unbatched()
    with shards_data.opened(ours) as stream:
        mine = np.concatenate([next(stream)["key"] for _ in range(3)])[:COUNT]
    assert len(set(mine)) == COUNT
    assert sorted(mine) == sorted(key.decode() for (key,) in theirs)


def test_a_sample_left_out_or_given_twice_is_no_epoch(latents: Latents) -> None:
    x, y = latents.x, latents.y
    for rows in (np.arange(COUNT - 1), np.r_[0, 0, 2:COUNT], np.r_[0:COUNT, 0]):
        with pytest.raises(RuntimeError, match="some reader delivered"):
            latents.check(touch(iter([(x[rows], y[rows])])), "some reader")
    with pytest.raises(ValueError, match="not stacked"):
        touch(iter([(x[:, ::2], y)]))
    samples = [{"x": x[i], "y": int(y[i])} for i in range(COUNT)]
    batches = [*stacked(samples, 256)]
    assert [len(labels) for _, labels in batches] == [256, 256, 88]
    latents.check(touch(iter(batches)), "stacked")


def test_each_turn_hashes_every_block_anew(latents: Latents, ours: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(ours, root)
    assert shards_data.our_epoch(root, COUNT) == latents.sums
    data.flip(*data.payload(root, 1, "x"))
    for _ in range(2):
        with pytest.raises(DamagedError, match="block 1"):
            shards_data.our_epoch(root, COUNT)


def test_the_synthetic_index_is_of_as_many_samples_as_it_says(tmp_path: Path) -> None:
    count = 1_281_167
    shards_start.synthetic(tmp_path / "some", count)
    found = manifests.load(tmp_path / "some")
    assert found.count == count == int(found.blocks["rows"].sum())
    order = Order(count=count, seed=0, block=found.block)
    for position in (0, int(count * 0.9) // 256 * 256):
        batch = shards_start.first_batch(tmp_path / "some", position)
        assert batch.tolist() == order.ordinals(position + np.arange(256)).tolist()
    (figure,) = shards_start.starting(tmp_path, (5000,), turns=2, goal=1e9)
    assert figure.reached and figure.ours > 0 and "5,000" in figure.name
    assert not (tmp_path / "start-5000").exists()


@pytest.mark.parametrize("name", shards_rivals.RIVALS)
def test_a_rival_reads_what_it_wrote(name: str, latents: Latents, tmp_path: Path) -> None:
    where = environments.folder(f"bench-{name}", shards_rivals.requirements(name))
    if not (where / environments.MARK).exists():
        pytest.skip(f"{name} is not installed: python -m tools.bench shards --quick")
    python = shards_rivals.python_of(name, print)
    arrays = (tmp_path / "x.npy", tmp_path / "y.npy")
    np.save(arrays[0], latents.x)
    np.save(arrays[1], latents.y)
    shards_rivals.write(name, python, arrays, tmp_path / name)
    with shards_rivals.Rival(name, python, tmp_path / name, 256) as rival:
        assert rival.epoch() == latents.sums
        assert rival.epoch() == latents.sums  # an epoch is all, each time


def test_a_rival_that_dies_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"litdata ended: (?s:.*)litdata"):
        shards_rivals.Rival("litdata", Path(sys.executable), tmp_path / "none", 256)
    with pytest.raises(RuntimeError, match="litdata could not write"):
        missing = (tmp_path / "x.npy", tmp_path / "y.npy")
        shards_rivals.write("litdata", Path(sys.executable), missing, tmp_path / "none")


def test_without_a_network_a_rival_has_no_row(
    latents: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    said: list[str] = []
    without = frozenset({"streaming"})
    assert [*suite._rivals(latents, tmp_path, without, said.append)] == []
    assert any(line.startswith("litdata: not installed") for line in said)
    assert not [*(tmp_path / "cache").rglob(environments.MARK)]


def test_blocks_from_a_real_store(
    latents: Latents, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    before = dict(os.environ)
    try:
        figures = shards_store.storing(latents, ours, tmp_path, 2, 0.0, lambda line: None)
    except (UserError, environments.InstallError) as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        pytest.skip(str(error))
    assert dict(os.environ) == before and not (tmp_path / "s3").exists()
    assert [f.reached for f in figures] == [True, None]
    assert all(f.ours > 0 and f.other > 0 and f.unit == "MB/s" for f in figures)


@pytest.mark.slow
def test_pictures_are_written_and_read_alike_by_both(tmp_path: Path) -> None:
    (made,) = shards_pictures.making(tmp_path, 30, 2, 0.0)
    assert made.reached and made.ours > 0 and "30 PNGs" in made.name
    found = shards_pictures.reading(tmp_path, 300, 2, {"jpg": 0.0, "png": 0.0})
    assert [f.unit for f in found] == ["us/sample", "us/sample", "ms"]
    assert all(f.ours > 0 and f.other > 0 for f in found)


def test_a_goal_is_a_bound_from_below_or_from_above() -> None:
    figure = Figure(name="a", unit="s", ours=1.0, other=3.0, ratio=3.0)
    assert figure.reached is None
    assert figure.judged(3.0).reached and not figure.judged(3.1).reached
    assert figure.judged(3.0, most=True).reached and not figure.judged(2.9, most=True).reached
    drawn = suite.table("title", [figure, figure.judged(3.1), figure.judged(2.9, most=True)])
    columns = [[*column.cells] for column in drawn.columns]
    assert columns[-2:] == [["", ">= 3.1", "<= 2.9"], ["", "missed", "missed"]]


def test_the_command_says_every_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "QUICK", COUNT)
    words = [
        "shards",
        "--quick",
        "--repeats",
        "2",
        "--without",
        "litdata,streaming,store,starting,pictures",
    ]
    assert command.main([*words, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["suites"]["shards"]
    goals = {f["name"]: f["goal"] for f in found if f["goal"] is not None}
    assert goals == {
        "bytes on disk over payload": 1.005,
        "webdataset on its default layout": 30.0,
        "webdataset on our tars": 3.0,
        "raw sequential read of the same bytes": 0.25,
        "the same, of blocks in their order": 0.4,
        "writing by webdataset's ShardWriter": 3.0,
    }
    for f in found:
        assert f["ours"] > 0 and f["other"] > 0 and f["ratio"] > 0
        assert (f["reached"] is None) == (f["goal"] is None)
    with pytest.raises(UserError, match=r"lidata: give some of .*did you mean 'litdata'\?"):
        command.main(["shards", "--quick", "--without", "lidata"])
