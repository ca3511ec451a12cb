"""Published snapshots without a training: weights drawn anew, none of them zero, in a folder as a run publishes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from launcher.compose import compose
from selfguide.networks.student import build_student
from selfguide.snapshot import CONFIG
from selfguide.spec.averages import averages_of
from selfguide.spec.files import to_yaml
from shards import storage
from shards.format import manifest as manifests


def write_snapshot(
    folder: Path,
    root: Path,
    *overrides: str,
    guidance: dict[str, Any] | None = None,
    experiment: str = "digits_uncond",
    seed: int = 1,
    **extra: Any,
) -> Path:
    """A snapshot of an experiment, with the given settings, that says it was trained on the shards at `root`.

    `seed` draws its weights; averages but the first are a tenth shorter than it.
    """
    config = compose([f"experiment={experiment}", "cluster=local", *overrides])
    student = build_student(config, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in student.parameters():
            parameter.data.normal_(0, 0.05 + 0.5 / parameter.shape[-1] ** 0.5)
    folder.mkdir(parents=True)
    for number, average in enumerate(averages_of(config)):
        weights = dict(student.state_dict())
        for name, parameter in student.named_parameters() if number else ():
            weights[name] = 0.9**number * parameter.data
        save_file(weights, folder / average.file)
    (folder / CONFIG).write_text(to_yaml(config))
    unconditional = {"source": "none", "told": False, "p": None, "label_free": True}
    published = {
        "images": 7,
        "guidance": unconditional | (guidance or {}),
        "data": {"root": str(root), "header": manifests.load(root).header},
        "saw_labels": False,
        "origin": {"source": "scratch", "saw_labels": False},
    }
    storage.publish_folder(folder, extra=published | extra)
    return folder
