"""What people get wrong: one line that names it, exit code 2, and no data set where there was none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import cli, storage
from tests.shards import data, inputs
from tools.s3.server import Server
from tools.shards.__main__ import main

pytestmark = pytest.mark.timeout(120)

NO_BUCKET = "there is no bucket 'nowhere' at {endpoint}; create it, or check its name"
ANOTHER = "has format version 99, this program reads 1: use the program it was written with"
REFUSED = "the credentials (access key selfguide:dev) are refused"
READS = ("stats", "verify", "inspect {} a", "explain {} --images 9", "simulate {} --batch 4")

# command, and what its error says; {in}, {out} and {s3} are folders of the test's own
MISTAKES = {
    "empty folder": ("make folder {in}/empty --out {out}", "source 'empty' is empty"),
    "empty array": ("make numpy {in}/none.npy --out {out}", "source 'none' is empty"),
    "empty tars": ("make tars {in}/empty --out {out}", "holds no .tar files"),
    "mixed shapes": ("make folder {in}/mixed --out {out}", "samples of 2 shapes, such as (3, 6, 6)"),
    "keys twice": ("make tars {in}/tars --out {out}", "1 keys of {in}/tars/0.tar and the other tars occur twice"),
    "labels": ("make numpy {in}/labels.npz --y y --out {out}", "label -2 of sample 'labels-2' is below 0"),
    "floats": ("make numpy {in}/floats.npz --y y --out {out}", "float64: give whole numbers"),
    "few labels": ("make numpy {in}/few.npz --y y --out {out}", "2 labels for 4 samples of 'few'"),
    "not finite": ("make numpy {in}/nan.npy --encoder a --out {out}", "4 of 4 inputs cannot be used"),
    "half": ("copy {in}/half {out}", "no LATEST, which is written last"),
    "make to no bucket": ("make folder {in}/good --out s3://nowhere/a", NO_BUCKET),
    "digits to no bucket": ("make digits --out s3://nowhere/a", NO_BUCKET),
    "copy to no bucket": ("copy {in}/data s3://nowhere/a", NO_BUCKET),
    "copy from no bucket": ("copy s3://nowhere/a {out}", NO_BUCKET),
    "repair from no bucket": ("repair {in}/data --from s3://nowhere/a", NO_BUCKET),
    "diff with no bucket": ("diff {in}/data s3://nowhere/a", NO_BUCKET),
    "sweep of no bucket": ("sweep s3://nowhere/a", NO_BUCKET),
    "no bucket's name": ("make digits --out s3://No!/a", "is no name for S3: give s3://BUCKET/FOLDER"),
    "copy of another version": ("copy {in}/version {out}", ANOTHER),
    "make over another version": ("make digits --out {in}/version", ANOTHER),
    "make, refused": ("make folder {in}/good --out {s3}", REFUSED),
    "copy, refused": ("copy {in}/data {s3}", REFUSED),
    "sweep, refused": ("sweep {s3}", REFUSED),
    **{
        f"{read.split()[0]}, {what}": (read.format(place) if "{}" in read else f"{read} {place}", told)
        for read in READS
        for what, place, told in (
            ("no bucket", "s3://nowhere/a", NO_BUCKET),
            ("another version", "{in}/version", ANOTHER),
            ("refused", "{s3}", REFUSED),
        )
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of every wrong kind, and some good ones."""
    root, zeros = tmp_path_factory.mktemp("in"), np.zeros((4, 3, 2, 2), np.uint8)
    for name in ("empty", "tars"):
        (root / name).mkdir()
    inputs.image_folder(root / "good", inputs.pixels(6))
    inputs.image_folder(root / "mixed", inputs.pixels(3))
    Image.fromarray(inputs.pixels(1, 6)[0]).save(root / "mixed" / "a" / "other.png")
    for number in range(2):
        png = inputs.png(inputs.pixels(1, seed=number)[0])
        inputs.archive(root / "tars" / f"{number}.tar", {"a.png": png, "a.cls": b"1"})
    np.save(root / "none.npy", zeros[:0])
    np.save(root / "nan.npy", np.full((4, 3, 2, 2), np.nan, np.float32))
    for name, labels in (("labels", [0, 1, -2, 3]), ("floats", [0, 1, 0.5, 3]), ("few", [0, 1])):
        np.savez(root / f"{name}.npz", x=zeros, y=np.array(labels))
    data.write(root / "data", 300)
    for name in ("version", "half"):
        shutil.copytree(root / "data", root / name)
    (root / "half" / "LATEST").unlink()
    path = next((root / "version").glob("manifest-*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    return root


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2_and_leaves_no_data_set(
    given: Path, server: Server, root: str, tmp_path: Path, environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], mistake: str,
) -> None:  # fmt: skip
    words, told = MISTAKES[mistake]
    places = {"in": given, "out": tmp_path / "out", "s3": root, "endpoint": server.endpoint}
    before = {p: p.stat().st_mtime_ns for p in given.rglob("*")}
    if told is REFUSED:
        environment.setenv("AWS_SECRET_ACCESS_KEY", "a wrong one")
        storage.reconnect()
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: main(words.format(**places).split()))
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert told.format(**places) in err and "Errno" not in err
    assert {p: p.stat().st_mtime_ns for p in given.rglob("*")} == before
    out = tmp_path / "out"
    assert not (out / "LATEST").exists() and not [*out.rglob("*.tar")]
    if told is not REFUSED:
        assert storage.list(root) == []
