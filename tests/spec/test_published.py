"""The rows of the four papers: complete, sound, and each a run that a dry run accepts."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from launcher import describe
from launcher.compose import Frames, compose, of_papers
from selfguide.spec.config import Config
from selfguide.spec.published import ROWS, Row, check, check_scores, table, tables
from selfguide.spec.validate import validate
from shards.errors import UserError

# rows of each table, figure and section, as the papers have them
COUNTS = {
    "sgfm": {
        "table1": 6, "table3": 7, "ablations": 4, "appendix7": 1, "figure3": 1, "figure4": 1, "figure5": 1,
        "figure6": 4, "figure9": 1, "figure11": 1, "figure13": 1, "figure15": 3, "figure16": 1, "figure19": 1,
        "table5": 3,
    },
    "sgdm": {
        "table1": 6, "figure2": 6, "figure3": 6, "figure4": 2, "table2": 6, "table3": 5, "appendixA1": 2, "table4": 8,
        "table5": 12, "table7": 3, "figure9": 1, "figure10": 4, "figure11": 1, "figure13": 1, "figure16": 1,
        "figure18": 1, "figure22": 1, "figure25": 1, "figure26": 1,
    },
    "cedm": {
        "table1": 19, "figure2": 4, "table2": 10, "table3": 4, "figure3": 15, "figure4": 15, "table4": 3,
        "appendixC4": 2, "figure5": 3, "figure6": 1, "figure7": 1, "figure8": 1, "figure9": 1, "figure11": 1,
        "figure15": 1, "section5": 1,
    },
    "ddaepp": {
        "table2": 28, "table3": 33, "table4": 10, "table5": 10, "table6": 30, "section4.2": 3, "table7": 12,
        "figure3": 1, "figure4": 1, "figure6": 1, "figure7": 1,
    },
}  # fmt: skip
PLAIN = Row(paper="sgdm", table="table2", name="a", experiment="sgdm/in32_none")


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
            key = (row.experiment, frozenset(row.overrides), row.protocols, each.metric)
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
        # and not what is published of it with self-conditioning, which is not built
        (["experiment=ddaepp/cifar10_edm"], 3.39),
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


def test_what_lacks_something_is_counted() -> None:
    lacking = Counter(row.paper for row in ROWS if row.lacks)
    assert sum(row.experiment is not None and not row.lacks for row in ROWS) >= 150, lacking
