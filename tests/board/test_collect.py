"""The laws of the ranking, on runs made in memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.board.collect import Row, collect, headline_images, over_seeds, standard_error
from launcher.board.read import Run
from launcher.board.states import chips, unscored
from launcher.compose import compose
from launcher.reconcile.decide import State
from selfguide.spec.contamination import NetUse
from selfguide.spec.metrics import FEATURES
from selfguide.spec.records import EvaluationRecord
from shards.errors import UserError

A = {"metric": "fd_digits", "g": 1.0}
B = {"metric": "fd_digits", "g": 1.5}


def record(
    images: int, fd: float | None, *, se: float | None = None, **more: Any
) -> EvaluationRecord:
    scores = {"fd_digits": fd, "fd_digits_se": se, **more.pop("scores", {})}
    made = EvaluationRecord(
        key=f"img-{images}",
        attempt=1,
        status="done",
        images=images,
        final=images == 100,
        protocol_key="a",
        protocol=A,
        scores={n: v for n, v in scores.items() if v is not None},
        nfe=50,
        label_free=True,
        time=float(images),
        seconds=1.0,
    )
    return replace(made, **more)


def run(
    experiment: str = "e",
    seed: int = 0,
    *records: EvaluationRecord,
    setting: Any = 0,
    id: str = "",
    **more: Any,
) -> Run:
    made = Run(
        id=id or f"{experiment}-{setting}-{seed}",
        experiment=experiment,
        seed=seed,
        images=100,
        created=0.0,
        identity={"train": {"setting": setting}, "seed": seed},
        root=Path("runs", experiment, id or f"{setting}-{seed}"),
        records=records,
        published=tuple(r.images for r in records),
        losses=(),
        attempts=1,
        seen=max([0, *(r.images for r in records)]),
        heard=1.0,
        state=State("running"),
        unscored=(),
    )
    return replace(made, **more)


def only_rows(*runs: Run, **how: Any) -> tuple[Row, ...]:
    (table,) = collect(runs, **how).tables
    return table.rows


def ranks(rows: tuple[Row, ...]) -> dict[str, tuple[int | None, bool]]:
    return {row.experiment: (row.rank, row.tied) for row in rows}


scores = st.one_of(st.none(), st.floats(0, 1e6), st.integers(0, 3).map(float))
some_runs = st.lists(
    st.builds(
        lambda e, seed, setting, points: run(
            e,
            seed,
            *(record(n, fd, se=se) for n, (fd, se) in sorted(points.items())),
            setting=setting,
        ),
        st.sampled_from(["p", "q", "r"]),
        st.integers(0, 3),
        st.integers(0, 1),
        st.dictionaries(
            st.sampled_from([25, 50, 100]), st.tuples(scores, st.none() | st.floats(0, 5))
        ),
    ),
    max_size=12,
    unique_by=lambda r: r.id,
)


@given(some_runs, st.randoms())
def test_the_order_of_the_files_changes_nothing(runs: list[Run], random: Any) -> None:
    shuffled = [replace(r, records=tuple(random.sample(r.records, len(r.records)))) for r in runs]
    random.shuffle(shuffled)

    def plain(board: Any) -> Any:
        return [(t.key, [replace(row, runs=()) for row in t.rows]) for t in board.tables]

    assert plain(collect(runs)) == plain(collect(shuffled))


@given(some_runs)
def test_ranks_follow_the_scores(runs: list[Run]) -> None:
    board = collect(runs)
    for table in board.tables:
        able = [row for row in table.rows if row.score is not None]
        assert list(table.rows[: len(able)]) == able, "rows without a score come last"
        assert all(row.rank is None and not row.tied for row in table.rows[len(able) :])
        means = [row.score.mean for row in able if row.score]
        assert means == sorted(means)
        if able:
            assert able[0].rank == 1
        for row in able:
            mates = [other for other in able if other.rank == row.rank]
            assert row.tied == (len(mates) > 1)
            assert row.rank == 1 + sum(1 for other in able if (other.rank or 0) < (row.rank or 0))


@given(some_runs)
def test_every_run_is_shown_once_in_a_table_or_as_waiting(runs: list[Run]) -> None:
    board = collect(runs)
    shown = [s.run.id for table in board.tables for row in table.rows for s in row.runs]
    assert sorted(shown + [r.id for r in board.waiting]) == sorted(r.id for r in runs)


def test_protocols_never_share_a_table() -> None:
    both = run(
        "both", 0, record(100, 5.0), record(100, 3.0, protocol_key="b", protocol=B, key="other")
    )
    board = collect([both, run("one", 0, record(100, 4.0))])
    found = {t.key: [(r.experiment, r.score.mean) for r in t.rows if r.score] for t in board.tables}
    assert found == {"a": [("one", 4.0), ("both", 5.0)], "b": [("both", 3.0)]}
    assert [t.differs for t in board.tables] == [("g",), ("g",)]


def test_seeds_are_one_row_with_their_spread() -> None:
    values = [7.0, 8.0, 9.5]
    (row,) = only_rows(*(run("e", seed, record(100, fd)) for seed, fd in enumerate(values)))
    assert row.score is not None and row.seeds == 3 and row.final
    assert row.score.mean == pytest.approx(statistics.mean(values))
    assert row.score.sd == pytest.approx(statistics.stdev(values))
    assert row.error == pytest.approx(statistics.stdev(values) / math.sqrt(3))


def test_other_settings_are_another_row_and_say_which() -> None:
    rows = only_rows(run("e", 0, record(100, 7.0)), run("e", 0, record(100, 5.0), setting=1))
    assert [row.variant for row in rows] == [("train.setting=1",), ("train.setting=0",)]


def test_a_repeated_seed_counts_once() -> None:
    twice = [run("e", 0, record(100, fd), id=f"n{fd}") for fd in (6.0, 8.0)]
    (row,) = only_rows(*twice, run("e", 1, record(100, 9.0)))
    assert row.score is not None and (row.score.n, row.score.mean) == (2, 8.0)
    assert row.seeds == 2


def test_seeds_are_compared_at_one_image_count() -> None:
    half = run("e", 1, record(50, 20.0), images=100)
    (row,) = only_rows(run("e", 0, record(50, 30.0), record(100, 7.0)), half)
    assert (row.images, row.seeds, row.final) == (100, 1, True)
    assert row.score is not None and row.score.mean == 7.0
    (row,) = only_rows(run("e", 0, record(25, 60.0), record(50, 30.0)), half)
    assert (row.images, row.seeds, row.final) == (50, 2, False)


@given(st.lists(st.sets(st.sampled_from([25, 50, 75]), min_size=1), min_size=1, max_size=5))
def test_headline_is_the_count_most_seeds_have_and_the_later_of_equals(
    seen: list[set[int]],
) -> None:
    chosen = headline_images([{n: record(n, 1.0) for n in s} for s in seen])
    votes = {n: sum(n in s for s in seen) for n in (25, 50, 75)}
    assert votes[chosen] == max(votes.values())
    assert all(votes[n] < votes[chosen] for n in votes if n > chosen)


def test_gaps_within_the_combined_standard_error_are_ties() -> None:
    rows = only_rows(
        run("a", 0, record(100, 5.0, se=0.3)),
        run("b", 0, record(100, 5.4, se=0.4)),  # 0.4 <= hypot(0.3, 0.4) = 0.5
        run("c", 0, record(100, 5.6, se=0.4)),  # near b, but 0.6 from the tier's first
        run("d", 0, record(100, 9.0, se=0.1)),
    )
    assert ranks(rows) == {"a": (1, True), "b": (1, True), "c": (3, False), "d": (4, False)}


def test_missing_scores_come_last_and_have_no_rank() -> None:
    rows = only_rows(run("a", 0, record(100, None)), run("b", 0, record(100, 5.0)))
    assert ranks(rows) == {"b": (1, False), "a": (None, False)}


def test_where_more_is_better_the_highest_is_first() -> None:
    runs = [run(e, 0, record(100, 5.0, scores={"nmi": v})) for e, v in (("a", 0.2), ("b", 0.6))]
    assert ranks(only_rows(*runs, metric="nmi")) == {"b": (1, False), "a": (2, False)}


def test_an_unknown_metric_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--metric 'fid_digits'.*did you mean 'fd_digits'"):
        collect([run("a", 0, record(100, 5.0))], metric="fid_digits")


def test_a_row_scored_in_a_net_that_guided_or_selected_it_has_a_badge_and_no_rank() -> None:
    """A model tuned on the distance in net A is best there, and not in net B, which ranks it."""
    nets = tuple(NetUse(net="A", sha256="aa", use=use) for use in ("guided", "selected"))
    in_a, in_b = ({"metric": "fd_digits", "feature_sha256": sha} for sha in ("aa", "bb"))
    runs = []
    for name, a, b, of in (("tuned", 1.0, 9.0, nets), ("honest", 5.0, 4.0, None)):
        measured = [
            record(100, a, protocol=in_a, protocol_key="a", nets=of),
            record(100, b, protocol=in_b, protocol_key="b", nets=of),
        ]
        runs.append(run(name, 0, *measured))
    tables = {table.key: table for table in collect(runs).tables}
    assert ranks(tables["a"].rows) == {"honest": (1, False), "tuned": (None, False)}
    assert ranks(tables["b"].rows) == {"honest": (1, False), "tuned": (2, False)}
    tuned = tables["a"].rows[-1]
    assert tuned.contaminations == ("guided by A", "selected by A") and tuned.score is not None
    assert {"guided by A", "selected by A"} <= {chip.text for chip in tuned.chips}
    assert tables["b"].rows[-1].contaminations == ()


def test_a_row_that_a_net_of_the_ratio_selected_has_no_rank_by_the_ratio_alone() -> None:
    sha = FEATURES["fid_clean"].sha256
    chosen = (NetUse(net="fid_clean", sha256=sha, use="selected"),)
    protocol = {**A, "extras": {"fdr": {"nets": {"fid_clean": sha}}}}
    runs = [
        run(name, 0, record(100, fd, scores={"fdr": fdr}, protocol=protocol, nets=nets))
        for name, fd, fdr, nets in (("tuned", 1.0, 1.0, chosen), ("honest", 5.0, 5.0, None))
    ]
    assert ranks(only_rows(*runs)) == {"tuned": (1, False), "honest": (2, False)}
    assert ranks(only_rows(*runs, metric="fdr")) == {"honest": (1, False), "tuned": (None, False)}


def test_best_is_of_all_snapshots_but_does_not_rank() -> None:
    (row,) = only_rows(run("e", 0, record(50, 4.0), record(100, 7.0)))
    assert row.score is not None and row.score.mean == 7.0
    assert row.runs[0].best is not None and row.runs[0].best.images == 50


def test_the_newest_record_of_a_snapshot_counts() -> None:
    again = record(100, 6.0, attempt=2, time=200.0)
    (row,) = only_rows(run("e", 0, again, record(100, 7.0)))
    assert row.score is not None and row.score.mean == 6.0


def test_label_free_needs_every_record_to_say_so() -> None:
    rows = only_rows(run("e", 0, record(100, 7.0)), run("f", 0, record(100, 7.0, label_free=False)))
    assert {row.experiment: row.label_free for row in rows} == {"e": True, "f": False}


def test_error_is_the_larger_of_seeds_and_measurement() -> None:
    spread = over_seeds([(0, 1.0), (1, 3.0)])
    assert spread is not None
    assert standard_error(spread, [0.1, 0.1]) == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert standard_error(spread, [3.0, 3.0]) == pytest.approx(3 / math.sqrt(2))
    assert standard_error(None, [1.0]) == 0.0
    assert over_seeds([(0, None), (1, math.nan)]) is None


def failed(images: int) -> EvaluationRecord:
    return record(images, None, status="failed", protocol_key="", message="out of memory")


DONE = {"published": (50, 100), "state": State("finished")}
STATES: list[tuple[Mapping[str, Any], tuple[EvaluationRecord, ...], list[str]]] = [
    ({"attempts": 0, "state": State("new")}, (), ["new"]),
    ({"seen": 10}, (), ["running"]),
    ({"state": State("queued")}, (), ["queued"]),
    ({"published": (50,), "unscored": (50,)}, (), ["running", "1 to score"]),
    (DONE | {"unscored": (100,)}, (record(50, 9.0),), ["finished", "1 to score"]),
    (
        DONE | {"state": State("evaluating"), "unscored": (50, 100)},
        (),
        ["evaluating", "2 to score"],
    ),
    (DONE, (), ["finished"]),
    (DONE | {"unscored": (100,)}, (failed(100),), ["finished", "1 to score"]),
    ({"published": (50, 100)}, (record(50, 9.0), record(100, 7.0)), ["final"]),
    ({"published": (50, 100)}, (failed(50), record(100, 7.0)), ["final", "1 not scored"]),
    ({"published": (50,)}, (failed(50), record(50, 7.0, attempt=2)), ["running"]),
    ({"state": State("failed", "rank 0: NaN loss")}, (), ["failed"]),
    ({"state": State("cancelled")}, (), ["cancelled"]),
    ({"state": State("unknown", "no answer")}, (), ["unknown"]),
]


@pytest.mark.parametrize(("changes", "records", "expected"), STATES)
def test_chips_say_where_a_run_stands(
    changes: Mapping[str, Any], records: tuple[EvaluationRecord, ...], expected: list[str]
) -> None:
    found = chips(run("e", 0, *records, **changes))
    assert [chip.label for chip in found] == expected
    for chip in found:
        if chip.kind == "failed":
            assert "out of memory" in chip.detail or "NaN loss" in chip.detail


def test_the_chips_of_a_row_count_its_runs() -> None:
    runs = [run("e", seed, record(100, 7.0)) for seed in (0, 1)]
    runs.append(run("e", 2, record(50, 9.0), published=(25, 50), unscored=(25,)))
    (row,) = only_rows(*runs)
    assert [chip.label for chip in row.chips] == ["2 final", "1 running", "1 to score"]


SWEPT: dict[str, Any] = {"protocol": B, "protocol_key": "b", "sweep": "s"}


def test_records_of_a_sweep_make_no_table_no_row_and_no_headline() -> None:
    both = run("both", 0, record(100, 5.0), record(100, 1.0, **SWEPT))
    only = run("only", 0, record(100, 2.0, **SWEPT))
    (table,) = collect([both, only]).tables
    assert table.key == "a" and ranks(table.rows) == {"both": (1, False)}
    assert [r.protocol_key for r in table.rows[0].runs[0].history] == ["a"]
    assert collect([both, only]).waiting == (only,)
    # whom somebody scores by that protocol has its table to himself
    own = run("own", 0, record(100, 3.0, protocol=B, protocol_key="b"))
    tables = {t.key: ranks(t.rows) for t in collect([both, only, own]).tables}
    assert tables == {"a": {"both": (1, False)}, "b": {"own": (1, False)}}


def test_records_of_a_sweep_count_under_a_protocol_that_scores_the_run_anyway() -> None:
    later = record(100, 2.0, **SWEPT)
    by_record = run("r", 0, record(50, 4.0, protocol=B, protocol_key="b"), later)
    by_config = run("c", 0, later, scored_by=frozenset("b"))
    (table,) = collect([by_record, by_config]).tables
    assert {row.experiment: row.score and row.score.mean for row in table.rows} == {
        "r": 2.0,
        "c": 2.0,
    }


def test_failed_points_of_a_sweep_are_not_snapshots_without_a_score() -> None:
    lost = record(100, None, status="failed", message="no room", **SWEPT)
    assert [c.label for c in chips(run("e", 0, record(100, 7.0), lost))] == ["final"]


def test_skipped_snapshots_are_counted_with_the_reason_until_they_are_scored() -> None:
    skipped = {"status": "skipped", "protocol_key": "a"}
    records = [record(n, None, **skipped, message="a newer one") for n in (25, 50)]
    records += [record(75, None, **skipped, message="by hand"), record(75, 8.0, attempt=2)]
    found = chips(run("e", 0, *records, failed(60), record(100, 7.0)))
    assert [(c.label, c.kind) for c in found] == [
        ("final", "final"), ("1 not scored", "failed"), ("2 skipped", "skipped"),
    ]  # fmt: skip
    assert found[2].detail == "at 25, 50 images: a newer one"
    assert unscored(run("e", 0, *records)) == ()


def test_chips_of_a_table_know_its_protocol_only() -> None:
    """Of two protocols one has scored the last snapshot; the other waits for it, and could not score the one before."""
    by_b: Any = {"protocol": B, "protocol_key": "b"}
    lost = record(50, None, status="failed", message="no room", **by_b)
    records = [record(n, 9.0) for n in (50, 100)] + [record(25, 9.0, **by_b), lost]
    one = run("e", 0, *records, state=State("evaluating"), unscored=(100,), waiting={"b": (100,)})
    tables = {t.key: [c.label for c in t.rows[0].chips] for t in collect([one]).tables}
    assert tables == {"a": ["final"], "b": ["evaluating", "1 to score", "1 not scored"]}
    cards = {t.key: t.rows[0].runs[0].chips for t in collect([one]).tables}
    assert {key: [c.label for c in found] for key, found in cards.items()} == tables


def test_failures_under_a_protocol_that_scored_nothing_are_told_in_the_tables_there_are() -> None:
    lost = record(50, None, status="failed", protocol={"metric": "fid"}, protocol_key="f")
    config = compose(["experiment=digits_dit"])
    config = replace(config, more_evaluations=(config.evaluation,))
    (row,) = only_rows(run("e", 0, record(50, 9.0), record(100, 7.0), lost, config=config))
    assert [chip.label for chip in row.chips] == ["final", "1 not scored by fid"]


def test_a_run_without_scores_waits() -> None:
    board = collect([run("e"), run("f", 0, failed(50)), run("g", 0, record(100, 7.0))])
    assert [r.experiment for r in board.waiting] == ["e", "f"]
    assert [row.experiment for table in board.tables for row in table.rows] == ["g"]
