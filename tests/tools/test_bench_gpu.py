"""The GPU's benchmark in small on a CPU: every part is measured or named, and figures are consistent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfguide.training.flops import Peak
from shards.errors import UserError
from tools.bench.gpu import command, suite
from tools.bench.gpu.timing import small


def test_the_whole_benchmark_runs_small_and_writes_what_it_found(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    # DeepSpeed and the compiler take longer than all the rest; `make test-slow` has them
    quick = [part for part in command.PARTS if part not in ("stages", "steps")]
    assert command.main(["--small", "--out", str(out), "--only", ",".join(quick)]) == 0
    found = json.loads(out.read_text())
    assert found["problems"] == [] and set(found["parts"]) == set(quick)
    assert all(row["passes"] for row in found["parts"]["gradients"] if "float32" in row["dtype"])
    assert all(row["error"] < 0.1 for row in found["parts"]["gradients"])
    whole, short = found["parts"]["extraction"]
    assert whole["images_per_s"] > 0 and short["of_whole"] > 0
    heads = found["parts"]["attention"]
    assert [each["attention"] for each in heads][1:] == [80, 96, 128] and heads[0]["of_plain"] == 1
    dense, routed = found["parts"]["routing"]
    assert routed["route"] == 0.5 and "route" not in dense
    assert routed["flops_step"] < routed["flops_step_dense"] == dense["flops_step"]
    assert found["machine"]["torch"] and isinstance(found["machine"]["absent"], list)


def test_a_step_states_its_flops_and_its_share_of_the_peak() -> None:
    from tools.bench.gpu.steps import measured

    found = measured("dit_digits", 2, "eager", small(torch.device("cpu")), Peak(1.0, "of a test"))
    for part in ("step", "forward_backward"):
        rate = found[part]
        assert rate["tflops"] == pytest.approx(found["flops_step"] / rate["ms"] * 1e3 / 1e12)
        assert (
            rate["images_per_s"] == pytest.approx(2e3 / rate["ms"])
            and rate["mfu"] == rate["tflops"]
        )


def test_what_fails_or_finds_no_time_is_named_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(extent: object) -> object:
        raise RuntimeError("no memory")

    monkeypatch.setattr(suite.parts, "gradients", broken)
    out = tmp_path / "gpu.json"
    assert command.main(["--small", "--out", str(out), "--only", "gradients,ceilings"]) == 0
    found = json.loads(out.read_text())
    assert [each["part"] for each in found["problems"]] == ["gradients"]
    assert "ceilings" in found["parts"]
    assert command.main(["--small", "--out", str(out), "--only", "ceilings", "--minutes", "0"]) == 0
    late = json.loads(out.read_text())
    assert late["parts"] == {} and [each["part"] for each in late["problems"]] == ["ceilings"]


@pytest.mark.parametrize("words", [["--only", "cielings"], ["--wheels", "nowhere"], []])
def test_mistakes_are_refused_before_anything_is_measured(words: list[str], tmp_path: Path) -> None:
    more = ["--small"] if words else []
    if not words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError):
        command.main([*words, *more, "--out", str(tmp_path / "gpu.json")])
    assert not (tmp_path / "gpu.json").exists()


def test_a_library_that_is_missing_is_named_or_left_out(tmp_path: Path) -> None:
    """In a process of its own: one without all that the trainer's own step does not need."""
    absent = [
        "deepspeed",
        "torchdiffeq",
        "torchvision",
        "timm",
        "diffusers",
        "hydra",
        "yaml",
        "sklearn",
        "rich",
    ]
    out = tmp_path / "gpu.json"
    parts = [
        "ceilings",
        "gradients",
        "attention",
        "extraction",
        "snapshot",
        "sampling",
        "inception",
    ]
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n"
        "from tools.bench.gpu import command\n"
        f"command.main(['--small', '--out', {str(out)!r}, '--only', {','.join(parts)!r}])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), timeout=300)
    found = json.loads(out.read_text())
    assert set(found["parts"]) == {*parts} - {"inception"}
    assert {each["part"] for each in found["problems"]} == {"inception"}
    assert {"torchdiffeq", "torchvision", "deepspeed"} <= set(found["machine"]["absent"])


@pytest.mark.slow
def test_all_parts_run_small_as_a_command(tmp_path: Path) -> None:
    """With the compiler, and DeepSpeed's stages in processes of their own."""
    out = tmp_path / "gpu.json"
    words = [sys.executable, "-m", "tools.bench", "gpu", "--small", "--out", str(out)]
    subprocess.run(words, check=True, env=dict(os.environ), timeout=500)
    found = json.loads(out.read_text())
    assert set(found["parts"]) == set(command.PARTS)
    assert {each["part"] for each in found["problems"]} == {"dit_digits, 2 images, graph"}
    assert {row["engine"] for row in found["parts"]["stages"]} >= {"torch", "ZeRO-1", "ZeRO-2"}
