"""Every table and figure of the four papers that this project follows, row by row. No torch.

`python -m tools.reproduce` lists, prints and runs them; docs/reproduce.md is made of them; and a submission that is one
of them expects the numbers that were published of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from selfguide.spec.config import Config, DataConfig, EvaluationConfig, TrainConfig
from selfguide.spec.config.evaluation import Expected
from selfguide.spec.config.laws import NotIdentity, fields_of
from selfguide.spec.extras import measured
from selfguide.spec.published import cedm, ddaepp, sgdm, sgfm
from selfguide.spec.published.row import Row, check
from selfguide.spec.suggest import check_known
from shards.errors import UserError

__all__ = [
    "DIFFERS", "PAPERS", "ROWS", "Row", "check", "check_scores", "expected", "table", "tables",
]  # fmt: skip

# of `key=value`, those that choose a file: another model is another row
GROUPS = ("model", "path", "sampler", "guidance", "data", "init", "augment")

# short name -> authors and title
PAPERS = {
    "sgfm": sgfm.PAPER,
    "sgdm": sgdm.PAPER,
    "cedm": cedm.PAPER,
    "ddaepp": ddaepp.PAPER,
}
# what is otherwise here in every row of a paper
DIFFERS = {
    "sgfm": sgfm.DIFFERS,
    "sgdm": sgdm.DIFFERS,
    "cedm": cedm.DIFFERS,
    "ddaepp": ddaepp.DIFFERS,
}
ROWS = check([*sgfm.ROWS, *sgdm.ROWS, *cedm.ROWS, *ddaepp.ROWS])


def tables(paper: str) -> list[str]:
    """The tables, figures and sections of a paper, in its order.

    Raises:
        UserError: no such paper.
    """
    check_known("paper", paper, PAPERS)
    return list(dict.fromkeys(row.table for row in ROWS if row.paper == paper))


def table(paper: str, name: str) -> tuple[Row, ...]:
    """The rows of one table.

    Raises:
        UserError: no such paper or table.
    """
    check_known("table", name, tables(paper))
    return tuple(row for row in ROWS if (row.paper, row.table) == (paper, name))


def expected(
    experiment: str, protocol: str | None, settings: Iterable[str]
) -> tuple[Expected, ...]:
    """What was published of an experiment as it was typed, each score once; nothing where no row is exactly that.

    A run elsewhere, on other data roots or of another seed is the same row. Where sidecars lie says nothing either,
    unless rows of the experiment differ in it.

    Args:
        experiment: a choice of `experiment=`.
        protocol: one choice of `evaluation=`; None is the experiment's own.
        settings: every other `key=value` that was typed.
    """
    wanted = {_plain(text) for text in settings if not _free(text.partition("=")[0])}
    unplaced = {text for text in wanted if text.partition("=")[0] not in _FOLDERS}
    of_it = [
        (row, {_plain(text) for text in row.overrides})
        for row in ROWS
        if row.experiment == experiment and row.images is None and not row.lacks
        if (protocol or row.paper) in row.protocols
    ]
    rows = [row for row, its_own in of_it if its_own == wanted]
    rows = rows or [row for row, its_own in of_it if its_own == unplaced]
    found: dict[str, Expected] = {}
    for row in rows:
        for each in row.expected:
            found.setdefault(each.metric, each)
    return tuple(found.values())


def check_scores(row: Row, config: Config) -> None:
    """Returns when the protocols of a row's config measure every number that was published of it.

    Raises:
        UserError: one is measured by none of them.
    """
    known = {name for each in config.scored_by for name in _scores(each.evaluation)}
    for metric in row.numbers:
        if metric not in known:
            raise UserError(
                f"{row.key} expects {metric}, and evaluation={row.protocol or row.paper} measures "
                f"{', '.join(sorted(known)) or 'nothing'}; name a protocol that measures it, or drop the number"
            )


def _scores(evaluation: EvaluationConfig) -> set[str]:
    """What a protocol's records hold that papers print."""
    if evaluation.protocol == "probe":
        return {"linear_accuracy", "knn_accuracy", "linear_accuracy_input", "knn_accuracy_input"}
    beside = {*measured(evaluation)}
    pairs = {"precision", "recall"} if "precision_recall" in beside else set()
    return {evaluation.protocol, *beside, *pairs}


_FOLDERS = ("guidance.ids", "guidance.layout", "guidance.dense")
# of evaluations, what changes no score, or says where its files are
_SAME_SCORE = (
    *("attempts", "batch", "decoder", "in_flight", "manifest", "milestone_images", "ranks", "require", "seed"),
    *("sha256", "snapshots", "weights"),
)  # fmt: skip


def _free(key: str) -> bool:
    """Whether a key changes neither what is learned nor how it is scored."""
    part, _, name = key.partition(".")
    if part in ("experiment", "cluster", "engine") or key in (
        "evaluation",
        "data.root",
        "init.path",
    ):
        return True
    if part == "evaluation":
        return name in _SAME_SCORE
    if not name:
        return key not in GROUPS
    cls = {"train": TrainConfig, "data": DataConfig}.get(part)
    laws = {each.name: each.law(NotIdentity) for each in fields_of(cls)} if cls else {}
    return laws.get(name) is not None


def _plain(text: str) -> str:
    """A setting with its numbers written one way: 1_000 as 1000."""
    key, equals, value = text.partition("=")
    return f"{key}{equals}{re.sub(r'(?<=[0-9])_(?=[0-9])', '', value)}"
