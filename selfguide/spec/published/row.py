"""A row of a paper's table or figure: what trains it here, how it is scored, and the number that was published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from selfguide.spec.config.evaluation import Expected
from selfguide.spec.metrics import METRICS
from selfguide.spec.suggest import check_known
from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published row, by the name that it has in its table here.

    A row is a run (`experiment` with `overrides`), a command over runs that other rows name (`command`), or neither,
    and then `lacks` says what is missing.
    """

    # sgfm, sgdm, cedm or ddaepp; table3 or figure2, as the paper numbers them, or a section of it
    paper: str
    table: str
    name: str
    # a choice of `experiment=`, and what is typed behind it
    experiment: str | None = None
    overrides: tuple[str, ...] = ()
    # a choice of `evaluation=`, or several in brackets; None is the paper's, which its experiments choose
    protocol: str | None = None
    # score -> what was published
    numbers: Mapping[str, float] = field(default_factory=dict)
    # where these stand
    source: str = ""
    # of a row that is one snapshot of a run, how far it had been trained
    images: int | None = None
    command: str | None = None
    # why it cannot be had yet
    lacks: str | None = None
    # what is otherwise than in the paper, beside what is so of the whole paper
    differs: str | None = None

    @property
    def key(self) -> str:
        """The row's name among all: sgdm/table2/in32-self."""
        return f"{self.paper}/{self.table}/{self.name}"

    @property
    def expected(self) -> tuple[Expected, ...]:
        """The published numbers as the board shows them beside ours."""
        return tuple(
            Expected(metric=metric, value=value, source=self.source)
            for metric, value in self.numbers.items()
        )

    @property
    def protocols(self) -> tuple[str, ...]:
        """The choices of `evaluation=` that score it."""
        return tuple((self.protocol or self.paper).strip("[]").split(","))

    @property
    def settings(self) -> tuple[str, ...]:
        """What is typed after `python -m launcher.submit`; empty for a row that is no run."""
        if self.experiment is None:
            return ()
        scored = () if self.protocol is None else (f"evaluation={self.protocol}",)
        return (f"experiment={self.experiment}", *self.overrides, *scored)


def check(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Returns the rows, each of them sound.

    Raises:
        UserError: two rows of one name; a number without a source, of an unknown score, or in percent; or a row that
            is no run, no command and does not say what it lacks.
    """
    found = tuple(rows)
    names: set[str] = set()
    for row in found:
        if row.key in names:
            raise UserError(f"two rows are called {row.key}; rename one")
        names.add(row.key)
        if row.numbers and not row.source.strip():
            raise UserError(f"{row.key} expects {dict(row.numbers)} without a source; name one")
        for metric in row.numbers:
            check_known(f"a number of {row.key}", metric, METRICS)
            if METRICS[metric].form == "percent" and not 0 <= row.numbers[metric] <= 1:
                raise UserError(
                    f"{row.key} expects {metric}={row.numbers[metric]:g}, which is shown in percent: give a share of 1"
                )
        runs = [row.experiment is not None, row.command is not None]
        if sum(runs) > 1 or (not any(runs) and not row.lacks):
            raise UserError(
                f"{row.key} must be one thing: give experiment or command, or say in lacks what is missing"
            )
        if row.experiment is None and (row.overrides or row.protocol):
            raise UserError(f"{row.key} has overrides or a protocol without an experiment; name it")
    return found
