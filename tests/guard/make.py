"""Makes the fixtures that hold a refactoring to its word: `python -m tests.guard.make`, at the commit before it.

Whatever a later commit moves or renames, tests/guard shows that ids, files on disk, batch scripts and the numbers of
short runs are what they were. Run this again only where a change of numbers is meant, and say so in the commit.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.guard.names import compose, digest, experiments, identity, options, sidecar
from tests.guard.runs import BATCH, HALF, MANIFEST, RUNS, WEIGHTS, tensors_of, train, where

FIXTURES = Path(__file__).parent / "fixtures"
BASE = ["experiment=digits_dit", "cluster=local"]
COUNT = 1797
SCRIPTS = {
    "slurm_plain": ["experiment=in1k_dit", "cluster=slurm", "nodes=4", "runs=RUNS"],
    "slurm_site": [
        "experiment=in1k_dit", "cluster=slurm", "nodes=2", "runs=RUNS", "cluster.partition=gpu", "cluster.account=lab",
        "cluster.qos=high", "cluster.mem_gb=480", "cluster.cpus_per_task=12", "cluster.gpus_per_node=4",
        "cluster.timeout_min=600", "cluster.environment.NCCL_DEBUG=INFO", "cluster.environment.SPACED='a b'",
    ],
    "slurm_cpu": [
        "experiment=digits_dit", "cluster=slurm", "runs=RUNS",
        "cluster.request_gpus=false", "cluster.gpus_per_node=2",
    ],
}  # fmt: skip
GROUPS = ("guidance", "path", "sampler", "engine", "model", "init", "evaluation")
SINGLE = [
    "data.flip=true", "data.crop=true", "data.on_damage=substitute", "train.micro_batch=32",
    "train.ema_halflife=[1000,2000]", "nodes=2", "guidance.revive=0.1", "init.source=snapshot",
    "engine.recompute=true", "seed=3", "data.mode=global",
]  # fmt: skip
SEVERAL = [
    [*BASE, "guidance=sidecar", "guidance.ids=/x", "guidance.groups=3", "guidance.dense=/y"],
    [*BASE, "guidance=sgfm_code", "train.micro_batch=8"],
]


def settings() -> list[list[str]]:
    """The shipped experiments, every choice of every group, and what else is in an identity."""
    rows = [[f"experiment={name}", "cluster=slurm"] for name in experiments()]
    rows += [[*BASE, f"{group}={name}"] for group in GROUPS for name in options(group)]
    return [*rows, *([*BASE, one] for one in SINGLE), *SEVERAL]


def identity_of(words: list[str]) -> dict[str, object]:
    """The identity of these settings on fixed data, weights and annotations."""
    sidecars = {"ids": "a", "saw_labels": False} if "guidance=sidecar" in words else None
    return json.loads(
        json.dumps(identity(compose(words), MANIFEST, WEIGHTS, sidecars), default=str)
    )


def script(words: list[str]) -> str:
    """The batch script of a dry run, without paths of this machine."""
    command = [sys.executable, "-m", "launcher.submit", *words, "dry_run=true", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = json.loads(done.stdout)["sbatch"]
    for path, name in ((sys.executable, "PYTHON"), (str(Path.cwd()), "HERE")):
        text = text.replace(path, name)
    return text


def manifest_hash(root: Path) -> str:
    """The hash of a data set's only manifest."""
    return (root / "LATEST").read_text().strip()


def sampled(run: Path, to: Path) -> Path:
    """The grid of 16 samples of the half-trained snapshot."""
    folder = run / "snapshots" / f"img-{10 * BATCH:09d}"
    command = [
        sys.executable,
        "-m",
        "tools.sample",
        str(folder),
        "--count",
        "16",
        "--steps",
        "5",
        "--g",
        "1.5",
    ]
    subprocess.run([*command, "--out", str(to)], check=True, capture_output=True)
    return to / "grid.png"


def commands() -> list[str]:
    """Every `python -m` command that README, docs and Makefile name."""
    from tests.guard.test_commands import found

    return found()


def main() -> None:
    """Writes everything anew."""
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    table = {" ".join(words): identity_of(words) for words in settings()}
    ids = {words: {"id": digest(what), "identity": what} for words, what in table.items()}
    (FIXTURES / "ids.json").write_text(json.dumps(ids, separators=(",", ":"), sort_keys=True))
    for name, words in SCRIPTS.items():
        (FIXTURES / f"{name}.sh").write_text(script(words))
    (FIXTURES / "commands.json").write_text(json.dumps(commands(), indent=1))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shards = [
            sys.executable,
            "-m",
            "tools.shards",
            "make",
            "digits",
            "--out",
            str(work / "digits"),
        ]
        subprocess.run(shards, check=True)
        shutil.copytree(work / "digits", FIXTURES / "digits")
        about = {"made_by": "tests.guard.make", "saw_labels": False}
        rows = (np.arange(COUNT) % 10).astype(np.int32)
        hash = manifest_hash(FIXTURES / "digits")
        sidecar.write(
            FIXTURES / "sidecar", rows, manifest=hash, kind="id", groups=10, provenance=about
        )
        hashes = {}
        for name in RUNS:
            run = train(name, work / "runs", work / "digits")
            hashes[name] = tensors_of(run)
            if name in HALF:
                keep_half(run, FIXTURES / name)
        shutil.copy(sampled(FIXTURES / "zero1_online", work / "samples"), FIXTURES / "samples.png")
        (FIXTURES / "hashes.json").write_text(
            json.dumps({"where": where(), "runs": hashes}, indent=1)
        )


def keep_half(run: Path, to: Path) -> None:
    """The run as it was when half of it was trained."""
    images = BATCH * 10
    shutil.copytree(
        run,
        to,
        ignore=shutil.ignore_patterns(
            "code", "*.lock", "job*", "code.json", "start-*", "progress.json", "rendezvous.json"
        ),
    )
    for folder in [*(to / "checkpoints").iterdir(), *(to / "snapshots").iterdir()]:
        if int(folder.name.removeprefix("img-")) > images:
            shutil.rmtree(folder)
    for path in (to / "attempts").glob("*/exit-*.json"):
        path.unlink()


if __name__ == "__main__":
    main()
