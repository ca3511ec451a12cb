"""Which snapshots retention deletes: nothing that somebody waits for or chose, and never half of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import payloads
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_decide import CONFIG, GONE, PROTOCOL, SHAPE, a_view, evaluation_of, record_of
from test_evaluate import Memory, a_run, ends, launched, memory

from launcher import doctor, evaluate, status, watch
from launcher.board import words
from launcher.board.read import Reader
from launcher.reconcile import decide, launch, prune
from launcher.reconcile.lineage import Parent
from launcher.reconcile.retention import expendable, kept, staying
from launcher.reconcile.timeline import events
from launcher.reconcile.view import JobView, RunView, read
from selfguide.evaluation import job
from selfguide.sampling import weak
from selfguide.snapshot import Snapshot
from selfguide.spec.config import Config, SamplerConfig, build
from selfguide.spec.find import find_snapshot
from selfguide.spec.initial_weights import read_snapshot
from selfguide.spec.records import EvaluationRecord, Protocol, record_key
from selfguide.spec.retention import Deleted, deletion, holding, pin, remains, unpin
from selfguide.spec.run import RunFolder, image_folder, write_record
from selfguide.spec.score_sweep import ScoreSweep
from selfguide.spec.selections import BEST_ON_TRAIN, select
from selfguide.spec.sizes import footprint
from shards import storage
from shards.errors import UserError

__all__ = ["launched", "memory"]

KEEP_ONE = "train.keep_snapshots=1"
PLACES = (128, 256, 384, 512, 640, 1280)


# ---- the rule ----------------------------------------------------------------------------------------


@given(
    published=st.lists(st.integers(1, 10_000), max_size=12, unique=True).map(sorted),
    newest=st.integers(1, 4),
    every=st.none() | st.integers(1, 3000),
    needed=st.lists(st.tuples(st.integers(1, 10_000), st.sampled_from("ab")), max_size=4),
    picks=st.sets(st.integers(0, 11)),
)
def test_rule_keeps_the_newest_milestones_and_needs_and_nothing_else(
    published: list[int],
    newest: int,
    every: int | None,
    needed: list[tuple[int, str]],
    picks: set[int],
) -> None:
    needed += [(published[i], "c") for i in picks if i < len(published)]
    stay = kept(published, newest, every, needed)
    for place, images in enumerate(published):
        recent = place >= len(published) - newest
        before = published[:place]
        mile = (
            every is not None
            and images >= every
            and all(b // every < images // every for b in before)
        )
        assert (images in stay) == (recent or mile or images in dict(needed))
    # nothing more goes at the next look, and what came since lets only go what was new
    assert kept(list(stay), newest, every, needed) == stay
    later = kept([*stay, 20_000], newest, every, needed)
    assert {images for images in stay if images not in later} <= set(published[-newest:])


@st.composite
def scored_views(draw: st.DrawFn) -> RunView:
    """A run of six snapshots, some scored, pinned, being scored, failed, or left out."""
    published = range(1, 7)
    results = draw(
        st.lists(
            st.sampled_from(["", "failed", "skipped", "1", "2", "nan"]), min_size=6, max_size=6
        )
    )
    records = []
    for images, result in zip(published, results, strict=True):
        if result in ("failed", "skipped"):
            records.append(record_of(images, result))
        elif result:
            records.append(replace(record_of(images, "done"), scores={"fd_digits": float(result)}))
    working = JobView(record=dict(GONE.record), state=draw(st.sampled_from(["running", "unknown"])))
    jobs = [
        evaluation_of(images, 1, job=draw(st.sampled_from([GONE, working])))
        for images in draw(st.sets(st.sampled_from(published)))
    ]
    train = replace(
        CONFIG.train,
        keep_snapshots=draw(st.none() | st.integers(1, 3)),
        keep_snapshots_every=draw(st.none() | st.integers(2, 6)),
    )
    return a_view(
        GONE,
        images=draw(st.sampled_from([6, 9])),
        config=replace(CONFIG, train=train),
        snapshots=dict.fromkeys(published, SHAPE),
        records=tuple(records),
        evaluations=tuple(jobs),
        pinned=frozenset(draw(st.sets(st.sampled_from(published)))),
        selected=frozenset(draw(st.sets(st.sampled_from(published), max_size=2))),
        retry_asked=draw(st.sampled_from([0.0, 1e12])),
    )


@given(scored_views())
def test_of_any_view_only_what_nobody_waits_for_and_no_choice_needs_is_let_go(
    view: RunView,
) -> None:
    assert view.config is not None
    train, gone = view.config.train, set(expendable(view))
    if train.keep_snapshots is None:
        assert not gone and not staying(view)
        return
    assert gone | set(staying(view)) == set(view.published)
    asked_again = view.retry_asked > 0
    done = {r.images: r.scores["fd_digits"] for r in view.records if r.done}
    skipped = {r.images for r in view.records if r.status == "skipped" and not asked_again}
    over = {record.key for record in view.records}
    busy = {e.images for e in view.evaluations if e.job is not GONE and e.key not in over}
    finite = [value for value in done.values() if value == value]
    best = {images for images, value in done.items() if finite and value == min(finite)}
    free = (set(done) | skipped) - best - busy - view.pinned - view.selected
    every = train.keep_snapshots_every
    miles = {images for images in view.published if every and images % every == 0}
    assert gone == free - miles - set(view.published[-train.keep_snapshots :])


def test_weak_models_sweeps_and_checkpoints_to_go_back_to_keep_their_snapshots() -> None:
    train = replace(CONFIG.train, keep_snapshots=1, unstable="roll_back")
    config = replace(
        CONFIG, train=train, sampler=replace(CONFIG.sampler, weak="condition+snapshot-2", g=2.0)
    )
    how = Protocol.of(config, SHAPE)
    records = tuple(
        replace(
            record_of(n, "done"),
            key=record_key(n, how),
            protocol_key=how.key,
            scores={"fd_digits": float(n)},
        )
        for n in range(1, 7)
    )
    sweep = ScoreSweep.at(4, [replace(config, sampler=replace(config.sampler, g=3.0))])
    view = a_view(
        GONE, images=9, config=config, snapshots=dict.fromkeys(range(1, 7), SHAPE), records=records,
        sweeps=(sweep,), checkpoints=(3,),
    )  # fmt: skip
    stay = staying(view)
    assert stay == {
        1: "the best fd_digits",
        2: "sampler.weak leads away from it",
        3: "the run may go back to 3",
        4: "a point of a sweep has no score",
        6: "of the newest 1",
    }
    assert expendable(view) == (5,)


def test_snapshot_of_before_a_deleted_one_still_tells_which_is_a_milestone_of_evaluation() -> None:
    policy = replace(CONFIG.evaluation, snapshots="newest", milestone_images=100)
    config = replace(CONFIG, evaluation=policy)
    gone = Deleted(images=120, time=0.0, bytes=1, setting="", why="", by="")
    view = a_view(GONE, config=config, snapshots=dict.fromkeys((90, 150, 260), SHAPE))
    assert decide.left_out(view, config, 150) == ""
    assert decide.left_out(replace(view, deleted={120: gone}), config, 150)


# ---- deleting ----------------------------------------------------------------------------------------


def measured(*values: float) -> Callable[[Path], None]:
    """Evaluations whose scores are these, in the order of the snapshots."""
    known = dict(zip(PLACES, values, strict=False))

    def score(request: Path) -> None:
        wanted = json.loads(request.read_text())
        run, config = RunFolder(Path(wanted["run"])), build(Config, wanted["config"])
        how = Protocol.of(config, run.snapshot_manifest(wanted["images"]))
        EvaluationRecord(
            status="done",
            key=wanted["key"],
            attempt=wanted["attempt"],
            images=wanted["images"],
            protocol=how.plain(),
            protocol_key=how.key,
            scores={"fd_digits": known[wanted["images"]]},
        ).publish(run)

    return score


def made(runs: Path, settings: list[str], memory: Memory, *more: str) -> RunFolder:
    """A run of four snapshots and its last one, of which the second scores best."""
    memory.evaluate = measured(9.0, 3.0, 8.0, 7.0, 6.0, 5.0)
    words = ("evaluation=fd_digits", "evaluation.in_flight=9", *(more or (KEEP_ONE,)))
    return a_run(runs, settings, memory, *words, snapshots=PLACES)


def config_of(view: RunView) -> Config:
    assert view.config is not None
    return view.config


def scored(run: RunFolder) -> RunView:
    """The run once its snapshots have their scores, which nobody has looked at yet."""
    view = read(run)
    watch.start(view, decide.all_wanted(view, config_of(view)))
    return read(run)


def left(run: RunFolder) -> list[int]:
    """What is there, and nothing beside it."""
    assert run.published() == run.snapshot_folders() and not remains(run)
    return run.published()


def test_watcher_deletes_what_is_scored_and_keeps_the_newest_best_and_pinned(
    runs: Path, settings: list[str], memory: Memory, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(runs, settings, memory)
    pin(run.snapshots, image_folder(384))
    watch.watch(run.root)
    assert left(run) == [256, 384, 1280]
    view = read(run, evidence=True)
    # scores stay, and nobody wants another one or calls the run unfinished
    assert [record.images for record in view.records] == [*PLACES]
    assert str(decide.state(view)) == "finished" and not decide.unscored(view)
    assert decide.all_wanted(view, view.config).done  # type: ignore[arg-type]
    assert {i: each.setting for i, each in view.deleted.items()} == dict.fromkeys(
        (128, 512, 640), KEEP_ONE
    )
    told = [event.text for event in events(view) if "deleted" in event.text]
    assert len(told) == 3 and all(KEEP_ONE in text and "newest 1" in text for text in told)
    status.show(run, as_json=True)
    about = json.loads(capsys.readouterr().out)["retention"]
    assert about["kept"] == {
        "256": "the best fd_digits",
        "384": "pinned",
        "1280": "of the newest 1",
    }
    assert [each["images"] for each in about["deleted"]] == [128, 512, 640]
    status.show(run, as_json=False)
    assert f"512 images, 0.00 GB ({KEEP_ONE})" in capsys.readouterr().out
    (shown,), _ = Reader().read(runs)
    assert any("deleted" in line and "128, 512, 640" in line for line in words.of_run(shown))
    unpin(run.snapshots, image_folder(384))
    assert evaluate.once([run])[0]["deleted"] == [384]
    assert evaluate.once([run]) == [], "a look that finds nothing to do says nothing"


def test_runs_keep_all_snapshots_where_nobody_asks_for_less(
    runs: Path, settings: list[str], memory: Memory
) -> None:
    run = made(runs, settings, memory, "train.keep_every=128")
    watch.watch(run.root)
    assert left(run) == [*PLACES] and not (run.snapshots / "deleted").exists()


def test_milestones_are_kept(runs: Path, settings: list[str], memory: Memory) -> None:
    run = made(runs, settings, memory, KEEP_ONE, "train.keep_snapshots_every=500")
    watch.watch(run.root)
    assert left(run) == [256, 512, 1280]


@pytest.mark.parametrize("how", ["failed", "waits", "running"])
def test_snapshot_whose_evaluation_is_not_over_is_held_until_it_is(
    how: str, runs: Path, settings: list[str], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(runs, settings, memory)
    score = memory.evaluate

    def only_the_last(request: Path) -> None:
        if json.loads(request.read_text())["images"] == 1280:
            score(request)
        elif how == "failed":
            ends(code=2, **{"class": "user"})(request)
        elif how == "running":
            memory.jobs[str(len(memory.jobs))] = "running"
        else:
            memory.silent = True

    memory.evaluate = only_the_last
    for _ in range(3):
        evaluate.once([run])
        memory.silent = False
    assert left(run) == [*PLACES]
    assert set(staying(read(run))) == {*PLACES}
    memory.jobs = dict.fromkeys(memory.jobs, "gone")
    memory.evaluate = score
    evaluate.once([run], retry=True)
    evaluate.once([run])
    assert left(run) == [256, 1280]


def test_deletion_that_is_killed_is_finished_by_the_next_look(
    runs: Path, settings: list[str], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(runs, settings, memory)
    delete, rename = storage.delete, Path.rename

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    # behind the record, with the folder still in its place
    monkeypatch.setattr(Path, "rename", killed)
    scored(run)
    with pytest.raises(KeyboardInterrupt):
        prune.prune(read(run))
    monkeypatch.setattr(Path, "rename", rename)
    assert (
        run.published() == [*PLACES] and not read(run).deleted and not deletion(run.snapshot(128))
    )
    # out of its place, and with all of its bytes
    monkeypatch.setattr(storage, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        prune.prune(read(run))
    monkeypatch.setattr(storage, "delete", delete)
    assert run.published() == [256, 1280] and len(remains(run)) == 4
    # between the manifest and the rest
    (remains(run)[0] / storage.MANIFEST).unlink()
    assert sorted(read(run).deleted) == [128, 384, 512, 640]
    assert prune.prune(read(run)).deleted == ()
    assert left(run) == [256, 1280]


def test_snapshot_that_is_published_again_counts_as_there_and_goes_again(
    runs: Path, settings: list[str], memory: Memory
) -> None:
    run = made(runs, settings, memory)
    watch.watch(run.root)
    payloads.publish(run, 640)
    assert 640 not in read(run).deleted and not deletion(run.snapshot(640))
    assert evaluate.once([run])[0]["deleted"] == [640]
    assert left(run) == [256, 1280]


def test_what_somebody_asks_for_while_a_snapshot_is_about_to_go_is_seen(
    runs: Path, settings: list[str], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(runs, settings, memory)
    before = scored(run)
    assert expendable(before) == (128, 384, 512, 640)
    pin(run.snapshots, image_folder(512))
    ScoreSweep.at(
        640, [replace(config_of(before), sampler=replace(config_of(before).sampler, g=2.0))]
    ).publish(run)
    assert prune.prune(before).deleted == (128, 384)
    assert left(run) == [256, 512, 640, 1280]


def test_nothing_is_deleted_where_snapshots_cannot_be_held(
    runs: Path, settings: list[str], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(runs, settings, memory)
    scored(run)

    def none(*_: object) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr("fcntl.flock", none)
    with holding(run) as held:
        assert not held
    (said,) = evaluate.once([run])
    assert said["deleted"] == [] and "has no locks" in said["problems"][0]
    assert left(run) == [*PLACES]


def test_snapshot_that_another_run_began_with_or_has_a_sidecar_from_stays(
    runs: Path, settings: list[str], memory: Memory, tmp_path: Path
) -> None:
    run = made(runs, settings, memory)
    scored(run)
    sha256 = read(run).snapshots[384]["files"][0]["sha256"]
    # a snapshot is told by its weights, and all of these have the same
    (run.snapshot(384) / "weights").write_bytes(b"y" * 10)
    (run.snapshot(384) / storage.MANIFEST).unlink()
    storage.publish_folder(
        run.snapshot(384), extra={"images": 384, "data": {"manifest": "none"}, "guidance": {}}
    )
    assert read(run).snapshots[384]["files"][0]["sha256"] != sha256
    net = {"net": "online", "sha256": read(run).snapshots[384]["files"][0]["sha256"]}
    other = a_run(runs, [*settings, "seed=7"], memory)
    about = {"images": 1280, "data": {"manifest": "none"}, "saw_labels": False}
    folder = other.snapshot(1280)
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"z" * 10)
    sidecar = {"folder": "s", "sha256": "0" * 64, "kind": "id", "nets": [net]}
    storage.publish_folder(folder, extra={**about, "guidance": {"sidecars": {"ids": sidecar}}})
    third = a_run(runs, [*settings, "seed=8"], memory)
    describe = third.describe()
    identity = describe["identity"] | {"init": {"source": "snapshot", "sha256": "1" * 64}}
    write_record(third.run_json, {**describe, "identity": identity}, replace=True)
    payloads.publish(third, 1280)
    manifest = json.loads((third.snapshot(1280) / storage.MANIFEST).read_text())
    manifest["origin"] = {"path": str(run.snapshot(512)), "sha256": "1" * 64, "images": 512}
    (third.snapshot(1280) / storage.MANIFEST).write_text(json.dumps(manifest))
    # of a run that has no snapshot yet the sidecar itself tells
    fresh = tmp_path / "sidecar"
    fresh.mkdir()
    (fresh / "rows.npy").write_bytes(b"rows")
    storage.publish_folder(fresh, extra={"provenance": {"saw_labels": False, "features": net}})
    assert prune._nets(Parent(kind="sidecar", name=str(fresh))) == (net["sha256"],)
    assert prune._nets(Parent(kind="sidecar", name=str(tmp_path / "gone"))) == ()
    done = prune.prune(read(run))
    assert done.deleted == (128, 640)
    assert other.root.name in done.stay[384] and third.root.name in done.stay[512]


def test_choice_among_snapshots_is_kept(runs: Path, settings: list[str], memory: Memory) -> None:
    run = made(runs, settings, memory)
    select(run, PROTOCOL.plain(), by=BEST_ON_TRAIN, images=512)
    watch.watch(run.root)
    assert left(run) == [256, 512, 1280]


def test_readers_of_a_deleted_snapshot_are_told_why_and_what_is_there(
    runs: Path, settings: list[str], memory: Memory
) -> None:
    run = made(runs, settings, memory)
    watch.watch(run.root)
    readers: list[Callable[[], object]] = [
        lambda: find_snapshot(str(run.root), runs, 640),
        lambda: find_snapshot(str(run.snapshot(640)), runs),
        lambda: evaluate.sweep(run, ["sampler.g=1,2"], images=640),
        lambda: read_snapshot(run.snapshot(640), verify="sizes"),
    ]
    newest = cast(Snapshot, SimpleNamespace(folder=run.snapshot(1280), images=1280))
    others: list[Callable[[], object]] = [
        lambda: job._snapshot(run, 640, 0),
        lambda: weak.check(newest, SamplerConfig(g=2.0, weak="snapshot-640")),
    ]
    for reads in [*readers, *others]:
        with pytest.raises(UserError) as said:
            reads()
        assert f"was deleted by retention ({KEEP_ONE})" in str(said.value)
        assert reads in others or "1280" in str(said.value), "what is there to take instead"


def test_run_without_scores_has_a_watcher_that_stays_while_it_trains(
    runs: Path, settings: list[str], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(runs, settings, memory, KEEP_ONE, snapshots=(128, 256))
    config = config_of(read(run))
    assert launch._watched(config)
    assert not launch._watched(replace(config, train=replace(config.train, keep_snapshots=None)))
    job = read(run).newest.job  # type: ignore[union-attr]
    assert job is not None
    memory.jobs[job.record["id"]] = "running"
    assert not decide.all_wanted(read(run), config).done
    seen: list[list[int]] = []

    def next_look(_: float) -> None:
        seen.append(left(run))
        payloads.publish(run, 1280 if seen[1:] else 384)

    monkeypatch.setattr(watch.time, "sleep", next_look)
    watch.watch(run.root)
    assert [*seen, left(run)] == [[256], [384], [1280]]


@pytest.mark.parametrize(
    ("keep", "every", "count"), [(None, None, 40), (4, None, 6), (4, 2000, 11), (50, None, 40)]
)
def test_doctor_asks_for_room_for_all_snapshots_that_stay(
    keep: int | None, every: int | None, count: int
) -> None:
    train = replace(
        CONFIG.train,
        images=10_000,
        snapshot_every=256,
        keep_snapshots=keep,
        keep_snapshots_every=every,
    )
    assert doctor._snapshots(train) == count
    config, size = replace(CONFIG, train=train), footprint(CONFIG)
    checkpoints = (train.keep_checkpoints + 1) * size.checkpoint
    assert doctor._needed(config) == checkpoints + count * size.snapshot


# ---- the real commands -------------------------------------------------------------------------------


def test_pin_and_a_single_look_by_the_real_commands(
    runs: Path, settings: list[str], memory: Memory
) -> None:
    run = made(runs, settings, memory)
    scored(run)

    def command(*words: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", *words], check=True, capture_output=True, text=True
        ).stdout

    said = command(
        "tools.checkpoint", "pin", str(run.root), "--images", "512", "--snapshot", "--json"
    )
    assert json.loads(said) == {"pinned": [image_folder(512)]}
    (done,) = json.loads(command("launcher.evaluate", "--once", "--runs", str(runs), "--json"))[
        "runs"
    ]
    assert done["deleted"] == [128, 384, 640] and done["problems"] == []
    late = ["tools.checkpoint", "pin", str(run.root), "--images", "640", "--snapshot"]
    refused = subprocess.run([sys.executable, "-m", *late], capture_output=True, text=True)
    assert refused.returncode == 2 and f"deleted by retention ({KEEP_ONE})" in refused.stderr
    assert left(run) == [256, 512, 1280]
