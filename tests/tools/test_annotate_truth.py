"""`tools.annotate truth` on small trees of VOC, COCO and COCO-Stuff: rows against boxes and masks that are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards import read_all, sidecar
from shards.errors import UserError
from shards.format.pictures import Picture, window
from tools.annotate.__main__ import main
from tools.annotate.people import VOC_CLASSES, VOID, Objects, Stuff
from tools.annotate.truth import cut, largest, named
from tools.shards.__main__ import main as shards_command

# width and height of images, in pixels; none is square
SIZES = {"a": (120, 80), "b": (70, 100), "c": (64, 48)}
SIZE = 16
# class and box of left, top, right, bottom, ends excluded
THINGS: dict[str, list[tuple[str, tuple[int, int, int, int]]]] = {
    "a": [("dog", (30, 10, 60, 70)), ("cat", (70, 20, 80, 30))],
    # both show the same class; the second is larger and lies outside of the centre crop
    "b": [("person", (10, 30, 50, 60)), ("person", (0, 0, 70, 12))],
    "c": [],
}


def painted(name: str, colours: bool) -> np.ndarray:
    """(H, W, 3) the image: its first thing red on black; or (H, W), the numbers of its classes."""
    width, height = SIZES[name]
    found = np.zeros((height, width, 3) if colours else (height, width), dtype=np.uint8)
    for number, (_, (left, top, right, bottom)) in enumerate(THINGS[name], 1):
        if number == 1 or not colours:
            found[top:bottom, left:right] = (255, 0, 0) if colours else number
    return found


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("VOC2012")
    for folder in ("JPEGImages", "Annotations", "SegmentationClass"):
        (root / folder).mkdir()
    for name, (width, height) in SIZES.items():
        Image.fromarray(painted(name, True)).save(
            root / "JPEGImages" / f"{name}.jpg", quality=98, subsampling=0
        )
        objects = "".join(
            f"<object><name>{of}</name><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax>"
            f"<ymax>{bottom}</ymax></bndbox><part><name>head</name></part></object>"
            for of, (left, top, right, bottom) in THINGS[name]
        )
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>{size}{objects}</annotation>"
        )
        mask = painted(name, False)
        # void around the first thing, as VOC has it
        for _, (left, top, _, bottom) in THINGS[name][:1]:
            mask[top:bottom, left : left + 2] = VOID
        found = Image.fromarray(mask, mode="P")
        found.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        found.save(root / "SegmentationClass" / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def shards(voc: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("data") / "voc")
    words = ["make", "folder", str(voc / "JPEGImages"), "--size", str(SIZE), "--out", out]
    assert shards_command([*words, "--json"]) == 0
    return out


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, with COCO's ids and its gaps in numbers; of stuff, sky, sand and what is left over."""
    root = tmp_path_factory.mktemp("coco")
    ids = {"dog": 18, "cat": 17, "person": 1}
    above = {"dog": "animal", "cat": "animal", "person": "person"}
    images, annotations = [], []
    for number, (name, (width, height)) in enumerate(SIZES.items(), 100):
        images.append({"id": number, "file_name": f"{name}.jpg", "width": width, "height": height})
        annotations += [
            {"image_id": number, "category_id": ids[of], "bbox": [left, top, right - left, bottom - top]}
            for of, (left, top, right, bottom) in THINGS[name]
        ]  # fmt: skip
    categories = [
        {"id": number, "name": name, "supercategory": above[name]} for name, number in ids.items()
    ]
    stuff = [
        {"id": 157, "name": "sky-other", "supercategory": "sky"},
        {"id": 154, "name": "sand", "supercategory": "ground"},
        {"id": 183, "name": "other", "supercategory": "other"},
    ]
    (root / "annotations").mkdir()
    said = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val.json").write_text(json.dumps(said))
    (root / "annotations" / "stuff_val.json").write_text(json.dumps({"categories": stuff}))
    (root / "stuffthingmaps" / "val").mkdir(parents=True)
    for name, (width, height) in SIZES.items():
        mask = np.full((height, width), 156, dtype=np.uint8)  # sky
        for of, (left, top, right, bottom) in THINGS[name]:
            mask[top:bottom, left:right] = ids[of] - 1
        mask[-3:] = VOID
        Image.fromarray(mask).save(root / "stuffthingmaps" / "val" / f"{name}.png")
    return root


def made(shards: str, out: Path, *words: str) -> tuple[sidecar.Sidecar, dict[str, Any]]:
    """The sidecar of a command, and its rows by the names of images."""
    assert main(["truth", shards, *words, "--out", str(out), "--json"]) == 0
    found = sidecar.read(out)
    assert found.saw_labels
    keys = read_all(shards)["key"].tolist()
    return found, dict(zip((Path(key).stem for key in keys), found.rows(), strict=True))


