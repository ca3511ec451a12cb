"""Adam steps each number alike wherever it lies, and only while that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tools.even_rounding import even_rounding

SIZE = 4096


def stepped(kind: type[torch.optim.Adam], cuts: Sequence[int], steps: int = 4) -> list[Tensor]:
    """Weights and moments, (SIZE,) each, of one vector that is stepped in pieces; the third step is skipped."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(SIZE, generator=draw) * 0.02
    pieces = [weights[a:b].clone().requires_grad_() for a, b in pairwise([0, *cuts, SIZE])]
    optimiser = kind(pieces, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    for step in range(steps):
        gradient = torch.randn(SIZE, generator=draw) * 1e-4
        for piece, own in zip(pieces, gradient.split([p.numel() for p in pieces]), strict=True):
            piece.grad = own.clone()
        # as the engines have a fused optimiser leave everything as it is
        optimiser.found_inf = torch.tensor(float(step == 2))  # type: ignore[attr-defined]
        optimiser.step()
    assert {int(optimiser.state[piece]["step"]) for piece in pieces} == {steps - 1}
    moments = ("exp_avg", "exp_avg_sq")
    return [
        torch.cat([piece.detach() for piece in pieces]),
        *(torch.cat([optimiser.state[piece][name] for piece in pieces]) for name in moments),
    ]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@given(cuts=st.sets(st.integers(1, SIZE - 1), max_size=12))
def test_vector_cut_anywhere_steps_to_the_same_bits(
    kind: type[torch.optim.Adam], cuts: set[int]
) -> None:
    whole = stepped(kind, [])
    with even_rounding():
        found = stepped(kind, sorted(cuts))
    # SIZE is a number of whole vectors, so that nothing of the uncut vector lies behind them
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_vector_cut_into_scalars_steps_to_other_bits_once_it_is_not_asked_for() -> None:
    """If this torch rounds alike by itself, `even_rounding` is no longer needed."""
    with even_rounding():
        pass
    whole, cut = (stepped(torch.optim.AdamW, cuts) for cuts in ([], range(1, SIZE)))
    assert not torch.equal(whole[2], cut[2])
    assert torch.allclose(whole[2], cut[2], rtol=1e-6, atol=0.0)
