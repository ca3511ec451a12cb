"""Four runs of 20 steps, small enough to be kept, by the command that a user types."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

MANIFEST, WEIGHTS = "0" * 64, "1" * 64
BATCH = 128
_COMMON = [
    "cluster=local", "evaluation=none", f"train.images={20 * BATCH}", f"train.batch={BATCH}",
    f"train.snapshot_every={10 * BATCH}", f"train.checkpoint_every={10 * BATCH}", f"train.log_every={10 * BATCH}",
    "train.keep_checkpoints=9", "train.warmup_images=256", "train.ema_ramp=1",
]  # fmt: skip
_SMALL = ["model.width=32", "model.depth=2", "model.heads=2"]
_ONLINE = [
    "guidance.layer=1", "guidance.groups=16", "guidance.pooling=mean", "guidance.window=1280",
    "guidance.teacher_refresh=256",
]  # fmt: skip
_TORCH = ["engine=torch", "cluster.gpus_per_node=1"]

RUNS = {
    "zero1_online": ["experiment=digits_dit", *_SMALL, *_ONLINE, "train.ema_halflife=[500,2000]"],
    "torch_online": ["experiment=digits_dit", *_SMALL, *_ONLINE, *_TORCH],
    "torch_labels": ["experiment=digits_class", "model=uvit_digits", *_SMALL, *_TORCH],
    "torch_edm": [
        "experiment=digits_edm",
        "guidance=none",
        "model.base=8",
        "model.groups=4",
        *_TORCH,
    ],
}
# kept half-trained, to be resumed
HALF = ("zero1_online", "torch_online")


def train(name: str, runs: Path, data: Path) -> Path:
    """Submits the run, or resumes it where its folder is there, and returns the folder once it has ended."""
    settings = [
        *RUNS[name],
        *_COMMON,
        f"name={name}",
        f"runs={runs}",
        f"data.root={data}",
        "follow=true",
    ]
    command = [sys.executable, "-m", "launcher.submit", *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    experiment = RUNS[name][0].partition("=")[2]
    return runs / experiment / name


def tensors_of(run: Path) -> dict[str, dict[str, Any]]:
    """File and tensor of the final snapshot -> sha256 of its bytes, and its sum in fp64."""
    found = {}
    for path in sorted((run / "snapshots" / f"img-{20 * BATCH:09d}").glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            data = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
            found[f"{path.name}/{name}"] = {
                "sha256": data,
                "sum": tensor.double().abs().sum().item(),
            }
    return found


def where() -> dict[str, str]:
    """What bits of a sum depend on, besides the code."""
    return {"cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
