"""The tiles of `tools.sample --beside`: query, layout, samples, row after row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from tools import drawing
from tools.sample_beside import sheet


def pictures(count: int, channels: int, size: int = 8) -> Tensor:
    made = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, size, size), generator=made, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_is_its_query_and_its_samples_in_their_order(channels: int) -> None:
    queries, samples = pictures(2, channels), pictures(6, channels)
    tiles, columns = sheet(Condition.of(id=torch.arange(6)), queries, samples)
    rows = tiles.unflatten(0, (-1, columns))
    assert rows.shape == (2, 4, 3, 8, 8)
    assert torch.equal(rows[:, 0], queries.expand(-1, 3, -1, -1))
    assert torch.equal(rows[:, 1:].flatten(0, 1), samples.expand(-1, 3, -1, -1))


def test_a_mask_stands_behind_its_query_in_a_colour_for_each_group_and_black_elsewhere() -> None:
    # on a grid of half the size, as latents have
    numbers = torch.randint(0, 4, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    # group 3 is none of the three channels
    masks = (numbers[:, None] == torch.arange(3).view(1, 3, 1, 1)).float()
    condition = Condition.of(spatial=masks.repeat_interleave(2, 0))
    tiles, columns = sheet(condition, pictures(2, 3), pictures(4, 3))
    assert columns == 4
    drawn = tiles.unflatten(0, (-1, columns))[:, 1]
    colours = torch.cat([torch.from_numpy(drawing.colours(3)), torch.zeros(1, 3)])
    wanted = colours[numbers].permute(0, 3, 1, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.equal(drawn.float(), wanted)


def test_a_box_is_white_and_patches_of_one_vector_have_one_colour() -> None:
    box = torch.zeros(2, 1, 8, 8)
    box[0, 0, 2:5, 1:7] = 1
    tiles, columns = sheet(Condition.of(spatial=box), pictures(2, 1), pictures(2, 1))
    drawn = tiles.unflatten(0, (-1, columns))[:, 1]
    assert torch.equal(drawn.float(), 255 * box.expand(-1, 3, -1, -1))
    ids = torch.tensor([0, 1, 1, 2])
    vectors = torch.eye(3)[ids][None]  # (1, 4, 3): two by two patches
    tiles, columns = sheet(Condition.of(patch=vectors), pictures(1, 1), pictures(1, 1))
    layout = tiles.unflatten(0, (-1, columns))[0, 1]
    corners = layout[:, ::4, ::4].flatten(1).T
    same = (corners[:, None] == corners).all(-1)
    assert torch.equal(same, ids[:, None] == ids)
