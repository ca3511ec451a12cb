"""The harness that every benchmark joins: it finds a real difference, and none where there is none."""

import json

import pytest

from tools.bench import __main__ as command
from tools.bench.harness import Variant, measure


def spin(rounds: int) -> int:
    total = 0
    for i in range(rounds):
        total += i * i
    return total


def test_twice_the_work_is_slower_and_the_same_work_is_not() -> None:
    calls: list[str] = []

    def variant(name: str, rounds: int) -> Variant:
        def run() -> None:
            calls.append(name)
            spin(rounds)

        return Variant(name, run)

    fences: list[int] = []
    variants = [variant("base", 20_000), variant("same", 20_000), variant("thrice", 60_000)]
    rows = {
        row.name: row
        for row in measure(variants, repeats=21, warmup=2, fence=lambda: fences.append(1))
    }
    assert rows["thrice"].verdict == "slower" and 2 < rows["thrice"].ratio < 4.5
    assert rows["same"].ratio == pytest.approx(1, abs=0.25)
    assert rows["base"].ratio == 1 and rows["base"].low <= rows["base"].median <= rows["base"].high
    # every turn runs the base twice: once as itself, once as the control
    assert calls.count("base") == 2 * 23 and calls.count("thrice") == 23
    assert len(fences) == 2 * len(calls)


def test_variants_take_turns_and_none_always_follows_the_same_one() -> None:
    calls: list[str] = []
    variants = [Variant(n, lambda n=n: calls.append(n)) for n in "abc"]  # type: ignore[misc]
    measure(variants, repeats=4, warmup=0)
    turns = ["".join(calls[i : i + 4]) for i in range(0, 16, 4)]
    assert len(set(turns)) == 4 and all(sorted(turn) == ["a", "a", "b", "c"] for turn in turns)


@pytest.mark.slow
def test_the_engine_suite_runs_and_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["engine", "--repeats", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    names = [row["name"] for row in found["suites"]["engine"]]
    assert sorted(names) == sorted(
        [
            "hand-written DDP",
            "hand-written DDP again (A/A)",
            "torch engine",
            "DeepSpeed ZeRO-1",
            "DeepSpeed ZeRO-2",
        ]
    )
    assert all(row["median"] > 0 for row in found["suites"]["engine"]) and found["machine"]
