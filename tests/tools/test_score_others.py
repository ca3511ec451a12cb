"""tools.score --as: somebody's scores are kept beside the runs, measured as a run's own are."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from launcher.board.collect import collect
from launcher.board.read import read_all
from launcher.compose import compose
from launcher.references import pinned
from selfguide.spec.others import (
    FOLDER,
    NAME,
    TYPED_NOTE,
    OtherRecord,
    measured,
    measured_alike,
    other_files,
    read_other_file,
)
from selfguide.spec.records import Protocol
from shards.errors import UserError
from shards.format.header import PIXELS
from shards.sources.source import ArraySource
from shards.write import writer
from tests.board import fakes
from tools import score, score_run
from tools.reference import __main__ as reference

NET = "test_resnet.r160_in1k"
# of a snapshot, where `evaluation=` says what samples are compared with
SNAPSHOT = {
    "data": {"manifest": "c0" * 6, "header": {}},
    "guidance": {"source": "online", "level": "image"},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random ones, of a small net."""
    file = tmp_path_factory.mktemp("net") / "net.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(NET).state_dict(), file)
    return str(file)


@pytest.fixture(scope="module")
def net(weights: str) -> list[str]:
    return ["--protocol", "fd_timm", "--net", NET, "--weights", weights, "--batch", "20"]


