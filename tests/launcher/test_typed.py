"""A field of text holds the text that was typed, wherever it was typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.compose import Frames, changed, compose, compose_cluster, holds_text, known_keys
from launcher.sweep import combinations
from selfguide.spec.files import read_config, to_yaml
from selfguide.spec.validate import validate
from shards.errors import UserError

FRAME = "experiment=digits_uncond"
FRAMES: Frames = {}
# as a shell hands it over, and what is meant where that is something else
TEXTS = [
    ("9.10", None), ("true", None), ("1e9", None), ("1_000", None), ("0x10", None), ("007", None), ("null", None),
    ("Yes", None), ("mlx5_0,mlx5_1", None), ("[a,b]", None), ("{a: 1}", None), ("/tmp/a=b/c", None), ("#1", None),
    ("a #b", None), ("f(x)", None), ("(", None), ("]", None), ("~/x", None), ("100%j", None), ("it's", None),
    ('say "a" and "b"', None), ("ünïcode 図", None), ("${HOME}/x", None), ("$HOME", None), ("a: b", None),
    ("range(0,3)", None), ("choice(a,b)", None), ("int(3)", None), (" a ", None), ("", None), ("++x", None),
    (r"C:\x", None), (r"a\\b${X}", r"a\b${X}"), ("${seed}", "0"), (r"\${seed}", "${seed}"), ("a@b:c;d|e&f", None),
    ("'a b'", "a b"), ('"1e3"', "1e3"), (r"'it\'s'", "it's"), (r"a\,b", "a,b"), (r"a\=b", "a=b"), ("'a','b'", None),
    ("line\nline", None), ("???x", None), ("!tag *a &b", None), ("${", None), ("${}", None), ("a}${b", None),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "meant"), TEXTS, ids=[row[0] for row in TEXTS])
def test_text_is_what_was_typed(typed: str, meant: str | None, tmp_path: Path) -> None:
    keys = ("data.root", "cluster.partition", "cluster.environment.X", "cluster.sbatch.wckey")
    config = compose([FRAME, *(f"{key}={typed}" for key in keys)], FRAMES)
    wanted = typed if meant is None else meant
    assert config.data.root == wanted and config.cluster.environment == {"X": wanted}
    assert config.cluster.sbatch == {"wckey": wanted}
    assert config.cluster.partition == (None if typed == "null" else wanted)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read_config(path) == config


@pytest.mark.parametrize("name", ["1e3", "9.10", "true", "null_1", "007", "0x10", "1_000", "Yes"])
def test_a_run_is_called_as_typed(name: str) -> None:
    made = compose([FRAME, "cluster=slurm", f"name={name}"], FRAMES)
    validate(made)
    assert made.name == name


def test_every_field_of_text_takes_text() -> None:
    texts = [key for key in known_keys() if holds_text(key) and key != "experiment"]
    assert {"name", "runs", "data.root", "init.path", "cluster.container"} <= {*texts}
    assert not {"seed", "train.resume", "data.mix", "data.shape", "follow"} & {*texts}
    for key in texts:
        try:
            config: Any = compose([FRAME, f"{key}=1e3,true #(="], FRAMES)
        except UserError as error:
            # of another source of guidance
            assert "guidance" in str(error)
            continue
        for part in key.split("."):
            config = getattr(config, part)
        assert config == "1e3,true #(=", key


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("[gcc/9.10,true,1e3]", ("gcc/9.10", "true", "1e3")),
        ('[ "a,b" , c=d]', ("a,b", "c=d")),
        ("[f(a,b),x]", ("f(a,b)", "x")),
        ("[a(b,c]", ("a(b", "c")),
        ("[it's,so's]", ("it's", "so's")),
        (r"[a\,b]", ("a,b",)),
        ("[]", ()),
        ("['']", ("",)),
    ],
)
def test_lists_of_text_are_divided_by_commas_alone(typed: str, meant: tuple[str, ...]) -> None:
    assert compose([FRAME, f"cluster.modules={typed}"], FRAMES).cluster.modules == meant


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("{mem-bind: 9.10, x: true}", {"mem-bind": "9.10", "x": "true"}),
        ('{licenses: "a:1,b:2"}', {"licenses": "a:1,b:2"}),
        ("{licenses: a:1, n:null}", {"licenses": "a:1", "n": "null"}),
        ("{a: b=c, 'd': (1,2)}", {"a": "b=c", "d": "(1,2)"}),
        ("{}", {}),
    ],
)
def test_mappings_of_text_keep_it(typed: str, meant: dict[str, str]) -> None:
    assert compose([FRAME, f"cluster.sbatch={typed}"], FRAMES).cluster.sbatch == meant
    assert compose_cluster([f"cluster.sbatch={typed}"]).sbatch == meant


def test_mapping_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="'b' is not NAME: VALUE"):
        compose([FRAME, "cluster.sbatch={a: 1, b}"])


def test_options_of_a_cluster_may_have_dashes() -> None:
    assert compose_cluster(["cluster.sbatch.mail-user=a@b"]).sbatch == {"mail-user": "a@b"}


def test_null_is_none_where_a_field_may_be_without_a_value() -> None:
    config = compose([FRAME, "name=null", "cluster.partition=NULL", "cluster.account='null'"])
    assert (config.name, config.cluster.partition, config.cluster.account) == (None, None, "null")


def test_a_run_that_is_changed_takes_the_text_as_typed() -> None:
    config = changed(compose([FRAME]), ["data.root=/a=b", "cluster.environment.V=9.10"])
    assert (config.data.root, config.cluster.environment) == ("/a=b", {"V": "9.10"})


@pytest.mark.parametrize(
    ("typed", "listed"),
    [
        ("data.root=/a,/b", ["/a", "/b"]),
        ("data.root=/a=1,/b=2", ["/a=1", "/b=2"]),
        ("name=1e3,true,9.10", ["1e3", "true", "9.10"]),
        ("data.root='a,b',c", ["'a,b'", "c"]),
        ("data.root=f(a,b),c", ["f(a,b)", "c"]),
        ("name=choice(a,b)", ["a", "b"]),
        ("seed=1,2", ["1", "2"]),
        ("seed=range(0,2)", ["0", "1"]),
        ("path=rectified_flow,edm", ["rectified_flow", "edm"]),
    ],
)
def test_commas_make_a_sweep_outside_of_quotes_and_brackets(typed: str, listed: list[str]) -> None:
    key = typed.partition("=")[0]
    assert [swept for _, swept in combinations([typed])] == [(f"{key}={each}",) for each in listed]


@pytest.mark.parametrize("typed", ["'a,b'", "a=b", "[a,b]", "f(a,b)", "a#(b"])
def test_one_text_is_no_sweep(typed: str) -> None:
    settings = [f"cluster.environment.X={typed}", "seed=0,1"]
    assert [each[0] for each, _ in combinations(settings)] == settings[:1] * 2


def test_environment_of_a_site_is_text_quoted_or_not(tmp_path: Path) -> None:
    site = tmp_path / "mine.yaml"
    lines = ["A: 9.10", "B: true", "C: 1e9", "D: '9.10'", "E: mlx5_0,mlx5_1", "F: null", "G: é=#x"]
    site.write_text("kind: slurm\nenvironment:\n" + "".join(f"  {each}\n" for each in lines))
    found = compose([FRAME, f"cluster={site}"]).cluster.environment
    wanted = {"A": "9.10", "B": "true", "C": "1e9", "D": "9.10", "E": "mlx5_0,mlx5_1", "F": "null"}
    assert found == wanted | {"G": "é=#x"}
