"""Whether a bootstrap finds groups: what is measured, what is said of it and when, and prototypes that begin anew."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from selfguide.distributed import RankInfo
from selfguide.guidance.component import Stepped
from selfguide.guidance.online import PROTOTYPES, OnlineSource
from selfguide.guidance.prototype_counts import PrototypeCounts
from selfguide.guidance.prototypes import assign
from selfguide.networks.student import build_student
from selfguide.spec.advice import SIGNS, advise, recorded
from selfguide.spec.config import Config, TrainConfig
from selfguide.spec.initial_weights import SCRATCH
from selfguide.spec.run import append_record
from selfguide.training.advisor import Advisor
from selfguide.training.engine.protocol import Moments
from selfguide.training.job import build_state
from selfguide.training.state import State
from tests.selfguide.test_online import make, online_config

WELL: dict[str, Any] = {
    "loss": 0.3, "groups": 30, "rows": 128, "counted": 60_000, "warm": 1.0, "used": 1.0, "perplexity": 0.9,
    "largest": 0.06, "dead": 0.0, "code_loss": 0.6, "churn": 0.02,
}  # fmt: skip


def lines(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [WELL | changes | {"images": 1000 * (i + 1)} for i in range(count)]


def alone(config: Config, images: int = 600) -> State:
    """A real state on one process, whose head has met a batch."""
    config = replace(
        config,
        engine=replace(config.engine, backend="torch"),
        train=TrainConfig(images=1024, batch=64, ema_halflife=(500, 2000)),
    )
    state = build_state(config, RankInfo(0, 0, 1), build_student(config, 0), [], SCRATCH)
    state.images = images
    return state


# --- what is said


def test_a_healthy_run_gets_no_advice() -> None:
    assert advise(lines(50)) == []
    assert advise([{"images": 1, "loss": 1.0}] * 9) == [], "nor is one without an online source"


@pytest.mark.parametrize(
    ("name", "sick", "words"),
    [
        ("few_rows", {"rows": 7}, "30 prototypes share about 7 rows"),
        ("no_structure", {"code_loss": 0.99}, "99.0% of ln K"),
        ("unused", {"used": 0.4}, "only 40% of 30"),
        ("one_group", {"largest": 0.6}, "takes 60%"),
        ("restless", {"churn": 0.5}, "50% of images"),
    ],
)
def test_each_sign_is_named_once_it_has_lasted_and_says_what_to_do(
    name: str, sick: dict[str, Any], words: str
) -> None:
    assert name in SIGNS
    wait = SIGNS[name].reports
    before = lines(3)
    assert advise(before + lines(wait - 1, **sick)) == []
    broken = [*lines(wait - 1, **sick), *lines(1), *lines(wait - 1, **sick)]
    assert advise(broken) == [], "a sign that went away is none"
    (said,) = advise(lines(wait + 4, **sick))
    assert said.name == name and said.images == 1000 * wait
    assert words in said.text and "guidance." in said.text + "guidance." * (name == "few_rows")


def test_signs_of_a_beginning_are_none() -> None:
    """Before its weight has grown, and before prototypes could have been met, a head knows nothing."""
    sick = {"code_loss": 1.0, "used": 0.1, "largest": 0.9, "churn": 0.9}
    assert advise(lines(9, warm=0.4, **sick)) == []
    few = [a.name for a in advise(lines(9, counted=100, **sick))]
    assert few == ["restless"]


def test_advice_is_logged_and_recorded_once_in_a_run_whatever_the_attempt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "selfguide.training")
    for attempt in (1, 2):
        advisor = Advisor(tmp_path, attempt)
        for line in lines(12, used=0.3):
            advisor.hear(line)
    assert caplog.text.count("only 30% of 30 prototypes") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["advice-0001.jsonl"]
    assert [a.name for a in recorded(tmp_path)] == ["unused"]
    said = json.loads((tmp_path / "advice-0001.jsonl").read_text())
    assert said["images"] == 5000 and said["time"] > 0


def test_an_advisor_forgets_what_a_run_left_behind_as_it_went_back(tmp_path: Path) -> None:
    """Four reports of a sign lie beyond the checkpoint that it goes back to, which is at one."""
    advisor, sick = Advisor(tmp_path, 1), lines(5, used=0.3)
    for line in (*sick, *sick[1:4]):
        if line is not sick[4]:
            advisor.hear(line)
    assert recorded(tmp_path) == [], "never five in a row"
    advisor.hear(sick[4])
    assert [(a.name, a.images) for a in recorded(tmp_path)] == [("unused", 5000)]


def test_a_sign_that_lasts_over_attempts_is_given_where_each_of_them_is_too_short(
    tmp_path: Path,
) -> None:
    """Two reports each, of which the second is lost and trained again, as after a preemption."""
    sick = [*lines(2), *lines(8, used=0.3)[2:]]
    for attempt in range(1, 7):
        advisor = Advisor(tmp_path, attempt)
        advisor.begin(1000 * (attempt - 1))
        for line in sick[attempt - 1 : attempt + 1]:
            append_record(tmp_path / f"train-{attempt:04d}.jsonl", line)
            advisor.hear(line)
    # the third to the seventh report
    assert [(a.name, a.images) for a in recorded(tmp_path)] == [("unused", 7000)]


def test_what_lies_beyond_the_checkpoint_that_an_attempt_goes_on_from_is_forgotten(
    tmp_path: Path,
) -> None:
    for line in lines(4, used=0.3):
        append_record(tmp_path / "train-0001.jsonl", line)
    for images, told in ((4000, ["unused"]), (2500, [])):
        advisor = Advisor(tmp_path, 2)
        advisor.begin(images)
        advisor.hear(lines(5, used=0.3)[-1])
        assert [a.name for a in recorded(tmp_path)] == told
        for path in tmp_path.glob("advice-*"):
            path.unlink()


@pytest.mark.parametrize(
    "other",
    [b'{"images": 30', b"\0\0", b"\xff\n", b"[1]\n", b"{}\n", b'{"images": 4500, "groups": 8}\n',
     b'{"images": 4500, "spectrum": {"all": {"loss": [1]}}}\n', b'{"images": null}\n'],
)  # fmt: skip
def test_lines_that_are_torn_or_of_another_version_keep_no_attempt_from_its_advice(
    tmp_path: Path, other: bytes
) -> None:
    """As where the loss of a report was not finite, which a line cannot hold."""
    sick = lines(5, used=0.3)
    with (tmp_path / "train-0001.jsonl").open("wb") as file:
        for line in sick[:4]:
            file.write(json.dumps(line | {"churn": None}).encode() + b"\n")
        file.write(other)
    (tmp_path / "train-notes.jsonl").write_text("?")
    advisor = Advisor(tmp_path, 2)
    advisor.begin(4500)
    advisor.hear(sick[4])
    assert [a.name for a in recorded(tmp_path)] == ["unused"]


@pytest.mark.parametrize("torn", [b'{"name": "unus', b"\0\0\0\0", b"\xff\n", b"[1]", b"{}"])
def test_a_line_of_advice_that_a_node_tore_as_it_went_down_keeps_no_attempt_from_starting(
    tmp_path: Path, torn: bytes
) -> None:
    advisor = Advisor(tmp_path, 1)
    for line in lines(12, used=0.3):
        advisor.hear(line)
    with (tmp_path / "advice-0001.jsonl").open("ab") as file:
        file.write(torn)
    Advisor(tmp_path, 2)
    assert [a.name for a in recorded(tmp_path)] == ["unused"]


# --- what is measured


def test_measures_are_those_of_a_plain_count() -> None:
    state = alone(online_config())
    (source,) = state.components
    assert isinstance(source, OnlineSource) and state.teacher is not None
    _, _, _, batch = make(online_config(), images=600)
    source.health.see(batch)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (200,), generator=generator)
    source.prototype_counts.begin_step(600)
    source.prototype_counts.count_learned(
        ids[:150], torch.full((150,), 2.0), torch.tensor([True, False])
    )
    source.prototype_counts.count_learned(
        ids[150:], torch.full((50,), 4.0), torch.tensor([False, False])
    )
    found = source.report(state.images, state.teaching)
    counts = [int((ids == k).sum()) for k in range(12)]
    p = [c / 200 for c in counts if c]
    assert found["used"] == pytest.approx(len(p) / 12) and found["largest"] == max(p)
    entropy = -sum(q * math.log(q) for q in p)
    assert found["perplexity"] == pytest.approx(math.exp(entropy) / 12)
    assert found["code_loss"] == pytest.approx((150 * 2 + 50 * 4) / 200 / math.log(12))
    assert found["dead"] == 0.5 and found["counted"] == 200 and "churn" not in found
    assert "code_loss" not in source.report(state.images, state.teaching), "a report begins anew"
    source.prototype_counts.count_learned(ids[:5], torch.ones(5), torch.tensor([True, False]))
    source.prototype_counts.count_learned(
        ids[:0], torch.ones(0), torch.tensor([True, True])
    )  # nobody to be near to
    assert source.report(state.images, state.teaching)["dead"] == 1.0


def test_churn_is_the_share_of_the_probe_whose_group_changed() -> None:
    state = alone(online_config())
    (source,) = state.components
    assert isinstance(source, OnlineSource) and state.teacher is not None
    _, _, _, batch = make(online_config(), images=600)
    source.health.see(batch)
    source.report(state.images, state.teaching)
    assert source.report(state.images, state.teaching)["churn"] == 0.0, "nothing was learned"
    head = state.teacher.module.head
    assert head is not None
    before = assign(state.teacher.module, source.extract(batch, state.teacher.module))
    head.prototypes.data = head.prototypes.data.roll(1, dims=0)
    head.norm.running_var.mul_(0.01)
    after = assign(state.teacher.module, source.extract(batch, state.teacher.module))
    batch.x0.zero_()  # the probe is a copy
    share = (before != after).float().mean().item()
    assert (
        source.report(state.images, state.teaching)["churn"] == pytest.approx(share) and share > 0
    )


def test_windows_forget() -> None:
    prototype_counts = PrototypeCounts(4, window=128, switch=100)
    seen = []
    for images in range(0, 640, 64):
        prototype_counts.begin_step(images)
        prototype_counts.begin_step(images)  # the second micro-batch of a step
        prototype_counts.count_learned(torch.tensor([1]), torch.ones(1), torch.zeros(4))
        seen.append(int(prototype_counts.totals()[2:].sum()))
    assert seen == [1, 2, 3, 4, 3, 4, 3, 4, 3, 4]


# --- prototypes that begin anew


def test_only_unused_prototypes_begin_anew_in_masters_averages_and_teacher() -> None:
    config = online_config(revive=0.5, window=64)
    state = alone(config, images=640)
    (source,), engine = state.components, state.engine
    generator = torch.Generator().manual_seed(3)
    assert isinstance(source, OnlineSource) and state.teacher is not None
    used = torch.arange(64) % 9  # of 12: three are met by nothing
    source.prototype_counts.begin_step(600)
    source.prototype_counts.count_learned(used, torch.ones(64), torch.zeros(12))
    embedding = F.normalize(torch.randn(64, 32, generator=generator), dim=1)
    source.recent = embedding, torch.arange(576, 640)
    ones = tuple(torch.ones_like(master) for master in engine.masters)
    engine.load_moments(Moments(ones, tuple(one.clone() for one in ones), 5))
    flat = engine.gather(engine.masters)  # of one process: the masters themselves
    before = {n: t.clone() for n, t in engine.layout.split(flat).items()}
    assert source.revive(state, Stepped(torch.tensor(False), 640, 64)) == 0
    assert source.revive(state, Stepped(torch.tensor(True), 640, 64)) == 3
    rows = engine.layout.split(flat)[PROTOTYPES]
    for row in rows[9:]:
        assert (embedding == row).all(1).any(), "a feature of the batch"
    assert len(rows[9:].unique(dim=0)) == 3
    assert torch.equal(rows[:9], before[PROTOTYPES][:9])
    for name, value in engine.layout.split(flat).items():
        assert name == PROTOTYPES or torch.equal(value, before[name])
    for index in (0, 1):
        averaged = state.averages.weights(index)[PROTOTYPES]
        assert torch.equal(averaged[9:], rows[9:])
    assert state.teacher.module.head is not None and engine.module.head is not None
    assert torch.equal(state.teacher.module.head.prototypes[9:], rows[9:])
    assert torch.equal(engine.module.head.prototypes[9:], rows[9:])
    moments = engine.moments()
    for moment in (moments.first, moments.second):
        kept = engine.layout.split(engine.gather(moment))
        assert not kept[PROTOTYPES][9:].any() and (kept[PROTOTYPES][:9] == 1).all()
        assert sum(int((t == 0).sum()) for t in kept.values()) == 3 * 32


def test_revival_waits_for_the_end_of_a_window_and_is_off_by_default() -> None:
    for config, images in (
        (online_config(window=64), 640),
        (online_config(revive=0.5, window=128), 704),
    ):
        state = alone(config, images=images)
        before = state.engine.gather(state.engine.masters).clone()
        (source,) = state.components
        assert isinstance(source, OnlineSource)
        assert source.revive(state, Stepped(torch.tensor(True), images, 64)) == 0
        assert torch.equal(state.engine.gather(state.engine.masters), before)


def drawn(rank_info: RankInfo, world: int) -> list[list[float]]:
    whole = torch.arange(48 * 2 * 3, dtype=torch.float32).view(96, 3)  # two patches of 48 images
    share = 48 // world
    config = online_config()
    source = OnlineSource(config.guidance, config.path, 0, 512)  # type: ignore[arg-type]
    mine = slice(rank_info.rank * share * 2, (rank_info.rank + 1) * share * 2)
    source.recent = (
        whole[mine],
        torch.arange(rank_info.rank * share, (rank_info.rank + 1) * share) + 7000,
    )
    return source._draw_recent(10, seed=4).tolist()


def test_features_for_revival_are_the_same_at_any_world_size(ranks: Any) -> None:
    single = drawn(RankInfo(0, 0, 1), 1)
    assert ranks(3, drawn, 3) == [single] * 3
    assert len({tuple(row) for row in single}) == 10
