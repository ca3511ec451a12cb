"""The one grammar by which rows are chosen, in every command and on the page.

    digits images=256k      rows that have both: a word stands anywhere in experiment, variant, states, labels, run ids
    "not scored"            quotes keep blanks together
    -failed                 not; before any term. In a shell: --filter=-failed
    seed=0,1                a key has one of the values; != none of them
    train.batch>=256        keys compare with < <= > >= as numbers; 256k, 1.5M and 2_000 are numbers
    model.name~dit          a key's text contains this; !~ does not

Terms are separated by blanks and must all hold. Keys are the board's columns (`images`, `fd_digits`, `gpu_hours`, ...),
`experiment`, `state`, `run`, `seed`, `labels` (free or used), and the settings of a run (`train.batch`). Case does not
matter. A row of several runs has the values of all of them: one that fits is enough, and none may fit for `!=` and
`!~`. Ranks are those among the rows that are left. Of others' samples the name is looked at, as an experiment's is.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.board.collect import Board, Row, Table, flatten, ranked_anew, spelled
from launcher.board.columns import Column, columns
from launcher.board.others import Other
from launcher.board.read import Run
from launcher.board.states import Chip, chips
from selfguide.spec.suggest import nearest
from shards.errors import UserError

Facts = Mapping[str, Sequence[str | float]]

_TERM = re.compile(r"""-?(?:[^\s"]+|"[^"]*")+""")
_PARTS = re.compile(r"(-?)([A-Za-z_][\w.]*)(!=|!~|<=|>=|=|~|<|>)(.*)", re.DOTALL)
_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)([kmg]?)", re.IGNORECASE)
_SIZES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_ORDER: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
WORDS = "words"


@dataclass(frozen=True, kw_only=True)
class Term:
    """One condition on a row."""

    negated: bool
    # None: the values are words to look for anywhere
    key: str | None
    sign: str
    values: tuple[str, ...]

    def holds(self, facts: Facts) -> bool:
        # not what is not so is what is so
        return self._fits(facts) != (self.negated != (self.sign in ("!=", "!~")))

    def _fits(self, facts: Facts) -> bool:
        given = facts.get(WORDS if self.key is None else self.key, ())
        if self.sign in _ORDER:
            bound, compare = number(self.values[0]), _ORDER[self.sign]
            assert bound is not None
            found = (number(value) for value in given)
            return any(value is not None and compare(value, bound) for value in found)
        return any(_same(value, wanted, self.sign) for value in given for wanted in self.values)


def parse(text: str) -> tuple[Term, ...]:
    """The terms of a filter.

    Raises:
        UserError: a quote is not closed, or an order has no number behind it.
    """
    if text.count('"') % 2:
        raise UserError(f"--filter {text!r}: a quote is not closed")
    return tuple(_term(found.group()) for found in _TERM.finditer(text))


def _term(text: str) -> Term:
    parts = _PARTS.fullmatch(text)
    if parts is None:
        negated = text.startswith("-") and len(text) > 1
        word = text[negated:].replace('"', "")
        return Term(negated=negated, key=None, sign="~", values=(word.lower(),))
    minus, key, sign, rest = parts.groups()
    values = tuple(value.lower() for value in rest.replace('"', "").split(","))
    if sign in _ORDER and (len(values) != 1 or number(values[0]) is None):
        raise UserError(f"--filter {text!r}: {sign} needs a number, such as {key}{sign}256k")
    return Term(negated=bool(minus), key=key, sign=sign, values=values)


def number(value: str | float) -> float | None:
    """256k -> 256000.0; None for what is no number."""
    if isinstance(value, int | float):
        return float(value)
    found = _NUMBER.fullmatch(value)
    return float(found[1].replace("_", "")) * _SIZES[found[2].lower()] if found else None


def _same(value: str | float, wanted: str, sign: str) -> bool:
    text = str(value).lower()
    if sign in ("~", "!~"):
        return wanted in text
    mine, theirs = number(value), number(wanted)
    return text == wanted or (mine is not None and mine == theirs)


def facts(table: Table, row: Row, shown: Iterable[Column] | None = None) -> Facts:
    """What terms look at in a row: values by key, and all its words under `WORDS`."""
    found = _of_runs([s.run for s in row.runs], row.chips, row.variant, row.label_free)
    for column in shown or columns(table):
        value = column.value(row)
        if value is not None and column.id != "experiment":
            found[column.id] = [value]
    return found


def _of_runs(
    runs: Sequence[Run], chips: Iterable[Chip], variant: Iterable[str], label_free: bool
) -> dict[str, list[str | float]]:
    shown = list(chips)
    states, texts = [chip.label for chip in shown], [chip.text for chip in shown]
    ids = [run.id for run in runs]
    said = ("label-free" if label_free else "labels", *states, *ids)
    settings = flatten({k: v for k, v in runs[0].identity.items() if k != "seed"})
    found: dict[str, list[str | float]] = {key: [_plain(value)] for key, value in settings.items()}
    return found | {
        "experiment": [runs[0].experiment],
        "state": [*states, *texts],
        "run": list(ids),
        "seed": [run.seed for run in runs],
        "labels": ["free" if label_free else "used"],
        WORDS: [" ".join((runs[0].experiment, *variant, *said))],
    }


def _plain(value: Any) -> str | float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else spelled(value)


def filtered(board: Board, text: str) -> Board:
    """The board of those rows, ranked among themselves; tables of which nothing is left are left out.

    Raises:
        UserError: a key that no row has, or a term that is none.
    """
    terms = parse(text)
    if not terms:
        return board
    waiting = [(run, _of_runs([run], chips(run), (), run.label_free)) for run in board.waiting]
    tables, known = [], {key for _, each in waiting for key in each}
    for table in board.tables:
        shown = columns(table)
        with_facts = [(row, facts(table, row, shown)) for row in table.rows]
        known |= {key for _, each in with_facts for key in each} | {column.id for column in shown}
        kept = [row for row, each in with_facts if all(term.holds(each) for term in terms)]
        others = [other.record for other in table.others if keeps(terms, other)]
        if kept or others:
            rows = [replace(row, rank=None, tied=False) for row in kept]
            tables.append(ranked_anew(table, rows, others))
    _check_keys(terms, known - {WORDS})
    left = tuple(run for run, each in waiting if all(term.holds(each) for term in terms))
    return replace(board, tables=tuple(tables), waiting=left)


def keeps(terms: Iterable[Term], other: Other) -> bool:
    """Whether all terms hold for others' samples, of which nothing but the name is looked at."""
    named = {"experiment": [other.name], WORDS: [other.name]}
    return all(term.holds(named) for term in terms)


def _check_keys(terms: Iterable[Term], known: set[str]) -> None:
    for term in terms:
        if term.key is not None and known and term.key not in known:
            raise UserError(
                f"--filter: no row has {term.key!r}{nearest(term.key, known)}; keys are columns and settings, "
                "which `python -m launcher.board show RUN --json` lists"
            )
