"""The harness that every benchmark joins: it finds a real difference, and none where there is none."""

import json

import pytest

from tools.bench import __main__ as command
from tools.bench import harness
from tools.bench.harness import Variant, measure


class Clock:
    """Time that passes only where a variant says so, with the unrest of a busy machine."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.calls += 1
        self.now += seconds * (1 + 0.1 * (self.calls * 7 % 11) / 11)


def test_thrice_the_work_is_slower_and_the_same_work_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, calls, fences = Clock(), list[str](), list[int]()
    monkeypatch.setattr(harness, "time", clock)

    def variant(name: str, seconds: float) -> Variant:
        def run() -> None:
            calls.append(name)
            clock.work(seconds)

        return Variant(name, run)

    variants = [variant("base", 2.0), variant("same", 2.0), variant("thrice", 6.0)]
    found = measure(variants, repeats=21, warmup=2, units=2, fence=lambda: fences.append(1))
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
