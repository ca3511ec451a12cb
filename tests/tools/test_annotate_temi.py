"""`tools.annotate temi` and `bound` on the digits: what they publish, over ranks, after a kill, what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import shards
from selfguide.discovery import temi_fit
from selfguide.discovery.temi import Heads, TemiConfig
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from tools.annotate.__main__ import main

QUICK = ("--heads", "2", "--epochs", "3", "--step-images", "128", "--learning-rate", "4e-3")


@pytest.fixture(scope="module")
def features(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("notes") / "pixels"
    assert main(["features", str(digits), "--pixels", "--out", str(out)]) == 0
    return out


def annotate(verb: str, root: Path, features: Path, out: Path, *more: str) -> None:
    flags = ["--features", str(features), "--out", str(out), *QUICK, *more]
    assert main([verb, str(root), *flags]) == 0


def test_published_groups_record_how_they_were_found(
    digits: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "temi"
    annotate("temi", digits, features, out, "--groups", "10", "--json")
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = sidecar.read(out, manifest=manifests.load(digits).hash)
    ids = np.asarray(found.rows())
    assert (found.kind, found.groups, found.count, found.saw_labels) == ("id", 10, 1797, False)
    assert facts["used"] == len(np.unique(ids)) and 0 < facts["nmi"] < 1
    # the class of each group, one to one, and how many images it is right for
    classes = {int(group): label for group, label in facts["classes"].items()}
    assert len(set(classes.values())) == len(classes) == 10
    right = np.vectorize(classes.get)(ids) == shards.read_all(digits)["y"]
    assert facts["accuracy"] == pytest.approx(right.mean())

    record = found.provenance
    config = TemiConfig(**record["temi"])
    assert (config.heads, config.epochs, config.neighbours) == (2, 3, 50)
    assert record["features"]["rows_sha256"] == sidecar.read(features).sha256
    np.testing.assert_allclose(record["p"], np.bincount(ids, minlength=10) / 1797)
    # the attached heads say the same of the features again
    heads = Heads(64, config)
    heads.load_state_dict(load_file(found.file("heads.safetensors")))
    again = temi_fit.assign(heads, record["head"], sidecar.read(features).rows())
    np.testing.assert_array_equal(again[0], ids)
    np.testing.assert_array_equal(again[1], found.column("confidence"))
    assert record["head"] == int(np.argmin(record["losses"]))
    assert not list(tmp_path.glob(".*")), "what a killed fit would go on from is left over"

    with pytest.raises(UserError, match="is taken already"):
        annotate("temi", digits, features, out, "--groups", "10")


def test_two_processes_find_the_groups_of_one(digits: Path, features: Path, tmp_path: Path) -> None:
    annotate("temi", digits, features, tmp_path / "one", "--groups", "10")
    annotate("temi", digits, features, tmp_path / "two", "--groups", "10", "--processes", "2")
    one, two = (sidecar.read(tmp_path / name) for name in ("one", "two"))
    assert np.mean(np.asarray(one.rows()) == np.asarray(two.rows())) > 0.99
    np.testing.assert_allclose(one.provenance["losses"], two.provenance["losses"], atol=1e-3)


class Killed(Exception):
    pass


def test_a_killed_search_goes_on_and_ends_as_one_that_was_not(
    digits: Path,
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    begun: list[int] = []
    true_begin, kill_at = temi_fit._begin, [8]

    def counted(width: int, config: TemiConfig, device: Any) -> Any:
        begun.append(config.groups)
        if config.groups in kill_at:
            raise Killed
        return true_begin(width, config, device)

    monkeypatch.setattr(temi_fit, "_begin", counted)
    flags = ("--start", "4", "--alpha", "0.99", "--finer", "1", "--json")
    out = tmp_path / "bound"
    with pytest.raises(Killed):
        annotate("bound", digits, features, out, *flags)
    assert begun == [4, 8]
    kill_at.clear()
    annotate("bound", digits, features, out, *flags)
    assert begun[2] == 8 and 4 not in begun[2:], "a finished fit was made again"
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])

    assert json.loads((out / "bound.json").read_text()) == facts
    assert (out / "bound.png").read_bytes()[:4] == b"\x89PNG"
    assert {p["groups"] for p in facts["points"]} == set(begun)
    for point in facts["points"]:
        fitted = sidecar.read(out / f"groups-{point['groups']:05d}")
        assert point["used"] == len(np.unique(np.asarray(fitted.rows())))
        assert point["ratio"] == point["used"] / point["groups"]
    good = [p["groups"] for p in facts["points"] if p["ratio"] >= 0.99]
    assert facts["bound"] == max(good, default=None)

    with pytest.raises(UserError, match="holds a fit with other settings or features"):
        annotate("bound", digits, features, out, *flags, "--beta", "0.7")


BEFORE = ("--decay-biases", "--no-warmup-from-zero")


def dies_in_epoch(number: int, patch: pytest.MonkeyPatch) -> None:
    """Fits are saved after every epoch, and the one of that number never comes."""
    epoch = temi_fit._epoch

    def dying(*arguments: Any) -> None:
        if arguments[-1] == number:
            raise Killed
        epoch(*arguments)

    patch.setattr(temi_fit, "SAVE_EVERY", 1)
    patch.setattr(temi_fit, "_epoch", dying)


def test_a_fit_begun_before_the_corrections_is_ended_as_it_was_begun(
    digits: Path,
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    annotate("temi", digits, features, tmp_path / "whole", "--groups", "10", *BEFORE)
    with monkeypatch.context() as once, pytest.raises(Killed):
        dies_in_epoch(2, once)
        annotate("temi", digits, features, tmp_path / "parts", "--groups", "10", *BEFORE)
    annotate("temi", digits, features, tmp_path / "parts", "--groups", "10")
    assert "decay_biases=False, warmup_from_zero=True" in capsys.readouterr().err
    whole, parts = (sidecar.read(tmp_path / name) for name in ("whole", "parts"))
    assert not {"decay_biases", "warmup_from_zero"} & whole.provenance["temi"].keys()
    assert whole.provenance == parts.provenance and whole.sha256 == parts.sha256
    annotate("temi", digits, features, tmp_path / "new", "--groups", "10")
    new = sidecar.read(tmp_path / "new").provenance
    assert (new["temi"]["decay_biases"], new["temi"]["warmup_from_zero"]) == (False, True)
    assert new["losses"] != whole.provenance["losses"]
    assert not capsys.readouterr().err


def test_a_search_begun_before_the_corrections_is_ended_as_it_was_begun(
    digits: Path,
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    flags = ("--start", "4", "--alpha", "1", "--finer", "0")
    fitted: list[int] = []
    begin = temi_fit._begin

    def second_dies(width: int, config: TemiConfig, device: Any) -> Any:
        fitted.append(config.groups)
        if len(fitted) == 2:
            raise Killed
        return begin(width, config, device)

    with monkeypatch.context() as once, pytest.raises(Killed):
        once.setattr(temi_fit, "_begin", second_dies)
        annotate("bound", digits, features, tmp_path / "bound", *flags, *BEFORE)
    annotate("bound", digits, features, tmp_path / "bound", *flags)
    assert "decay_biases=False" in capsys.readouterr().err
    groups = sorted((tmp_path / "bound").glob("groups-*"))
    assert len(groups) > 1
    for folder in groups:
        assert "decay_biases" not in sidecar.read(folder).provenance["temi"]


@pytest.mark.parametrize(
    ("verb", "flags", "message"),
    [
        ("temi", ("--groups", "1798"), "groups=1798 of 1797 images"),
        ("temi", ("--groups", "10", "--neighbours", "1797"), "neighbours=1797 of 1797 images"),
        ("temi", ("--groups", "10", "--processes", "0"), "--processes 0"),
        ("bound", ("--alpha", "0"), "alpha=0.0"),
        ("bound", ("--alpha", "1.5"), "alpha=1.5"),
        ("bound", ("--start", "5000"), "start=5000 of 1797 images"),
        ("bound", ("--finer", "-1"), "finer=-1"),
    ],
)
def test_what_cannot_be_is_refused_before_work(
    digits: Path, features: Path, tmp_path: Path, verb: str, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        annotate(verb, digits, features, tmp_path / "out", *flags)
    assert not list(tmp_path.iterdir())


def test_features_of_other_shards_are_refused(digits: Path, features: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(features, other)
    record = json.loads((other / "MANIFEST.json").read_text())
    (other / "MANIFEST.json").write_text(json.dumps({**record, "annotates": "0" * 64}))
    for verb, flags in (("temi", ("--groups", "10")), ("bound", ())):
        with pytest.raises(UserError, match="annotates shards 000000000000"):
            annotate(verb, digits, other, tmp_path / "out", *flags)


def test_the_lower_bound_over_k_is_what_fits_without_the_exponent_use(
    digits: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lower"
    with pytest.raises(UserError, match="give --beta 1"):
        annotate("bound", digits, features, out, "--over", "8", "12")
    with pytest.raises(UserError, match="two or more"):
        annotate("bound", digits, features, out, "--beta", "1", "--over", "8")
    assert not out.exists()
    annotate("bound", digits, features, out, "--beta", "1", "--over", "12", "8", "--json")
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    fits = [sidecar.read(out / f"groups-{k:05d}") for k in (8, 12)]
    assert [fit.provenance["temi"]["beta"] for fit in fits] == [1.0, 1.0]
    used = [len(np.unique(fit.rows())) for fit in fits]
    assert [(p["groups"], p["used"]) for p in facts["points"]] == [(8, used[0]), (12, used[1])]
    assert facts["lower"] == np.mean(used)
    assert facts["deviation"] == pytest.approx(np.std(used, ddof=1))
    assert (out / "bound.png").stat().st_size > 5_000