def red(shards: str) -> dict[str, np.ndarray]:
    """Where the stored images are red, by their names."""
    held = read_all(shards)
    names = [Path(key).stem for key in held["key"].tolist()]
    return {name: x[0] > 127 for name, x in zip(names, held["x"], strict=True)}


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def inside(box: np.ndarray) -> np.ndarray:
    found = np.zeros((SIZE, SIZE), dtype=bool)
    found[box[0] : box[2], box[1] : box[3]] = True
    return found


def test_labels_of_voc_are_the_classes_of_each_images_objects(
    voc: Path, shards: str, tmp_path: Path
) -> None:
    found, rows = made(shards, tmp_path / "out", "voc", str(voc), "--kind", "labels")
    assert (found.kind, found.groups) == ("multi_hot", 20)
    classes = {name: [VOC_CLASSES[k] for k in np.flatnonzero(row)] for name, row in rows.items()}
    assert classes == {"a": ["cat", "dog"], "b": ["person"], "c": []}


def test_a_box_lies_where_its_object_is_seen_in_the_stored_image(
    voc: Path, shards: str, tmp_path: Path
) -> None:
    found, rows = made(shards, tmp_path / "out", "voc", str(voc), "--kind", "box")
    seen = red(shards)
    for name in ("a", "b"):
        assert iou(inside(rows[name]), seen[name]) > 0.85
    # without an object the box is the whole image, and the record says how often
    assert rows["c"].tolist() == [0, 0, SIZE, SIZE]
    assert found.provenance["report"]["without_object"] == pytest.approx(1 / 3)
    assert found.file("box.png").stat().st_size > 0


def test_a_mask_has_the_class_of_each_pixel_and_void_takes_the_nearest(
    voc: Path, shards: str, tmp_path: Path
) -> None:
    found, rows = made(shards, tmp_path / "out", "voc", str(voc), "--kind", "mask")
    assert (found.kind, found.groups) == ("mask", 21)
    seen = red(shards)
    for name in ("a", "b"):
        assert iou(rows[name] == 1, seen[name]) > 0.75
        assert VOID not in rows[name]
    assert not rows["c"].any()


def test_coco_gives_the_same_boxes_and_its_own_classes(
    voc: Path, coco: Path, shards: str, tmp_path: Path
) -> None:
    of_voc = made(shards, tmp_path / "voc", "voc", str(voc), "--kind", "box")[1]
    split = ("--split", "val")
    of_coco = made(shards, tmp_path / "coco", "coco", str(coco), *split, "--kind", "box")[1]
    assert {n: r.tolist() for n, r in of_coco.items()} == {n: r.tolist() for n, r in of_voc.items()}
    found, rows = made(shards, tmp_path / "labels", "coco", str(coco), *split, "--kind", "labels")
    # in the order of COCO's ids, gaps closed
    assert found.provenance["classes"] == ["person", "cat", "dog"]
    assert {name: row.tolist() for name, row in rows.items()} == {
        "a": [0, 1, 1],
        "b": [1, 0, 0],
        "c": [0, 0, 0],
    }


def test_cocostuff_merges_categories_to_what_stands_above_them(
    coco: Path, shards: str, tmp_path: Path
) -> None:
    words = ("cocostuff27", str(coco), "--split", "val", "--kind")
    found, rows = made(shards, tmp_path / "masks", *words, "mask")
    # cat and dog are one, what is left over is none
    names = ["person", "animal", "ground", "sky"]
    assert found.provenance["classes"] == names and found.groups == 4
    assert iou(rows["a"] == names.index("animal"), rows["a"] != names.index("sky")) == 1
    assert (rows["c"] == names.index("sky")).all()
    _, several = made(shards, tmp_path / "labels", *words, "labels")
    assert several["a"].tolist() == [0, 1, 0, 1] and several["b"].tolist() == [1, 0, 0, 1]


# COCO's 80 things by id, and the 91 kinds of stuff from 92 on, each under what COCO-Stuff's authors put it
THINGS_ABOVE = (
    "person:1 vehicle:2-9 outdoor:10,11,13-15 animal:16-25 accessory:27,28,31-33 sports:34-43 kitchen:44,46-51 "
    "food:52-61 furniture:62-65,67,70 electronic:72-77 appliance:78-82 indoor:84-90"
)
STUFF_ABOVE = (
    "textile:92,93,104,105,109,131,137,141,152,167,168 plant:94,97,119,124,129,134,142,163,169 "
    "building:95,96,128,151,158,166 furniture-stuff:98,107,108,110,112,123,130,133,156,161,165 "
    "structural:99,113,138,146,164 raw-material:100,132,139,143 floor:101,114-118 ceiling:102,103 sky:106,157 "
    "ground:111,125,126,136,140,144,145,147,149,154,159 water:120,148,155,178,179 food-stuff:121,122,153,170 "
    "solid:127,135,150,160,162,182 wall:171-177 window:180,181"
)


