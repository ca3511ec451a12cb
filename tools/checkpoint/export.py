"""Write the weights of a checkpoint as safetensors: fp32, whole, by name, whatever engine and ranks it was written by.

The folder gets `weights.safetensors`, what the optimiser steps, and `ema-<average>.safetensors` of each average. Each
has the parameters and the buffers of the model's state_dict. The checkpoint is verified before.

examples:
  python -m tools.checkpoint export runs/in1k_dit/3f2a --out weights
  python -m tools.checkpoint export 3f2a --images 512000 --average power-0.05 --out weights
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from selfguide.spec.averages import AverageSpec
from selfguide.training.stored import open_checkpoint
from selfguide.weights import save_tensors
from shards import storage
from shards.errors import UserError
from tools import flags
from tools.checkpoint import target
from tools.checkpoint.draft import drafted


def add(parser: argparse.ArgumentParser) -> None:
    target.add(parser, "the checkpoint at N images seen (default: the newest)")
    flags.add(
        parser,
        ("--average KEY", str, None, "only this average, as `show` names it; `weights` for none"),
        ("--out DIR", flags.here, flags.REQUIRED, "a new folder"),
    )


def run(options: argparse.Namespace) -> int:
    out = Path(options.out)
    if out.exists():
        raise UserError(f"--out {out}: it exists already; name another")
    stored = open_checkpoint(target.one(options))
    wanted: list[AverageSpec | None] = [None, *stored.averages]
    if options.average is not None:
        wanted = [None if options.average == "weights" else AverageSpec.of(options.average)]
    images = stored.manifest["images"]
    written: list[dict[str, Any]] = []
    with drafted(out) as folder:
        folder.mkdir()
        for average in wanted:
            tensors = stored.weights(average)
            name = "weights.safetensors" if average is None else average.file
            key = average.key if average else ""
            about = {"format": "pt", "images": str(images), "average": key}
            save_tensors(folder / name, tensors, about)
            digest = storage.sha256(folder / name)
            written.append({"file": name, "tensors": len(tensors), "sha256": digest})
    if options.json:
        print(json.dumps({"out": str(out), "images": images, "files": written}))
    else:
        for each in written:
            print(f"{out / each['file']}  {each['tensors']} tensors at {images:,} images")
    return 0
