"""Laws of all samplers on Gaussian data, where the exact denoiser and the exact answer are known.

Orders are measured in the inside of a path. Over its whole length a solver in lambda = ln(a / b) meets infinite steps
at rectified flow's ends, which cost a logarithm, and EDM's last step, from sigma 0.002 to 0, does not shrink.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from selfguide.diffusion.paths import DDPM, RectifiedFlow, VarianceExploding, build_path
from selfguide.diffusion.preconditioning import Preconditioning
from selfguide.diffusion.samplers import SAMPLERS, sample
from selfguide.diffusion.samplers.schedule import Schedule, StepNoise, noise_times, shifted
from selfguide.spec.config import PathConfig
from selfguide.spec.config.sampler import most_steps
from shards.errors import UserError
from tests.selfguide.exact import MEAN, PATHS, SD, exact, gaussian, on_the_ode

NOISE = gaussian(8)
SEEDS = torch.arange(8)
FIXED = [name for name in SAMPLERS if name != "dopri5"]


def start(name: str, tau: float) -> Tensor:
    """NOISE as it lies at noise-time `tau`."""
    return NOISE * PATHS[name][0].coefficients(torch.tensor(tau, dtype=torch.float64))[1]


def inside(sampler: str, path: str, steps: int) -> float:
    """Error between noise-times 0.9 and 0.1, in steps that are even in the logarithm of tau / (1 - tau)."""
    logits = torch.linspace(math.log(9), -math.log(9), steps + 1, dtype=torch.float64)
    times = logits.sigmoid()
    schedule = Schedule(PATHS[path][0], times)
    x = SAMPLERS[sampler](exact(path, 8), schedule.start(NOISE), schedule)
    goal = on_the_ode(PATHS[path][0], start(path, 0.9), 0.9, 0.1)
    return (x - goal).square().mean().sqrt().item()


def whole(sampler: str, path: str, steps: int, **options: float) -> float:
    """Error of the whole way, at the noise-time where it ends."""
    denoiser, seen = exact(path, 8), []
    x = sample(
        sampler, denoiser, NOISE, steps=steps, callback=lambda *step: seen.append(step), **options
    )
    first = denoiser.preconditioning.first
    goal = on_the_ode(denoiser.path, start(path, first), first, seen[-1][1])
    return (x - goal).square().mean().sqrt().item()


@pytest.mark.parametrize("path", ["rf", "rf_eps", "vp", "edm"])
@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        ("euler", 1),
        ("heun", 2),
        ("ddim", 1),
        ("dpm1", 1),
        ("dpm2", 2),
        ("dpmpp", 2),
        ("dpm_fast", 3),
    ],
)
def test_orders_of_convergence(sampler: str, order: int, path: str) -> None:
    coarse, fine = (inside(sampler, path, steps) for steps in (128, 256))
    assert abs(math.log2(coarse / fine) - order) < 0.08 * order, (coarse, fine)


def test_ddim_on_the_discrete_table_is_of_order_one() -> None:
    # its table is linear between entries: a kink at each, so that no higher order shows
    errors = [whole("ddim", "ddpm", steps) for steps in (125, 250, 500)]
    assert all(abs(math.log2(a / b) - 1) < 0.05 for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("path", ["rf", "rf_eps", "smin", "vp", "edm"])
@pytest.mark.parametrize(("sampler", "error"), [("heun", 1e-3), ("dpm2", 1e-3), ("dpmpp", 2e-3)])
def test_second_order_solvers_agree_over_the_whole_path(
    sampler: str, error: float, path: str
) -> None:
    assert whole(sampler, path, 128) < error


@pytest.mark.parametrize("path", ["rf", "vp", "ddpm", "edm"])
def test_ddim_heun_and_dpm_solver_agree_at_many_steps(path: str) -> None:
    for sampler in ("ddim", "heun", "dpm2", "dpmpp"):
        assert whole(sampler, path, 500) < 7e-3, sampler


@pytest.mark.parametrize("path", PATHS)
def test_dopri5_reaches_the_analytic_map_and_counts_what_it_ran(path: str) -> None:
    # noise-times reach the net in fp32; a discrete table's betas are a staircase, which adaptive steps resolve badly
    tolerance, error = (1e-5, 2e-3) if path == "ddpm" else (1e-7, 1e-5)
    assert whole("dopri5", path, 50, rtol=tolerance, atol=tolerance) < error
    denoiser = exact(path, 8)
    sample("dopri5", denoiser, NOISE)
    assert denoiser.evaluations == len(denoiser.model.seen) < 200  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["rf", "vp", "ddpm"])
def test_dopri5_never_looks_beyond_its_ends_and_every_state_it_shows_is_on_the_way(
    path: str,
) -> None:
    denoiser, seen = exact(path, 8), []
    sample("dopri5", denoiser, NOISE, callback=lambda *step: seen.append(step))
    times = [float(tau[0]) for _, tau, _ in denoiser.model.seen]  # type: ignore[union-attr]
    last = denoiser.preconditioning.last
    assert max(times) <= 1 and min(times) >= last - 1e-7
    assert [number for number, _, _ in seen] == list(range(len(seen))) and len(seen) > 3
    assert [tau for _, tau, _ in seen] == sorted((tau for _, tau, _ in seen), reverse=True)
    assert seen[-1][1] == last
    for _, tau, state in seen:
        goal = on_the_ode(denoiser.path, start(path, 1.0), 1.0, tau)
        torch.testing.assert_close(state, goal, atol=3e-3 if path == "ddpm" else 3e-4, rtol=0)


# sampler -> evaluations of N steps; dpm2 and dpm_fast have fewer where a path begins in pure noise or ends in pure data
COUNTS = {name: (lambda n: n) for name in FIXED} | {"heun": lambda n: 2 * n - 1}
MIDPOINTS = {
    "rf": lambda n: max(2 * n - 2, n),
    "rf_eps": lambda n: 2 * n - 1,
    "smin": lambda n: 2 * n - 1,
    "vp": lambda n: 2 * n,
    "ddpm": lambda n: 2 * n - 1,
    "edm": lambda n: 2 * n - 1,
}


THIRDS = {
    "rf": lambda n: max(3 * n - 4, 1),
    "rf_eps": lambda n: 3 * n - 2,
    "smin": lambda n: max(3 * n - 3, 1),
    "vp": lambda n: 3 * n - 1,
    "ddpm": lambda n: 3 * n - 2,
    "edm": lambda n: 3 * n - 2,
}


REFUSED = {("euler_maruyama", "ddpm"), ("euler_maruyama", "edm")}
WALKS = [(s, p) for s in FIXED for p in MIDPOINTS if (s, p) not in REFUSED]


@pytest.mark.parametrize(("sampler", "path"), WALKS)
@pytest.mark.parametrize("steps", [1, 2, 3, 18])
def test_network_evaluations_are_exactly_those_stated(sampler: str, path: str, steps: int) -> None:
    denoiser, seen = exact(path, 8), []
    x = sample(
        sampler,
        denoiser,
        NOISE,
        steps=steps,
        seeds=SEEDS,
        callback=lambda *step: seen.append(step),
    )
    fewer = {"dpm2": MIDPOINTS, "dpm_fast": THIRDS}
    wanted = (fewer[sampler][path] if sampler in fewer else COUNTS[sampler])(steps)
    assert denoiser.evaluations == wanted == len(denoiser.model.seen)  # type: ignore[arg-type]
    assert [number for number, _, _ in seen] == list(range(steps)) and seen[-1][2] is x
    assert x.isfinite().all()
    ends_in_data = path != "vp" or sampler == "euler_maruyama"
    assert seen[-1][1] == (0.0 if ends_in_data else 1e-3)


@pytest.mark.parametrize("path", ["rf", "vp", "ddpm", "edm"])
def test_dpm1_is_ddim_step_for_step(path: str) -> None:
    states: dict[str, list[Tensor]] = {"ddim": [], "dpm1": []}
    for name, kept in states.items():
        sample(name, exact(path, 8), NOISE, steps=9, callback=lambda i, tau, x, k=kept: k.append(x))
    torch.testing.assert_close(states["ddim"], states["dpm1"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["rf", "edm"])
def test_euler_is_ddim_where_the_path_is_straight_in_its_clock(path: str) -> None:
    euler, ddim = (sample(name, exact(path, 8), NOISE, steps=9) for name in ("euler", "ddim"))
    torch.testing.assert_close(euler, ddim, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "path", "steps", "options"),
    [
        ("euler_maruyama", "rf", 250, {"diffusion": "sit"}),
        ("euler_maruyama", "rf", 250, {"diffusion": "repa"}),
        ("euler_maruyama", "rf", 250, {"diffusion": "sbdm"}),
        ("euler_maruyama", "rf", 50, {"diffusion": "sbdm"}),
        ("ddim", "rf", 250, {"eta": 1.0}),
        ("ddim", "rf", 250, {"eta": 0.5}),
        ("ddim", "ddpm", 250, {"eta": 1.0}),
        ("ddim", "edm", 250, {"eta": 1.0}),
        ("heun", "edm", 64, {"churn": 20.0}),
    ],
)
def test_stochastic_samplers_have_the_marginals_of_the_data(
    sampler: str, path: str, steps: int, options: dict[str, float]
) -> None:
    count = 4000
    x = sample(
        sampler,
        exact(path, count),
        gaussian(count, 1, 1, 4),
        steps=steps,
        seeds=torch.arange(count),
        **options,
    )
    # 16,000 numbers: four standard errors, and 2.5 % for the bias of finite steps
    assert abs(x.mean() - MEAN) < 4 * SD / math.sqrt(x.numel()) + 0.005
    assert abs(x.std() / SD - 1) < 4 / math.sqrt(2 * x.numel()) + 0.025


def test_churn_of_zero_is_no_churn_and_more_of_it_is_other_noise() -> None:
    plain = sample("heun", exact("edm", 8), NOISE, steps=18)
    none = sample("heun", exact("edm", 8), NOISE, steps=18, churn=0.0, churn_sigma=(0.0, 50.0))
    some = sample("heun", exact("edm", 8), NOISE, steps=18, churn=5.0, seeds=SEEDS)
    other = sample("heun", exact("edm", 8), NOISE, steps=18, churn=5.0, seeds=SEEDS + 8)
    outside = {"churn": 5.0, "churn_sigma": (100.0, 200.0)}
    never = sample("heun", exact("edm", 8), NOISE, steps=18, seeds=SEEDS, **outside)
    assert torch.equal(plain, none) and torch.equal(plain, never)
    assert (some - plain).abs().min() > 0 and (some - other).abs().min() > 0


@pytest.mark.parametrize("steps", [1, 7, 50, 250])
def test_shift_is_lightningdits_map_of_data_time_on_the_whole_grid(steps: int) -> None:
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)  # data-time, rising
    theirs = 0.3 * t / (1 + (0.3 - 1) * t)
    ours = noise_times(Preconditioning(RectifiedFlow()), steps, shift=1 / 0.3)
    torch.testing.assert_close(1 - ours, theirs, rtol=1e-14, atol=1e-14)
    assert ours[0] == 1 and ours[-1] == 0


def test_sampling_walks_the_shifted_grid() -> None:
    seen: list[float] = []
    sample(
        "euler",
        exact("rf", 8),
        NOISE,
        steps=5,
        shift=2.0,
        callback=lambda i, tau, x: seen.append(tau),
    )
    assert seen == pytest.approx([2 * t / (1 + t) for t in (0.8, 0.6, 0.4, 0.2, 0.0)], abs=1e-15)


@pytest.mark.parametrize("shift", [0.2, 0.5, 2.0, 1 / 0.3])
@pytest.mark.parametrize("path", ["rf", "smin", "vp", "ddpm"])
def test_shift_moves_the_inside_and_leaves_both_ends(path: str, shift: float) -> None:
    form = Preconditioning(*PATHS[path])  # type: ignore[arg-type]
    for steps in (1, 2, 30, 100):
        plain, moved = noise_times(form, steps), noise_times(form, steps, shift)
        assert moved[0] == plain[0] and moved[-1] == plain[-1] and (moved.diff() < 0).all()
        inside = shift * plain / (1 + (shift - 1) * plain)
        tolerance = {"vp": 5e-3, "ddpm": 3e-3}.get(
            path, 1e-12
        )  # where it ends early; whole entries
        torch.testing.assert_close(moved[1:-1], inside[1:-1], atol=tolerance, rtol=0)


@pytest.mark.parametrize("shift", [0.1, 0.3, 0.7, 1.5, 1 / 0.3, 10.0])
def test_a_shifted_table_stays_on_its_entries_up_to_the_most_steps_it_allows(shift: float) -> None:
    form, most = Preconditioning(DDPM(), "eps"), most_steps(shift)
    for steps in {1, 7, most // 2, most - 1, most}:
        entries = noise_times(form, steps, shift) * 1000
        torch.testing.assert_close(entries, entries.round(), atol=1e-9, rtol=0)
        assert (entries.diff() < -0.5).all() and len(entries) == steps + 1
    with pytest.raises(UserError, match=f"steps={most + 1} with shift.*take {most} steps or fewer"):
        noise_times(form, most + 1, shift)


@pytest.mark.parametrize("path", ["rf", "rf_eps", "vp"])
def test_shift_leaves_the_last_step_of_euler_maruyama_alone(path: str) -> None:
    seen: dict[float, list[float]] = {}
    for shift in (1.0, 1 / 0.3):
        times = seen[shift] = []
        sample(
            "euler_maruyama", exact(path, 8), NOISE, steps=6, shift=shift, seeds=SEEDS,
            callback=lambda i, tau, x, times=times: times.append(tau),
        )  # fmt: skip
    assert [times[-2:] for times in seen.values()] == [[0.04, 0.0]] * 2
    assert all(a < b for a, b in zip(seen[1.0][:4], seen[1 / 0.3], strict=False))


@pytest.mark.parametrize("path", ["rf", "rf_eps", "vp"])
@pytest.mark.parametrize("steps", [20, 50, 250])
def test_sbdm_keeps_the_deviation_from_its_first_step_on(path: str, steps: int) -> None:
    count, seen = 4000, []
    denoiser = exact(path, count)
    sample(
        "euler_maruyama", denoiser, gaussian(count, 1, 1, 4), steps=steps, diffusion="sbdm",
        seeds=torch.arange(count), callback=lambda i, tau, x: seen.append((tau, x.std().item())),
    )  # fmt: skip
    for number, (tau, found) in enumerate(seen):
        a, b, _, _ = denoiser.path.coefficients(torch.tensor(tau, dtype=torch.float64))
        wanted = math.sqrt((a * SD) ** 2 + b**2)
        # c = 0.1 at each step: 1 + c^2 of the variance after one, 1 / (1 - c / 2) after many
        assert abs(found / wanted - 1) < (0.025 if number == 0 else 0.08), (number, found, wanted)


@pytest.mark.parametrize("steps", [10, 1500])
def test_noise_predictions_begin_where_some_data_is_left_and_no_step_is_empty(steps: int) -> None:
    for shift in (1.0, 1 / 0.3):
        times = noise_times(Preconditioning(RectifiedFlow(), "eps"), steps, shift)
        assert times[0] == pytest.approx(0.999, abs=1e-12) and times[-1] == 0
        assert (times.diff() < 0).all()


def test_grids_of_other_paths() -> None:
    edm = noise_times(Preconditioning(VarianceExploding(), "edm"), 18)
    sigma = edm / (1 - edm)
    assert sigma[[0, -2, -1]].tolist() == pytest.approx([80, 0.002, 0], rel=1e-9)
    ddpm = noise_times(Preconditioning(DDPM(), "eps"), 30) * 1000
    torch.testing.assert_close(ddpm, ddpm.round(), atol=1e-9, rtol=0)
    torch.testing.assert_close(shifted(edm, 1.0), edm)


@pytest.mark.parametrize("sampler", FIXED)
def test_an_image_does_not_depend_on_its_batch(sampler: str) -> None:
    path = "edm" if sampler == "heun" else "rf"
    options = {"heun": {"churn": 5.0}, "ddim": {"eta": 0.7}}.get(sampler, {})
    together = sample(sampler, exact(path, 8), NOISE, steps=6, seeds=SEEDS, **options)
    part = [5, 2, 7]
    alone = sample(sampler, exact(path, 3), NOISE[part], steps=6, seeds=SEEDS[part], **options)
    torch.testing.assert_close(alone, together[part], rtol=1e-12, atol=1e-12)


def test_every_step_and_seed_has_noise_of_its_own() -> None:
    seen: list[Tensor] = []
    noise = StepNoise("a test", SEEDS, NOISE)
    seen = [noise(k) for k in range(3)]
    flat = torch.cat(seen).flatten(1)  # (24, 4)
    assert len(torch.unique(flat, dim=0)) == 24 and seen[0].dtype == torch.float64
    assert torch.equal(noise(1), seen[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("noise", [torch.bfloat16, torch.float32, torch.float64])
def test_the_state_is_fp32_or_wider(sampler: str, noise: torch.dtype) -> None:
    states: list[Tensor] = []
    sample(
        sampler,
        exact("rf", 8),
        NOISE.to(noise),
        steps=4,
        seeds=SEEDS,
        callback=lambda i, tau, x: states.append(x),
    )
    wide = torch.float64 if noise == torch.float64 else torch.float32
    assert {state.dtype for state in states} == {wide}


def test_sampling_keeps_no_graph() -> None:
    denoiser = exact("rf", 8, shift=1.0)
    denoiser.model.shift = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert denoiser.velocity(NOISE, 0.5).requires_grad
    assert not sample("euler", denoiser, NOISE, steps=2).requires_grad


def test_sigmas_of_others_give_the_karras_schedule() -> None:
    ours = exact("edm", 8)
    times = noise_times(ours.preconditioning, 18)
    schedule = Schedule.of_sigmas(ours.path.sigma(times))
    torch.testing.assert_close(schedule.times, times, rtol=1e-12, atol=0)
    found = SAMPLERS["heun"](ours, schedule.start(NOISE), schedule)
    torch.testing.assert_close(found, sample("heun", ours, NOISE, steps=18), rtol=1e-9, atol=1e-12)


BAD = [
    ("eulr", "rf", {}, "did you mean 'euler'"),
    ("ddim", "rf", {"etta": 0.5}, "'eta'"),
    ("euler", "rf", {"eta": 0.5}, "no option of euler.*it takes: none"),
    ("euler", "rf", {"steps": 0}, "steps=0.*1 or more"),
    ("euler", "rf", {"shift": 0.0}, "shift=0.0.*positive"),
    ("euler", "rf", {"shift": math.nan}, "shift=nan.*positive"),
    ("euler", "edm", {"shift": 2.0}, "shift=2.0.*drop it"),
    ("dopri5", "rf", {"shift": 2.0}, "shift=2.0.*drop it"),
    ("euler", "ddpm", {"steps": 1001}, "1001.*1000 or fewer"),
    ("ddim", "ddpm", {"steps": 501, "shift": 2.0}, "steps=501 with shift=2.0.*500 steps or fewer"),
    ("ddim", "rf", {"eta": 1.5}, r"eta=1.5.*\[0, 1\]"),
    ("ddim", "rf", {"eta": 0.5}, r"eta=0.5 draws noise.*seeds, int64 of shape \(8,\)"),
    ("heun", "edm", {"churn": 5.0}, "churn=5.0 draws noise.*seeds"),
    ("heun", "rf", {"churn": 5.0}, "churn=5.0.*RectifiedFlow.*EDM"),
    ("euler_maruyama", "rf", {}, "euler_maruyama draws noise.*seeds"),
    ("euler_maruyama", "edm", {"seeds": SEEDS}, "VarianceExploding.*ddim with eta=1"),
    ("euler_maruyama", "ddpm", {"seeds": SEEDS}, "DDPM.*ddim with eta=1"),
    ("euler_maruyama", "rf", {"seeds": SEEDS, "diffusion": "sitt"}, "did you mean 'sit'"),
    ("euler_maruyama", "rf", {"seeds": SEEDS[:3]}, r"shape \(3,\).*int64 of \(8,\)"),
    ("euler_maruyama", "rf", {"seeds": SEEDS.float()}, "torch.float32.*int64"),
]


@pytest.mark.parametrize(("sampler", "path", "options", "message"), BAD)
def test_what_cannot_be_walked_is_said_before_the_first_evaluation(
    sampler: str, path: str, options: dict[str, float], message: str
) -> None:
    denoiser = exact(path, 8)
    with pytest.raises(UserError, match=message):
        sample(sampler, denoiser, NOISE, **options)
    assert denoiser.evaluations == 0


def test_dopri5_says_when_the_network_gives_out() -> None:
    denoiser = exact("rf", 8)
    denoiser.model.shift = math.nan  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"dopri5's step shrank.*not finite"):
        sample("dopri5", denoiser, NOISE)


@pytest.mark.parametrize(("last", "left"), [(1e-3, 0.0105), (1e-4, 0.0032)])
def test_vp_sampling_leaves_the_noise_of_where_it_ends(last: float, left: float) -> None:
    """U-ViT's 1e-4 leaves 0.4 grey levels of 255, SiT's 1e-3 leaves 1.3."""
    path = build_path(PathConfig(name="vp", prediction="eps", last=last))
    assert float(path.grid(50)[-1]) == last
    b = path.coefficients(torch.tensor(last, dtype=torch.float64))[1]
    assert float(b) == pytest.approx(left, rel=0.02)