@pytest.fixture(scope="module")
def data(net: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shards to train on, and some in their source's order to test on; samples; statistics of two of these."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    found = {}
    for name, count in (("train", 60), ("test", 50), ("samples", 40)):
        x = rng.integers(0, 256, (count, 3, 8, 8)).astype(np.uint8)
        found[name] = str(folder / name)
        source = ArraySource.of(name, x)
        writer.write(folder / name, source, header=PIXELS, shuffle=name != "test")
        if name == "samples":
            found[name] += ".npz"
            np.savez(folder / "samples.npz", arr_0=np.moveaxis(x, 1, -1))
    found["reference"] = str(folder / "reference.npz")
    assert reference.main(["make", found["train"], *net, "--out", found["reference"]]) == 0
    found["uncond"] = str(folder / "uncond.npz")
    words = ["samples", found["samples"], "--of", "uncond", *net, "--out", found["uncond"]]
    assert reference.main(words) == 0
    return found


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands keep what they make where they are called."""
    monkeypatch.chdir(tmp_path)


def kept(words: list[str], runs: str = "runs") -> OtherRecord:
    """What this command line keeps."""
    assert score.main(words) == 0
    (path,) = other_files(Path(runs))
    return read_other_file(path)


def test_score_without_a_name_keeps_nothing(
    data: dict[str, str], net: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert score.main([data["samples"], *net, "--shards", data["train"], "--json"]) == 0
    assert "kept" not in json.loads(capsys.readouterr().out)
    assert not Path("runs").exists()


def test_score_with_a_name_keeps_what_it_prints(
    data: dict[str, str], net: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [data["samples"], *net, "--shards", data["train"], "--runs", "elsewhere", "--json"]
    record = kept([*words, "--as", " ADM-G ", "--note", "guidance 1.5"], "elsewhere")
    told = json.loads(capsys.readouterr().out)
    assert told["scores"] == record.scores
    assert told["kept"] == str(*other_files(Path("elsewhere")))
    assert (record.name, record.note, record.samples) == ("ADM-G", "guidance 1.5", "samples.npz")
    assert len(record.left_out) == 10 and record.metric == "fd_timm"
    # the mean of a jackknife's blocks is near the score
    assert np.mean(record.left_out) == pytest.approx(record.scores["fd_timm"], rel=0.5)
    # again, of other samples of that number, in place of the first
    with np.load(data["samples"]) as file:
        np.savez("darker.npz", file["arr_0"] // 2)
    again = kept(["darker.npz", *words[1:], "--as", "ADM-G"], "elsewhere")
    assert (again.name, again.note, again.samples) == ("ADM-G", "", "darker.npz")
    assert again.scores != record.scores and again.stamp != record.stamp
    assert again.protocol == record.protocol


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--shards", "TRAIN"], ["shards=TRAIN"]),
        (["--reference", "REFERENCE"], ["reference=REFERENCE"]),
        (
            ["--shards", "TRAIN", "--setting", "reference_count=50"],
            ["shards=TRAIN", "reference_count=50"],
        ),
        (
            ["--shards", "TEST", "--setting", "reference_count=45"],
            ["shards=TEST", "reference_count=45"],
        ),
        (
            ["--shards", "TRAIN", "--setting", "reference_count=50", "reference_seed=3"],
            ["shards=TRAIN", "reference_count=50", "reference_seed=3"],
        ),
        (
            ["--shards", "TRAIN", "--setting", "crop=6", "crop_rule=random", "crop_seed=5"],
            ["shards=TRAIN", "crop=6", "crop_rule=random", "crop_seed=5"],
        ),
        (
            [
                *("--shards", "TRAIN", "--metrics", "kid", "ood_auroc", "precision_recall"),
                *("--setting", "kid_size=30", "test=TEST"),
            ],
            [
                *("shards=TRAIN", "metrics=[precision_recall,ood_auroc,kid]"),
                *("kid_size=30", "test=TEST"),
            ],
        ),
        (
            ["--shards", "TRAIN", "--metrics", "ufid", "--setting", "unconditional=UNCOND"],
            ["shards=TRAIN", "metrics=[ufid]", "unconditional=UNCOND"],
        ),
    ],
    ids=["shards", "file", "part", "seed by order", "drawn part", "crop", "metrics", "ufid"],
)
def test_score_is_measured_alike_to_a_run_of_the_same_evaluation(
    data: dict[str, str], net: list[str], weights: str, words: list[str], settings: list[str]
) -> None:
    def filled(texts: list[str]) -> list[str]:
        for name, place in data.items():
            texts = [text.replace(name.upper(), place) for text in texts]
        return texts

    record = kept([data["samples"], *net, *filled(words), "--as", "theirs"])
    given = [f"net={NET}", f"weights={weights}", "samples=40", *filled(settings)]
    overrides = [f"evaluation.{text}" for text in given]
    config = compose(["experiment=digits_dit", "evaluation=fd_timm", *overrides])
    # as at a submission
    config = replace(config, evaluation=pinned(config, config.evaluation))
    ours = json.loads(json.dumps(Protocol.of(config, SNAPSHOT).plain()))
    assert record.protocol == measured(ours)
    assert measured_alike(record.protocol, ours)
    guided = replace(config, sampler=replace(config.sampler, g=2.0))
    assert measured_alike(record.protocol, Protocol.of(guided, SNAPSHOT).plain())
    fewer = replace(config, evaluation=replace(config.evaluation, samples=39))
    assert not measured_alike(record.protocol, Protocol.of(fewer, SNAPSHOT).plain())


def test_score_that_is_kept_stands_beside_the_run_that_was_measured_alike(
    data: dict[str, str], net: list[str]
) -> None:
    runs = Path("runs")
    record = kept([data["samples"], *net, "--shards", data["train"], "--as", "theirs"])
    run, value = fakes.make_run(runs), record.scores["fd_timm"]
    protocol = {f.name: record.protocol.get(f.name) for f in fields(Protocol)}
    measuring = {name: value for name, value in protocol.items() if name in record.protocol}
    fakes.add_record(run, 256_000, {"fd_timm": value - 100.0}, protocol=measuring)
    (table,) = collect(*read_all(runs)).tables
    assert len(table.rows) == 1
    assert [(o.name, o.place, o.score) for o in table.others] == [("theirs", 2, value)]
    assert table.others[0].error == record.scores["fd_timm_se"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--as", ""], "--as"),
        (["--as", "  "], "--as"),
        (["--as", "a" * (NAME + 1)], "--as"),
        (["--as", "a\x1b[31m"], "--as"),
        (["--as", "a\nb"], "--as"),
        (["--as", "a", "--note", "b\x07"], "--note"),
        (["--as", "a", "--note", "b" * (TYPED_NOTE + 1)], "--note"),
        (["--note", "without a name"], "--as NAME"),
        (["--as", "a", "--runs", "file"], "--runs file"),
        (["--as", "a", "--runs", "file/runs"], "--runs file/runs"),
        (["--as", "a", "--runs", "taken"], "--runs taken"),
        (["--as", "a", "--runs", "runs/digits_dit"], "--runs"),
    ],
)
def test_score_that_could_not_be_kept_is_refused_before_images_are_read(
    words: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("x")
    Path("taken").mkdir()
    Path("taken", FOLDER).write_text("x")
    fakes.make_run(Path("runs"))
    monkeypatch.setattr(score_run, "open_images", lambda *_: pytest.fail("images were read"))
    asked = ["samples.npz", "--protocol", "fd_effnet", "--shards", "data", *words]
    with pytest.raises(UserError, match=named):
        score.main(asked)
    assert not Path("runs", FOLDER).exists()


def test_score_into_a_folder_that_may_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    (tmp_path / "closed").mkdir()
    real = os.access
    # a superuser may write everywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: "closed" not in str(path) and real(path, mode)
    )
    words = ["samples.npz", "--protocol", "fd_effnet", "--shards", "data", "--as", "a"]
    with pytest.raises(UserError, match="closed"):
        score.main([*words, "--runs", "closed/runs"])


def test_score_that_finds_no_room_to_be_kept_is_printed_all_the_same(
    data: dict[str, str],
    net: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "runs/.others")

    monkeypatch.setattr(OtherRecord, "publish", full)
    with pytest.raises(OSError):
        score.main([data["samples"], *net, "--shards", data["train"], "--as", "a", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["scores"]["fd_timm"] and "kept" not in told


def test_score_of_chosen_samples_says_so_in_its_note(
    data: dict[str, str], net: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {"kept": 40, "of": 60, "by": "the surest heads"}
    monkeypatch.setattr(score_run, "chosen_by", lambda _: chosen)
    words = [data["samples"], *net, "--shards", data["train"], "--as", "theirs"]
    record = kept([*words, "--note", "ours"])
    assert record.note.startswith("ours; ") and "40" in record.note and "60" in record.note
