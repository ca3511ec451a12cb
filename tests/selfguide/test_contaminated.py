"""A planted contamination: a model that was tuned on one net's distance is flagged, and a held-out net disagrees."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from launcher.board.collect import collect
from launcher.board.read import read_runs
from launcher.compose import compose
from launcher.reconcile.view import read
from selfguide.evaluation.features.net import FeatureNet
from selfguide.evaluation.metrics.frechet import Reference, frechet
from selfguide.evaluation.metrics.moments import BLOCKS, Moments
from selfguide.spec.contamination import NetUse
from selfguide.spec.records import EvaluationRecord, Protocol, record_key
from selfguide.spec.run import RunFolder
from selfguide.spec.selections import nets_that_selected, select, selections

COUNT = 400


class Random(nn.Module):
    """A net of random weights."""

    def __init__(self, seed: int, *, depth: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [3, *([12] * depth)]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(b, a, 3, 3, generator=generator) / (9 * a) ** 0.5, requires_grad=False)
            for a, b in itertools.pairwise(sizes)
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for weight in self.weights:
            x = torch.conv2d(x, weight, padding=1).relu()
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1), None


def net_of(name: str, seed: int, depth: int) -> FeatureNet:
    return FeatureNet(
        name=name, sha256=name * 8, resize="bicubic, antialiased, float", size=8, mean=(128.0,) * 3,
        std=(64.0,) * 3, width=24, net=Random(seed, depth=depth),
    )  # fmt: skip


def drawn(seed: int, contrast: float) -> Tensor:
    """Smooth images about grey, of some contrast."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(COUNT, 3, 10, 10, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(x, 3, 1)
    return (128 + contrast * smooth).clamp(0, 255)


def distance(net: FeatureNet, real: Tensor, made: Tensor) -> float:
    reference = Reference.of(Moments.of(net.embed(real.round().to(torch.uint8))))
    features = net.embed(made.round().to(torch.uint8))
    return frechet(reference, Moments.of(features, reference.mean, BLOCKS)).value


def tuned(net: FeatureNet, real: Tensor, made: Tensor) -> Tensor:
    """Images whose mean and covariance of features in `net` were made those of real ones, by gradients."""
    x = made.clone().requires_grad_()
    target, _ = net.net((real - 128) / 64)
    optimiser = torch.optim.Adam([x], lr=6.0)
    for _ in range(60):
        found, _ = net.net((x - 128) / 64)
        loss = (found.mean(0) - target.mean(0)).square().sum() + (
            found.T.cov() - target.T.cov()
        ).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return x.detach().clamp(0, 255)


def test_samples_tuned_on_one_net_are_better_there_and_not_in_a_held_out_one() -> None:
    tuner, held_out = net_of("a", 0, 2), net_of("b", 1, 3)
    real, honest = drawn(0, 160.0), drawn(1, 130.0)
    cheated = tuned(tuner, real, drawn(2, 40.0))
    assert distance(tuner, real, cheated) < distance(tuner, real, honest)
    assert distance(held_out, real, cheated) > distance(held_out, real, honest)


CONFIG = compose(["experiment=digits_uncond", "cluster=local", "evaluation=fd_digits"])
ABOUT = {"data": {"manifest": "m"}, "guidance": {}}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with a record at 64 and at 128 images under fd_digits, and under another net."""
    found = RunFolder(tmp_path / "runs" / "digits_uncond" / "0123")
    identity = {"experiment": "digits_uncond", "seed": 0}
    about = {
        "id": "0123",
        "name": None,
        "experiment": "digits_uncond",
        "hash": "0",
        "identity": identity,
    }
    found.root.mkdir(parents=True)
    found.run_json.write_text(json.dumps({**about, "images": 128, "created": 0.0, "time": 0.0}))
    base = Protocol.of(CONFIG, ABOUT)
    for protocol in (base, replace(base, metric="fd_timm", net="other", feature_sha256="f" * 64)):
        for images in (64, 128):
            EvaluationRecord(
                status="done", key=record_key(images, protocol), attempt=1, images=images, final=images == 128,
                run="0123", experiment="digits_uncond", protocol=protocol.plain(), protocol_key=protocol.key,
                scores={protocol.metric: 1.0}, label_free=True,
            ).publish(found)  # fmt: skip
    return found


def test_choice_by_a_nets_score_flags_that_nets_records_from_the_chosen_snapshot_on(
    run: RunFolder,
) -> None:
    before = read(run)
    assert not any(record.contaminations for record in before.records)
    base = Protocol.of(CONFIG, ABOUT)
    select(run, base.plain(), by="tools.better", images=100, among=("x", "y"))
    flagged = {(r.metric, r.images) for r in read(run).records if r.contaminations}
    assert flagged == {("fd_digits", 128)}
    (use,) = {u for r in read(run).records for u in r.contaminations}
    assert use == NetUse(net="fd_digits", sha256=base.feature_sha256, use="selected")
    assert use.words == "selected by fd_digits"
    assert nets_that_selected(run, 64) == []
    assert nets_that_selected(run, 128) == [{"net": "fd_digits", "sha256": base.feature_sha256}]


def test_the_same_choice_is_written_once(run: RunFolder) -> None:
    base = Protocol.of(CONFIG, ABOUT).plain()
    for _ in range(2):
        select(run, base, by="tools.better", images=100, among=("x", "y"))
    (found,) = selections(run)
    assert (found.by, found.images, found.among) == ("tools.better", 100, ("x", "y"))


def test_board_gives_a_chosen_run_a_badge_and_no_rank_in_that_net_alone(run: RunFolder) -> None:
    base = Protocol.of(CONFIG, ABOUT)
    select(run, base.plain(), by="tools.better")
    board = collect(*read_runs(run.root.parent.parent))
    rows = {table.metric: table.rows[0] for table in board.tables}
    assert rows["fd_digits"].rank is None
    assert rows["fd_digits"].contaminations == ("selected by fd_digits",)
    assert rows["fd_timm"].rank == 1
    assert not rows["fd_timm"].contaminations


def test_selection_that_cannot_be_read_is_a_problem_and_hides_no_record(run: RunFolder) -> None:
    (run.root / "selected").mkdir()
    (run.root / "selected" / "bad.json").write_text("{")
    view = read(run)
    assert len(view.records) == 4
    assert any("bad.json" in problem for problem in view.problems)
