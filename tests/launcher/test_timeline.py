"""What happened to a run, and why it stopped, told of views that tests make up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.compose import compose
from launcher.folder import Attempt
from launcher.reconcile.attempts import Cause
from launcher.reconcile.conclusion import conclude
from launcher.reconcile.timeline import Event, events, last_frames, verdict
from launcher.reconcile.view import AttemptView, JobView, RunView
from selfguide.spec.run import RunFolder

RUN = RunFolder(Path("/runs/digits_dit/abc"))
CONFIG = compose(["experiment=digits_dit", "cluster=local", "train.batch=128", "evaluation=none"])
NODES = {"0": "n1", "1": "n1", "2": "n2", "3": "n2"}
TRACEBACK = """Traceback (most recent call last):
  File "/code/a.py", line 1, in main
    job.main(folder)
  File "/code/b.py", line 2, in train
    step(job)
  File "/code/c.py", line 3, in step
    forward(batch)
  File "/code/d.py", line 4, in forward
    raise ValueError("no such layer")
ValueError: no such layer
"""
SAVED = {"code": 75, "class": "preempted", "message": "Preempted: stopped by SIGUSR2", "saved": 640}
SAVED |= {"images": 640, "section": "train"}
ENDED = {"code": 143, "class": "signal", "message": "ended by SIGTERM", "images": 640}
PEER = {"code": 1, "class": "error", "message": "RuntimeError: gloo", "peer_gone": True}
FELL = {"code": 1, "class": "error", "message": "ValueError: no such layer", "images": 640}
FELL |= {"type": "ValueError", "section": "train", "traceback": TRACEBACK}
REFUSED = {
    "code": 88,
    "class": "node",
    "node": "n2",
    "message": "NodeRefused: n2 fails the check 'gemm'",
}
HUNG = {
    "code": 85,
    "class": "hang",
    "message": "no progress for 73 s in section data",
    "section": "data",
}
FENCED = {"code": 1, "class": "fenced", "message": "Fenced: overtaken", "images": 640}


def attempt(
    number: int = 1,
    exits: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    state: str = "gone",
    **more: Any,
) -> AttemptView:
    """Attempt `number` of four ranks on two nodes, which began at 100 x number and whose ranks ended after 10 s."""
    ending = more.pop("ending", {})
    record = {"kind": "slurm", "id": str(number), "nodes": 2, "tasks": 2}
    begins = {rank: {"node": node, "time": 100.0 * number} for rank, node in NODES.items()}
    made = AttemptView(
        files=Attempt(RUN.attempt(number)),
        opened=100.0 * number,
        world=4,
        job=JobView(record=record, state=state, ending=ending),  # type: ignore[arg-type]
        starts=frozenset(NODES),
        begins=begins,
        began=100.0 * number,
        exits={r: {"time": 100.0 * number + 10, **each} for r, each in (exits or {}).items()},
    )
    return replace(made, **more)


def view(*attempts: AttemptView, **more: Any) -> RunView:
    made = RunView(
        folder=RUN, time=1000.0, id="abc", experiment="digits_dit", name=None, hash="", identity={},
        images=1280, created=0.0, tries=len(attempts), attempts=attempts, config=CONFIG,
    )  # fmt: skip
    return replace(made, **more)


def told(run: RunView, kind: str) -> list[Event]:
    return [each for each in events(run) if each.kind == kind]


def all_of(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return dict.fromkeys(NODES, record)


OK = {"code": 0, "class": "ok", "message": "", "images": 1280}
FINISHED = {"snapshots": {1280: {"images": 1280}}}

# of an attempt that ended: the kind, the rank and the node that `verdict` names
CAUSES: list[tuple[AttemptView, str, str | None, str | None]] = [
    (attempt(exits={**all_of(ENDED), "2": FELL}), "error", "2", "n2"),
    # a rank that lost its peer wrote its record first
    (attempt(exits={**all_of(ENDED), "0": {**PEER, "time": 105.0}, "3": FELL}), "error", "3", "n2"),
    (
        attempt(exits=dict.fromkeys("023", ENDED), ending={"signals": {"1": 9}}),
        "killed",
        "1",
        "n1",
    ),
    (attempt(exits=dict.fromkeys("012", PEER), ending={"signals": {"3": 11}}), "crash", "3", "n2"),
    (attempt(exits=dict.fromkeys("012", PEER), ending={"codes": {"3": 7}}), "error", "3", "n2"),
    (attempt(exits=dict.fromkeys("01", ENDED), ending={"state": "NODE_FAIL"}), "node", "2", "n2"),
    # srun says which; its ranks live on, and lose their right
    (
        attempt(exits={**all_of(PEER), "2": FENCED, "3": FENCED}, ending={"lost_nodes": ["n2"]}
                | {"log_state": "NODE_FAIL"}),
        "node", "2", "n2",
    ),
    # they have saved before Slurm ended them
    (
        attempt(exits=all_of(SAVED), ending={"state": "NODE_FAIL", "lost_nodes": ["n2"]}),
        "node", "2", "n2",
    ),
    (attempt(exits=all_of(SAVED), ending={"state": "PREEMPTED"}), "preempted", None, None),
    (attempt(exits=all_of(SAVED), ending={"log_state": "TIMEOUT"}), "limit", None, None),
    (attempt(exits=all_of(SAVED), limit_s=60.0), "limit", "0", "n1"),
    # as an administrator has set it since
    (attempt(exits=all_of(SAVED), limit_s=3600.0, ending={"limit_s": 60.0}), "limit", "0", "n1"),
    (attempt(exits=all_of(SAVED), limit_s=3600.0), "preempted", "0", "n1"),
    (attempt(exits=all_of(SAVED), ending={"state": "CANCELLED"}), "outside", None, None),
    (attempt(exits=all_of(SAVED), ending={"state": "CANCELLED"}, cancelled=True), "cancelled", None, None),
    (
        attempt(exits=dict.fromkeys("013", ENDED), ending={"signals": {"2": 9}, "log_state": "OUT_OF_MEMORY"}),
        "memory", "2", "n2",
    ),
    (attempt(exits=dict.fromkeys("013", ENDED)), "killed", "2", "n2"),
    (attempt(exits=all_of(FENCED)), "lost", "0", "n1"),
    # all ranks say which node failed a check
    (attempt(exits=all_of(REFUSED)), "node", "2", "n2"),
    (attempt(exits={**all_of(ENDED), "3": HUNG}), "hang", "3", "n2"),
]  # fmt: skip


@pytest.mark.parametrize(("at", "kind", "rank", "node"), CAUSES)
def test_verdict_names_kind_rank_and_node(
    at: AttemptView, kind: str, rank: str | None, node: str | None
) -> None:
    found = verdict(view(at))
    assert found is not None
    assert (found.kind, found.rank, found.node) == (kind, rank, node)
    (told_of,) = told(view(at), "cause")
    assert told_of.text.startswith(f"{kind}: ") and told_of.rank == rank
    end = conclude(view(at), found)
    assert kind in end.why and (node is None or node in end.why), end.why


@pytest.mark.parametrize(
    "run",
    [
        view(attempt(exits=all_of(OK)), **FINISHED),
        view(attempt(state="running")),
        view(attempt(state="queued", starts=frozenset(), begins={})),
        view(attempt(state="unknown")),
        # a rank that its job's end caught while it left
        view(attempt(exits=dict.fromkeys("013", OK), ending={"signals": {"2": 9}}), **FINISHED),
        view(),
    ],
)
def test_run_to_which_nothing_happened_has_no_cause(run: RunView) -> None:
    assert verdict(run) is None and told(run, "cause") == []
    assert "nothing went wrong" in conclude(run, None).why


def test_run_that_went_on_has_the_cause_of_its_last_stop_and_each_attempt_its_own() -> None:
    first = attempt(1, {**all_of(ENDED), "2": FELL})
    second = attempt(2, all_of(SAVED), ending={"state": "PREEMPTED"}, resumed_from=256)
    run = view(first, second, attempt(3, all_of(OK), resumed_from=640), **FINISHED)
    found = verdict(run)
    assert found is not None and (found.kind, found.attempt) == ("preempted", 2)
    end = conclude(run, found)
    assert "attempt 3" in end.followed and "finished" in end.followed and end.command is None
    asked = verdict(run, 1)
    assert asked is not None and (asked.kind, asked.attempt) == ("error", 1)
    assert verdict(run, 3) is None


def test_replayed_steps_are_counted_from_where_the_attempt_before_had_come() -> None:
    first, second = attempt(1, {**all_of(ENDED), "2": FELL}), attempt(2, state="running")
    began = told(view(first, replace(second, resumed_from=256)), "began")[1]
    assert "resumed from 256 (3 steps trained again)" in began.text
    assert began.text.startswith("attempt 2 began on n1, n2 (4 ranks)")


def test_root_cause_comes_before_those_that_ended_for_it_with_its_last_frames_only() -> None:
    at = attempt(exits={**all_of({**PEER, "time": 105.0}), "2": FELL})
    kinds = [each.kind for each in events(view(at))]
    assert kinds.index("cause") < kinds.index("ended")
    (found,) = told(view(at), "cause")
    assert found.lines == last_frames(TRACEBACK) and len(found.lines) == 7
    assert found.lines[-1] == "ValueError: no such layer" and "b.py" in found.lines[0]
    (ended,) = told(view(at), "ended")
    assert ended.text.startswith("ranks 0, 1, 3 ") and ended.lines == ()


def test_last_frames_are_of_the_exception_that_was_raised_last() -> None:
    chained = (
        TRACEBACK + "\nDuring handling of the above exception, another exception occurred:\n\n"
    )
    chained += (
        'Traceback (most recent call last):\n  File "/e.py", line 5, in f\n    x()\nKeyError: 1\n'
    )
    assert last_frames(chained, 1) == ('  File "/e.py", line 5, in f', "    x()", "KeyError: 1")
    assert last_frames("") == () and last_frames("no traceback") == ("no traceback",)


def test_what_no_scheduler_says_is_called_unknown() -> None:
    at = attempt(exits=dict.fromkeys("013", ENDED))
    assert [each.attempt for each in told(view(at), "unknown")] == [1]
    assert told(view(replace(at, job=replace(at.job, ending={"state": "FAILED"}))), "unknown") == []
    end = conclude(view(attempt(state="unknown")), None)
    assert "unknown" in end.followed and end.command == f"python -m launcher.why {RUN.root}"


def test_attempt_that_another_has_followed_is_explained_whoever_answers_for_its_job() -> None:
    first = attempt(1, dict.fromkeys("013", ENDED), state="unknown", ending={"signals": {"2": 9}})
    run = view(first, attempt(2, state="unknown"))
    found = verdict(run)
    assert found is not None and (found.kind, found.rank, found.attempt) == ("killed", "2", 1)
    assert [each.attempt for each in told(run, "unknown") if "no answer" in each.text] == [2]


def test_attempt_that_does_not_move_is_told_so() -> None:
    beats = {
        "0": {"section": "data", "images": 512, "progressed": 800.0, "step_s": 1.0, "time": 990.0}
    }
    (now,) = told(view(attempt(state="running", heartbeats=beats)), "now")
    assert "512 of 1,280" in now.text and "no progress for 3:20" in now.text


def test_silent_rank_is_last_seen_where_its_heartbeat_says() -> None:
    beats = {"2": {"section": "data", "images": 512, "time": 104.0}}
    (found,) = told(view(attempt(exits=dict.fromkeys("013", ENDED), heartbeats=beats)), "cause")
    assert found.text.endswith("last seen in section data at 512 images")


def test_damaged_checkpoint_cancellation_and_publications_are_events() -> None:
    flaw = {"file": "rank-1.safetensors", "rank": 1, "reason": "is not what was written"}
    damage = {"images": 512, "checkpoint": "img-512", "kept": "/aside", "flaws": [flaw]}
    at = attempt(
        exits=all_of(SAVED), cancelled=True, cancel_asked=105.0, cancel_by="ada@login",
        progress={"damaged": [damage], "resumed_from": 256}, resumed_from=256,
    )  # fmt: skip
    run = view(
        at, saved_at={256: 90.0, 640: 110.0}, checkpoints=(256, 640), published_at={640: 1.0}
    )
    (damaged,), (asked,) = told(run, "damaged"), told(run, "cancelled")
    assert "512" in damaged.text and "rank 1" in damaged.text and "/aside" in damaged.text
    assert (asked.time, "ada@login" in asked.text) == (105.0, True)
    assert [each.time for each in told(run, "checkpoint")] == [90.0, 110.0]
    # not complete
    assert told(run, "snapshot") == []
    assert [each.time for each in events(run)] == sorted(each.time for each in events(run))


def test_finished_run_without_all_its_scores_names_the_command_that_makes_them() -> None:
    scored = compose(["experiment=digits_dit", "cluster=local", "evaluation=fd_digits"])
    shape = {"images": 1280, "data": {"manifest": "m"}, "guidance": {}}
    run = view(attempt(exits=all_of(OK)), snapshots={1280: shape}, config=scored)
    end = conclude(run, verdict(run))
    assert end.command == f"python -m launcher.evaluate {RUN.root}"
    assert "1 snapshot without a score" in end.followed and end.why == "nothing went wrong"


def test_run_that_nothing_continues_names_a_command_that_does() -> None:
    user = {
        "code": 2,
        "class": "user",
        "message": "UserError: data.root is gone",
        "type": "UserError",
    }
    run = view(attempt(exits=all_of(user)))
    found = verdict(run)
    assert isinstance(found, Cause) and found.kind == "user"
    end = conclude(run, found)
    assert end.command == f"python -m launcher.resume {RUN.root}"
    assert re.search("nothing follows", end.followed)
