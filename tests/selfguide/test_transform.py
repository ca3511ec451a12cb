"""Image, boxes and masks move together: what is drawn once is applied to all, and nothing drawn changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.compose import compose
from selfguide.data.crop_flip import CropFlip, box_masks, mirrored, sample_crop_flip
from selfguide.data.normaliser import Normaliser
from selfguide.randomness import uniform
from selfguide.spec.config import DataConfig
from selfguide.spec.config.data import check_stored
from selfguide.spec.identity import identity
from selfguide.spec.validate import validate
from selfguide.training.work import crop_and_flip
from shards.errors import UserError
from shards.format.header import Header
from tests.selfguide.test_online import online_config

COUNT = 7


@st.composite
def crop_flips(draw: st.DrawFn, *, coarse: bool = False) -> tuple[CropFlip, tuple[int, int]]:
    """A random crop and flip, and the size of the annotated image: any, or that of the grid itself."""
    grid = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    window = (draw(st.integers(1, grid[0])), draw(st.integers(1, grid[1])))
    image = (draw(st.integers(grid[0], 40)), draw(st.integers(grid[1], 40))) if coarse else grid
    start = draw(st.integers(0, 2**40))
    crop_flip = sample_crop_flip(
        draw(st.integers(0, 9)), start + torch.arange(COUNT), grid, flip=draw(st.booleans()),
        window=draw(st.sampled_from([None, window])),
    )  # fmt: skip
    return crop_flip, image


@st.composite
def boxes_in(draw: st.DrawFn, image: tuple[int, int]) -> torch.Tensor:
    """(COUNT, 4) boxes of at least one pixel inside an image."""
    made = []
    for _ in range(COUNT):
        top, left = draw(st.integers(0, image[0] - 1)), draw(st.integers(0, image[1] - 1))
        bottom, right = draw(st.integers(top + 1, image[0])), draw(st.integers(left + 1, image[1]))
        made.append((top, left, bottom, right))
    return torch.tensor(made, dtype=torch.int32)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_box_may_be_drawn_before_or_after_it_is_moved(data: st.DataObject) -> None:
    """On the image's own pixels and on a coarser grid of any ratio."""
    crop_flip, image = data.draw(crop_flips(coarse=True))
    boxes = data.draw(boxes_in(image))
    before = crop_flip.spatial(box_masks(boxes, image), how="nearest")
    after = box_masks(crop_flip.boxes(boxes, image), crop_flip.size)
    assert before.shape == (COUNT, 1, *crop_flip.size)
    assert torch.equal(before, after)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_mask_made_of_the_image_moves_as_the_image(data: st.DataObject) -> None:
    crop_flip, _ = data.draw(crop_flips())
    image = uniform(3, "picture", torch.arange(COUNT), 2 * int(np.prod(crop_flip.grid)))
    image = image.view(COUNT, 2, *crop_flip.grid)
    moved = crop_flip.images(image)
    assert moved.shape == (COUNT, 2, *crop_flip.size)
    assert torch.equal(crop_flip.spatial(image > 0.5), (moved > 0.5).float())
    assert torch.equal(crop_flip.spatial(image > 0.5, how="nearest"), moved > 0.5)
    # and both are what a plain loop does: mirror, then cut
    for i in range(COUNT):
        plain = image[i]
        if crop_flip.mirrored is not None and crop_flip.mirrored[i]:
            plain = plain.flip(-1)
        top, left = (0, 0) if crop_flip.corner is None else crop_flip.corner[i].tolist()
        plain = plain[:, top : top + crop_flip.size[0], left : left + crop_flip.size[1]]
        assert torch.equal(moved[i], plain)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_segments_on_a_coarser_grid_are_shares_of_its_cells(data: st.DataObject) -> None:
    crop_flip, _ = data.draw(crop_flips())
    scale = data.draw(st.integers(1, 4))
    height, width = (scale * n for n in crop_flip.grid)
    ids = (uniform(5, "segments", torch.arange(COUNT), height * width) * 4).long()
    channels = torch.nn.functional.one_hot(ids.view(COUNT, height, width), 4).permute(0, 3, 1, 2)
    shares = crop_flip.spatial(channels)
    assert shares.dtype == torch.float32 and shares.shape == (COUNT, 4, *crop_flip.size)
    torch.testing.assert_close(shares.sum(1), torch.ones(COUNT, *crop_flip.size))
    cells = channels.float().view(COUNT, 4, crop_flip.grid[0], scale, crop_flip.grid[1], scale)
    torch.testing.assert_close(shares, crop_flip.images(cells.mean((3, 5))))
    # the mask of groups, at cell centres, keeps its numbers
    at = crop_flip.spatial(ids.view(COUNT, 1, height, width), how="nearest")
    picked = ids.view(COUNT, 1, height, width)[..., scale // 2 :: scale, scale // 2 :: scale]
    assert at.dtype == torch.int64 and torch.equal(at, crop_flip.images(picked))


def test_mirrored_twice_is_the_image_itself() -> None:
    x = torch.rand(64, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    crop_flip = sample_crop_flip(0, torch.arange(64), (5, 7), flip=True)
    assert crop_flip.mirrored is not None and 16 < int(crop_flip.mirrored.sum()) < 48
    once = crop_flip.images(x)
    assert torch.equal(crop_flip.images(once), x) and not torch.equal(once, x)
    assert torch.equal(crop_flip.images(x, mirrored=True), x)
    boxes = torch.tensor([[1, 2, 4, 7]]).expand(64, 4)
    assert torch.equal(crop_flip.boxes(crop_flip.boxes(boxes, (5, 7)), (5, 7)), boxes)


def test_draws_belong_to_positions_not_to_batches() -> None:
    positions = torch.arange(4096) + 2**33
    whole = sample_crop_flip(7, positions, (6, 9), flip=True, window=(4, 4))
    parts = [
        sample_crop_flip(7, p, (6, 9), flip=True, window=(4, 4))
        for p in positions.split([100, 3996])
    ]
    for field in ("mirrored", "corner"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(p, field) for p in parts]))
    other = sample_crop_flip(8, positions, (6, 9), flip=True, window=(4, 4))
    assert not torch.equal(other.corner, whole.corner)
    assert not torch.equal(other.mirrored, whole.mirrored)
    # every window is as likely as any other, to 5 standard deviations: 3 x 6 of them
    assert whole.corner is not None and whole.mirrored is not None
    counts = torch.bincount(whole.corner[:, 0] * 6 + whole.corner[:, 1], minlength=18)
    share = 1 / 18
    deviation = (4096 * share * (1 - share)) ** 0.5
    assert len(counts) == 18 and (counts - 4096 * share).abs().max() < 5 * deviation
    assert abs(int(whole.mirrored.sum()) - 2048) < 5 * 32


