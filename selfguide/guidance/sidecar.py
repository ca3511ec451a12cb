"""Conditions on what was found of each image beforehand: groups, boxes, masks and features from annotation sidecars.

Self-guided diffusion (Hu et al. 2023, arXiv 2210.06462): a group as one-hot into the embedding, a box as one channel
beside the image, a mask as one channel for each group, all dropped by one mask. Groups alone are C-EDM's condition
(Adaloglou et al. 2024, arXiv 2403.00570). A sample is conditioned on the row of a training image, all of it together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.data.crop_flip import CropFlip, Size, box_masks
from selfguide.data.transfer import on_device
from selfguide.diffusion.conditions import Condition
from selfguide.guidance.component import Component, Inputs
from selfguide.guidance.labels import drop_images, frequencies
from selfguide.networks.student import Student
from selfguide.randomness import uniform
from selfguide.spec.config import SidecarGuidance
from selfguide.spec.contamination import nets_behind
from shards import sidecar


class Annotations:
    """The configured sidecars, memory-mapped; of their rows only those that are asked for are read."""

    def __init__(self, guidance: SidecarGuidance, seed: int) -> None:
        self.guidance = guidance
        self.sidecars = {field: sidecar.read(at) for field, at in guidance.folders.items()}
        self.rows = {field: found.rows() for field, found in self.sidecars.items()}
        self.count = next(iter(self.sidecars.values())).count
        self.row_of = shuffled(self.count, guidance.shuffle, seed)

    def image(self, otherwise: Size) -> Size:
        """Height and width of the annotated images, on whose pixels boxes and masks lie."""
        layout = self.sidecars.get("layout")
        if layout is None:
            return otherwise
        height, width = (
            layout.shape if layout.kind == "mask" else layout.provenance.get("image", otherwise)
        )
        return height, width

    def condition(
        self, ordinals: Tensor, crop_flip: CropFlip, device: torch.device | str = "cpu"
    ) -> Condition:
        """The condition of the images at `ordinals` (B,), moved as `crop_flip` moved them, on `device`."""
        asked = self.row_of[ordinals.cpu().numpy()]
        values = {  # picking rows out of a map copies them, once
            field: on_device(np.asarray(rows[asked]), device) for field, rows in self.rows.items()
        }
        fields: dict[str, Tensor] = {}
        if "ids" in values:
            several = self.sidecars["ids"].kind == "multi_hot"
            fields = (
                {"multi_hot": values["ids"].float()} if several else {"id": values["ids"].long()}
            )
        if "layout" in values:
            fields["spatial"] = self._spatial(values["layout"], crop_flip)
        if "layout" in values and "ids" not in values and self.guidance.groups:
            fields["multi_hot"] = present(fields["spatial"])
        if "dense" in values:
            fields["dense"] = values["dense"].float()
        return Condition.of(**fields)

    def _spatial(self, layout: Tensor, crop_flip: CropFlip) -> Tensor:
        """(B, M, h, w) of boxes (B, 4) or masks (B, H, W), moved as their images were."""
        if self.sidecars["layout"].kind == "box":
            boxes = crop_flip.boxes(layout, self.image(crop_flip.grid))
            return box_masks(boxes, crop_flip.size)
        groups = torch.arange(self.guidance.channels, device=layout.device)
        return crop_flip.spatial((layout[:, None] == groups.view(-1, 1, 1)).float())


class SidecarSource(Component):
    """Conditions each image on its row, some of them on another's where `shuffle` asks for that control."""

    name = "guidance"

    def __init__(self, guidance: SidecarGuidance, seed: int) -> None:
        self.config, self.seed = guidance, seed
        self.annotations = Annotations(guidance, seed)

    def condition(self, batch: Batch, teacher: Student | None, inputs: Inputs) -> Inputs:
        size = (batch.x0.shape[-2], batch.x0.shape[-1])
        crop_flip = batch.crop_flip or CropFlip(grid=size, size=size)  # or shown whole
        rows = self.annotations.condition(batch.ordinal, crop_flip, batch.x0.device)
        dropped = drop_images(self.seed, batch.position, self.config.drop)
        return replace(inputs, condition=rows.drop(dropped))

    def metadata(self) -> dict[str, Any]:
        """What sampling needs without the sidecars: p(k); and which they were, for what needs them."""
        found = self.annotations.sidecars
        return {
            "source": "sidecar",
            "told": True,
            "p": group_frequencies(self.annotations),
            "label_free": not any(each.saw_labels for each in found.values()),
            "sidecars": {field: _about(each) for field, each in found.items()},
        }


def _about(annotation: sidecar.Sidecar) -> dict[str, Any]:
    """Which sidecar it was, and the feature nets that it was made with."""
    nets = list(nets_behind(annotation.provenance))
    return {
        "folder": str(annotation.folder),
        "kind": annotation.kind,
        "sha256": annotation.sha256,
        **({"nets": nets} if nets else {}),
    }


def group_frequencies(annotations: Annotations) -> list[float] | None:
    """p(k) over all samples; None where an image is not conditioned on one group. A shuffle changes none of it."""
    found = annotations.sidecars.get("ids")
    if found is None or found.kind != "id":
        return None
    return frequencies(np.bincount(annotations.rows["ids"], minlength=found.groups or 0).tolist())


def present(spatial: Tensor) -> Tensor:
    """(B, K) of 0 and 1: which groups a mask (B, K, H, W) shows anywhere, SGDM's multi-hot by spatial maximum."""
    return (spatial.amax((2, 3)) > 0).float()


def shuffled(count: int, share: float, seed: int) -> NDArray[np.int64]:
    """(count,) the row that each sample is conditioned on: its own, or for that share of samples another's among them.

    Samples are chosen and brought into an order by their ordinals alone, and each takes the row of the next. So the
    wrong rows are a permutation, p(k) stays as it is, and no chosen sample keeps its row, unless it is the only one.
    """
    rows = np.arange(count)
    if not share:
        return rows
    u = uniform(seed, "shuffle", torch.arange(count), 3).double().numpy()
    chosen = np.flatnonzero(u[:, 0] < share)
    order = chosen[np.lexsort((u[chosen, 2], u[chosen, 1]))]
    rows[order] = np.roll(order, -1)
    return rows
