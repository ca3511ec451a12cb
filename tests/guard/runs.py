"""Short runs, small enough to be kept, by the command that a user types."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures"
MANIFEST, WEIGHTS = "0" * 64, "1" * 64
BATCH = 128
HALFWAY, WHOLE = f"img-{10 * BATCH:09d}", f"img-{20 * BATCH:09d}"
_COMMON = [
    "cluster=local", f"train.images={20 * BATCH}", f"train.batch={BATCH}",
    f"train.snapshot_every={10 * BATCH}", f"train.checkpoint_every={10 * BATCH}", f"train.log_every={10 * BATCH}",
    "train.keep_checkpoints=9", "train.warmup_images=256", "train.ema_ramp=1",
    # a sum's bits depend on how many threads share it, and that on the machine's cores
    "cluster.environment.OMP_NUM_THREADS=1",
]  # fmt: skip
_SMALL = ["model.width=24", "model.depth=2", "model.heads=2"]
_ONLINE = [
    "guidance.layer=1", "guidance.groups=16", "guidance.pooling=mean", "guidance.window=1280",
    "guidance.teacher_refresh=256",
]  # fmt: skip
_TORCH = ["engine=torch", "cluster.gpus_per_node=1"]
_UNSCORED = ["evaluation=none"]

RUNS = {
    # conditioned from step 8 on, so the checkpoint of step 10 has a teacher that is in use
    "zero1_online": [
        "experiment=digits_dit", *_UNSCORED, *_SMALL, *_ONLINE, "train.ema_halflife=[500,2000]", "guidance.switch=0.4",
    ],
    # conditioned from step 14 on, so the switch comes after the resumption
    "torch_online": [
        "experiment=digits_dit", *_UNSCORED, *_SMALL, *_ONLINE, *_TORCH, "guidance.switch=0.7",
    ],
    "torch_labels": ["experiment=digits_class", *_UNSCORED, "model=uvit_digits", *_SMALL, *_TORCH],
    "torch_edm": [
        "experiment=digits_edm", *_UNSCORED, "guidance=none", "model.base=8", "model.groups=4", *_TORCH,
    ],
    "torch_sidecar": [
        "experiment=digits_dit", *_UNSCORED, *_SMALL, *_TORCH, "guidance=sidecar", "guidance.groups=10",
        f"guidance.ids={FIXTURES / 'sidecar'}",
    ],
    "scored": [
        "experiment=digits_class", "model.width=16", "model.depth=1", "model.heads=1", *_TORCH,
        "evaluation=fd_digits", "evaluation.samples=256", "evaluation.batch=128", "sampler.steps=4",
    ],
}  # fmt: skip
# kept half-trained, to be resumed
HALF = ("zero1_online", "torch_online")


def folder_of(name: str, runs: Path) -> Path:
    """Where below `runs` the run of that name lies."""
    return runs / RUNS[name][0].partition("=")[2] / name


def train(name: str, runs: Path, data: Path) -> Path:
    """Submits the run, or resumes it where its folder is there, and returns the folder once it has ended."""
    settings = [*RUNS[name], *_COMMON, f"name={name}", f"runs={runs}", f"data.root={data}"]
    command([sys.executable, "-m", "launcher.submit", *settings, "follow=true"])
    return folder_of(name, runs)


def command(words: list[str]) -> str:
    """What a command prints; raises AssertionError with all it said where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tensors_of(run: Path) -> dict[str, dict[str, Any]]:
    """Name of each tensor at the end -> sha256 of its bytes, and the sum of its magnitudes in fp64.

    Of the final snapshot every tensor of every average; of the final checkpoint the masters and Adam's moments, each as
    the one flat vector that its ranks hold in turn.
    """
    found = {}
    for path in sorted((run / "snapshots" / WHOLE).glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            found[f"{path.name}/{name}"] = tensor
    ranks = [load_file(p) for p in sorted((run / "checkpoints" / WHOLE).glob("rank-*.safetensors"))]
    for name in ("master", "first", "second"):
        found[f"checkpoint/{name}"] = torch.cat([rank[name] for rank in ranks])
    return {name: _summary(tensor) for name, tensor in found.items()}


def _summary(tensor: torch.Tensor) -> dict[str, Any]:
    data = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
    return {"sha256": data, "sum": tensor.double().abs().sum().item()}


def where() -> dict[str, str]:
    """What the bits of a sum depend on, besides the code."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"cpu": capability, "machine": platform.machine(), "torch": torch.__version__}
