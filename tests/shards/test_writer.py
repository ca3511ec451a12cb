"""What is written: deterministic tars any WebDataset reader opens, and a manifest that tells the truth."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash

import shards
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.format.moments import Moments
from shards.format.tar import TarBuilder
from shards.sources.source import ArraySource
from shards.write import writer
from tests.shards.data import LATENT, flip, names, source, write


def _tree(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("labels", [True, False])
def test_what_comes_back_is_what_went_in(tmp_path: Path, labels: bool) -> None:
    manifest = write(tmp_path, labels=labels)
    given, found = source(labels=labels), shards.read_all(tmp_path)
    rows = np.array([int(k.removeprefix("test-")) for k in found["key"]])
    assert np.array_equal(np.sort(rows), np.arange(1000)) and not np.array_equal(
        rows, np.arange(1000)
    )
    assert found["x"].dtype == np.float16 and np.array_equal(found["x"], given.x[rows])
    assert ("y" in found) == labels
    if given.labels is not None:
        assert np.array_equal(found["y"], given.labels[rows])
        assert manifest.label_histogram == tuple(np.bincount(given.labels).tolist())
    assert len(manifest.shards) == 2 and manifest.count == 1000 and manifest.shape == (2, 3, 4)


def test_the_order_of_the_source_may_be_kept_and_is_another_data_set(tmp_path: Path) -> None:
    given, told = source(), {"header": LATENT, "seed": 3, "shard_bytes": 40_000}
    manifest, _ = writer.write(tmp_path, given, shuffle=False, **told)
    found = shards.read_all(tmp_path)
    assert (
        np.array_equal(found["x"], given.x)
        and found["key"].tolist() == given.keys.astype(str).tolist()
    )
    assert manifest.plain["order"] == "source" and manifest.seed == 3
    with pytest.raises(UserError, match="holds another data set"):
        writer.write(tmp_path, given, **told)


def test_bytes_depend_on_nothing_but_the_source(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert _tree(tmp_path / "a") == _tree(tmp_path / "b")
    assert not [name for name in _tree(tmp_path / "a") if ".tmp" in name]


def test_webdataset_reads_our_tars_bit_exact(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    urls = [str(tmp_path / s.name) for s in manifest.shards]
    theirs = (
        webdataset.WebDataset(urls, shardshuffle=False)
        .decode()
        .to_tuple("x.npy", "y.npy", "id.npy")
    )
    ours = shards.read_all(tmp_path)
    x, y, ids = (np.concatenate(parts) for parts in zip(*theirs, strict=True))
    assert x.dtype == ours["x"].dtype and np.array_equal(x, ours["x"])
    assert np.array_equal(y, ours["y"])
    assert [i.decode() for i in ids] == ours["key"].tolist()
    singles = (
        webdataset.WebDataset(urls, shardshuffle=False)
        .decode()
        .to_tuple("x.npy", "y.npy")
        .unbatched()
    )
    assert sum(1 for _ in singles) == 1000


def test_our_layout_is_the_tar_that_webdataset_writes_but_for_padding(tmp_path: Path) -> None:
    """The other way round: members that their writer made are the arrays that ours made."""
    arrays = {"x.npy": np.arange(24, dtype="<f4").reshape(2, 3, 4), "y.npy": np.array([5, 6])}
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as theirs:
        theirs.write({"__key__": "00000000", **arrays})
    builder = TarBuilder()
    for name, array in arrays.items():
        builder.add(f"00000000.{name}", array)
    (tmp_path / "ours.tar").write_bytes(builder.finish())
    read = []
    for name in ("theirs", "ours"):
        with tarfile.open(tmp_path / f"{name}.tar") as tar:
            contents = {m.name: tar.extractfile(m) for m in tar.getmembers()}
            read.append({n: np.load(io.BytesIO(f.read())) for n, f in contents.items() if f})
    assert read[0].keys() == read[1].keys()
    for name, array in read[0].items():
        assert array.dtype == read[1][name].dtype and np.array_equal(array, read[1][name])


def test_tars_have_no_time_no_owner_no_pax_and_pages_for_large_payloads(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    row = manifest.blocks[1]
    data = (tmp_path / manifest.shards[0].name).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
        assert not tar.pax_headers and all(not m.pax_headers for m in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert data[257:265] == b"ustar\x0000"
    for column, offset in enumerate(row["offset"].tolist()):
        size = int(row["bytes"][column])
        assert offset % (4096 if size >= 4096 else 64) == 0
        assert row["xxh3"][column].tobytes() == xxhash.xxh3_128_digest(data[offset : offset + size])


def test_latents_cost_half_a_percent_more_than_their_bytes(tmp_path: Path) -> None:
    x = np.zeros((1024, 4, 32, 32), dtype=np.float16)
    keys = [f"n0{i:07d}" for i in range(1024)]
    given = ArraySource.of("zeros", x, labels=np.arange(1024) % 7, classes=7, keys=keys)
    manifest, _ = writer.write(tmp_path, given, header=LATENT)
    assert sum(s.bytes for s in manifest.shards) <= 1.005 * x.nbytes


def test_statistics_are_those_of_all_samples(tmp_path: Path) -> None:
    manifest, x = write(tmp_path), source().x.astype(np.float64)
    np.testing.assert_allclose(
        manifest.channel_mean, x.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-15
    )
    np.testing.assert_allclose(manifest.channel_std, x.std(axis=(0, 2, 3)), rtol=1e-12)
    assert (manifest.minimum, manifest.maximum) == (x.min(), x.max())


def test_statistics_of_large_images_take_little_memory() -> None:
    x = np.random.default_rng(0).integers(0, 256, (100, 3, 256, 256), dtype=np.uint8)
    tracemalloc.start()
    found = Moments.of(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * x.nbytes  # float64 of all would be as much, before the first square
    values = x.transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(found.mean, values.mean(axis=1, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.std, values.std(axis=1, dtype=np.float64), rtol=1e-12)
    assert (found.count, found.minimum, found.maximum) == (100 << 16, x.min(), x.max())


def test_the_manifest_names_every_byte(tmp_path: Path) -> None:
    written = write(tmp_path)
    manifest = manifests.load(tmp_path)
    assert manifest.hash == written.hash == (tmp_path / "LATEST").read_text().strip()
    plain = json.loads((tmp_path / f"manifest-{manifest.hash[:12]}.json").read_text())
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == manifest.hash
    for shard in manifest.shards:
        data = (tmp_path / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
    index = (tmp_path / f"index-{plain['index']['sha256'][:12]}.npy").read_bytes()
    assert hashlib.sha256(index).hexdigest() == plain["index"]["sha256"]
    assert manifest.header["scale"] == 0.5 and manifest.header["encoder"] == "test"


def test_a_manifest_of_a_later_writer_keeps_its_hash(tmp_path: Path) -> None:
    write(tmp_path, 100)
    old = manifests.load(tmp_path)
    plain = {
        **old.plain,
        "novelty": 1,
        "shards": [{**s, "novelty": 2} for s in old.plain["shards"]],
    }
    manifests.save(tmp_path, manifests.Manifest.of(plain, old.blocks))
    new = manifests.load(tmp_path)
    assert new.hash != old.hash and new.shards == old.shards
    assert manifests.load(tmp_path, old.hash).hash == old.hash


def test_the_index_is_what_the_records_of_the_shards_say(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    rows = []
    for number, shard in enumerate(manifest.shards):
        told = json.loads((tmp_path / shard.name).with_suffix(".json").read_text())
        for block in told["blocks"]:
            placed = [block["fields"][f.name] for f in manifest.fields]
            hashes = [bytes.fromhex(p["xxh3"]) for p in placed]
            offsets, sizes = [p["offset"] for p in placed], [p["bytes"] for p in placed]
            rows.append([number, block["rows"], offsets, sizes, hashes])
    found = [
        [
            *row.tolist()[:2],
            row["offset"].tolist(),
            row["bytes"].tolist(),
            [*map(bytes, row["xxh3"])],
        ]
        for row in manifest.blocks
    ]
    assert found == rows and sum(row[1] for row in rows) == 1000


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../victim/a.tar"},
        {"name": "shards/../../a.tar"},
        {"name": "/etc/a.tar"},
        {"name": "s3://else/a.tar"},
        {"sha256": "../../outside"},
        {"sha256": "A" * 64},
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(
    tmp_path: Path, wrong: dict[str, str]
) -> None:
    manifest = write(tmp_path, 100)
    plain = {**manifest.plain, "shards": [{**manifest.plain["shards"][0], **wrong}]}
    with pytest.raises(DamagedError, match=f"shard .*{next(iter(wrong.values()))[:12]}.*no writer"):
        manifests.Manifest.of(plain, manifest.blocks)
    with pytest.raises(DamagedError, match="index has the sha256 'x'"):
        manifests.Manifest.of({**manifest.plain, "index": {"sha256": "x"}}, manifest.blocks)


def test_writing_again_writes_nothing_and_heals_what_is_missing(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert writer.write(tmp_path, source(), header=LATENT, seed=3, shard_bytes=40_000)[1] is False
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    tree = _tree(tmp_path)
    (tmp_path / manifest.shards[1].name).unlink()
    assert writer.write(tmp_path, source(), header=LATENT, seed=3, shard_bytes=40_000)[1] is True
    assert _tree(tmp_path) == tree


def test_another_data_set_in_the_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    write(tmp_path)
    tree = _tree(tmp_path)
    with pytest.raises(
        UserError, match=r"holds another data set .*1,000 samples.*choose another folder"
    ):
        writer.write(tmp_path, source(999), header=LATENT, seed=3, shard_bytes=40_000)
    assert _tree(tmp_path) == tree


def test_a_writer_that_dies_leaves_no_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manifests, "save", die)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    with pytest.raises(UserError, match="it holds shards but no LATEST"):
        manifests.load(tmp_path)
    monkeypatch.undo()
    write(tmp_path)


X = np.zeros((4, 1, 2, 2), dtype=np.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArraySource.of("s", X[:0]), "source 's' is empty"),
        (lambda: ArraySource.of("s", []), "source 's' is empty"),
        (
            lambda: ArraySource.of("s", [X[0], X[0, :, :1]]),
            r"several shapes, \(1, 2, 2\).*row 0.*row 1",
        ),
        (lambda: ArraySource.of("s", X[0]), r"samples are \(2, 2\)"),
        (lambda: ArraySource.of("s", X.astype(str)), "whole or floating"),
        (
            lambda: ArraySource.of("s", X, labels=[0, 1, 2, 3], classes=3),
            "label 3 of sample 's-3' is out of",
        ),
        (
            lambda: ArraySource.of("s", X, labels=[0, -1, 0, 0], classes=3),
            "label -1 of sample 's-1'",
        ),
        (lambda: ArraySource.of("s", X, labels=[0, 1, 1, 0]), "classes=0, but there are labels"),
        (lambda: ArraySource.of("s", X, labels=[0.5] * 4, classes=2), "labels have dtype float64"),
        (lambda: ArraySource.of("s", X, labels=[0], classes=2), "1 labels for 4 samples"),
        (lambda: ArraySource.of("s", X, keys=["a", "b", "a", "a"]), "key 'a' occurs 3 times"),
        (lambda: ArraySource.of("s", X, keys=["a", "", "b", "c"]), "key '' of row 1 is empty"),
        (
            lambda: ArraySource.of("s", X / np.float32(0)),
            "'s-[0-3]' holds values that are not finite",
        ),
    ],
)
def test_bad_sources_are_named_and_leave_nothing(tmp_path: Path, make, message: str) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(UserError, match=message):
        writer.write(tmp_path / "out", make(), header=LATENT)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "video"}, "kind='video'"),
        ({"kind": "image", "scale": 0.0}, "scale=0.0"),
        ({"kind": "latent"}, "which encoder"),
    ],
)
def test_bad_headers_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Header(**wrong)


def test_roots_without_a_data_set_are_named(tmp_path: Path) -> None:
    for name, message in (("none", "no such folder"), ("empty", "the folder is empty")):
        if name == "empty":
            (tmp_path / name).mkdir()
        cure = "python -m tools.shards make`"
        with pytest.raises(UserError, match=message) as caught:
            manifests.load(tmp_path / name)
        assert cure in str(caught.value) and caught.value.exit_code == 2
    digits = tmp_path / "a b" / "digits"
    with pytest.raises(UserError, match=f"make digits --out '{digits}'"):
        manifests.load(digits)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        manifests.load(tmp_path / "file")
    with pytest.raises(UserError, match="is a file"):
        write(tmp_path / "file")


def test_another_version_and_a_changed_manifest_are_told_apart(tmp_path: Path) -> None:
    name = tmp_path / f"manifest-{write(tmp_path, 100).hash[:12]}.json"
    text = name.read_text()
    name.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match="format version 2, this program reads 1"):
        manifests.load(tmp_path)
    name.write_text(text.replace('"count": 100', '"count": 99'))
    with pytest.raises(DamagedError, match="changed after it was written"):
        manifests.load(tmp_path)
    name.write_text(text[:100])
    with pytest.raises(DamagedError, match="not JSON"):
        manifests.load(tmp_path)
    name.unlink()
    with pytest.raises(DamagedError, match="is missing"):
        manifests.load(tmp_path)


def test_a_changed_index_is_detected(tmp_path: Path) -> None:
    write(tmp_path, 100)
    flip(next(tmp_path.glob("index-*.npy")), 200)
    with pytest.raises(DamagedError, match="index-"):
        manifests.load(tmp_path)
