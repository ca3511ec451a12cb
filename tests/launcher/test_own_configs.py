"""Experiments and groups outside of the checkout, and data of which only the place is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launcher import sites, submit
from launcher.choices import experiments, options
from launcher.compose import compose
from launcher.resume import main as resume
from selfguide.spec.sizes import architecture
from shards.errors import UserError
from shards.format.header import Header
from shards.sources.source import ArraySource
from shards.write.writer import write

MINE = """\
# @package _global_
# flags at 32 pixels
defaults:
  - digits_class
  - override /data: flags
  - override /model: dit_tiny_32
  - override /evaluation: none
seed: 3
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands put their --config-dir into the variable."""
    monkeypatch.setenv(sites.VARIABLE, "")


@pytest.fixture
def flags(tmp_path: Path) -> Path:
    """Shards of 40 colour images in 3 classes."""
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    source = ArraySource.of("flags", x, labels=np.arange(40) % 3, classes=3)
    root = tmp_path / "shards"
    write(str(root), source, header=Header(kind="image", shift=127.5, scale=1 / 127.5))
    return root


@pytest.fixture
def own(tmp_path: Path, flags: Path) -> Path:
    """A folder with an experiment and its data."""
    folder = tmp_path / "mine"
    for group, name, text in (
        ("experiment", "flags_class", MINE),
        ("data", "flags", f"root: {flags}\n"),
        ("model", "slim", "name: dit_tiny_32\ndepth: 2\n"),
        ("path", "edm", "name: rectified_flow\n"),
    ):
        (folder / group).mkdir(parents=True)
        (folder / group / f"{name}.yaml").write_text(text)
    return folder


def test_a_folder_of_configs_composes_with_ours(own: Path, flags: Path) -> None:
    sites.search_first(str(own))
    config = compose(["experiment=flags_class", "model=slim", "sampler=heun_edm", "path=edm"])
    assert (config.experiment, config.seed, config.data.root) == ("flags_class", 3, str(flags))
    assert (config.data.shape, config.data.classes) == ((3, 32, 32), 3)
    assert (config.model.depth, config.sampler.name) == (2, "heun")
    # searched before ours
    assert config.path.name == "rectified_flow"
    assert config.guidance.source == "labels" and architecture(config).classes == 3
    assert experiments()["flags_class"] == "flags at 32 pixels" and "slim" in options("model")


def test_a_folder_of_configs_is_named_by_option_or_variable_in_every_command(
    own: Path, tmp_path: Path
) -> None:
    words = ["experiment=flags_class", "cluster=local", f"runs={tmp_path / 'runs'}"]
    bare = {k: v for k, v in os.environ.items() if k != sites.VARIABLE}
    for module, more, variable in (
        ("launcher.submit", ["--config-dir", str(own), *words, "dry_run=true", "--json"], ""),
        ("launcher.submit", [*words, "dry_run=true", "--json"], f"/nowhere:{own}"),
        ("launcher.plan", [f"--config-dir={own}", "--images-per-s=100", "--json", *words], ""),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, *more],
            env={**bare, sites.VARIABLE: variable},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)


def test_a_folder_of_configs_that_is_none_is_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        submit.main(["--config-dir", str(tmp_path / "none"), "experiment=digits_dit"])
    with pytest.raises(UserError, match="give a folder"):
        submit.main(["experiment=digits_dit", "--config-dir"])
    (own / "experiment" / "flags_class.yaml").write_text("seed: 3\n")
    sites.search_first(str(own))
    with pytest.raises(UserError, match="@package _global_"):
        compose(["experiment=flags_class"])


def test_a_folder_of_configs_that_is_named_is_before_those_that_the_variable_names(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other one"
    shutil.copytree(own, other)
    for folder, seed in ((own, 3), (other, 4)):
        (folder / "experiment" / "twice.yaml").write_text(
            f"# @package _global_\ndefaults:\n  - digits_uncond\nseed: {seed}\n"
        )
    monkeypatch.setenv(sites.VARIABLE, f"{own}:{other}")
    assert compose(["experiment=twice"]).seed == 3
    sites.search_first(str(other))
    assert compose(["experiment=twice"]).seed == 4
    # by a relative name
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(sites.VARIABLE, f"{own}:other one")
    sites.search_first("other one")
    assert compose(["experiment=twice"]).seed == 4


@pytest.mark.parametrize("base", ["self", "/experiment: digits_uncond", "/experiment: nothing"])
def test_a_config_whose_defaults_are_itself_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "self.yaml").write_text(
        f"# @package _global_\ndefaults:\n  - {base}\n"
    )
    monkeypatch.setenv(sites.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"experiment=self: .*lead back to the file itself"):
        compose(["experiment=self"])


def test_a_base_that_is_absent_is_named_without_the_search_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - nothing\n"
    )
    monkeypatch.setenv(sites.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"Could not load 'experiment/nothing'\.$"):
        compose(["experiment=mine"])
    monkeypatch.setenv(sites.VARIABLE, f"{tmp_path}:{tmp_path}/gone")
    with pytest.raises(UserError, match=r"SELFGUIDE_CONFIGS names .*/gone, where no folder is"):
        compose(["experiment=theirs"])


def test_configs_are_copied_with_an_attempt(own: Path, tmp_path: Path) -> None:
    sites.copy(("experiment", "data", "model"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    sites.search_first(str(own))
    sites.copy(("experiment", "data"), tmp_path / "kept")
    kept = {str(path.relative_to(tmp_path / "kept")) for path in tmp_path.glob("kept/*/*/*")}
    assert kept == {"0/experiment/flags_class.yaml", "0/data/flags.yaml"}


def test_data_root_alone_says_shape_and_classes(flags: Path) -> None:
    config = compose(["experiment=digits_uncond", f"data.root={flags}", "model=dit_tiny_32"])
    assert (config.data.shape, config.data.classes) == ((3, 32, 32), 3)
    net = architecture(config)
    assert (net.channels, net.size) == (3, 32)
    # what was typed is compared when the run is submitted, and so is a crop's shape
    typed = compose(
        ["experiment=digits_uncond", f"data.root={flags}", "data.shape=[3,16,16]", "data.classes=7"]
    )
    assert (typed.data.shape, typed.data.classes) == ((3, 16, 16), 7)
    crop = compose(["experiment=digits_uncond", f"data.root={flags}", "data.crop=true"])
    assert crop.data.shape == (1, 8, 8)


def test_data_that_are_not_there_are_as_the_experiment_says(own: Path, tmp_path: Path) -> None:
    config = compose(["experiment=digits_class", f"data.root={tmp_path / 'none'}"])
    assert (config.data.shape, config.data.classes) == ((1, 8, 8), 10)
    (own / "data" / "flags.yaml").write_text(f"root: {tmp_path / 'none'}\n")
    sites.search_first(str(own))
    with pytest.raises(UserError, match="nothing says what"):
        compose(["experiment=flags_class"])


@pytest.mark.parametrize(
    ("model", "edge"), [("dit_tiny_32", 32), ("dit_small_64", 64), ("unet_small_32", 32)]
)
def test_small_presets_are_of_their_size(model: str, edge: int) -> None:
    shape = f"data.shape=[3,{edge},{edge}]"
    words = ["experiment=digits_uncond", f"model={model}", shape, "evaluation=none"]
    net = architecture(compose([*words, *(["path=edm"] if "unet" in model else [])]))
    assert (net.size, net.channels) == (edge, 3)
    assert net.parameters() < 60e6


def test_resume_takes_a_folder_of_configs(own: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        resume(["none", "--config-dir", str(own), "--runs", str(tmp_path)])
    assert sites.folders() == [own]


TEXTS = """\
# @package _global_
defaults:
  - digits_uncond
