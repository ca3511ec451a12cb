"""A row at toy size: the same method on 1,797 handwritten digits of 8 x 8 pixels, with a network that a CPU trains.

What makes a row this row stays: path, prediction, time density, the form of its network, where its condition comes
from, its sampler and its guidance. Its data, width, length and batch shrink; of K groups the square root of K are
found, by the row's own method in the pixels, since no ViT sees images of 8 pixels; labels by text are people's own. So
rows that differ only in what is replaced, such as the net of their features, are one run here.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launcher.compose import compose
from selfguide.spec.config import Config, OnlineGuidance, SidecarGuidance
from selfguide.spec.published import Row
from selfguide.spec.sizes import row as size_of
from selfguide.spec.unet import UNetArchitecture
from shards import read_all, sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from tools.annotate.__main__ import main as annotate
from tools.shards.__main__ import main as shards_command

BATCH, CLASSES, CHANNELS = 128, 10, 3
# an image's ink: above half of the brightest of 16 levels
_INK = 8


@dataclass(frozen=True)
class Toy:
    """Where the toy's data and annotations are, and how long its rows train."""

    folder: Path
    images: int

    @property
    def shards(self) -> str:
        return str(self.folder / "digits")

    def settings(self, row: Row) -> list[str]:
        """What is typed after `python -m launcher.submit` for the row at toy size.

        Raises:
            UserError: it is no run, or lacks something.
        """
        if row.lacks or not row.settings:
            raise UserError(
                f"{row.key} cannot be run: {row.lacks or 'it is made of the runs of other rows: ' + str(row.command)}"
            )
        config = compose([*row.settings, "cluster=local"])
        kept = [word for word in (row.settings[0], *row.overrides) if not _shrunk(word)]
        return [*kept, *self._common(row), *_network(config), *self._guidance(config)]

    def _common(self, row: Row) -> list[str]:
        steps = max(self.images // BATCH, 2)
        rounded = steps * BATCH
        return [
            *("data=digits", f"data.root={self.shards}", "data.flip=false", "cluster=local", "engine=torch"),
            # a second process or thread costs more than it gives, above all where others work
            *("cluster.gpus_per_node=1", "cluster.environment.OMP_NUM_THREADS=1"),
            *("init=scratch", "init.path=null", "init.time=as_trained"),
            *("evaluation=fd_digits", "evaluation.samples=500", "evaluation.shards=null"),
            f"evaluation.expected={_expected(row)}",
            *(f"train.images={rounded}", f"train.batch={BATCH}", "train.learning_rate=2e-3"),
            *(f"train.warmup_images={min(6400, rounded // 4)}", "train.ema_halflife=[5000]"),
            # what is lost where a long row is ended
            f"train.checkpoint_every={min(rounded, 100 * BATCH)}",
            f"train.snapshot_every={rounded}",
            f"train.log_every={BATCH}",
        ]  # fmt: skip

    def _guidance(self, config: Config) -> list[str]:
        guidance = config.guidance
        if isinstance(guidance, OnlineGuidance):
            sizes = ["guidance.groups=30", "guidance.switch=0.3", "guidance.teacher_refresh=128"]
            return [*sizes, "guidance.queue=128"] if guidance.queue else sizes
        if not isinstance(guidance, SidecarGuidance):
            return []
        words = []
        if guidance.ids:
            words += self._ids(guidance)
        if guidance.layout:
            kind, make = ("boxes", _boxes) if guidance.channels == 1 else ("masks", _masks)
            channels = 1 if kind == "boxes" else CHANNELS
            words += [f"guidance.layout={self._made(kind, make)}", f"guidance.channels={channels}"]
            words += (
                [] if guidance.ids else [f"guidance.groups={channels if guidance.groups else 0}"]
            )
        if guidance.dense:
            words += [f"guidance.dense={self._made('pixels', _pixels)}", "guidance.width=64"]
        return words

    def _ids(self, guidance: SidecarGuidance) -> list[str]:
        """People's labels, which stand for those by text too, or groups that are found as the row's are."""
        by_text = "-clip-k" in str(guidance.ids)
        if by_text or "-truth-" in str(guidance.ids):
            return [f"guidance.ids={self._made('labels', _labels)}", f"guidance.groups={CLASSES}"]
        groups = max(2, round(math.sqrt(guidance.groups)))
        how = "temi" if "-temi" in str(guidance.ids) else "kmeans"
        folder = self._made(f"{how}-k{groups}", lambda toy, out: _groups(toy, out, how, groups))
        return [f"guidance.ids={folder}", f"guidance.groups={groups}"]

    def _made(self, name: str, make: Callable[[Toy, str], None]) -> Path:
        """The folder of an annotation of the digits, which is made where it is missing."""
        folder = self.folder / "notes" / name
        if not (folder / "MANIFEST.json").exists():
            make(self, str(folder))
        return folder.absolute()

    def prepare(self) -> None:
        """The digits as shards; nothing where they are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _quiet(shards_command, ["make", "digits", "--out", self.shards])


def _shrunk(word: str) -> bool:
    """Whether a setting of the row is one that the toy replaces."""
    key = word.partition("=")[0]
    replaced = ("guidance.ids", "guidance.groups", "guidance.layout", "guidance.dense")
    return key in replaced or key.startswith(("train.", "evaluation", "data"))


def _network(config: Config) -> list[str]:
    """The row's family, as small as the digits, and fewer steps of its sampler."""
    words, base = ["model.size=null", "model.channels=null"], size_of(config.model.name)
    if isinstance(base, UNetArchitecture):
        words += ["model.dropout=0", "model.base=16", "model.mult=[1,2]", "model.blocks=1"]
        words += ["model.attention=[2]", "model.groups=8"]
        if base.out_groups is not None or config.model.out_groups is not None:
            words += ["model.out_groups=8"]
    else:
        words += ["model.patch=2", "model.width=64", "model.depth=4", "model.heads=4"]
    if config.model.self_condition is not None:
        unet = isinstance(base, UNetArchitecture)
        words += [f"model.self_condition={'out_2' if unet else 'block_2'}"]
    if config.contrastive.on:
        # of layers that the small net has
        words += ["contrastive.layer=null", "contrastive.hidden=64", "contrastive.width=32"]
    adaptive = config.sampler.name == "dopri5"
    tolerance = ["sampler.rtol=1e-2", "sampler.atol=1e-2"]
    return [*words, *(tolerance if adaptive else ["sampler.steps=20"])]


def _expected(row: Row) -> str:
    """The published distance of the row at full size, as what the toy's is shown beside."""
    distances = [each for each in row.expected if each.metric.startswith(("fid", "fdd"))]
    if not distances:
        return "[]"
    first = distances[0]
    source = f'"{first.source}, {first.metric} at full size"'
    return f"[{{metric: fd_digits, value: {first.value:g}, source: {source}}}]"


def _quiet(command: Callable[[Sequence[str]], int], words: Sequence[str]) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        code = command(words)
    if code:
        raise UserError(f"{' '.join(words)} failed")


def _groups(toy: Toy, out: str, how: str, groups: int) -> None:
    words = [how, toy.shards, "--pixels", "--groups", str(groups), "--out", out]
    # steps of fewer images, since 1,797 make few of them
    small = ["--heads", "4", "--epochs", "10", "--step-images", "64", "--learning-rate", "2e-3"]
    _quiet(annotate, [*words, *(small if how == "temi" else [])])


def _labels(toy: Toy, out: str) -> None:
    """The class of each digit, in the form of the classes of a photo: several may be present."""
    rows = np.eye(CLASSES, dtype=np.uint8)[read_all(toy.shards)["y"]]
    _write(toy, out, rows, kind="multi_hot", groups=CLASSES, saw_labels=True)


def _pixels(toy: Toy, out: str) -> None:
    _quiet(annotate, ["features", toy.shards, "--pixels", "--out", out])


def _boxes(toy: Toy, out: str) -> None:
    """The box around each digit's ink: LOST needs larger pictures."""
    ink = read_all(toy.shards)["x"][:, 0] > _INK
    rows = []
    for each in ink:
        high, wide = np.flatnonzero(each.any(1)), np.flatnonzero(each.any(0))
        rows.append((high[0], wide[0], high[-1] + 1, wide[-1] + 1))
    _write(toy, out, np.asarray(rows, dtype=np.int32), kind="box", groups=None)


def _masks(toy: Toy, out: str) -> None:
    """Each digit's paper, faint ink and ink: STEGO needs larger pictures."""
    x = read_all(toy.shards)["x"][:, 0]
    rows = np.digitize(x, (1, _INK)).astype(np.uint8)
    _write(toy, out, rows, kind="mask", groups=CHANNELS)


def _write(
    toy: Toy, out: str, rows: Any, *, kind: Any, groups: int | None, saw_labels: bool = False
) -> None:
    about = {"made_by": "tools.reproduce", "saw_labels": saw_labels}
    hashed = manifests.load(toy.shards).hash
    sidecar.write(out, rows, manifest=hashed, kind=kind, groups=groups, provenance=about)
