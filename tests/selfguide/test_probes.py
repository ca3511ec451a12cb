"""What a rank measures of its node: a product whose every entry is known, the first bytes of a shard, clocks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.compose import compose
from selfguide.distributed import RankInfo
from selfguide.spec.config import Config
from selfguide.spec.nodes import NodeRefused
from selfguide.training import probes
from shards.format.manifest import Manifest, load

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_that_is_right_is_exact_in_every_format(dtype: torch.dtype) -> None:
    problem, seconds = probes.product(CPU, dtype)
    assert problem == "" and seconds > 0


@pytest.mark.parametrize("wrong", [float("nan"), 1.0])
def test_product_with_one_wrong_entry_is_found(
    monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found = left @ right
        found[7, 300] += wrong
        return found

    monkeypatch.setattr(probes, "multiply", multiply)
    assert probes.product(CPU, torch.float32)[0].startswith("1 of ")


@pytest.fixture
def sources(digits: Path) -> tuple[Config, Sequence[Manifest]]:
    words = ["experiment=digits_dit", "cluster=slurm", f"data.root={digits}", "nodes=1"]
    return compose(words), [load(str(digits))]


def check(tmp_path: Path, sources: tuple[Config, Sequence[Manifest]]) -> dict[str, Any]:
    attempt = tmp_path / "runs" / "digits_dit" / "a1" / "attempts" / "0001"
    attempt.mkdir(parents=True, exist_ok=True)
    config, manifests = sources
    try:
        probes.check(config, RankInfo(0, 0, 1), attempt, manifests)
    finally:
        assert [path.name for path in attempt.iterdir()] == ["preflight.json"]
    return json.loads((attempt / "preflight.json").read_text())


def test_check_of_a_node_that_is_well_is_quick_and_written_down(
    tmp_path: Path, sources: tuple[Config, Sequence[Manifest]]
) -> None:
    before = torch.get_rng_state()
    found = check(tmp_path, sources)
    assert found["findings"] == [] and len(found["ranks"]) == 1
    assert abs(found["ranks"][0]["clock"] - time.time()) < 60
    # the numbers of a run do not depend on it
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("clocks", "ahead"), [((0, 0), 0), ((0, 500), 0), ((500, 500), -500), ((-500, -400), 400)]
)
def test_clock_of_a_disk_is_compared_with_all_the_time_that_it_took_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clocks: tuple[int, int], ahead: int
) -> None:
    """This node's clock before and after, in seconds from the disk's."""
    read = iter(clocks)
    began = time.time()
    monkeypatch.setattr(probes, "now", lambda: began + next(read))
    assert probes._server_ahead_s(tmp_path) == pytest.approx(ahead, abs=60)


def test_check_of_a_node_that_is_not_well_refuses_it(
    tmp_path: Path,
    sources: tuple[Config, Sequence[Manifest]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr(probes, "now", lambda: time.time() + 3600)
    # the disk's clock is the second voice of two
    monkeypatch.setattr(probes, "_server_ahead_s", lambda attempt: -3600.0)
    with pytest.raises(NodeRefused) as caught:
        check(tmp_path, sources)
    assert (caught.value.node, caught.value.check) == ("n1", "clock")


def test_check_where_no_node_reads_the_shards_leaves_it_to_the_trainer(
    tmp_path: Path, sources: tuple[Config, Sequence[Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes.storage, "read_range", _unreadable)
    found = check(tmp_path, sources)
    assert found["findings"] == [] and "no such mount" in found["ranks"][0]["unreadable"]


def _unreadable(*_: object) -> bytes:
    raise FileNotFoundError("no such mount")
