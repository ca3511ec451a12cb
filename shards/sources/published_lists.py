"""Lists of images and classes that papers use, by the name of their file: how long they are, and where they are.

None is shipped. Whoever has one keeps its name, and `--only` says where another stands under it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from shards.errors import UserError

_PICIE = "https://raw.githubusercontent.com/janghyuncho/PiCIE/master/curated"


@dataclass(frozen=True, kw_only=True)
class PublishedList:
    """A list of one key or class a line."""

    what: str
    lines: int
    place: str
    # where we have read all of it
    sha256: str | None = None

    def check(self, path: str, lines: list[str], text: bytes) -> None:
        """
        Raises:
            UserError: the file at `path` is another one.
        """
        found = hashlib.sha256(text).hexdigest()
        if len(lines) == self.lines and self.sha256 in (None, found):
            return
        own = "" if self.sha256 is None else f" and sha256 {self.sha256[:12]}"
        raise UserError(
            f"{path} has {len(lines):,} lines and sha256 {found[:12]}, and {self.what} of that name has "
            f"{self.lines:,}{own}: get it from {self.place}, or rename yours"
        )


LISTS = {
    "imagenet100.txt": PublishedList(
        what="CMC's list of 100 synsets (Tian et al. 2020)",
        lines=100,
        place="https://raw.githubusercontent.com/HobbitLong/CMC/master/imagenet100.txt",
        sha256="79f3f1552ccc478ce24bd934b4573625db584ddc1f4643ae23c994a94cb11397",
    ),
    "voc12031.txt": PublishedList(
        what="the list of VOC 2012's trainaug and val images",
        lines=12_031,
        place="the 10,582 names of SBD's trainaug.txt and the 1,449 of VOC's ImageSets/Segmentation/val.txt",
    ),
    "coco20k.txt": PublishedList(
        what="the list of COCO-20K (Vo et al. 2020), of train2014",
        lines=19_817,
        place="https://raw.githubusercontent.com/valeoai/LOST/master/datasets/coco_20k_filenames.txt",
    ),
    "coco-stuff-train.txt": PublishedList(
        what="the curated list of train2017 (Ji et al. 2019)",
        lines=49_629,
        place=f"{_PICIE}/train2017/Coco164kFull_Stuff_Coarse_7.txt",
    ),
    "coco-stuff-val.txt": PublishedList(
        what="the curated list of val2017 (Ji et al. 2019)",
        lines=2_175,
        place=f"{_PICIE}/val2017/Coco164kFull_Stuff_Coarse_7.txt",
    ),
}
