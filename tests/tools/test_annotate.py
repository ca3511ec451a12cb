"""`python -m tools.annotate features` and `kmeans` on the digits, and what all verbs share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

import shards
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.snapshots import write_snapshot
from tests.shards import data
from tools.annotate.__main__ import main

VIT = ("--vit", "test_vit", "--weights", "random:0")


@pytest.fixture(scope="module")
def pixels(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("notes") / "pixels"
    assert main(["features", str(digits), "--pixels", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def snapshot(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_snapshot(tmp_path_factory.mktemp("run") / "img-7", digits)


def said(capsys: pytest.CaptureFixture) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_features_of_a_snapshot(
    digits: Path, snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--snapshot", str(snapshot), "--layer", "block_3", "--pooling", "flat"]
    out = tmp_path / "f"
    assert main(["features", str(digits), *flags, "--out", str(out), "--json"]) == 0
    facts = said(capsys)
    assert (facts["count"], facts["width"], facts["published"]) == (1797, 1024, True)
    assert facts["sha256"] == sidecar.read(out).sha256
    assert facts["provenance"]["noise_time"] == 0.2


def test_processes_and_tasks_make_the_same_file(
    digits: Path, snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["features", str(digits), "--snapshot", str(snapshot), "--batch", "100"]
    assert main([*flags, "--out", str(tmp_path / "one")]) == 0
    assert main([*flags, "--out", str(tmp_path / "two"), "--processes", "2"]) == 0
    capsys.readouterr()
    tasks = [*flags, "--out", str(tmp_path / "tasks"), "--world", "2", "--json", "--rank"]
    assert main([*tasks, "1"]) == 0 and not said(capsys)["published"]
    assert main([*tasks, "0"]) == 0 and said(capsys)["published"]
    one = (tmp_path / "one" / "rows.npy").read_bytes()
    assert (tmp_path / "two" / "rows.npy").read_bytes() == one
    assert (tmp_path / "tasks" / "rows.npy").read_bytes() == one


def test_kmeans_writes_groups_and_how_they_are(
    digits: Path, pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "k"
    flags = ["kmeans", str(digits), "--features", str(pixels), "--groups", "10", "--out", str(out)]
    assert main([*flags, "--json"]) == 0
    facts, found = said(capsys), sidecar.read(out, manifest=manifests.load(digits).hash)
    ids, labels = np.asarray(found.rows()), shards.read_all(digits)["y"]
    assert (found.kind, found.groups, found.saw_labels) == ("id", 10, False)
    assert facts["nmi"] == pytest.approx(normalized_mutual_info_score(labels, ids))
    assert facts["nmi"] > 0.65
    rows = np.array(sidecar.read(pixels).rows())
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    centroids = np.load(found.file("centroids.npy"))
    away = np.square(rows[:, None] - centroids).sum(2)
    np.testing.assert_array_equal(away.argmin(1), ids)
    np.testing.assert_allclose(found.column("distance"), away.min(1), atol=1e-5)
    record = found.provenance
    assert record["features"]["net"] == "pixels"
    assert record["features"]["rows_sha256"] == sidecar.read(pixels).sha256
    assert record["report"]["utilisation"] == 1 and record["seed"] == 0
    with pytest.raises(UserError, match="is taken already"):
        main(flags)


def test_kmeans_over_ranks_finds_the_same(digits: Path, pixels: Path, tmp_path: Path) -> None:
    flags = ["kmeans", str(digits), "--features", str(pixels), "--groups", "10", "--raw"]
    more = ["--iterations", "200", "--restarts", "2"]
    assert main([*flags, *more, "--out", str(tmp_path / "one")]) == 0
    assert main([*flags, *more, "--out", str(tmp_path / "two"), "--processes", "2"]) == 0
    one, two = sidecar.read(tmp_path / "one"), sidecar.read(tmp_path / "two")
    np.testing.assert_array_equal(one.rows(), two.rows())
    np.testing.assert_allclose(one.column("distance"), two.column("distance"), rtol=1e-3, atol=1e-2)
    assert (one.provenance["engine"], two.provenance["engine"]) == ("faiss", "lloyd")


def test_kmeans_extracts_what_it_needs_beside_its_own(digits: Path, tmp_path: Path) -> None:
    """And what saw labels says so to the end."""
    flags = ["kmeans", str(digits), *VIT, "--saw-labels", "yes", "--groups", "4"]
    assert main([*flags, "--out", str(tmp_path / "k")]) == 0
    features, groups = sidecar.read(tmp_path / "k.features"), sidecar.read(tmp_path / "k")
    assert features.shape == (64,) and features.saw_labels and groups.saw_labels
    assert groups.provenance["features"]["rows_sha256"] == features.sha256


def test_what_undoes_our_differences_is_recorded_and_what_does_not_leaves_no_trace(
    digits: Path, pixels: Path, tmp_path: Path
) -> None:
    flags = ["kmeans", str(digits), "--features", str(pixels), "--groups", "10"]
    published = ["--assign-raw", "--per-group", "100", "--restarts", "1"]
    assert main([*flags, *published, "--out", str(tmp_path / "published")]) == 0
    assert main([*flags, "--out", str(tmp_path / "ours")]) == 0
    records = [sidecar.read(tmp_path / name).provenance for name in ("published", "ours")]
    assert (records[0]["assigned"], records[0]["per_group"], records[0]["restarts"]) == (
        "raw",
        100,
        1,
    )
    assert not {"assigned", "per_group"} & records[1].keys()
    views = [["--view", "sgdm"], []]
    for number, more in enumerate(views):
        words = ["features", str(digits), *VIT, *more, "--out", str(tmp_path / str(number))]
        assert main(words) == 0
    records = [sidecar.read(tmp_path / name).provenance for name in ("0", "1")]
    assert records[0]["view"] == "sgdm" and not {"view", "positions"} & records[1].keys()


def test_shards_without_labels_have_no_agreement(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data.write(tmp_path / "shards", 200, labels=False)
    hash = manifests.load(tmp_path / "shards").hash
    rows = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)
    free = {"saw_labels": False}
    sidecar.write(tmp_path / "f", rows, manifest=hash, kind="dense", provenance=free)
    flags = ["--features", str(tmp_path / "f"), "--groups", "5", "--out", str(tmp_path / "k")]
    assert main(["kmeans", str(tmp_path / "shards"), *flags, "--json"]) == 0
    assert "nmi" not in said(capsys)


MISTAKES: list[tuple[list[str], str]] = [
    (["kmeans", "--features", "{pixels}", "--groups", "1798"], "groups=1798 of 1,797 samples"),
    (["kmeans", "--features", "{pixels}", "--groups", "0"], "groups=0"),
    (["kmeans", "--features", "{pixels}", "--groups", "5", "--restarts", "0"], "restarts=0"),
    (["kmeans", "--features", "{pixels}", "--groups", "5", "--spherical", "--raw"], "spherical"),
    (
        ["kmeans", "--features", "{pixels}", "--groups", "5", "--assign-raw", "--raw"],
        "leave it out",
    ),
    (["kmeans", "--features", "{pixels}", "--groups", "5", "--per-group", "0"], "--per-group 0"),
    (
        ["kmeans", "--features", "{pixels}", "--groups", "5", "--assign-raw", "--processes", "2"],
        "leave out --processes",
    ),
    (["features", "--pixels", "--view", "sgdm"], "--view says nothing to --pixels"),
    (["kmeans", "--features", "{nowhere}", "--groups", "5"], "holds no annotation"),
    (["kmeans", "--features", "{foreign}", "--groups", "5"], "annotates shards bbbbbbbbbbbb"),
    (["kmeans", "--features", "{ids}", "--groups", "5"], "is of kind id; give one of features"),
    (["kmeans", "--features", "{constant}", "--groups", "5"], "samples are the same"),
    (["features", "--pixels", "--layer", "3"], "--layer says nothing to --pixels"),
    (["features", "--pixels", "--pooling", "mean"], "--pooling says nothing to --pixels"),
    (["features", *VIT, "--noise-time", "0.2"], "--noise-time says nothing to --net"),
    (["features", "--snapshot", "{snapshot}", "--sha256", "ab"], "says nothing to --snapshot"),
    (["features", "--snapshot", "{snapshot}", "--layer", "9"], "layer=9 is not one of"),
    (["features", "--snapshot", "{nowhere}"], "nowhere does not exist"),
    (["features", "--pixels", "--rank", "0"], "--rank and --world come together"),
    (["features", "--pixels", "--rank", "0", "--world", "2", "--processes", "2"], "--processes"),
    (["features", "--pixels", "--processes", "0"], "--processes 0"),
    (["features", "--pixels", "--batch", "0"], "--batch 0"),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES)
def test_mistakes_are_named_before_work_starts(
    digits: Path, pixels: Path, snapshot: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    hash, free = manifests.load(digits).hash, {"saw_labels": False}
    places = {"pixels": pixels, "snapshot": snapshot, "nowhere": tmp_path / "nowhere"}
    rows = np.zeros((1797, 2), np.float32)
    for name, kind, content, manifest in (
        ("foreign", "dense", rows, "b" * 64),
        ("constant", "dense", rows, hash),
        ("ids", "id", np.zeros(1797, np.int32), hash),
    ):
        places[name] = tmp_path / name
        groups = 1 if kind == "id" else None
        sidecar.write(
            places[name], content, manifest=manifest, kind=kind, groups=groups, provenance=free
        )  # type: ignore[arg-type]
    verb, *rest = [flag.format(**places) for flag in flags]
    with pytest.raises(UserError, match=words):
        main([verb, str(digits), *rest, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_mistake_ends_the_command_with_one_line(digits: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.annotate", "kmeans", str(digits), "--pixels"]
    done = subprocess.run(
        [*command, "--groups", "5000", "--out", str(tmp_path / "k")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: groups=5000 of 1,797 samples")
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize("verb", ["features", "kmeans", "temi", "bound", "lost", "stego"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert "SHARDS" in text and "--out" in text and "--json" in text
