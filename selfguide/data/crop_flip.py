"""Crop and flip of an image together with its boxes and masks: mirrored, then a window cut out.

A box, a mask and the image they describe must be moved together (Hu et al. 2023, arXiv 2210.06462, section 3.3), so
what is sampled is a `CropFlip` rather than a moved image. Layouts lie on the pixels of the image that was annotated,
and a model sees a grid that may be coarser: latents. They are brought to that grid first, boxes by the value at each
cell's centre, shares of segments by their mean over the cell; mirror and window then move whole cells, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfguide.randomness import uniform

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, kw_only=True)
class CropFlip:
    """The window of each image of a batch and whether it is mirrored; by default all of it as it is."""

    grid: Size  # of the stored image
    size: Size  # of the window
    mirrored: Tensor | None = None  # (B,) bool; None mirrors no image
    corner: Tensor | None = None  # (B, 2) top and left of each window, in the mirrored image

    @staticmethod
    def centred(count: int, grid: Size, size: Size, device: torch.device | str = "cpu") -> CropFlip:
        """A centre crop of each image, never mirrored: for images that are read once, such as queries."""
        middle = [(whole - shown) // 2 for whole, shown in zip(grid, size, strict=True)]
        corner = torch.tensor([middle], device=device).expand(count, 2)
        return CropFlip(grid=grid, size=size, corner=corner if size != grid else None)

    def images(self, x: Tensor, *, mirrored: bool = False) -> Tensor:
        """Crops and flips x (B, C, *grid) -> (B, C, *size); where `mirrored`, x is flipped already."""
        if x.shape[-2:] != self.grid:
            raise ValueError(f"images of {tuple(x.shape[-2:])} for a crop of {self.grid}")
        return self._move(x, None if mirrored else self.mirrored)

    def spatial(self, masks: Tensor, *, how: Literal["mean", "nearest"] = "mean") -> Tensor:
        """Masks (B, M, H, W) on the annotated image's pixels -> (B, M, *size) on its window.

        `mean` gives fp32 shares of the cell, for the channels of a one-hot segmentation; `nearest` takes the value at
        the cell's centre and keeps the type, for boxes and for numbers of groups.
        """
        if masks.shape[-2:] != self.grid:
            masks = _at_centres(masks, self.grid) if how == "nearest" else _means(masks, self.grid)
        elif how == "mean":
            masks = masks.float()
        return self._move(masks, self.mirrored)

    def boxes(self, boxes: Tensor, image: Size) -> Tensor:
        """Boxes (B, 4) of top, left, bottom, right in pixels of an `image` of this size -> in cells of the window.

        Ends are excluded. Of a box outside the window nothing is left: bottom <= top, or right <= left.
        """
        top, left, bottom, right = (boxes[:, i].long() for i in range(4))
        # a cell belongs to the box where its centre does: as `spatial` decides by `nearest`
        top, bottom = (_cells(edge, image[0], self.grid[0]) for edge in (top, bottom))
        left, right = (_cells(edge, image[1], self.grid[1]) for edge in (left, right))
        if self.mirrored is not None:
            width = self.grid[1]
            left, right = (
                torch.where(self.mirrored, width - right, left),
                torch.where(self.mirrored, width - left, right),
            )
        moved = torch.stack((top, left, bottom, right), dim=1)  # (B, 4)
        if self.corner is not None:
            moved = moved - self.corner.repeat(1, 2)
        # no tensor of bounds: copying it to a GPU would wait for the GPU
        rows, columns = (moved[:, axis::2].clamp(0, self.size[axis]) for axis in range(2))
        return torch.stack((rows, columns), dim=2).flatten(1)

    def _move(self, x: Tensor, mirrored: Tensor | None) -> Tensor:
        if mirrored is not None:
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        if self.corner is None:
            return x
        height, width = self.size
        rows = self.corner[:, :1] + torch.arange(height, device=x.device)  # (B, h)
        columns = self.corner[:, 1:] + torch.arange(width, device=x.device)  # (B, w)
        x = x.take_along_dim(rows[:, None, :, None], dim=2)  # (B, C, h, W)
        return x.take_along_dim(columns[:, None, None, :], dim=3)  # (B, C, h, w)


def sample_crop_flip(
    seed: int, positions: Tensor, grid: Size, *, flip: bool, window: Size | None = None
) -> CropFlip:
    """Samples the crop and flip of the images at `positions` (B,) of a run.

    `flip` mirrors each with probability 1/2; of images larger than `window` one is cut at any of its places.
    """
    size, corner = window or grid, None
    if size != grid:
        u = uniform(
            seed, "crop", positions, 2
        ).double()  # a product in fp32 may round up to its bound
        places = [whole - shown + 1 for whole, shown in zip(grid, size, strict=True)]
        corner = torch.stack([(u[:, i] * places[i]).long() for i in range(2)], dim=1)  # (B, 2)
    flipped = mirrored(seed, positions) if flip else None
    return CropFlip(grid=grid, size=size, mirrored=flipped, corner=corner)


def mirrored(seed: int, positions: Tensor) -> Tensor:
    """(B,) bool: which images are mirrored."""
    return uniform(seed, "flip", positions, 1)[:, 0] < 0.5


def box_masks(boxes: Tensor, size: Size) -> Tensor:
    """(B, 4) boxes in pixels -> (B, 1, H, W) fp32, 1 inside."""
    top, left, bottom, right = (boxes[:, i, None] for i in range(4))  # each (B, 1)
    y, x = (torch.arange(n, device=boxes.device) for n in size)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)  # (B, H), (B, W)
    return (rows[:, :, None] & columns[:, None, :])[:, None].float()


def _cells(edge: Tensor, pixels: int, cells: int) -> Tensor:
    """The first cell whose centre lies at or behind an edge between pixels, int64."""
    return -((pixels - 2 * cells * edge) // (2 * pixels))


def _at_centres(masks: Tensor, grid: Size) -> Tensor:
    """(B, M, H, W) -> (B, M, *grid), the pixel under each cell's centre, of any dtype."""
    for dim, cells in ((-2, grid[0]), (-1, grid[1])):
        pixels = masks.shape[dim]
        centres = (2 * torch.arange(cells, device=masks.device) + 1) * pixels // (2 * cells)
        masks = masks.index_select(dim, centres)
    return masks


def _means(masks: Tensor, grid: Size) -> Tensor:
    """(B, M, H, W) -> (B, M, *grid) fp32, the mean over each cell."""
    return F.adaptive_avg_pool2d(masks.float(), grid)
