"""All ranks prove each epoch together, whatever a restart or another world size does to it; and waiting is reported."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import shards
from selfguide.distributed import RankInfo
from selfguide.spec.advice import SIGNS, advise
from selfguide.spec.config import Config, LabelGuidance, NoGuidance
from selfguide.spec.run import Lease, RunFolder, write_record
from selfguide.training import job
from selfguide.training.epochs import Epochs
from selfguide.training.job import work
from selfguide.training.state import State
from selfguide.training.telemetry import Telemetry
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.read import mixing
from shards.read.audit import EpochAudit
from tests.selfguide.test_training import IMAGES, attempt, config
from tests.shards.data import flip, payload, write
from tools.shards import __main__ as command

Step = tuple[int, list[dict[str, int]]]  # position, accounts proven after it


def proven(
    rank_info: RankInfo, root: str, batch: int, start: int, stop: int, carried: Any
) -> tuple[list[Step], Any]:
    """What was proven after each global batch of an attempt on [start, stop), and what it leaves behind."""
    with shards.open(
        root, global_batch=batch, micro_batch=batch // rank_info.world // 2, rank=rank_info.rank, world=rank_info.world,
        seed=2, position=start,
    ) as stream:  # fmt: skip
        epochs, steps = Epochs(stream, carried), []
        while stream.position < stop:
            next(stream), next(stream)
            steps.append((stream.position, [asdict(a) for a in epochs.settle()]))
        assert stream.ended == []
        return steps, epochs.carried()


def each(rank_info: RankInfo, cases: list[tuple[Any, ...]]) -> list[tuple[list[Step], Any]]:
    return [proven(rank_info, *case) for case in cases]


def test_an_epoch_is_proven_over_restarts_and_world_sizes(ranks: Any, tmp_path: Path) -> None:
    """The second attempt begins and the first ends in the middle of one; a batch may hold several."""
    shapes = [
        (str(tmp_path / str(count)), batch) for count, batch in ((100, 24), (10, 72), (700, 120))
    ]
    for root, _ in shapes:
        write(Path(root), int(Path(root).name))
    first = ranks(3, each, [(root, batch, 0, 17 * batch, ()) for root, batch in shapes])
    then = [
        (root, batch, 17 * batch, 41 * batch, carried)
        for (root, batch), (_, carried) in zip(shapes, first[0], strict=True)
    ]
    again = each(RankInfo(0, 0, 1), then)
    assert all(a == first[0] for a in first)
    for (root, batch), (before, _), (after, _) in zip(shapes, first[0], again, strict=True):
        count, steps = int(Path(root).name), before + after
        assert [position for position, _ in steps] == [batch * (i + 1) for i in range(41)]
        for position, accounts in steps:
            ended = range((position - batch) // count, position // count)
            assert [a["epoch"] for a in accounts] == [*ended]
            assert all((a["seen"], a["substituted"]) == (count, 0) for a in accounts)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Messages of this process, as rank 0 logs them."""
    caplog.set_level("INFO", "selfguide.training")
    return caplog


def logging_attempt(rank_info: RankInfo, cfg: Config, root: str) -> int:
    """An attempt whose ranks log as the launcher has them do."""
    ours = logging.getLogger("selfguide")
    ours.addHandler(logging.StreamHandler(sys.stdout))
    ours.setLevel(logging.INFO if rank_info.rank == 0 else logging.WARNING)
    return attempt(rank_info, cfg, root)


def alone(root: Path, start: int, carried: Any, log: pytest.LogCaptureFixture) -> list[str]:
    log.clear()
    proven(RankInfo(0, 0, 1), str(root), 50, start, 300, carried)
    return log.messages


def test_what_is_carried_must_be_what_was_given(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 100)
    _, carried = proven(RankInfo(0, 0, 1), str(tmp_path), 50, 0, 150, ())
    ((account,)) = carried
    assert account["epoch"] == 1 and account["seen"] == 50
    json_round = json.loads(json.dumps(carried))
    said = [f"epoch {e}: 100 seen + 0 substituted = 100" for e in range(3)]
    assert alone(tmp_path, 0, (), log) == said
    assert alone(tmp_path, 150, json_round, log) == said[1:]
    assert alone(tmp_path, 150, None, log) == said[2:], "of an old checkpoint, from the next on"
    for wrong in ((), ({**account, "seen": 49},), ({**account, "first": account["first"] + 1},)):
        with pytest.raises(DamagedError, match=r"epoch 1: .* not all of them once each"):
            alone(tmp_path, 150, wrong, log)


def test_without_accounts_of_its_beginning_an_epoch_leaves_none(tmp_path: Path) -> None:
    write(tmp_path, 100)
    assert proven(RankInfo(0, 0, 1), str(tmp_path), 10, 50, 90, None)[1] is None
    _, carried = proven(RankInfo(0, 0, 1), str(tmp_path), 10, 50, 110, None)
    assert [a["epoch"] for a in carried] == [1]


