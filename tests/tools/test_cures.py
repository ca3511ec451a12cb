"""A cure that is printed works as it is printed: each mistake here is answered by it, in a shell's words."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launcher.compose import Frames, compose
from selfguide.spec.config import Config
from selfguide.spec.validate import validate
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import PIXELS
from shards.sources.source import ArraySource
from shards.write import writer
from tools.shards.__main__ import main

FRAMES: Frames = {}
# key=value, or 'key=value' as a shell takes it; and the name that may have been meant
_SETTING = re.compile(r"'(?P<quoted>[a-z_.]+=[^']*)'|(?P<bare>\b[a-z_.]+=[^\s,;:)(']+)")
_MEANT = re.compile(r"did you mean '([^']+)'")
# options whose value is a file or folder
PLACE = re.compile(r"^(DIR|FILE|PATH|ROOT|FOLDER|RUN|SHARDS|SAMPLES|IMAGE|COPY)$")


def accepted(words: list[str]) -> Config:
    config = compose(words, FRAMES)
    validate(config)
    return config


def cured(words: list[str], message: str, bad: str) -> list[str]:
    """The words with what the message says to give in place of `bad`, or beside it."""
    key, _, value = bad.partition("=")
    if meant := _MEANT.search(message):
        setting = f"{meant[1]}={value}" if "unknown key" in message else f"{key}={meant[1]}"
        return [setting if word == bad else word for word in words]
    advice = re.split(r"[;:,] (?=(?:or )?(?:take|set|give|drop|choose) )", message)[1:]
    found = [next(filter(None, each.groups())) for each in _SETTING.finditer(" ".join(advice))]
    if not found and (number := re.search(r"take (\d+)", message)):
        found = [f"{message.partition('=')[0]}={number[1]}"]
    assert found, message
    given = found[0].partition("=")[0]
    return [*(word for word in words if word.partition("=")[0] != given), found[0]]


@pytest.mark.parametrize(
    "bad",
    [
        "train.lr=1e-3",
        "train.wd=0.1",
        "train.bacth=64",
        "batch=64",
        "model=dit_digit",
        "path=rectified_flwo",
        "engine.dtype=bf61",
        "train.resume=newst",
        "train.batch=100",
        "train.snapshot_every=5",
        "cluster.modules=cuda",
        "cluster.setup=module",
        "sampler.g=2",
        "data.crop=true",
        "nodes=2",
        "cluster.warn_s=0",
    ],
)
def test_cure_of_a_setting_is_accepted_as_printed(bad: str) -> None:
    frame = ["experiment=digits_uncond", "cluster=local", "cluster.gpus_per_node=8"]
    words = [*frame, bad]
    with pytest.raises(UserError) as first:
        accepted(words)
    message = str(first.value)
    # a cure may lead to what it means for another setting, which has a cure of its own
    for _ in range(4):
        words = cured(words, message, bad)
        try:
            accepted(words)
            return
        except UserError as error:
            assert str(error) != message
            message = str(error)
    raise AssertionError(message)


def refusal(capsys: pytest.CaptureFixture[str], run: Callable[[], object]) -> str:
    """What a command says that refuses."""
    try:
        run()
    except UserError as error:
        return str(error)
    except SystemExit as error:
        assert error.code == 2
        return capsys.readouterr().err.splitlines()[-1]
    raise AssertionError("it was not refused")


def commands(message: str) -> list[str]:
    return re.findall(r"`([^`]+)`", message)


@pytest.mark.parametrize(
    "folder", ["digits", "a b/digits", "it's/digits", "été/digits", "$HOME (1)/digits"]
)
def test_digits_that_are_missing_are_made_as_printed(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / folder
    (command,) = commands(refusal(capsys, lambda: main(["stats", str(root)])))
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "tools.shards"] and main(words[3:]) == 0
    assert manifests.load(root).count == 1797


@pytest.mark.parametrize("left", ["nothing", "folder", "skipped.jsonl", "0.tar", "picture.png"])
def test_folder_of_ones_own_is_never_to_be_filled_with_digits(
    left: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mine"
    if left != "nothing":
        root.mkdir()
    if "." in left:
        (root / left).write_text("")
    assert "digits" not in refusal(capsys, lambda: main(["stats", str(root)]))


@pytest.mark.parametrize("name", ["a.tar", "b c.tar.gz", "it's.tgz", "d", "e$(f).tar.gz"])
def test_compressed_tar_is_unpacked_as_printed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, path = tmp_path / "0.txt", tmp_path / "in" / name
    picture.write_text("no picture")
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(picture, "0.txt")
    words = ["make", "tars", str(path), "--out", str(tmp_path / "out")]
    (command,) = commands(refusal(capsys, lambda: main(words)))
    subprocess.run(command, shell=True, check=True)
    (plain,) = set(path.parent.iterdir()) - {path}
    with tarfile.open(plain, "r:") as tar:
        assert plain.suffix == ".tar" and tar.getnames() == ["0.txt"]


@pytest.mark.parametrize("typed", ["0007", "7/0007", "7/0007.png", "0007.jpg", "a/b/0007"])
def test_key_whose_end_was_typed_is_found_as_printed(
    typed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [*(f"a/b/{i % 10}/{i:04d}" for i in range(600)), "a/b/0007"]
    source = ArraySource.of("x", np.zeros((601, 1, 4, 4), np.uint8), keys=keys)
    writer.write(tmp_path / "x", source, header=PIXELS, seed=0)
    if typed in keys:
        assert main(["inspect", str(tmp_path / "x"), typed]) == 0
        return
    message = refusal(capsys, lambda: main(["inspect", str(tmp_path / "x"), typed]))
    meant = _MEANT.search(message)
    assert meant and meant[1].endswith("0007")
    assert main(["inspect", str(tmp_path / "x"), meant[1]]) == 0


@pytest.mark.parametrize("name", ["b/x", "b", "b/x/y", "b x/été", "b..c/x"])
def test_folder_called_s3_is_written_as_printed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(capsys, lambda: main(["stats", f"s3:{name}"]))
    other = re.search(r"\(or (.+) for", message)
    assert f"s3://{name}" in message and other
    message = refusal(capsys, lambda: main(["make", "digits", "--out", f"s3:{name}"]))
    other = re.search(r"\(or (.+) for", message)
    assert f"s3://{name}" in message and other
    assert main(["make", "digits", "--out", other[1]]) == 0
    assert manifests.load(tmp_path / f"s3:{name}").count == 1797


def test_home_is_meant_by_a_tilde_that_no_shell_expands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main(["make", "digits", "--out=~/x"]) == 0
    assert main(["stats", "~/x", "--json"]) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["home"]


class Built(BaseException):
    """A command has made the parser of its words, and parses them."""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("tools.shards.__main__", "make digits"),
        ("tools.shards.__main__", "inspect"),
        ("tools.shards.__main__", "repair"),
        ("tools.annotate.__main__", "adopt"),
        ("tools.study.__main__", "headline"),
        ("tools.sample", ""),
        ("tools.probe", ""),
        ("tools.confidence", ""),
        ("tools.spacing", ""),
        ("tools.toy.__main__", ""),
        ("tools.bench.gpu.command", ""),
        ("launcher.runs", ""),
        ("launcher.board.__main__", "export"),
    ],
)
def test_options_that_name_a_place_take_the_home_of_a_tilde(
    module: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell expands it in `--out=~/x.png`."""

    def built(parser: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(parser)
        raise Built

    parsers: list[argparse.ArgumentParser] = []
    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, built)
    with pytest.raises(Built):
        importlib.import_module(module).main(words.split())
    (parser,) = parsers
    for verb in words.split():
        (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = verbs.choices[verb]
    monkeypatch.setenv("HOME", str(tmp_path))
    places = [
        action
        for action in parser._actions
        # which reads its folder by itself
        if action.option_strings
        and action.dest != "config_dir"
        and (PLACE.search(str(action.metavar)) or action.dest in ("out", "runs"))
    ]
    assert places
    for action in places:
        taken = action.type("~/x.png") if callable(action.type) else "~/x.png"
        assert str(taken) == f"{tmp_path}/x.png", action.option_strings


@pytest.mark.parametrize(
    "flag",
    [
        "--shard-mb=inf", "--shard-mb=nan", "--shard-mb=0", "--shard-mb=1e308",
        "--seed=1e3", f"--seed={2**64}", f"--seed=-{2**64}",
    ],
)  # fmt: skip
def test_numbers_that_no_command_can_use_are_refused_in_a_line(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, lambda: main(["make", "digits", "--out", str(tmp_path / "x"), flag]))
    assert "give a" in message and flag.partition("=")[0] in message


@pytest.mark.parametrize("labels", [[-1, 0], [-1, -1], [3, -7], [0, -128], [-(2**31), 5]])
def test_labels_below_zero_are_named(
    labels: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 1, 4, 4), np.uint8), y=np.array(labels))
    words = ["make", "numpy", str(tmp_path / "a.npz"), "--x", "x", "--y", "y"]
    message = refusal(capsys, lambda: main([*words, "--out", str(tmp_path / "o")]))
    assert f"label {min(labels)} of sample" in message and "classes=" not in message
