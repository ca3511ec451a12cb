"""`tools.sample --label`, from class folders to pictures of the class that was named."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from selfguide.spec.config import LabelGuidance
from shards.errors import UserError
from tests.selfguide.test_training import attempt, config
from tools import sample
from tools.atlas.__main__ import main as atlas
from tools.ranks import run_ranks
from tools.shards.__main__ import main

NAMES = (
    "flags",
    "sea bass, raw",
    "\u00e9t\u00e9",
    "it's",
    "-dash",
    "a=b",
    "12",
    "2",
    "\u65e5\u672c",
    "100%",
)
# numbers in names count as numbers
ORDER = (
    "2",
    "12",
    "100%",
    "-dash",
    "a=b",
    "flags",
    "it's",
    "sea bass, raw",
    "\u00e9t\u00e9",
    "\u65e5\u672c",
)
LABELS = {name: label for label, name in enumerate(ORDER)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of two steps, conditioned on the classes of a folder."""
    root = tmp_path_factory.mktemp("named")
    scans, numbers = load_digits(return_X_y=True)
    for row, (scan, number) in enumerate(zip(scans[:128], numbers, strict=False)):
        folder = root / "in" / NAMES[number]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((scan.reshape(8, 8) * 15).astype(np.uint8)).save(folder / f"{row}.png")
    words = ["make", "folder", str(root / "in"), "--channels", "1", "--out", str(root / "shards")]
    assert main(words) == 0
    cfg = config(root / "shards")
    train = replace(cfg.train, images=128, log_every=64, snapshot_every=128, checkpoint_every=128)
    data = replace(cfg.data, classes=len(NAMES))
    cfg = replace(cfg, guidance=LabelGuidance(), data=data, train=train)
    run_ranks(1, attempt, cfg, str(root / "runs" / "named"))
    return str(root / "runs" / "named")


def drawn(run: str, out: Path, *label: str) -> tuple[list[np.ndarray], list[str]]:
    """The pictures, and the labels that the command says it drew."""
    words = ["--count", "2", "--steps", "2", "--out", str(out), "--label", *label]
    assert sample.main([run, *words]) == 0
    files = sorted((out / "images").iterdir())
    said = json.loads((out / "sample.json").read_text())["labels"]
    return [np.asarray(Image.open(file)) for file in files], said


@pytest.mark.parametrize("name", sorted({*NAMES} - {"12", "2", "-dash"}))
def test_a_class_by_its_name_is_that_by_its_number(run: str, tmp_path: Path, name: str) -> None:
    named, said = drawn(run, tmp_path / "a", name)
    numbered, _ = drawn(run, tmp_path / "b", f"number:{LABELS[name]}")
    assert said == [f"{LABELS[name]} ({name})"]
    np.testing.assert_array_equal(named, numbered)


def test_names_that_are_numbers_or_begin_like_an_option_are_asked_for_by_name(
    run: str, tmp_path: Path
) -> None:
    several, said = drawn(run, tmp_path / "a", "name:2", "name:-dash", "name:12", "flags")
    wanted = [LABELS[name] for name in ("2", "-dash", "12", "flags")]
    assert said == [f"{label} ({ORDER[label]})" for label in wanted]
    alone, _ = drawn(run, tmp_path / "b", *(f"number:{label}" for label in wanted))
    np.testing.assert_array_equal(several, alone)
    # the class called 2 has another label, and label 2 is called by another name
    assert LABELS["2"] != 2
    with pytest.raises(UserError, match="name:2 or number:2"):
        drawn(run, tmp_path / "c", "2")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("flag", "flags"),
        ("FLAGS", "flags"),
        ("sea bass", "sea bass, raw"),
        ("ete", "\u00e9t\u00e9"),
        ("its", "it's"),
    ],
)
def test_a_class_that_is_none_is_refused_with_the_nearest(
    run: str, tmp_path: Path, typed: str, meant: str
) -> None:
    with pytest.raises(UserError) as refused:
        drawn(run, tmp_path / "a", typed)
    assert str(refused.value).endswith(f"did you mean {meant!r}?")
    assert not (tmp_path / "a").exists()
    assert drawn(run, tmp_path / "b", meant)[1] == [f"{LABELS[meant]} ({meant})"]


@pytest.mark.parametrize("typed", ["10", "-1", "1.0", "", "zzzz", "name:", "number:x"])
def test_what_is_no_class_is_refused(run: str, tmp_path: Path, typed: str) -> None:
    with pytest.raises(UserError, match="label"):
        sample.main([run, "--count", "2", "--out", str(tmp_path / "a"), f"--label={typed}"])


@pytest.mark.parametrize("more", ["", "--groups 10", "--seed 3", "--shards", "--g 2"])
def test_an_atlas_of_classes_calls_them_by_their_names(run: str, tmp_path: Path, more: str) -> None:
    page = tmp_path / "a.html"
    words = more.replace("--shards", f"--shards {Path(run).parents[1] / 'shards'}").split()
    assert atlas([run, "--out", str(page), "--count", "1", *words]) == 0
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.read_text(encoding="utf-8"), flags=re.S)
    said = " ".join(html.unescape(text).split())
    for name, label in LABELS.items():
        assert f"{label} {name}" in said or f"{label}: {name}" in said, (name, said[:2000])
