"""LOST against the planted object and a slow plain re-derivation (Simeoni et al. 2021, arXiv 2109.14279)."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfguide.data.crop_flip import box_masks
from selfguide.discovery.lost import in_pixels, lost_boxes


def lost(features: torch.Tensor, grid: tuple[int, int], **more: int) -> tuple[int, ...]:
    """The box of one image."""
    return tuple(lost_boxes(features[None], grid, **more)[0].tolist())


def plain_lost(features: np.ndarray, grid: tuple[int, int], k: int) -> tuple[int, int, int, int]:
    """LOST in loops: degrees, seed, companions, summed similarities, flood fill from the seed."""
    n, (_, width) = len(features), grid
    dot = [[float(np.dot(features[p], features[q])) for q in range(n)] for p in range(n)]
    degree = [sum(dot[p][q] > 0 for q in range(n) if q != p) for p in range(n)]
    lowest = sorted(range(n), key=lambda p: (degree[p], p))[:k]
    seed = lowest[0]
    companions = [p for p in lowest if dot[seed][p] > 0]  # the seed resembles itself
    inside = {q for q in range(n) if sum(dot[p][q] for p in companions) > 0}
    if seed not in inside:
        inside = {seed}
    reached, queue = {seed}, deque([seed])
    while queue:
        p = queue.popleft()
        y, x = divmod(p, width)
        for ny, nx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            q = ny * width + nx
            if 0 <= ny < grid[0] and 0 <= nx < width and q in inside and q not in reached:
                reached.add(q)
                queue.append(q)
    ys, xs = zip(*(divmod(p, width) for p in reached), strict=True)
    return min(ys), min(xs), max(ys) + 1, max(xs) + 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 7), st.integers(1, 4), st.integers(1, 12), st.integers(0, 999)
)
def test_it_is_the_plain_form(height: int, width: int, d: int, k: int, seed: int) -> None:
    """Whole-number features: sums are exact, and ties of degree are many."""
    rng = np.random.default_rng(seed)
    features = rng.integers(-2, 3, (height * width, d)).astype(np.float64)
    expected = plain_lost(features, (height, width), k)
    found = lost(torch.from_numpy(features), (height, width), k_patches=k)
    assert found == expected


def blob(rng: np.random.Generator, grid: tuple[int, int]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Features of a background direction and, in an ellipse, of one against it; its tight box."""
    height, width = grid
    radii = rng.uniform(1.5, 0.3 * np.array(grid))
    centre = rng.uniform(radii, np.array(grid) - radii)
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1
    direction = rng.normal(size=(2, 64))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    object_, ground = direction[0], direction[1] - (1 + direction[0] @ direction[1]) * direction[0]
    features = np.where(inside[..., None], object_, ground) + rng.normal(
        scale=0.03, size=(height, width, 64)
    )
    ys, xs = np.nonzero(inside)
    return features.reshape(-1, 64), (ys.min(), xs.min(), ys.max() + 1, xs.max() + 1)


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection over union of two boxes."""
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inner / (sum(areas) - inner)


@pytest.mark.parametrize("grid", [(14, 14), (28, 28), (24, 32)])
def test_a_planted_object_is_boxed(grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(grid[1])
    planted = [blob(rng, grid) for _ in range(25)]
    features = torch.from_numpy(np.stack([f for f, _ in planted]))
    found = lost_boxes(features, grid).tolist()
    worst = min(overlap(tuple(b), box) for b, (_, box) in zip(found, planted, strict=True))
    assert worst >= 0.9
    assert found[3] == list(lost(features[3], grid))  # alone as among others


def test_a_seed_that_resembles_nothing_is_boxed_alone() -> None:
    """Orthogonal patches: no companions, and nothing positive."""
    assert lost(torch.eye(12), (3, 4)) == (0, 0, 1, 1)
    features = torch.eye(12)
    features[:, 0] += 1.0  # all resemble each other
    features[7] = -torch.ones(12)  # but one
    assert lost(features, (3, 4)) == (1, 3, 2, 4)


def test_the_seed_is_one_of_those_that_its_box_resembles() -> None:
    """What the seed resembles has a high degree and does not join it: its own likeness draws the box."""
    seed, alike, other = (3.0, 0.0), (1.0, 2.0), (-1.0, 1.0)
    features = torch.tensor([seed, alike, other, other, other])
    assert lost(features, (1, 5), k_patches=2) == (0, 0, 1, 2)


def test_all_alike_is_one_box() -> None:
    assert lost(torch.ones(12, 5), (3, 4)) == (0, 0, 3, 4)


def test_features_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="for a grid of 3 x 5"):
        lost(torch.ones(12, 5), (3, 5))


def test_boxes_in_pixels_end_with_the_image() -> None:
    patches = torch.tensor([[0, 0, 2, 3], [1, 2, 3, 4]])
    # 40 x 60 pixels are 3 x 4 patches of 16: the last row and column hang over
    assert in_pixels(patches, 16, (40, 60)).tolist() == [[0, 0, 32, 48], [16, 32, 40, 60]]
    # images shown to the net larger than they are: a patch is 16 / 4 of their pixels
    assert in_pixels(patches, 4.0, (10, 15)).tolist() == [[0, 0, 8, 12], [4, 8, 10, 15]]


def test_a_box_of_patches_smaller_than_pixels_has_a_pixel() -> None:
    """8 pixels shown at 224 are 14 patches of 0.57 pixels: every patch alone, and every pair of neighbours."""
    starts = torch.cartesian_prod(torch.arange(14), torch.arange(14))
    for more in (1, 2):
        boxes = in_pixels(torch.cat((starts, starts + more), dim=1), 16 * 8 / 224, (8, 8))
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 8).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_box_masks_are_ones_inside() -> None:
    boxes = np.array([[0, 1, 2, 3], [2, 0, 4, 5], [3, 3, 3, 3]])
    expected = np.zeros((3, 1, 4, 5), dtype=np.float32)
    for i, (top, left, bottom, right) in enumerate(boxes):
        expected[i, 0, top:bottom, left:right] = 1
    assert torch.equal(box_masks(torch.from_numpy(boxes), (4, 5)), torch.from_numpy(expected))
