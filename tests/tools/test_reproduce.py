"""The rows of four papers: complete, sound, each a run that a dry run accepts; and `python -m tools.reproduce`.

All in one file, since composing a hundred experiments takes ten seconds and is done once.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launcher import describe
from launcher.choices import of_papers
from launcher.compose import Frames, compose
from selfguide.spec.config import Config
from selfguide.spec.published import PAPERS, ROWS, Row, check, check_scores, table, tables
from selfguide.spec.validate import validate
from shards import read_all, sidecar
from shards.errors import UserError
from tools import confidence, sample_options, verbs
from tools.annotate.__main__ import VERBS as ANNOTATIONS
from tools.annotate.__main__ import _common as annotated
from tools.reproduce import page, picture, steps
from tools.reproduce.__main__ import main
from tools.reproduce.cost import PEAK, REACHED, gpu_hours
from tools.reproduce.shrink import Toy
from tools.shards.__main__ import VERBS as SHARDS

# rows of each table, figure and section, as the papers have them
COUNTS = {
    "sgfm": {
        "table1": 6, "table3": 7, "ablations": 4, "appendix7": 1, "figure3": 1, "figure4": 2, "figure5": 1,
        "figure6": 6, "figure9": 1, "figure11": 1, "figure12": 1, "figure13": 1, "figure15": 3, "figure16": 1,
        "figure19": 1, "table5": 3,
    },
    "sgdm": {
        "table1": 6, "figure2": 8, "figure3": 6, "figure4": 2, "table2": 6, "table3": 5, "appendixA1": 2, "table4": 8,
        "table5": 12, "table7": 3, "figure6": 1, "figure9": 1, "figure10": 4, "figure11": 1, "figure13": 1,
        "figure16": 1, "figure18": 1, "figure22": 1, "figure25": 1, "figure26": 2,
    },
    "cedm": {
        "table1": 22, "figure2": 4, "table2": 10, "table3": 4, "figure3": 23, "figure4": 15, "table4": 3,
        "appendixC4": 2, "figure5": 3, "figure6": 1, "figure7": 1, "figure8": 1, "figure9": 1, "figure11": 1,
        "figure15": 1, "section4.1": 1, "section5": 2,
    },
    "ddaepp": {
        "table2": 28, "table3": 33, "table4": 10, "table5": 10, "table6": 30, "section4.1": 1, "section4.2": 3,
        "section5.1": 2, "table7": 12, "figure3": 1, "figure4": 1, "figure5": 1, "figure6": 1, "figure7": 1,
    },
}  # fmt: skip
PLAIN = Row(paper="sgdm", table="table2", name="a", experiment="sgdm/in32_none")


ROOT = Path(__file__).parents[2]
# rows whose networks, paths and sources of conditions differ
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
    "ddaepp/table5/in100-dit-labels-self",
    "ddaepp/table2/cifar10-edm-self",
    "ddaepp/table3/cifar10-edm-self-aug-cl",
    "ddaepp/table7/target-pooled",
)
RUNS = [row for row in ROWS if row.settings and not row.lacks]


FRAMES: Frames = {}


@functools.cache
def composed(*words: str) -> Config:
    return compose([*words, "cluster=slurm"], FRAMES)


def dry_run(*words: str) -> Config:
    """What `launcher.submit ... dry_run=true` looks at, in this process."""
    config = composed(*words)
    validate(config)
    assert describe.facts(config)["parameters"] > 0
    return config


@pytest.mark.parametrize("paper", COUNTS)
def test_the_table_of_rows_counted_by_table_is_complete(paper: str) -> None:
    found = {name: len(table(paper, name)) for name in tables(paper)}
    assert found == COUNTS[paper]


def test_every_row_that_is_a_run_passes_a_dry_run_and_expects_what_was_published() -> None:
    bad = {}
    for row in (row for row in ROWS if row.experiment is not None):
        try:
            config = dry_run(*row.settings)
            check_scores(row, config)
            if not row.lacks and row.images is None:
                ours = {
                    (e.metric, e.value)
                    for each in config.scored_by
                    for e in each.evaluation.expected
                }
                assert {(e.metric, e.value) for e in row.expected} <= ours
        except (UserError, AssertionError) as error:
            bad[row.key] = str(error)
    assert not bad


def test_every_experiment_of_a_paper_is_in_a_row_and_scored_as_its_paper_scores() -> None:
    used = {row.experiment for row in ROWS}
    assert set(of_papers()) == used - {None}
    for name in of_papers():
        own, scored = composed(f"experiment={name}"), f"evaluation={name.split('/')[0]}"
        paper = composed(
            f"experiment={next(each for each in of_papers() if each[:4] == name[:4])}", scored
        )
        assert replace(own.evaluation, shards=None, expected=()) == replace(
            paper.evaluation, shards=None, expected=()
        )
        assert own.experiment == name.replace("/", "_")


def test_a_row_that_is_a_submission_with_a_file_of_one_s_own_passes_a_dry_run() -> None:
    typed = [row.command.split()[3:] for row in table("cedm", "figure5") if row.command]
    assert len(typed) == 3
    for words in typed:
        config = composed(*words)
        validate(config)
        assert config.evaluation.metrics == ("ood_auroc",)


def test_no_two_rows_are_one_run_with_two_numbers() -> None:
    """Of one score under one protocol; a snapshot on the way is another number of it."""
    found: dict[tuple[Any, ...], set[float]] = {}
    for row in (row for row in ROWS if not row.lacks and row.images is None):
        for each in row.expected:
            run = row.experiment or row.command
            key = (run, frozenset(row.overrides), row.protocols, each.metric)
            found.setdefault(key, set()).add(each.value)
    assert not {key: values for key, values in found.items() if len(values) > 1}


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["experiment=sgdm/in32_self"], 7.3),
        (["experiment=sgdm/in32_self", "seed=3", "nodes=2", "data.root=/x", "guidance.ids=/y"], 7.3),
        (["experiment=sgdm/in32_self", "evaluation=sgdm", "engine=zero1"], 7.3),
        (["experiment=sgdm/voc_boxed", "guidance.groups=50", "guidance.ids=notes/voc-dino-k50"], 18.6),
        (["experiment=sgdm/stuff_none", "evaluation=sgdm_val"], 34.1),
        (["experiment=sgdm/in32_self", "train.images=25_623_296"], None),
        (["experiment=sgdm/in32_self", "train.batch=64"], None),
        (["experiment=sgdm/in32_self", "sampler.g=3"], None),
        (["experiment=sgdm/in32_self", "evaluation.samples=1000"], None),
        (["experiment=sgdm/in32_self", "path=ddpm"], None),
        # with and without self-conditioning and the contrastive loss
        (["experiment=ddaepp/cifar10_edm"], 3.39),
        (["experiment=ddaepp/cifar10_edm", "model.self_condition=out_7"], 3.30),
        (["experiment=ddaepp/cifar10_edm", "model.self_condition=out_5"], None),
        (
            ["experiment=ddaepp/cifar10_edm", "augment=edm", "data.flip=false", "path.weighting=uncertainty",
             "path.uncertainty=normalised", "contrastive.weight=0.01", "contrastive.layer=out_7",
             "contrastive.noise_time=0.0565"],
            3.42,
        ),
        (["experiment=digits_dit"], None),
    ],
)  # fmt: skip
def test_a_run_expects_a_published_number_where_it_is_that_row_alone(
    typed: list[str], wanted: float | None
) -> None:
    found = {each.metric: each.value for each in composed(*typed).evaluation.expected}
    assert found.get("fid_adm") == wanted


def test_a_run_scored_by_two_protocols_expects_each_number_of_its_own() -> None:
    config = composed("experiment=ddaepp/cifar10_edm", "evaluation=[ddaepp,probe_test]")
    found = [each.evaluation.expected for each in config.scored_by]
    assert [[each.metric for each in one] for one in found] == [["fid_adm", "linear_accuracy"]] * 2
    assert found[0][1].value == pytest.approx(0.9141)


def test_what_is_typed_of_expected_is_kept() -> None:
    typed = "evaluation.expected=[{metric: fid_adm, value: 2.5, source: mine}]"
    (one,) = composed("experiment=sgdm/in32_self", typed).evaluation.expected
    assert (one.value, one.source) == (2.5, "mine")


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([PLAIN, PLAIN], "two rows"),
        ([replace(PLAIN, numbers={"fid_adm": 1.0})], "without a source"),
        ([replace(PLAIN, numbers={"linear_accuracy": 63.56}, source="SGDM")], "give a share of 1"),
        ([replace(PLAIN, numbers={"fid_amd": 1.0}, source="SGDM")], "fid_adm"),
        ([replace(PLAIN, experiment=None)], "lacks"),
        ([replace(PLAIN, command="python -m tools.sample")], "experiment or command"),
        ([replace(PLAIN, experiment=None, lacks="x", overrides=("seed=1",))], "without an experiment"),
    ],
)  # fmt: skip
def test_a_table_with_an_unsound_row_is_refused(rows: list[Row], names: str) -> None:
    with pytest.raises(UserError, match=names):
        check(rows)


def test_a_row_whose_protocol_does_not_measure_its_number_is_refused() -> None:
    row = replace(PLAIN, numbers={"fdd": 100.0}, source="SGDM")
    with pytest.raises(UserError, match="expects fdd"):
        check_scores(row, composed(*row.settings))


def test_rows_that_begin_from_weights_trained_with_labels_say_so_in_their_config() -> None:
    for row in (row for row in ROWS if row.paper == "sgfm" and row.experiment):
        init = composed(*row.settings).init
        assert (init.source, init.form) == ("official", "uvit")


def test_most_rows_are_runs() -> None:
    assert len(RUNS) > 150


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
        "data/in100-256", "data/in100-sd", "notes/in100-dino", "notes/images/in100-dino-k1000",
        "notes/in100-dino-k1000",
    ]  # fmt: skip
    # k-means as the published code has it, and of no other paper's rows
    assert made[3][-5:-2] == ["--per-group", "256", "--assign-raw"]
    (other,) = json.loads(said(capsys, "show", "sgfm", "table1", "in100-dino", "--json"))
    assert not any("--assign-raw" in command for command in other["steps"])
    # nothing is read before it is made
    for number, words in enumerate(made):
        later = set(outs[number:])
        assert not later & set(words[:-1]), words
    assert row["command"] == "python -m launcher.submit experiment=sgdm/in100_self"
    assert row["gpu_hours"] > 0


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("show", "sgdm", "table99"), "table7"),
        (("ls", "sgfn"), "sgfm"),
        (("show", "sgdm", "table2", "in32-slf"), "in32-self"),
        (("sgd", "table2", "--shrink", "digits"), "sgdm"),
        (("shwo", "sgdm"), "show"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(words: tuple[str, ...], near: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{near}'"):
        main(words)


def test_a_dry_run_of_a_row_makes_no_run_and_asks_no_board_of_one(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = ["sgdm", "table2", "in32-none", "--runs", str(runs), "--set", "dry_run=true"]
    assert main([*words, "cluster=local"]) == 0
    assert not runs.exists()


def test_every_file_that_a_shipped_row_names_has_a_step_that_makes_it() -> None:
    for experiment in {row.experiment for row in RUNS}:
        assert steps.before(composed(f"experiment={experiment}"))
    for row in RUNS:
        for word in row.overrides:
            key, _, value = word.partition("=")
            if key in ("guidance.ids", "guidance.layout", "guidance.dense", "evaluation.shards"):
                assert steps.step(value).command


def test_every_step_is_a_command_line_that_is_understood() -> None:
    for made, command in steps.DATA.items():
        words = shlex.split(f"{command} --out {made}")
        assert words[:3] == ["python", "-m", "tools.shards"]
        verbs.parse("tools.shards", None, SHARDS, words[3:])
    typed = {
        step for row in RUNS for step in steps.before(composed(*row.settings)) if not step.by_hand
    }
    seen = set()
    for step in typed:
        words = shlex.split(step.command, comments=True)
        kind = (words[2], words[3], *(word for word in words if word.startswith("--")))
        # one of each form: a parser of all verbs takes a while to be made
        if kind in seen:
            continue
        seen.add(kind)
        package, known, common = {
            "tools.shards": ("tools.shards", SHARDS, None),
            "tools.annotate": ("tools.annotate", ANNOTATIONS, annotated),
        }[words[2]]
        verbs.parse(package, None, known, words[3:], *filter(None, [common]))


def test_every_command_of_a_row_is_a_command_line_that_is_understood() -> None:
    parsers: dict[str, Callable[[], argparse.ArgumentParser]] = {
        "tools.sample": lambda: sample_options.parser(None),
        "tools.confidence": confidence._parser,
    }
    typed = [shlex.split(row.command) for row in ROWS if row.command]
    read = [words for words in typed if words[2] in parsers]
    assert {words[2] for words in read} == {*parsers}
    for words in read:
        # what a user puts in stands there in capitals
        given = ["7" if word == "N" else word for word in words[3:]]
        parsers[words[2]]().parse_args(given)
    annotations = [words[3:] for words in typed if words[2] == "tools.annotate"]
    for words in annotations:
        verbs.parse("tools.annotate", None, ANNOTATIONS, words, annotated)


def test_gpu_hours_follow_from_flops() -> None:
    config = composed("experiment=sgdm/in32_none")
    # 59 GFLOP an image by the dry run
    by_hand = 59.0e9 * config.train.images / (PEAK * REACHED) / 3600
    assert gpu_hours(config) == pytest.approx(by_hand, rel=0.01)
    online = composed("experiment=sgfm/in100_online")
    none = composed("experiment=sgfm/in100_none")
    # the teacher's pass, in half of training
    assert gpu_hours(online) / gpu_hours(none) == pytest.approx(1 + 0.5 / 3, rel=0.02)
    told_apart = composed("experiment=sgfm/in100_none", "contrastive.weight=0.01")
    assert gpu_hours(told_apart) / gpu_hours(none) == pytest.approx(4 / 3)


def test_the_page_is_what_the_table_of_rows_makes() -> None:
    assert (ROOT / "docs" / "reproduce.md").read_text() == page.text(FRAMES), (
        "run: python -m tools.reproduce page --out docs/reproduce.md"
    )


def test_the_page_names_what_is_not_built_with_its_reason() -> None:
    text = (ROOT / "docs" / "reproduce.md").read_text()
    for word in ("SODA", "MSS"):
        assert word in text.partition("## What is not built")[2]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    made = Toy(tmp_path_factory.mktemp("toy"), 256)
    made.prepare()
    return made


@pytest.mark.parametrize("key", FAMILIES)
def test_a_row_at_toy_size_keeps_its_method_and_passes_validation(toy: Toy, key: str) -> None:
    (row,) = (row for row in ROWS if row.key == key)
    whole, small = composed(*row.settings), compose(toy.settings(row))
    validate(small)
    assert small.model.name == whole.model.name and small.path == whole.path
    assert small.guidance.source == whole.guidance.source
    assert small.sampler.name == whole.sampler.name and small.sampler.g == whole.sampler.g
    assert small.experiment == whole.experiment and small.data.shape == (1, 8, 8)
    expected = {each.value for each in small.evaluation.expected}
    assert expected <= {each.value for each in row.expected}


def test_rows_of_other_numbers_of_groups_are_other_runs_at_toy_size(toy: Toy) -> None:
    rows = [row for row in table("sgdm", "figure2") if row.name in ("k10", "k100", "k500")]
    found = [compose(toy.settings(row)).guidance for row in rows]
    assert [guidance.groups for guidance in found] == [3, 10, 22]
    for guidance in found:
        groups = sidecar.read(guidance.folders["ids"])
        assert groups.groups == guidance.groups and not groups.saw_labels


def test_rows_with_people_s_labels_are_told_them_at_toy_size_and_say_so(toy: Toy) -> None:
    (row,) = (row for row in table("sgdm", "table4") if row.name == "voc-boxes")
    config = compose(toy.settings(row))
    validate(config)
    labels = sidecar.read(config.guidance.folders["ids"])
    assert (labels.kind, labels.saw_labels) == ("multi_hot", True)
    assert (labels.rows().argmax(1) == read_all(toy.shards)["y"]).all()


def finished(folder: Path, key: str, score: float) -> picture.Finished:
    """A row with samples and a score."""
    (row,) = (row for row in ROWS if row.key == key)
    grid = folder / f"{row.name}.png"
    Image.fromarray(np.zeros((140, 575), dtype=np.uint8)).save(grid)
    scores = {"fd_digits": score, "fd_digits_se": 0.5}
    return picture.Finished(row, "fd_digits", scores, grid)


def test_a_table_is_drawn_with_a_line_for_each_row(tmp_path: Path) -> None:
    keys = ["sgdm/table2/in32-none", "sgdm/table2/in32-self", "sgdm/figure3/labels"]
    heights = []
    # of rows without a published number too
    for count in (1, 3):
        rows = [finished(tmp_path, key, 3.0 + n) for n, key in enumerate(keys[-count:])]
        picture.draw(rows, "a table", tmp_path / "drawn" / "table.png")
        heights.append(Image.open(tmp_path / "drawn" / "table.png").height)
    assert heights[1] > 1.5 * heights[0]
    with pytest.raises(UserError, match="no row has a score"):
        picture.draw([], "a table", tmp_path / "none.png")


def test_a_row_that_lacks_something_is_not_run_at_toy_size(toy: Toy) -> None:
    (row,) = (row for row in table("ddaepp", "table3") if row.name == "cifar10-soda")
    with pytest.raises(UserError, match="cannot be run: SODA"):
        toy.settings(row)


def test_a_table_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row that is a run"):
        main(["sgdm", "figure9", "--runs", str(tmp_path)])
