"""The toy: its data against closed forms, its distance against scipy's, and a short run from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import energy_distance, kstest

from selfguide.diffusion.samplers import sample
from selfguide.randomness import uniform
from shards.errors import UserError
from tools.toy.__main__ import PATHS, main
from tools.toy.learn import (
    BATCH,
    DATA,
    EDGE,
    MOON,
    STD,
    THICKNESS,
    TIMES,
    Data,
    learn,
    off,
    points,
    preset,
    presets,
)
from tools.toy.measure import Reference, denoiser_of, spread

IMAGES = 100 * BATCH


def drawn(data: Data, count: int = 200_000) -> torch.Tensor:
    return points(data, uniform(0, "test", torch.arange(count), 5)).flatten(1).double()


@pytest.mark.parametrize("data", DATA)
def test_data_is_centred_and_as_wide_as_images(data: Data) -> None:
    x = drawn(data)
    assert x.mean(0).abs().max() < 0.01
    assert x.square().mean().sqrt() == pytest.approx(STD, abs=0.003)


def test_the_board_is_uniform_on_its_eight_filled_squares_only() -> None:
    x = drawn("checkerboard")
    cells, counts = (x / (EDGE / 4) + 2).floor().long().unique(dim=0, return_counts=True)
    filled = {(0, 0), (2, 0), (1, 1), (3, 1), (0, 2), (2, 2), (1, 3), (3, 3)}
    assert {tuple(cell) for cell in cells.tolist()} == filled
    assert (counts / len(x)).tolist() == pytest.approx([1 / 8] * 8, abs=0.005)
    inside = (x / (EDGE / 4) + 2).frac()
    for axis in (0, 1):
        assert kstest(inside[:2000, axis].numpy(), "uniform").pvalue > 1e-3


def test_a_moon_is_a_half_circle_of_its_thickness() -> None:
    x = drawn("moons") / MOON + torch.tensor([0.5, 0.25])
    # the top of the upper moon, where the lower one is far
    angle = torch.atan2(x[:, 1], x[:, 0])
    top = x[((angle - torch.pi / 2).abs() < 0.3) & (x[:, 1] > 0.8)]
    across = top.norm(dim=1) - 1
    assert len(top) / len(x) == pytest.approx(0.6 / torch.pi / 2, abs=0.01)
    assert across.std() == pytest.approx(THICKNESS, rel=0.03)


def test_off_is_where_no_data_is() -> None:
    assert not off("checkerboard", drawn("checkerboard")).any()
    assert off("moons", drawn("moons")).double().mean() < 0.0035  # beyond three deviations: 0.27 %
    square = torch.from_numpy(np.random.default_rng(0).uniform(-EDGE / 2, EDGE / 2, (100_000, 2)))
    assert off("checkerboard", square).double().mean() == pytest.approx(0.5, abs=0.01)
    beyond = torch.tensor([[EDGE / 2 + 1e-3, 0.3], [-2.0, -2.0], [0.0, 9.0]])
    assert off("checkerboard", beyond).all()
    # half circles end: below the upper one's feet, on the rest of its circle, is nothing but the other moon
    ends = MOON * torch.tensor([[-1.5, -0.25], [-0.5, -1.25], [-1.5, -0.45]])
    assert off("moons", ends).tolist() == [False, True, True]


def test_distance_is_the_energy_distance_of_all_pairs() -> None:
    """On a line scipy integrates the difference of the distribution functions: D there is the same number."""
    reference = Reference("moons", 0, 512)
    flat = reference.points * torch.tensor([1.0, 0.0]).view(2, 1, 1)
    reference.points = flat
    reference.within = (flat.flatten(1)[:, None] - flat.flatten(1)).norm(dim=2).mean().item()
    other = flat * 1.3 + torch.tensor([0.2, 0.0]).view(2, 1, 1)
    expected = energy_distance(flat[:, 0, 0, 0].numpy(), other[:, 0, 0, 0].numpy())
    assert reference.distance(other) == pytest.approx(expected, rel=1e-4)
    assert reference.distance(flat) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("data", DATA)
def test_even_draws_hide_less_than_random_ones(data: Data) -> None:
    reference = Reference(data, 0, 1024)
    random = reference.distance(drawn(data, 1024).float()[:, :, None, None])
    assert reference.floor() < random / 2
    assert reference.floor() < reference.distance(1.05 * reference.points)


def test_spread_noise_is_standard_normal() -> None:
    noise = Reference("moons", 3, 1024).noise()
    assert noise.shape == (1024, 2, 1, 1)
    for channel in (0, 1):
        assert kstest(noise[:, channel, 0, 0].numpy(), "norm").pvalue > 0.5
    least, most = spread(4096, 2, 0).aminmax()
    assert least > 0 and most < 1


@pytest.mark.parametrize("name", PATHS)
def test_a_second_of_training_comes_nearer_to_the_data_on_every_path(name: str) -> None:
    reference = Reference("moons", 0, 512)
    config = preset(name)

    def distance(images: int) -> float:
        learned = learn(config, "moons", images=images, seed=0, doing="")
        denoiser = denoiser_of(learned, reference.count)
        return reference.distance(sample("dpmpp", denoiser, reference.noise(), steps=30))

    near = distance(IMAGES)
    assert near < distance(0) / 3 and near < 0.13  # a normal blob of the data's width has 0.164


def test_every_preset_can_be_learnt() -> None:
    for name, config in presets().items():
        assert config.name in TIMES
        learned = learn(config, "checkerboard", images=3 * BATCH, seed=0, doing=name)
        assert np.isfinite(learned.loss), name


def test_training_is_a_pure_function_of_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        learned = learn(preset("edm"), "moons", images=3 * BATCH, seed=seed, doing="")
        return torch.cat([p.flatten() for p in learned.net.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_picture_and_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "toy.png"
    asked = [
        "--paths",
        "rectified_flow",
        "vp",
        "--images",
        str(IMAGES),
        "--out",
        str(out),
        "--samples",
        "256",
    ]
    assert main([*asked, "--data", "moons", "checkerboard", "--json"]) == 0
    moons, board = json.loads(capsys.readouterr().out)
    assert (moons["figure"], board["figure"]) == (
        str(out),
        str(out.with_name("toy-checkerboard.png")),
    )
    for report in (moons, board):
        width, height = Image.open(report["figure"]).size
        assert width > 500 and height > 900
        for path in report["paths"].values():
            euler = [s for s in path["scores"] if s["solver"] == "euler"]
            assert [s["evaluations"] for s in euler] == [5, 10, 20, 50]
            heun = [s["evaluations"] for s in path["scores"] if s["solver"] == "heun"]
            assert heun == [5, 9, 19, 49]
            assert all(report["floor"] / 2 < s["distance"] < 1 for s in path["scores"])


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(
        UserError, match=r"'rectified_flw' is no preset; did you mean 'rectified_flow'"
    ):
        main(["--paths", "rectified_flw"])
    with pytest.raises(UserError, match=r"--images 10 is not one batch; take 1024"):
        main(["--images", "10"])
    with pytest.raises(UserError, match=r"--samples 8 is too few to draw; take 64"):
        main(["--samples", "8"])
    with pytest.raises(SystemExit):
        main(["--data", "spiral"])
