"""What people wrote down of the images of Pascal VOC and COCO: objects with their boxes, and the class of each pixel.

Pascal VOC (Everingham et al. 2010) has 20 classes of objects, and 21 with the background; COCO (Lin et al. 2014) has
80; COCO-Stuff (Caesar et al. 2018) gives every pixel one of 171 classes, which are merged to the 27 that their own
hierarchy has above them: 12 of things, 15 of stuff.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.errors import UserError

# of a mask's pixels to which nobody gave a class
VOID = 255
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# of COCO-Stuff's hierarchy, what was left without a class
_OTHER = "other"
# a thing: its class, and its box as left, top, right, bottom in pixels of the image
Thing = tuple[int, tuple[float, float, float, float]]


@dataclass(frozen=True)
class Objects:
    """The size (width, height) of an image, and what people found in it."""

    size: tuple[int, int]
    things: Sequence[Thing]


@dataclass(frozen=True)
class Voc:
    """A year's folder, VOCdevkit/VOC2012; masks in one of its subfolders, PNGs of class numbers."""

    root: Path
    masks: str = "SegmentationClass"
    classes: tuple[str, ...] = VOC_CLASSES
    segments: tuple[str, ...] = ("background", *VOC_CLASSES)

    def objects(self, name: str) -> Objects:
        """Of the image with this name; difficult objects too."""
        file = self.root / "Annotations" / f"{name}.xml"
        try:
            tree = ElementTree.parse(file).getroot()
            size = tuple(int(_text(tree, f"size/{side}")) for side in ("width", "height"))
            things = [self._thing(each) for each in tree.iterfind("object")]
        except FileNotFoundError:
            raise _absent(name, file) from None
        except (ElementTree.ParseError, ValueError) as error:
            raise UserError(f"{file} is no annotation of VOC ({error}): unpack it again") from error
        return Objects((size[0], size[1]), things)

    def _thing(self, found: ElementTree.Element) -> Thing:
        ends = [float(_text(found, f"bndbox/{end}")) for end in ("xmin", "ymin", "xmax", "ymax")]
        # VOC counts pixels from 1 and includes the last
        box = (ends[0] - 1, ends[1] - 1, ends[2], ends[3])
        return self.classes.index(_text(found, "name")), box

    def mask(self, name: str) -> NDArray[np.uint8]:
        """(H, W) of 0 to 20, and VOID around objects."""
        return _read_mask(name, self.root / self.masks / f"{name}.png")


@dataclass(frozen=True)
class Coco:
    """A folder that holds `annotations`; boxes of one split."""

    root: Path
    split: str

    @cached_property
    def _said(self) -> dict[str, Any]:
        return _read_json(self.root / "annotations" / f"instances_{self.split}.json")

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(each["name"] for each in _by_id(self._said))

    @cached_property
    def _objects(self) -> Mapping[str, Objects]:
        numbers = {each["id"]: number for number, each in enumerate(_by_id(self._said))}
        things: dict[int, list[Thing]] = defaultdict(list)
        for each in self._said["annotations"]:
            left, top, width, height = each["bbox"]
            box = (left, top, left + width, top + height)
            things[each["image_id"]].append((numbers[each["category_id"]], box))
        return {
            Path(each["file_name"]).stem: Objects(
                (each["width"], each["height"]), things[each["id"]]
            )
            for each in self._said["images"]
        }

    def objects(self, name: str) -> Objects:
        """Of the image whose file is called so, without suffix."""
        if name not in self._objects:
            raise _absent(name, self.root / "annotations" / f"instances_{self.split}.json")
        return self._objects[name]


@dataclass(frozen=True)
class Stuff:
    """COCO-Stuff's maps of pixels, stuffthingmaps/<split>/<name>.png below the folder that holds `annotations`."""

    root: Path
    split: str
    masks: str = "stuffthingmaps"

    @cached_property
    def _above(self) -> dict[int, str]:
        """Category, counted from 0 as maps do -> what it is merged to."""
        both = [
            _read_json(self.root / "annotations" / f"{which}_{self.split}.json")
            for which in ("instances", "stuff")
        ]
        found = {
            each["id"] - 1: each["supercategory"]
            for each in itertools.chain.from_iterable(map(_by_id, both))
        }
        return {category: name for category, name in found.items() if name != _OTHER}

    @cached_property
    def segments(self) -> tuple[str, ...]:
        """The merged classes: things before stuff, in the order in which their first category comes."""
        return tuple(dict.fromkeys(self._above.values()))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.segments

    def mask(self, name: str) -> NDArray[np.uint8]:
        """(H, W) of 0 to 26, and VOID."""
        merged = np.full(256, VOID, dtype=np.uint8)
        for category, above in self._above.items():
            merged[category] = self.segments.index(above)
        return merged[_read_mask(name, self.root / self.masks / self.split / f"{name}.png")]


def _text(tree: ElementTree.Element, path: str) -> str:
    found = tree.findtext(path)
    if found is None:
        raise ValueError(f"no {path}")
    return found.strip()


def _read_mask(name: str, file: Path) -> NDArray[np.uint8]:
    """(H, W) class numbers: a palette's own, never its colours."""
    if not file.is_file():
        raise _absent(name, file)
    with Image.open(file) as image:
        if image.mode not in ("P", "L"):
            raise UserError(
                f"{file} is a picture of mode {image.mode}: give masks of class numbers"
            )
        return np.asarray(image)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        found["categories"]
    except FileNotFoundError:
        raise UserError(
            f"{file} is not there: name the folder that holds `annotations`, and --split one of its splits"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no annotation of COCO ({error}): download it again") from error
    return found


def _by_id(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(found["categories"], key=lambda each: each["id"])


def _absent(name: str, file: Path) -> UserError:
    return UserError(
        f"image {name!r} of the shards has no annotation at {file}: name the folder of its data set, or leave it out "
        "with tools.shards make --only"
    )
