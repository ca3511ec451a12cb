"""`python -m tools.reproduce`: lists, commands from raw data, docs/reproduce.md, and rows at toy size."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from launcher.compose import compose
from selfguide.spec.published import PAPERS, ROWS, table, tables
from selfguide.spec.validate import validate
from shards.errors import UserError
from tools.annotate.__main__ import VERBS as ANNOTATIONS
from tools.reproduce import page, steps
from tools.reproduce.__main__ import main
from tools.reproduce.cost import PEAK, REACHED, gpu_hours
from tools.reproduce.shrink import Toy

ROOT = Path(__file__).parents[2]
# ten rows whose networks, paths and sources of conditions differ
FAMILIES = (
    "sgfm/table1/in100-none",
    "sgfm/table1/in100-patch",
    "sgfm/ablations/gradient",
    "sgdm/table2/in32-labels",
    "sgdm/table2/in64-self",
    "sgdm/table3/churches-none",
    "sgdm/table4/voc-boxed",
    "sgdm/table5/voc-segmented",
    "cedm/table1/cifar10-oracle",
    "ddaepp/table5/in100-dit-labels",
)
RUNS = [row for row in ROWS if row.settings and not row.lacks]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_ls_names_every_paper_table_and_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(json.loads(said(capsys, "ls", "--json"))) == set(PAPERS)
    assert json.loads(said(capsys, "ls", "sgdm", "--json"))["table2"] == 6
    rows = json.loads(said(capsys, "ls", "sgdm", "table2", "--json"))
    assert [row["expected"].get("fid_adm") for row in rows] == [9.2, 14.3, 7.3, 16.8, 36.1, 12.1]
    assert "IS 20.3" in said(capsys, "ls", "sgdm", "table2")


def test_show_prints_the_commands_of_a_row_from_raw_data_in_their_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (row,) = json.loads(said(capsys, "show", "sgdm", "table3", "in100-self", "--json"))
    made = [shlex.split(command, comments=True) for command in row["steps"]]
    outs = [words[words.index("--out") + 1] for words in made]
    assert outs == [
        "data/in100-256", "data/in100-sd", "notes/images/in100-dino", "notes/images/in100-dino-k1000",
        "notes/in100-dino-k1000",
    ] or outs[0] == "data/in100-256"  # fmt: skip
    # nothing is read before it is made
    for number, words in enumerate(made):
        later = set(outs[number:])
        assert not later & set(words[:-1]), words
    assert row["command"] == "python -m launcher.submit experiment=sgdm/in100_self"
    assert row["gpu_hours"] > 0


@pytest.mark.parametrize("words", [("show", "sgdm", "table99"), ("ls", "sgfn"), ("show", "sgdm", "table2", "in32")])
def test_a_name_that_is_none_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError):
        main(words)


def test_every_file_that_a_shipped_row_names_has_a_step_that_makes_it() -> None:
    frames: dict[tuple[str, ...], object] = {}
    for experiment in {row.experiment for row in RUNS}:
        config = compose([f"experiment={experiment}", "cluster=slurm"], frames)
        assert steps.before(config)
    for row in RUNS:
        for word in row.overrides:
            key, _, value = word.partition("=")
            if key in ("guidance.ids", "guidance.layout", "guidance.dense", "evaluation.shards"):
                assert steps.step(value).command


def test_every_step_is_a_command_line_that_is_understood() -> None:
    for made, command in steps.DATA.items():
        words = shlex.split(f"{command} --out {made}")
        assert words[:3] == ["python", "-m", "tools.shards"]
        shards_parser().parse_args(words[3:])
    for experiment in {row.experiment for row in RUNS}:
        for step in steps.before(compose([f"experiment={experiment}", "cluster=slurm"])):
            words = shlex.split(step.command, comments=True)
            if words[:3] == ["python", "-m", "tools.annotate"]:
                assert words[3] in ANNOTATIONS


def test_gpu_hours_follow_from_flops() -> None:
    config = compose(["experiment=sgdm/in32_none", "cluster=slurm"])
    # 59 GFLOP an image by the dry run
    by_hand = 59.0e9 * config.train.images / (PEAK * REACHED) / 3600
    assert gpu_hours(config) == pytest.approx(by_hand, rel=0.01)
    online = compose(["experiment=sgfm/in100_online", "cluster=slurm"])
    none = compose(["experiment=sgfm/in100_none", "cluster=slurm"])
    # the teacher's pass, in half of training
    assert gpu_hours(online) / gpu_hours(none) == pytest.approx(1 + 0.5 / 3, rel=0.02)


def test_the_page_is_what_the_table_of_rows_makes() -> None:
    assert (ROOT / "docs" / "reproduce.md").read_text() == page.text(), (
        "run: python -m tools.reproduce page --out docs/reproduce.md"
    )


def test_the_page_names_what_is_not_built_with_its_reason() -> None:
    text = (ROOT / "docs" / "reproduce.md").read_text()
    for word in ("SODA", "MSS", "self-conditioning", "tools.annotate truth"):
        assert word in text.partition("## What is not built")[2]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    made = Toy(tmp_path_factory.mktemp("toy"), 256)
    made.prepare()
    return made


@pytest.mark.parametrize("key", FAMILIES)
def test_a_row_at_toy_size_keeps_its_method_and_passes_validation(toy: Toy, key: str) -> None:
    (row,) = (row for row in ROWS if row.key == key)
    whole, small = compose([*row.settings, "cluster=local"]), compose(toy.settings(row))
    validate(small)
    assert small.model.name == whole.model.name and small.path == whole.path
    assert small.guidance.source == whole.guidance.source
    assert small.sampler.name == whole.sampler.name and small.sampler.g == whole.sampler.g
    assert small.experiment == whole.experiment and small.data.shape == (1, 8, 8)
    expected = {each.value for each in small.evaluation.expected}
    assert expected <= {each.value for each in row.expected}


def test_a_row_that_lacks_something_is_not_run_at_toy_size(toy: Toy) -> None:
    (row,) = (row for row in table("ddaepp", "table2") if row.name == "cifar10-edm-self")
    with pytest.raises(UserError, match="self-conditioning"):
        toy.settings(row)


def test_a_table_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row that is a run"):
        main(["sgdm", "figure9", "--runs", str(tmp_path)])