def test_the_middle_is_shown_where_nothing_is_drawn() -> None:
    x = torch.arange(2 * 7 * 6.0).view(2, 1, 7, 6)
    shown = CropFlip.centred(2, (7, 6), (3, 4)).images(x)
    assert torch.equal(shown, x[:, :, 2:5, 1:5])
    assert CropFlip.centred(2, (7, 6), (7, 6)).images(x) is x


def test_a_crop_refuses_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"images of \(4, 4\) for a crop of \(8, 8\)"):
        sample_crop_flip(0, torch.arange(2), (8, 8), flip=True).images(torch.zeros(2, 1, 4, 4))


HEADER = Header(kind="image", shift=8.0, scale=0.125)
LATENT = Header(kind="latent", encoder="tiny", encoder_sha256="0" * 64)


def test_nothing_asked_changes_no_bit_and_draws_nothing() -> None:
    x0 = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shown, crop_flip = crop_and_flip(x0, online_config(switch=0.5), HEADER, torch.arange(3))
    assert shown is x0 and crop_flip.mirrored is None and crop_flip.corner is None
    masks = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(crop_flip.spatial(masks), masks)


def test_an_experiment_that_flips_and_crops_shows_such_images() -> None:
    config = online_config(switch=0.5)
    config = replace(config, data=replace(config.data, flip=True, crop=True))
    x0 = torch.rand(99, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    shown, crop_flip = crop_and_flip(x0, config, HEADER, torch.arange(99))
    drawn = sample_crop_flip(config.seed, torch.arange(99), (12, 12), flip=True, window=(8, 8))
    assert torch.equal(shown, drawn.images(x0)) and shown.shape == (99, 1, 8, 8)
    assert torch.equal(crop_flip.images(x0), shown)


def test_layouts_follow_the_picked_one_of_a_stored_pair() -> None:
    """Shards that hold both mirror images: the crop and flip knows which one the normaliser picked."""
    header = replace(LATENT, flips=True)
    plain = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    stored, position = torch.stack((plain, plain.flip(-1)), dim=1), torch.arange(64) + 5
    seed = 11
    x0 = Normaliser.of(header).encode(stored, seed, position)
    config = replace(online_config(switch=0.5), seed=seed)
    shown, crop_flip = crop_and_flip(x0, config, header, position)
    assert shown is x0
    assert torch.equal(crop_flip.spatial(plain), x0)  # a layout of the image as it was annotated
    assert crop_flip.mirrored is not None and crop_flip.mirrored.any()
    assert torch.equal(crop_flip.mirrored, mirrored(seed, position))


@pytest.mark.parametrize(
    ("header", "flip", "crop", "whole", "parts"),
    [
        (LATENT, True, False, (4, 8, 8), ("data.flip=true", "latents", "data.flip=false")),
        (LATENT, False, True, (4, 8, 8), ("data.crop=true", "latents", "data.crop=false")),
        (replace(HEADER, flips=True), True, False, (4, 8, 8), ("already", "data.flip=false")),
        (HEADER, False, False, (4, 9, 9), ("[4, 8, 8]", "[4, 9, 9]", "data.shape=[4,9,9] ")),
        (HEADER, False, True, (4, 7, 9), ("[4, 7, 9]", "or smaller")),
        (HEADER, False, True, (3, 9, 9), ("[3, 9, 9]", "or smaller")),
    ],
)
def test_shards_that_cannot_be_shown_so_are_refused(
    header: Header, flip: bool, crop: bool, whole: tuple[int, int, int], parts: tuple[str, ...]
) -> None:
    data = DataConfig(root="here", shape=(4, 8, 8), flip=flip, crop=crop)
    with pytest.raises(UserError) as raised:
        check_stored(data, header, whole)
    for part in parts:
        assert part in str(raised.value)
    check_stored(replace(data, flip=False, crop=False), header, (4, 8, 8))
    check_stored(DataConfig(root="here", shape=(4, 8, 8), flip=True, crop=True), HEADER, (4, 9, 12))


def test_what_is_shown_names_a_run_only_where_it_changes_something() -> None:
    config = online_config(switch=0.5)
    before = identity(config, "m")
    flipped = identity(replace(config, data=replace(config.data, flip=True)), "m")
    cropped = identity(replace(config, data=replace(config.data, crop=True)), "m")
    assert before["data"] == {"manifest": "m", "mode": config.data.mode}
    assert len({str(i["data"]) for i in (before, flipped, cropped)}) == 3


def test_a_window_keeps_of_a_box_what_it_shows() -> None:
    crop_flip = CropFlip(grid=(8, 8), size=(4, 4), corner=torch.tensor([[2, 3]]).expand(3, 2))
    boxes = torch.tensor([[0, 0, 8, 8], [3, 4, 8, 6], [0, 0, 2, 3]])
    assert crop_flip.boxes(boxes, (8, 8)).tolist() == [[0, 0, 4, 4], [1, 1, 4, 3], [0, 0, 0, 0]]


def test_an_experiment_may_ask_for_both_by_name() -> None:
    words = ["experiment=digits_uncond", "cluster=local", "data.flip=true"]
    assert compose(words).data.flip and not compose(words).data.crop
    validate(compose([*words, "data.crop=true", "evaluation=none"]))
    with pytest.raises(UserError, match=r"data.crop=true .*fd_digits.* set data.crop=false"):
        validate(compose([*words, "data.crop=true"]))
