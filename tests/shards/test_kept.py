"""Data sets written block by block, and from pictures that were kept, are those of one process that reads twice."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards import parallel
from shards.format import manifest as manifests
from shards.format.header import PIXELS
from shards.format.pictures import Picture
from shards.format.tar import member_header, members, plain_members
from shards.sources import folders
from shards.verify import verify
from shards.write import kept as kept_module
from shards.write import writer
from shards.write.building import build_block, build_shard, join_shard
from shards.write.kept import Kept, keeping
from shards.write.plan import make_plan
from shards.write.scan import PART, Threshold, scan
from tests.shards.data import LATENT, source

COUNT = 300  # a whole block and a part


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of one size in two classes, PNG and JPEG, some transparent, and one that is none."""
    root = tmp_path_factory.mktemp("pictures")
    levels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 4), dtype=np.uint8)
    for number, each in enumerate(levels):
        place = root / "ab"[number % 2] / f"{number:04d}"
        place.parent.mkdir(exist_ok=True)
        if number % 3:
            mode = "RGBA" if number % 5 == 0 else "RGB"
            Image.fromarray(each).convert(mode).save(place.with_suffix(".png"))
        else:
            Image.fromarray(each[..., :3]).save(place.with_suffix(".jpg"))
    (root / "a" / "bad.png").write_text("no image")
    return root


def _write(
    pictures: Path, root: Path, picture: Picture, *, keep: bool, **options: Any
) -> dict[str, bytes]:
    """Every file of the data set."""
    listing = folders.image_folder(str(pictures), picture)
    with keeping(root, len(listing.keys), PART) as kept:
        found, _ = scan(root, listing, max_skipped=Threshold(count=1), kept=kept if keep else None)
        writer.write(root, found, header=PIXELS, **options)
    assert verify(root).problems == ()
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("layout", ["samples", "blocks"])
@pytest.mark.parametrize("size", [None, 4])
def test_kept_pictures_become_the_bytes_of_pictures_read_twice(
    pictures: Path, tmp_path: Path, layout: Any, size: int | None
) -> None:
    picture = Picture(size=size, background="white")
    twice = _write(pictures, tmp_path / "twice", picture, keep=False, layout=layout)
    once = _write(pictures, tmp_path / "once", picture, keep=True, layout=layout)
    assert once == twice
    assert not list((tmp_path / "once").rglob(".kept*"))


@pytest.mark.parametrize("fault", ["deleted", "a byte", "cut"])
def test_kept_samples_that_are_lost_are_decoded_again(
    pictures: Path, tmp_path: Path, fault: str
) -> None:
    picture = Picture(size=4, background="white")
    listing = folders.image_folder(str(pictures), picture)
    with keeping(tmp_path, len(listing.keys), PART) as kept:
        found, _ = scan(tmp_path, listing, max_skipped=Threshold(count=1), kept=kept)
        (file,) = Path(kept.folder).iterdir()
        whole = file.read_bytes()
        if fault == "deleted":
            shutil.rmtree(kept.folder)
        else:
            file.write_bytes(whole[:-1] if fault == "cut" else whole[:99] + b"\7" + whole[100:])
        rows = np.arange(COUNT)
        plain, _ = scan(tmp_path, listing, max_skipped=Threshold(count=1))
        assert np.array_equal(found.images(rows), plain.images(rows))


def test_kept_samples_need_no_input_any_more(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "in")
    listing = folders.image_folder(str(tmp_path / "in"), Picture(size=4, background="white"))
    with keeping(tmp_path / "out", len(listing.keys), PART) as kept:
        found, _ = scan(tmp_path / "out", listing, max_skipped=Threshold(count=1), kept=kept)
        shutil.rmtree(tmp_path / "in")
        assert found.images(np.arange(COUNT)).shape == (COUNT, 3, 4, 4)
        again = pickle.loads(pickle.dumps(found))
        assert len(again.pictures(np.arange(9))) == 9