def test_a_resumed_training_proves_the_epoch_it_began_in(
    ranks: Any,
    single: RankInfo,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    log: pytest.LogCaptureFixture,
) -> None:
    """The real job: interrupted at image 256 of epochs of 100, and gone on with on another number of ranks."""
    root, run = tmp_path / "data", tmp_path / "run"
    command.main(
        ["make", "synthetic", "--out", str(root), "--count", "100", "--shape", "1", "8", "8"]
    )
    cfg = replace(config(root), guidance=NoGuidance())
    # what they print is read here: those of a fork server print where it did when it began
    ranks(2, logging_attempt, cfg, str(run), start="spawn")
    first = _epochs(capfd.readouterr().out.splitlines())
    for folder in [*(run / "checkpoints").glob("img-*"), *(run / "snapshots").glob("img-*")]:
        if int(folder.name[4:]) > 256:
            (folder / "MANIFEST.json").unlink()
    attempt(single, cfg, str(run))
    assert first == [*range(IMAGES // 100)] and _epochs(log.messages) == [2, 3, 4]
    lines = (run / "metrics" / "train-0001.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert 0 <= line["data_wait"] <= line["data_wait_max"] and 0 <= line["data_share"] <= 1
        assert "substituted" not in line


def test_a_job_trains_on_what_it_checked_though_the_folder_changes_meanwhile(
    single: RankInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    """Between the check and the first batch weights are built, which takes as long as a writer needs."""
    root, build = tmp_path / "data", job.build_state
    make = ["make", "synthetic", "--shape", "1", "8", "8", "--count"]
    command.main([*make, "100", "--out", str(root)])
    command.main([*make, "160", "--out", str(tmp_path / "other")])

    def meanwhile(*given: Any) -> State:
        for name in ("manifest-*.json", "index-*.npy", "LATEST"):
            for path in (tmp_path / "other").glob(name):
                shutil.copy(path, root)
        return build(*given)

    monkeypatch.setattr(job, "build_state", meanwhile)
    attempt(single, replace(config(root), guidance=NoGuidance()), str(tmp_path / "run"))
    assert manifests.load(root).count == 160
    assert _epochs(log.messages) == [*range(IMAGES // 100)]


def _epochs(messages: list[str]) -> list[int]:
    """Those that were proven whole."""
    lines = [line for line in messages if line.startswith("epoch ")]
    assert all(line.endswith(": 100 seen + 0 substituted = 100") for line in lines)
    return [int(line.split()[1].rstrip(":")) for line in lines]


def test_a_training_on_a_mixture_proves_the_epochs_of_each_source(
    single: RankInfo, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """From the config to the snapshot, resumed once; labels are met as often as the mixture says."""
    roots = [tmp_path / "a", tmp_path / "b"]
    for count, root in zip(("100", "40"), roots, strict=True):
        command.main(
            ["make", "synthetic", "--out", str(root), "--count", count, "--shape", "1", "8", "8", "--classes", "3"]
        )  # fmt: skip
    cfg = replace(config(roots[0]), guidance=LabelGuidance())
    data = replace(cfg.data, mix=(str(roots[1]),), weights=(3.0, 1.0), mode="window", classes=3)
    train = replace(cfg.train, images=2560, snapshot_every=2560, checkpoint_every=1280)
    cfg = replace(cfg, data=data, train=train)
    found = [manifests.load(root) for root in roots]
    identity = mixing.identity(found, data.weights)
    run = RunFolder(tmp_path / "run")
    write_record(run.run_json, {"images": 2560, "identity": {"data": {"manifest": identity}}})
    said = []
    for _ in range(2):
        log.clear()
        lease = Lease(run, run.open_attempt())
        work(cfg, single, lease, Telemetry(run, lease.number, single, 2560))
        said.append(re.findall(r"epoch (\d+)( of source 1)?: (\d+) seen", log.text))
        for folder in (run.checkpoint(2560), run.snapshot(2560)):
            manifest = json.loads((folder / "MANIFEST.json").read_text())
            (folder / "MANIFEST.json").unlink()
    # 2,000 positions are in whole thousands: 1,500 of the first source and 500 of the second
    assert {int(e) for e, other, n in said[0] if not other and n == "100"} == {*range(15)}
    assert {int(e) for e, other, n in said[0] if other and n == "40"} == {*range(12)}
    assert said[1] and {*said[1]} < {*said[0]} and len(said[0]) == 27
    assert manifest["data"]["manifest"] == identity
    rates = sum(
        w * np.array(m.label_histogram) / m.count for w, m in zip((0.75, 0.25), found, strict=True)
    )
    assert manifest["guidance"]["p"] == pytest.approx(rates.tolist())
    other = replace(cfg, data=replace(data, weights=(1.0, 1.0)))
    with pytest.raises(UserError, match=r"mixed with .*this run was begun on"):
        work(other, single, lease, Telemetry(run, lease.number, single, 2560))


def test_substitutes_are_counted_and_reported(
    single: RankInfo, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    root, run = tmp_path / "data", tmp_path / "run"
    command.main(
        ["make", "synthetic", "--out", str(root), "--count", "512", "--shape", "1", "8", "8"]
    )
    flip(*payload(root, 1, "x"))
    cfg = replace(config(root), guidance=NoGuidance())
    cfg = replace(cfg, data=replace(cfg.data, on_damage="substitute", damaged=0.5))
    attempt(single, cfg, str(run))
    lines = [json.loads(each) for each in (run / "metrics" / "train-0001.jsonl").open()]
    assert sum(line.get("substituted", 0) for line in lines) == 256
    said = log.text
    assert "epoch 0: 256 seen + 256 substituted = 512" in said
    assert said.count("stood in for damaged ones") == 1 and "images substituted" in said


def judged(
    rank_info: RankInfo, root: str, start: int, stop: int, carried: Any, bound: float
) -> Any:
    """Substitutes of an attempt by all that its ranks were given, or why it ended; no rank's own share is too much."""
    with shards.open(
        root, global_batch=64, micro_batch=64 // rank_info.world, rank=rank_info.rank, world=rank_info.world,
        seed=0, position=start, on_damage="substitute", damaged=0.5,
    ) as stream:  # fmt: skip
        epochs = Epochs(stream, carried, bound)
        try:
            while stream.position < stop:
                next(stream)
                epochs.settle()
            return epochs.carried()
        except DamagedError as error:
            return str(error)


def test_what_all_ranks_and_attempts_substituted_is_judged_together(
    ranks: Any, tmp_path: Path
) -> None:
    """A half is damaged: two ranks have a quarter each, two attempts a part each, and 0.4 is too much."""
    write(tmp_path, 512)
    flip(*payload(tmp_path, 1, "x"))
    for found in ranks(2, judged, str(tmp_path), 0, 512, (), 0.4):
        assert found.startswith("epoch 0: 256 of 512 samples were substituted so far, more than")
    alone = RankInfo(0, 0, 1)
    assert judged(alone, str(tmp_path), 0, 512, (), 0.5) == ()
    (half,) = judged(alone, str(tmp_path), 0, 256, (), 0.4)
    assert 0 < half["substituted"] < 0.4 * 512
    (rest,) = judged(alone, str(tmp_path), 256, 448, (), 0.4)
    assert 0 < rest["substituted"] < 0.4 * 512 < rest["substituted"] + half["substituted"]
    assert "so far" in judged(alone, str(tmp_path), 256, 448, (half,), 0.4)


def reported(rank_info: RankInfo, folder: str) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """Two lines of telemetry, of steps in which rank r waits r + 1 seconds by its own count; and large sums."""
    telemetry = Telemetry(RunFolder(Path(folder)), 1, rank_info, 100)
    telemetry.restart(0)
    for step in (1, 2):
        telemetry.add(loss=1.0)
        telemetry.read(step * (rank_info.rank + 1.0), step * rank_info.rank)
    first = telemetry.report(20)
    telemetry.add(loss=1.0)
    telemetry.read(2 * (rank_info.rank + 1.0), 2 * rank_info.rank)
    large = EpochAudit(epoch=0, first=2**63 + 2**62, second=2**64 - 2)
    stream = SimpleNamespace(ended=[], under_way=lambda: [large])
    ((account),) = Epochs(stream, ()).carried()  # type: ignore[arg-type, misc]
    return first, telemetry.report(40), [account["first"], account["second"]]


def test_waiting_is_a_mean_and_a_maximum_over_ranks_and_sums_wrap_around(
    ranks: Any, tmp_path: Path
) -> None:
    (tmp_path / "attempts" / "0001").mkdir(parents=True)
    for line, then, sums in ranks(2, reported, str(tmp_path)):
        assert line["data_wait"] == pytest.approx(1.5) and line["data_wait_max"] == 2.0
        assert line["substituted"] == 2 and line["data_share"] > 0
        assert then["data_wait_max"] == 0 and "substituted" not in then
        assert sums == [(2**63 + 2**62) * 2 % 2**64, 2**64 - 4]


def test_advice_comes_when_waiting_lasts() -> None:
    def lines(count: int, share: float) -> list[dict[str, Any]]:
        return [
            {"images": i, "data_share": share, "data_wait_max": 0.2, "loss": 1.0}
            for i in range(count)
        ]

    wait = SIGNS["data_wait"].reports
    assert advise(lines(20, 0.1)) == [] and advise(lines(wait - 1, 0.4)) == []
    (said,) = advise(lines(wait, 0.4))
    assert said.name == "data_wait" and said.images == wait - 1
    assert "40% of the time" in said.text and "data.cache" in said.text
