"""Settings of a command line, key=value, wherever they stand."""

from __future__ import annotations

import argparse
import importlib
import itertools

import pytest

from shards import cli
from shards.words import Parser

SETTINGS = ["train.batch=64", "cluster.environment.X=a=b", "+evaluation=none"]


def parser() -> argparse.ArgumentParser:
    made = Parser()
    made.add_argument("run")
    made.add_argument("settings", nargs="*", metavar="key=value")
    made.add_argument("--arms", nargs="+", choices=("a", "b"))
    made.add_argument("--seeds", nargs="*", type=int)
    made.add_argument("--like")
    made.add_argument("--size", nargs=2)
    made.add_argument("--set", nargs="+", metavar="KEY=VALUE")
    made.add_argument("-n", type=int)
    made.add_argument("--json", action="store_true")
    return made


# argparse itself takes a run behind an open list for one more of it
ORDERS = [
    words
    for words in itertools.permutations(["R", "--arms a b", "--json", "-n 3", "--seeds 0 -1"], 4)
    if "R" in words and not words[max(0, words.index("R") - 1)].startswith(("--arms", "--seeds"))
]


@pytest.mark.parametrize("intermixed", [False, True], ids=["plain", "intermixed"])
@pytest.mark.parametrize("words", ORDERS)
def test_settings_behind_any_option_are_settings(words: tuple[str, ...], intermixed: bool) -> None:
    # one setting behind each part of the line
    typed = [w for part, s in zip(words, SETTINGS, strict=False) for w in (*part.split(), s)]
    typed += words[3].split()
    made = parser()
    found = (made.parse_intermixed_args if intermixed else made.parse_args)(typed)
    assert found.run == "R" and found.settings == SETTINGS
    assert found.arms in (None, ["a", "b"]) and found.seeds in (None, [0, -1])


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("R --like a=b.png s=1", "like", "a=b.png"),
        ("R --like=a=b.png s=1", "like", "a=b.png"),
        ("R --lik a=b.png s=1", "like", "a=b.png"),
        ("R --size a=1 b=2 s=1", "size", ["a=1", "b=2"]),
        ("R s=1 --set a=1 b=2 --json", "set", ["a=1", "b=2"]),
    ],
)
def test_what_an_option_takes_for_itself_is_no_setting(
    typed: str, name: str, value: object
) -> None:
    found = parser().parse_args(typed.split())
    assert (vars(found)[name], found.settings) == (value, ["s=1"])


def test_settings_of_a_subcommand_are_its_own() -> None:
    made = Parser()
    verb = made.add_subparsers(dest="verb").add_parser("go")
    verb.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    verb.add_argument("--arms", nargs="+")
    found = made.parse_args(["go", "--arms", "a", "b", "x=1"])
    assert (found.arms, found.settings) == (["a", "b"], ["x=1"])


def test_a_parser_without_settings_is_argparse() -> None:
    made = cli.parser("m", None)
    made.add_argument("--like", nargs="+")
    assert made.parse_args(["--like", "a=b", "c=d"]).like == ["a=b", "c=d"]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("launcher.resume", "RUN --runs DIR --json train.batch=x"),
        ("launcher.tune", "RUN --runs DIR log_every=1"),
        ("launcher.plan", "experiment=digits_uncond --json cluster=nowhere"),
        ("launcher.doctor", "--runs DIR cluster=nowhere --json seed=1"),
        ("tools.same", "experiment=digits_uncond --steps 1 cluster=nowhere"),
        ("tools.study.__main__", "headline --arms class online cluster=nowhere"),
        ("tools.study.__main__", "headline --seeds 0 1 cluster=nowhere --weights 1.2 2"),
    ],
)
def test_commands_take_settings_behind_their_options(
    module: str,
    words: str,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed = words.replace("DIR", str(tmp_path_factory.mktemp("runs"))).split()
    command = importlib.import_module(module).main
    # not argparse's SystemExit, which calls them unrecognized or no choice
    with pytest.raises(cli.UserError, match=r"no run|cluster=nowhere|finds none"):
        command(typed)
    assert "usage" not in capsys.readouterr().err