def test_a_disk_without_room_keeps_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(kept_module.shutil, "disk_usage", lambda place: usage(1000))
    listing = folders.image_folder(str(pictures), Picture(size=4, background="white"))
    with keeping(tmp_path, len(listing.keys), PART) as kept:
        found, _ = scan(tmp_path, listing, max_skipped=Threshold(count=1), kept=kept)
        assert list(Path(kept.folder).iterdir()) == []
        assert len(found.images(np.arange(COUNT))) == COUNT


def test_a_disk_that_fills_up_gives_back_all_that_was_kept(tmp_path: Path) -> None:
    kept = Kept(folder=str(tmp_path / "kept"), inputs=2, part=2)
    kept.begin()
    x = np.zeros((1, 2, 2), dtype=np.uint8)
    with kept.writing(0) as file:
        file.put(0, x, "")
    sample = kept.sample(0, x.shape, x.dtype)
    assert sample is not None and np.array_equal(sample.x, x)
    with kept.writing(1) as file:
        shutil.rmtree(kept.folder)  # as another process does that finds no room
        file.put(0, x, "")
    assert not Path(kept.folder).exists()
    assert Kept(folder=kept.folder, inputs=2, part=2).sample(0, x.shape, x.dtype) is None


@pytest.mark.parametrize("shard_blocks", [1, 2, 3, 4])
def test_blocks_joined_are_the_shard_that_is_built_alone(shard_blocks: int) -> None:
    plan = make_plan(source(), LATENT, 3, 1)
    plan = replace(plan, shard_blocks=shard_blocks)
    for k in range(plan.shards):
        blocks = (pickle.loads(pickle.dumps(build_block(plan, b))) for b in plan.blocks(k))
        assert join_shard(plan, k, blocks) == build_shard(plan, k)
    assert [b for k in range(plan.shards) for b in plan.blocks(k)] == [*range(4)]


def test_few_shards_are_written_alike_by_any_number_of_workers(tmp_path: Path) -> None:
    trees: list[dict[str, bytes]] = []
    for workers, finished in ((1, ()), (2, ()), (3, ()), (2, (1,))):
        root = tmp_path / str(len(trees))
        # three shards, of which one may be there already
        if finished:
            shutil.copytree(tmp_path / "0", root)
            (root / "LATEST").unlink()
            for left in root.glob("shards/*-0000[02]-*"):
                left.unlink()
        writer.write(root, source(1400), header=LATENT, shard_bytes=2 * 256 * 70, workers=workers)
        paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
        trees.append({str(path.relative_to(root)): path.read_bytes() for path in paths})
    assert len(manifests.load(tmp_path / "0").shards) == 3
    assert all(tree == trees[0] for tree in trees)


def test_tasks_are_done_in_their_order_and_no_more_are_asked_for_than_workers_need() -> None:
    asked: list[int] = []

    def tasks():
        for task in range(20):
            asked.append(task)
            yield task

    done = parallel.spread(abs, tasks(), 2)
    assert next(done) == 0 and len(asked) <= 2 * parallel.AHEAD + 1
    assert [*done] == [*range(1, 20)]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("000000001.png", 6000),
        ("a", 0),
        ("x" * 100, 8**11 - 1),
        ("y" * 50 + "/" + "x" * 90, 7),
        ("é.png", 3),
    ],
)
def test_a_header_is_the_one_that_tarfile_makes(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert member_header(name, size) == member.tobuf(tarfile.USTAR_FORMAT)


def test_members_are_found_again_where_their_headers_are_plain() -> None:
    contents = {"0.png": b"p" * 700, "0.cls": b"", "0.id.txt": b"x" * 512}
    span = members(contents)
    found = plain_members(span)
    assert found is not None
    assert {name: span[start : start + size] for name, start, size in found} == contents
    assert plain_members(span[:-1]) is None and plain_members(bytes(1024)) is None
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("n" * 200)
        tar.addfile(member)
    assert plain_members(file.getvalue()) is None


def test_indented_json_is_the_text_of_the_library() -> None:
    value = {"a": [1, 2.5, None, True, 'é"\n'], "b": {}, "c": [], "d": {"x": [[1], []]}, "e": 1e-7}
    assert manifests.indented(value) == json.dumps(value, indent=1)