def spelled(text: str) -> dict[int, str]:
    found = {}
    for part in text.split():
        name, _, numbers = part.partition(":")
        for span in numbers.split(","):
            first, _, last = span.partition("-")
            found |= dict.fromkeys(range(int(first), int(last or first) + 1), name)
    return found


def test_the_whole_hierarchy_comes_to_twelve_things_and_fifteen_kinds_of_stuff(
    tmp_path: Path,
) -> None:
    (tmp_path / "annotations").mkdir()
    both = spelled(THINGS_ABOVE), spelled(STUFF_ABOVE)
    assert [len(each) for each in both] == [80, 91]
    for which, above in zip(("instances", "stuff"), both, strict=True):
        listed = [
            {"id": number, "name": str(number), "supercategory": name}
            for number, name in above.items()
        ]
        if which == "stuff":
            listed.append({"id": 183, "name": "other", "supercategory": "other"})
        file = tmp_path / "annotations" / f"{which}_train2017.json"
        file.write_text(json.dumps({"categories": listed}))
    (tmp_path / "stuffthingmaps" / "train2017").mkdir(parents=True)
    # a map counts categories from 0: a person, a dog, a chair, a cabinet, sky, wood, what is left over, nothing
    numbers = [0, 16, 61, 97, 156, 181, 182, 255]
    picture = Image.fromarray(np.array([numbers], np.uint8))
    picture.save(tmp_path / "stuffthingmaps" / "train2017" / "a.png")
    stuff = Stuff(tmp_path, "train2017")
    assert len(stuff.segments) == 27 and len(set(stuff.segments)) == 27
    assert set(stuff.segments[:12]) == set(both[0].values())
    found = stuff.mask("a")[0].tolist()
    names = [VOID if number == VOID else stuff.segments[number] for number in found]
    expected = ["person", "animal", "furniture", "furniture-stuff", "sky", "solid", VOID, VOID]
    assert names == expected


@pytest.mark.parametrize("size", [(120, 80), (80, 120), (33, 33), (501, 375), (17, 40)])
def test_masks_and_boxes_are_cut_as_their_pictures_are(size: tuple[int, int]) -> None:
    """Of an image whose left part is white up to an edge, the edge is where the picture has it."""
    width, height = size
    for edge in range(width // 4, 3 * width // 4, 7):
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[:, :edge] = 1
        picture = Picture(size=SIZE, channels=1)._pixels(Image.fromarray(mask * 255))[0]
        there = picture.astype(float).mean(0).sum() / 255
        assert abs(cut(mask, SIZE).mean(0).sum() - there) <= 1
        box = largest(Objects(size, [(0, (0, 0, edge, height))]), SIZE)
        assert box is not None and abs(box[3] - there) <= 1


def test_a_window_is_at_least_its_size_and_lies_in_the_middle() -> None:
    for width in range(16, 200, 13):
        for height in range(16, 200, 17):
            at = window(width, height, SIZE)
            assert min(at.width, at.height) == SIZE
            assert 0 <= at.left <= at.width - SIZE and 0 <= at.top <= at.height - SIZE
            assert abs(2 * at.left + SIZE - at.width) <= 1


def test_void_takes_the_class_of_the_nearest_pixel_and_all_void_is_refused() -> None:
    mask = np.array([[1, VOID, VOID, 2], [1, VOID, VOID, 2]], dtype=np.uint8)
    assert named(mask, "x").tolist() == [[1, 1, 2, 2]] * 2
    with pytest.raises(UserError, match="'x'"):
        named(np.full((2, 2), VOID, dtype=np.uint8), "x")


def test_what_has_no_annotation_is_refused_by_name(
    voc: Path, coco: Path, shards: str, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "out")]
    empty = tmp_path / "empty"
    (empty / "Annotations").mkdir(parents=True)
    refused: list[tuple[list[str], str]] = [
        (["voc", str(empty), "--kind", "labels"], "has no annotation"),
        (["voc", str(voc), "--kind", "mask", "--masks", "Aug"], "has no annotation"),
        (["voc", str(voc), "--kind", "box", "--masks", "Aug"], "masks alone"),
        (["coco", str(coco), "--kind", "box"], "--split"),
        (["coco", str(coco), "--split", "val", "--kind", "mask"], "cocostuff27"),
        (["cocostuff27", str(coco), "--split", "val", "--kind", "box"], "coco has boxes"),
    ]
    for words, match in refused:
        with pytest.raises(UserError, match=match):
            main(["truth", shards, *words, *out])
    (empty / "Annotations" / "a.xml").write_text("<annotation></annotation>")
    (empty / "Annotations" / "b.xml").write_text("<annotation>")
    for name in ("a", "b"):
        from tools.annotate.people import Voc

        with pytest.raises(UserError, match="no annotation of VOC"):
            Voc(empty).objects(name)
    assert not (tmp_path / "out").exists()