name: 1e3
cluster:
  timeout_min: 1:30:00
  partition: 010
  modules: [gcc/9.10, 9.10, no]
  environment: {A: 9.10, B: on, C: 007, D: 1e9, E: 2026-11-28, F: 12:30:00, G: 0x10, H: null, I: "x # y", J: , NO: 1}
  sbatch: {nice: 010, spread-job: yes, hint: null, licenses: 1.10}
"""
MEANT = {
    "A": "9.10", "B": "on", "C": "007", "D": "1e9", "E": "2026-11-28", "F": "12:30:00", "G": "0x10", "H": "null",
    "I": "x # y", "J": "", "NO": "1",
}  # fmt: skip


@pytest.mark.parametrize("site", [False, True])
def test_text_in_a_file_is_what_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: bool
) -> None:
    for group, text in (
        ("experiment", TEXTS),
        # the same as a site's profile
        ("cluster", "kind: slurm\n" + TEXTS.partition("cluster:\n")[2].replace("\n  ", "\n")[2:]),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / "texts.yaml").write_text(text)
    monkeypatch.setenv(sites.VARIABLE, str(tmp_path))
    chosen = ["digits_uncond", "texts"] if site else ["texts", "slurm"]
    config = compose([f"experiment={chosen[0]}", f"cluster={chosen[1]}"])
    cluster = config.cluster
    assert (cluster.timeout_min, cluster.partition) == (90, "010")
    assert cluster.modules == ("gcc/9.10", "9.10", "no") and cluster.environment == MEANT
    options = {"nice": "010", "spread-job": True, "licenses": "1.10"}
    assert cluster.sbatch_options == options
    assert site or config.name == "1e3"


def test_what_is_no_text_in_a_file_is_as_yaml_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.yaml").write_text("root: 2024\nshape: [1, 8, 8]\nclasses: 1e1\n")
    (tmp_path / "experiment" / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - digits_uncond\n  - override /data: own\n"
        "seed: 1_0\nruns: ${data.root}\ntrain: {images: 2e3, clip: 1e3}\n"
    )
    monkeypatch.setenv(sites.VARIABLE, str(tmp_path))
    config = compose(["experiment=own", "cluster=local"])
    assert (config.seed, config.train.images, config.train.clip) == (10, 2000, 1000.0)
    assert (config.data.root, config.data.classes, config.runs) == ("2024", 10, "2024")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("${HOME}/x", "${HOME}/x"),
        ("${USER}", "${USER}"),
        ("a/${X:-y}/${}", "a/${X:-y}/${}"),
        (r"\${seed}", "${seed}"),
        ("${seed}", "0"),
        ("${.partition}", "debug"),
        ("${oc.env:SELFGUIDE_TRIED}", "tried"),
        ("${oc.env:SELFGUIDE_NOT,else}/${HOME}", "else/${HOME}"),
        ("$HOME", "$HOME"),
    ],
)
def test_a_brace_in_a_file_is_text_unless_it_names_a_setting_or_a_resolver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, meant: str
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - digits_uncond\n"
        f"cluster:\n  partition: debug\n  account: '{text}'\n  modules: ['{text.replace('.partition', 'seed')}']\n"
        f"  environment: {{A: '{text.replace('.partition', 'seed')}'}}\n"
    )
    monkeypatch.setenv(sites.VARIABLE, str(tmp_path))
    monkeypatch.setenv("SELFGUIDE_TRIED", "tried")
    cluster = compose(["experiment=own", "cluster=slurm"]).cluster
    assert cluster.account == meant
    if meant != "debug":
        assert cluster.modules == (meant,) and cluster.environment == {"A": meant}


@pytest.mark.parametrize("text", ["${BATCH}", "${oc.env:SELFGUIDE_NOT}", "${train.bacth}"])
def test_a_brace_that_names_nothing_where_no_text_stands_says_what_it_may_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "experiment").mkdir()
    path = tmp_path / "experiment" / "own.yaml"
    own = "# @package _global_\ndefaults:\n  - digits_uncond\ntrain:\n  batch: %s\n"
    path.write_text(own % text)
    monkeypatch.setenv(sites.VARIABLE, str(tmp_path))
    with pytest.raises(UserError) as refused:
        compose(["experiment=own", "cluster=local"])
    cure = str(refused.value).rpartition("stands, ")[2].partition(" for")[0]
    path.write_text(own % cure.replace("NAME", "SELFGUIDE_NOT").replace("DEFAULT", "64"))
    assert compose(["experiment=own", "cluster=local"]).train.batch == 64


@pytest.mark.parametrize(
    "text", [b"train: {a", b"seed: [1", b"a: b: c", b"\xff\xfe\x00", b"\tseed: 1"]
)
@pytest.mark.parametrize("group", ["experiment", "data", "cluster"])
def test_a_file_that_is_no_yaml_is_named_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, group: str
) -> None:
    (tmp_path / group).mkdir()
    (tmp_path / group / "own.yaml").write_bytes(text)
    monkeypatch.setenv(sites.VARIABLE, str(tmp_path))
    words = {"experiment": "digits_uncond", group: "own"}
    with pytest.raises(UserError, match=r"own\.yaml cannot be read as YAML"):
        compose([f"{name}={value}" for name, value in words.items()])
