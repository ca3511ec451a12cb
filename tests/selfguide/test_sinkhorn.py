"""Distributed Sinkhorn: exact for unequal and empty shards, n all-reduces, the right marginals, POT's plans."""

import math
from functools import partial
from typing import Any

import numpy as np
import ot
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from selfguide import sinkhorn as module
from selfguide.distributed import RankInfo
from selfguide.sinkhorn import LEAST_EPSILON, Queue, sinkhorn, solve
from tools.ranks import run_ranks

SIZES = (3, 0, 22, 15)
FORMS = (False, True)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def scores(dtype: torch.dtype, count: int = sum(SIZES), groups: int = 12, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    z = torch.nn.functional.normalize(
        torch.randn(count, 8, generator=generator, dtype=torch.float64), dim=1
    )
    prototypes = torch.nn.functional.normalize(
        torch.randn(groups, 8, generator=generator, dtype=torch.float64), dim=1
    )
    return (z @ prototypes.T).to(dtype)


def heads(dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([scores(dtype, seed=seed) for seed in range(3)])


WORLDS = ((40,), (18, 22), (0, 40, 0), SIZES)  # rows of each rank


def on_a_rank(rank_info: RankInfo) -> list[list[tuple[np.ndarray, np.ndarray, list]]]:
    """For each of WORLDS this rank is in: codes, dead prototypes and collectives of every form."""
    calls: list[Any] = []
    reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        calls.append((str(op).rsplit(".")[-1], tuple(tensor.shape), tensor.dtype))
        return reduce(tensor, op=op, group=group)

    groups = [dist.new_group(range(len(sizes))) for sizes in WORLDS[:-1]]
    dist.all_reduce = counted  # counts the real collective, replaces nothing
    for name in ("all_gather", "all_gather_into_tensor", "broadcast", "reduce", "barrier"):
        setattr(dist, name, lambda *a, name=name, **k: calls.append((name, (), None)))
    answers = []
    for sizes, group in zip(WORLDS, [*groups, None], strict=True):  # None: the default group
        answers.append([])
        for whole, log_domain in CASES if rank_info.rank < len(sizes) else ():
            calls.clear()
            mine = whole().split(sizes, dim=-2)[rank_info.rank]
            codes, dead = solve(mine, iterations=3, log_domain=log_domain, group=group)
            answers[-1].append((codes.numpy(), dead.numpy(), list(calls)))
    return answers


CASES = [
    (partial(make, dtype), log_domain)
    for dtype in TOLERANCE
    for make in (scores, heads)
    for log_domain in FORMS
]


@pytest.fixture(scope="module")
def answers() -> list[Any]:
    return run_ranks(4, on_a_rank)


@pytest.mark.parametrize("world", range(1, 5))
def test_shards_of_any_size_give_the_codes_of_one_process(answers: list[Any], world: int) -> None:
    for case, (make, log_domain) in enumerate(CASES):
        whole = make()
        wanted = solve(whole, iterations=3, group="local", log_domain=log_domain)
        found = [answers[rank][world - 1][case] for rank in range(world)]
        together = np.concatenate([codes for codes, _, _ in found], axis=-2)
        assert together.dtype == wanted.codes.numpy().dtype
        tolerance = TOLERANCE[whole.dtype]
        np.testing.assert_allclose(together, wanted.codes.numpy(), atol=tolerance, rtol=0)
        vector = (12,) if whole.dim() == 2 else (3, 12)
        turn = [("SUM", vector, whole.dtype)]
        turn = [("MAX", vector, whole.dtype), *turn] if log_domain else turn
        for _, dead, calls in found:
            np.testing.assert_array_equal(dead, wanted.dead.numpy())
            assert calls == turn * 3


def by_definition(whole: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """SwAV's listing: scale columns to 1 / K, then rows to 1 / B, in fp64 on the plan itself."""
    q = torch.exp(whole.double() / epsilon - whole.double().max() / epsilon)
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


@given(
    st.integers(1, 30),
    st.integers(2, 30),
    st.sampled_from([0.03, 0.05, 0.2]),
    st.integers(1, 6),
    st.booleans(),
)
@settings(max_examples=40)
def test_codes_are_those_of_the_definition(
    count: int, groups: int, epsilon: float, iterations: int, log_domain: bool
) -> None:
    whole = scores(torch.float64, count, groups)
    codes = sinkhorn(whole, epsilon=epsilon, iterations=iterations, log_domain=log_domain)
    torch.testing.assert_close(
        codes, by_definition(whole, epsilon, iterations), atol=1e-12, rtol=1e-9
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("log_domain", FORMS)
@pytest.mark.parametrize(("count", "groups"), [(40, 12), (20, 400)])
def test_many_iterations_make_the_plan_doubly_stochastic(
    dtype: torch.dtype, log_domain: bool, count: int, groups: int
) -> None:
    """Also with many more prototypes than samples, where a free factor would grow as 20^100."""
    whole = scores(dtype, count, groups)
    codes = sinkhorn(whole, epsilon=0.1, iterations=100, log_domain=log_domain)
    for marginal in (codes.sum(1), codes.sum(0) * groups / count):
        torch.testing.assert_close(marginal, torch.ones_like(marginal), atol=1e-5, rtol=0)


@pytest.mark.parametrize("log_domain", FORMS)
def test_converged_plans_are_pots(log_domain: bool) -> None:
    whole = scores(torch.float64)
    rows, columns = np.full(40, 1 / 40), np.full(12, 1 / 12)
    plan = ot.sinkhorn(rows, columns, -whole.numpy(), reg=0.05, numItermax=10_000, stopThr=1e-15)
    codes = sinkhorn(whole, iterations=2000, log_domain=log_domain)
    np.testing.assert_allclose(codes.numpy(), plan * 40, atol=1e-10)


def test_a_small_epsilon_is_solved_in_the_log_domain_as_by_pot() -> None:
    whole, epsilon = scores(torch.float64), 0.004
    plan = ot.bregman.sinkhorn_log(
        np.full(40, 1 / 40), np.full(12, 1 / 12), -whole.numpy(), epsilon,
        numItermax=50_000, stopThr=1e-14,
    )  # fmt: skip
    codes = sinkhorn(whole, epsilon=epsilon, iterations=20_000)
    np.testing.assert_allclose(codes.numpy(), plan * 40, atol=1e-8)
    # in fp32 the plain form would lose the tails: the default does not
    far = scores(torch.float32) - 3.0
    default = sinkhorn(far, epsilon=epsilon, iterations=5)
    torch.testing.assert_close(default.double(), by_definition(far, epsilon, 5), atol=2e-4, rtol=0)
    assert sinkhorn(far, epsilon=epsilon, iterations=5, log_domain=False).max() == 0


def test_the_log_domain_is_chosen_where_the_plain_form_underflows() -> None:
    whole = scores(torch.float32)
    for epsilon, log_domain in ((LEAST_EPSILON, False), (0.99 * LEAST_EPSILON, True)):
        chosen = sinkhorn(whole, epsilon=epsilon)
        assert torch.equal(chosen, sinkhorn(whole, epsilon=epsilon, log_domain=log_domain))
        assert not torch.equal(chosen, sinkhorn(whole, epsilon=epsilon, log_domain=not log_domain))
    # what the constant says: the worst pair of cosines is still a normal number above it, and none below
    tiny = torch.finfo(torch.float32).tiny
    assert math.exp(-2 / LEAST_EPSILON) > tiny > math.exp(-2 / (0.99 * LEAST_EPSILON))


@given(st.floats(-3, 1), st.integers(1, 5), st.booleans())
def test_a_shift_of_all_scores_changes_nothing(
    shift: float, iterations: int, log_domain: bool
) -> None:
    base = scores(torch.float64)
    torch.testing.assert_close(
        sinkhorn(base + shift, iterations=iterations, log_domain=log_domain),
        sinkhorn(base, iterations=iterations, log_domain=log_domain),
    )


def test_scores_without_a_bound_are_solved_in_the_log_domain() -> None:
    wide = scores(torch.float32) * 1000
    codes = sinkhorn(wide, log_domain=True, iterations=10)
    assert torch.isfinite(codes).all()
    torch.testing.assert_close(codes.sum(1), torch.ones(40))
    torch.testing.assert_close(
        codes, sinkhorn(wide + 5e3, log_domain=True, iterations=10), atol=0.1, rtol=0
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_log_domain_equals_the_plain_form(dtype: torch.dtype) -> None:
    plain, logs = (solve(scores(dtype), log_domain=form) for form in FORMS)
    atol = {torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(plain.codes, logs.codes, atol=atol, rtol=0)
    assert torch.equal(plain.dead, logs.dead)


@pytest.mark.parametrize("log_domain", FORMS)
def test_stacked_heads_are_solved_as_one_by_one(log_domain: bool) -> None:
    stacked = heads(torch.float64)
    stacked[1, :, 4] = -200.0  # dead in one head only
    codes, dead = solve(stacked, log_domain=log_domain)
    for one, its_codes, its_dead in zip(stacked, codes, dead, strict=True):
        alone = solve(one, log_domain=log_domain)
        torch.testing.assert_close(its_codes, alone.codes, atol=1e-15, rtol=1e-13)
        assert torch.equal(its_dead, alone.dead)
    assert dead.nonzero().tolist() == [[1, 4]]


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=20)
def test_the_order_of_samples_and_prototypes_does_not_matter(seed: int, log_domain: bool) -> None:
    base, generator = scores(torch.float64), torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(n, generator=generator) for n in base.shape)
    torch.testing.assert_close(
        sinkhorn(base[rows][:, columns], log_domain=log_domain),
        sinkhorn(base, log_domain=log_domain)[rows][:, columns],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("log_domain", FORMS)
def test_half_precision_is_widened_before_the_exponential(
    dtype: torch.dtype, log_domain: bool
) -> None:
    codes = sinkhorn(scores(dtype), log_domain=log_domain)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, sinkhorn(scores(dtype).float(), log_domain=log_domain))


@pytest.mark.parametrize("log_domain", FORMS)
def test_autocast_does_not_reach_it(log_domain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CPUs cast to bf16 is less than what GPUs do, so the state inside is looked at, beside the result."""
    whole, inside = scores(torch.float32), []
    reduced = module._reduced

    def seen(*arguments: Any) -> torch.Tensor:
        inside.append(torch.is_autocast_enabled("cpu"))
        return reduced(*arguments)

    monkeypatch.setattr(module, "_reduced", seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = sinkhorn(whole, log_domain=log_domain)
        assert torch.is_autocast_enabled("cpu")  # and on again after it
    assert inside and not any(inside)
    assert torch.equal(codes, sinkhorn(whole, log_domain=log_domain))


def test_codes_carry_no_gradient_and_scores_stay() -> None:
    for log_domain in FORMS:
        whole = scores(torch.float32).requires_grad_()
        before = whole.detach().clone()
        assert not sinkhorn(whole, log_domain=log_domain).requires_grad
        assert torch.equal(whole.detach(), before)


@pytest.mark.parametrize("log_domain", FORMS)
def test_a_prototype_that_no_sample_is_near_is_counted_and_gives_no_nan(log_domain: bool) -> None:
    far = scores(torch.float32)
    far[:, 3] = -200.0
    far[:, 7] = far[:, 7] - 0.5  # far, but not lost
    codes, dead = solve(far, log_domain=log_domain)
    assert dead.nonzero().flatten().tolist() == [3]
    assert torch.isfinite(codes).all()
    torch.testing.assert_close(codes.sum(1), torch.ones(40))
    assert (codes[:, 3].max() == 0) == (not log_domain)


@pytest.mark.parametrize("log_domain", FORMS)
def test_iterations_bring_no_prototype_back(log_domain: bool) -> None:
    """Its first mass decides, also for distances just around the smallest number of fp32."""
    sweep = scores(torch.float32).repeat(61, 1, 1)
    sweep[:, :, 3] = torch.linspace(-3.7, -3.1, 61)[:, None]
    once, often = (
        solve(sweep, iterations=n, log_domain=log_domain).dead[:, 3].tolist() for n in (1, 6)
    )
    assert once == often == sorted(once, reverse=True) and len(set(once)) == 2


def test_an_empty_batch_has_no_codes() -> None:
    for log_domain in FORMS:
        for shape in ((0, 12), (3, 0, 12)):
            assert solve(torch.empty(shape), log_domain=log_domain).codes.shape == shape


@pytest.mark.parametrize("log_domain", FORMS)
def test_scores_that_are_not_finite_reach_the_codes(log_domain: bool) -> None:
    """The loop's watch over the loss must see them."""
    broken = scores(torch.float32)
    broken[5, 2] = torch.nan
    assert sinkhorn(broken, log_domain=log_domain).isnan().any()


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"iterations": 0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sinkhorn(scores(torch.float32), **wrong)
    with pytest.raises(ValueError, match="shape"):
        sinkhorn(torch.zeros(12))


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 12))
def test_a_queue_holds_the_newest_rows_in_order(pushes: list[int], capacity: int) -> None:
    queue, everything = Queue(capacity, 3), torch.empty(0, 3)
    for number, count in enumerate(pushes):
        rows = torch.full((count, 3), float(number), dtype=torch.float64) + torch.rand(count, 3)
        everything = torch.cat((everything, rows.float()))
        queue.push(rows.requires_grad_())
        assert torch.equal(queue.rows(), everything[-capacity:])
        assert queue.rows().dtype == torch.float32 and not queue.rows().requires_grad


def test_a_queue_goes_on_from_its_state() -> None:
    queue, other = Queue(5, 2), Queue(5, 2)
    queue.push(torch.rand(4, 2))
    state = queue.saved_rows()
    other.push(torch.rand(5, 2))
    other.load_rows(state)
    for rows in (torch.rand(2, 2), torch.rand(0, 2), torch.rand(9, 2)):
        queue.push(rows), other.push(rows)
        assert torch.equal(queue.rows(), other.rows())
    assert len(state) == 4  # a copy: pushing did not change it
    smaller = Queue(3, 2)
    smaller.load_rows(state)
    assert torch.equal(smaller.rows(), state[-3:])
    held, kept = queue.saved_rows(), queue.rows().clone()
    other.load_rows(held)
    held.zero_()  # what a checkpoint does with it reaches neither queue
    assert torch.equal(queue.rows(), kept) and torch.equal(other.rows(), kept)
    with pytest.raises(ValueError, match="rows of shape"):
        smaller.load_rows(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="capacity=0"):
        Queue(0, 2)


def test_a_row_that_is_not_finite_does_not_outlive_its_batch_in_a_queue() -> None:
    queue, broken = Queue(4, 3), torch.ones(2, 3)
    broken[1, 2] = torch.nan
    queue.push(broken)
    assert queue.rows().tolist() == [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]


def test_queued_rows_share_the_prototypes_with_the_batch() -> None:
    """A batch of one group fills its own prototype only, once a queue holds the others."""
    eye = torch.eye(4)
    batch, queue = eye[:1].repeat(4, 1), Queue(12, 4)
    alone = sinkhorn(batch @ eye.T, iterations=50)
    queue.push(eye[1:].repeat(4, 1))
    joined = sinkhorn(torch.cat((batch @ eye.T, queue.rows() @ eye.T)), iterations=50)[:4]
    torch.testing.assert_close(alone, torch.full((4, 4), 0.25))  # spread over all, near or not
    torch.testing.assert_close(joined, eye[:1].repeat(4, 1), atol=1e-6, rtol=0)
