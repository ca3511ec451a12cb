"""The harness that every benchmark joins: it finds a real difference, and none where there is none."""

import itertools
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from selfguide.spec.run import RunFolder
from selfguide.training.saver import Saver
from shards.errors import UserError
from tools.bench import __main__ as command
from tools.bench import engine, saves
from tools.bench.gpu.steps import config_of
from tools.bench.harness import Variant, bootstrapped, measure


class Clock:
    """Time that passes only where a variant says so, with the unrest of a busy machine."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def now_s(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.calls += 1
        self.now += seconds * (1 + 0.1 * (self.calls * 7 % 11) / 11)


def test_thrice_the_work_is_slower_and_the_same_work_is_not() -> None:
    clock, calls, fences = Clock(), list[str](), list[int]()

    def variant(name: str, seconds: float) -> Variant:
        def run() -> None:
            calls.append(name)
            clock.work(seconds)

        return Variant(name, run)

    variants = [variant("base", 2.0), variant("same", 2.0), variant("thrice", 6.0)]
    found = measure(
        variants, repeats=21, warmup=2, units=2, fence=lambda: fences.append(1), clock=clock.now_s
    )
    rows = {row.name: row for row in found}
    assert rows["thrice"].verdict == "slower" and rows["thrice"].ratio == pytest.approx(3, abs=0.3)
    assert rows["same"].verdict == "no difference" and rows["same"].ratio == pytest.approx(
        1, abs=0.1
    )
    assert rows["base"].ratio == 1 and 1 <= rows["base"].low <= rows["base"].median <= 1.1
    # every turn runs the base twice: once as itself, once as the control
    assert calls.count("base") == 2 * 23 and calls.count("thrice") == 23
    assert len(fences) == 2 * len(calls)


def test_variants_take_turns_and_none_always_follows_the_same_one() -> None:
    calls: list[str] = []
    variants = [Variant(n, lambda n=n: calls.append(n)) for n in "abcde"]  # type: ignore[misc]
    measure(variants, repeats=60, warmup=0)
    turns = [calls[i : i + 6] for i in range(0, 360, 6)]
    assert all(sorted(turn) == [*"aabcde"] for turn in turns)
    # rotated orders would keep all neighbours but one
    before = Counter(pair for turn in turns for pair in itertools.pairwise(turn))
    assert all(before[x, y] < 25 for x in "bcde" for y in "bcde" if x != y)
    again = list(calls)
    calls.clear()
    measure(variants, repeats=60, warmup=0)
    assert calls == again, "every rank has the same order"


@pytest.mark.slow
def test_the_engine_suite_runs_and_speaks_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BATCHES", (8,))
    assert command.main(["engine", "--repeats", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = {row["name"].removeprefix("8 images: "): row for row in found["suites"]["engine"]}
    parts = ["waiting for a batch", "asking whether to stop", *engine.AVERAGES]
    wanted = {"hand-written DDP", "no communication", engine.OWN_ZERO_1, *engine.ENGINES}
    wanted |= {f"{part}, alone" for part in parts}
    assert wanted < rows.keys()
    assert all(0 < rows[f"{part}, alone"]["ratio"] < 1 for part in parts)
    assert all(row["median"] > 0 for row in rows.values()) and found["machine"]
    features = [row["ratio"] for name, row in rows.items() if name.startswith("features")]
    assert len(features) == 3 and features[0] == 1.0


def test_a_ratio_is_to_the_variant_that_was_named_and_else_to_the_first() -> None:
    clock = Clock()
    takes = {"a": 1.0, "b": 2.0, "c": 3.0}
    variants = [
        Variant("a", lambda: clock.work(takes["a"])),
        Variant("b", lambda: clock.work(takes["b"])),
        Variant("c", lambda: clock.work(takes["c"]), "b"),
    ]
    rows = {row.name: row for row in measure(variants, repeats=40, warmup=0, clock=clock.now_s)}
    assert rows["b"].ratio == pytest.approx(2.0, rel=0.2)
    assert rows["c"].ratio == pytest.approx(1.5, rel=0.2)


def test_the_bootstrap_holds_the_median_as_often_as_it_says() -> None:
    """Of 400 samples whose median is known; and it narrows with the root of their number."""
    rng = np.random.default_rng(0)
    samples = [list(rng.lognormal(size=41)) for _ in range(400)]
    held = [low <= 1.0 <= high for low, high in map(bootstrapped, samples)]
    assert 0.9 < np.mean(held) < 0.99
    few, many = (bootstrapped(list(rng.lognormal(size=n))) for n in (50, 5000))
    assert 5 < (few[1] - few[0]) / (many[1] - many[0]) < 20


def test_saves_are_written_in_both_ways_and_a_stall_is_a_part_of_its_steps(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    config = config_of("dit_digits", 4, backend="torch")
    rows = {row.name: row for row in saves.timed(config, run, 3)}
    # the newest of both
    assert len(run.saved()) == config.train.keep_checkpoints
    here, whole = rows["stall of one written here"], rows["and a checkpoint written here"]
    assert 0 < here.median < whole.median
    assert rows["stall of one written beside"].median > 0
    assert rows["CPU of the writer for one"].median > 0


@pytest.mark.parametrize("repeats", ["0", "1", "-3"])
def test_too_few_turns_for_a_spread_are_refused_before_anything_is_timed(repeats: str) -> None:
    with pytest.raises(UserError, match=f"--repeats={repeats}: take 2"):
        command.main(["engine", "--repeats", repeats])


def test_a_save_that_outlasts_its_ten_steps_stalls_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one waits for it."""
    wait = Saver.wait

    def slow(saver: Saver) -> None:
        time.sleep(0.2)
        wait(saver)

    # once before the snapshot, and once at the end of the steps
    monkeypatch.setattr(Saver, "wait", slow)
    rows = saves.timed(config_of("dit_digits", 4, backend="torch"), RunFolder(tmp_path), 2)
    (stall,) = [row for row in rows if row.name == "stall of one written beside"]
    assert stall.median > 0.4
