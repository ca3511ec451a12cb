"""The suite that `selfguide.diffusion.denoiser.LITTLE` follows times what it says it times."""

from __future__ import annotations

import json

import pytest
import torch

from selfguide.models.dit import DiT
from tools.bench import __main__ as command
from tools.bench import sampling


def test_the_sampling_suite_times_both_ways_of_one_guided_evaluation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CASES", (("dit_digits", 2),))
    sizes: list[int] = []
    run = DiT.forward

    def counted(self: DiT, x: torch.Tensor, *rest: object, **more: object) -> object:
        sizes.append(len(x))
        return run(self, x, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(DiT, "forward", counted)
    assert command.main(["sampling", "--repeats", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["suites"]["sampling"]
    names = [row["name"].removeprefix("dit_digits, 2 images: ") for row in found]
    assert sorted(names) == ["in turn", "in turn again (A/A)", "one batch"]
    # in turn and its control run twice as often, at half the size
    assert sizes.count(2) == 4 * sizes.count(4) > 0 and set(sizes) == {2, 4}
