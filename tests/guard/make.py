"""Makes the fixtures that hold a refactoring to its word: `python -m tests.guard.make --anew`, at the commit before it.

Whatever a later commit moves or renames, tests/guard shows that ids, files on disk, batch scripts and the numbers of
short runs are what they were. Run this again only where a change of numbers is meant, and say so in the commit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.guard.names import compose, digest, experiments, identity, options, sidecar, to_yaml
from tests.guard.runs import (
    FIXTURES,
    HALF,
    HALFWAY,
    MANIFEST,
    RUNS,
    WEIGHTS,
    WHOLE,
    command,
    tensors_of,
    train,
    where,
)

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
    "devcluster_plain": ["experiment=digits_dit", "cluster=devcluster", "runs=RUNS"],
    "devcluster_rich": [
        "experiment=digits_dit", "cluster=devcluster", "nodes=2", "runs=RUNS", "cluster.partition=other",
        "cluster.account=lab", "cluster.qos=high", "cluster.mem_gb=2", "cluster.cpus_per_task=1",
        "cluster.timeout_min=5", "cluster.environment.NCCL_DEBUG=INFO",
    ],
}  # fmt: skip
GROUPS = ("guidance", "path", "sampler", "engine", "model", "init", "evaluation", "data")
SINGLE = [
    "data.flip=true", "data.crop=true", "data.on_damage=substitute", "train.micro_batch=32",
    "train.ema_halflife=[1000,2000]", "nodes=2", "guidance.revive=0.1", "init.source=snapshot",
    "engine.recompute=true", "seed=3", "data.mode=global",
]  # fmt: skip
# every key of a part at once, at a value that is not its default: the whole identity is compared, not its hash alone
SEVERAL = [
    [*BASE, "guidance=sidecar", "guidance.ids=/x", "guidance.groups=3", "guidance.dense=/y"],
    [*BASE, "guidance=sgfm_code", "train.micro_batch=8"],
    [
        *BASE, "guidance=sidecar", "guidance.layout=/x", "guidance.channels=3", "guidance.width=5",
        "guidance.drop=0.2", "guidance.shuffle=0.5",
    ],
    [
        *BASE, "guidance=online", "guidance.groups=7", "guidance.level=patch", "guidance.prototype_width=5",
        "guidance.head_width=6", "guidance.layer=2", "guidance.pooling=attention", "guidance.noise_time=0.3",
        "guidance.view=training", "guidance.mask=[0.1,0.3]", "guidance.view_told=as_trained",
        "guidance.codes_over=all", "guidance.mean_over=all", "guidance.extraction_noise=training",
        "guidance.teacher_buffers=frozen", "guidance.told_rows=averaged", "guidance.untold=zero",
        "guidance.switch=0.25", "guidance.epsilon=0.07", "guidance.iterations=4", "guidance.queue=9",
        "guidance.temperature=0.2", "guidance.weight=0.5", "guidance.drop=0.3", "guidance.window=1234",
        "guidance.teacher_refresh=77",
    ],
    [*BASE, "guidance=labels", "guidance.drop=0.3"],
    [*BASE, "nodes=3", "cluster.gpus_per_node=4", "train.batch=384"],
    [*BASE, "nodes=3", "cluster.gpus_per_node=4", "train.batch=384", "train.micro_batch=16"],
    [
        *BASE, "train.images=1000", "train.batch=10", "train.learning_rate=1e-3", "train.warmup_images=7",
        "train.betas=[0.8,0.9]", "train.weight_decay=0.01", "train.clip=2.0", "train.ema_halflife=[3,4,5]",
        "train.ema_ramp=0.1",
    ],
    [
        *BASE, "train.log_every=11", "train.snapshot_every=12", "train.checkpoint_every=13",
        "train.keep_checkpoints=14", "engine.timeout_s=15", "runs=/elsewhere", "name=called", "follow=true",
        "data.root=/elsewhere", "data.threads=2", "data.decoders=3", "data.cache=/c", "data.cache_bytes=9",
    ],
    [
        *BASE, "engine.zero_stage=2", "engine.dtype=bf16", "engine.compile=true", "engine.channels_last=true",
        "engine.recompute=true",
    ],
    [
        *BASE, "path.name=ddpm", "path.sigma_min=1e-4", "path.betas=scaled_linear", "path.prediction=eps",
        "path.sigma_data=0.7", "path.weighting=uncertainty", "path.cosine=0.5", "path.time_density=log_normal",
        "path.time_mean=-1.2", "path.time_std=1.2", "path.uniform_after=0.75",
    ],
    [
        *BASE, "model=uvit_digits", "model.size=16", "model.channels=3", "model.learn_sigma=true",
        "model.cls_token=true", "model.patch=4", "model.width=24", "model.depth=3", "model.heads=3",
        "model.norm=rms", "model.mlp=swiglu", "model.rope=true", "model.qk_norm=true", "model.conv=true",
    ],
    [
        *BASE, "model=unet_digits", "model.base=8", "model.mult=[1,2]", "model.blocks=1", "model.attention=[1]",
        "model.groups=4", "model.dropout=0.1",
    ],
    [
        *BASE, "data.shape=[1,4,4]", "data.crop=true", "data.flip=true", "data.mix=[/a,/b]",
        "data.weights=[1.0,2.0,3.0]", "data.classes=5", "data.on_damage=substitute", "data.damaged=0.02",
    ],
    [*BASE, "data.damaged=0.5"],
    [*BASE, "init=snapshot", "init.path=/w", "init.labels=keep", "init.time=relearn"],
    [*BASE, "init=official", "init.path=/w.pt", "init.form=sit", "init.labels=keep", "init.time=relearn"],
]  # fmt: skip
# of these, what submit writes as config.yaml is kept
CONFIGS = [
    *([*BASE, f"guidance={name}"] for name in ("none", "labels", "online", "sidecar", "sgfm_code")),
    ["experiment=in1k_dit", "cluster=slurm", "cluster.environment.NCCL_DEBUG=INFO", "nodes=4"],
    ["experiment=digits_edm", "cluster=devcluster"],
    ["experiment=digits_uvit", "cluster=auto", "sampler=dopri5"],
    *SEVERAL,
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
    said = command([sys.executable, "-m", "launcher.submit", *words, "dry_run=true", "--json"])
    text = json.loads(said)["sbatch"]
    for path, name in ((sys.executable, "PYTHON"), (str(Path.cwd()), "HERE")):
        text = text.replace(path, name)
    return text


def manifest_hash(root: Path) -> str:
    """The hash of a data set's only manifest."""
    return (root / "LATEST").read_text().strip()


def sampled(run: Path, to: Path) -> Path:
    """The grid of 16 samples of the half-trained snapshot."""
    how = ["--count", "16", "--steps", "5", "--g", "1.5", "--out", str(to)]
    command([sys.executable, "-m", "tools.sample", str(run / "snapshots" / HALFWAY), *how])
    return to / "grid.png"


def kept(run: Path, to: Path, *, half: bool) -> None:
    """Copies a run folder less what only the living job needs; with `half` as it was when half of it was trained."""
    passing = (
        "code",
        "*.lock",
        "job*",
        "code.json",
        "start-*",
        "progress.json",
        "rendezvous.json",
        "watch*",
    )
    gone = (*passing, WHOLE, "exit-*.json") if half else (*passing, "checkpoints")
    shutil.copytree(run, to, ignore=shutil.ignore_patterns(*gone))


def write_tables() -> None:
    """What is composed and not run: identities, configs, batch scripts, and the documents' commands."""
    from tests.guard.test_commands import found

    table = {" ".join(words): identity_of(words) for words in settings()}
    ids = {words: {"id": digest(what), "identity": what} for words, what in table.items()}
    # a line a row, so that a change of one shows as one
    lines = [
        f"{json.dumps(words)}: {json.dumps(row, sort_keys=True)}" for words, row in ids.items()
    ]
    (FIXTURES / "ids.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (FIXTURES / "configs").mkdir()
    (FIXTURES / "configs.json").write_text(json.dumps([" ".join(c) for c in CONFIGS], indent=1))
    for number, words in enumerate(CONFIGS):
        (FIXTURES / "configs" / f"{number:02d}.yaml").write_text(to_yaml(compose(words)))
    for name, words in SCRIPTS.items():
        (FIXTURES / f"{name}.sh").write_text(script(words))
    (FIXTURES / "commands.json").write_text(json.dumps(found(), indent=1))


def main() -> None:
    """Writes everything anew."""
    parser = argparse.ArgumentParser(description="Replaces the fixtures by what this commit makes.")
    parser.add_argument(
        "--anew", action="store_true", required=True, help="the fixtures of before are deleted"
    )
    parser.parse_args()
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    write_tables()
    data = FIXTURES / "digits"
    command([sys.executable, "-m", "tools.shards", "make", "digits", "--out", str(data)])
    sidecar.write(
        FIXTURES / "sidecar",
        (np.arange(COUNT) % 10).astype(np.int32),
        manifest=manifest_hash(data),
        kind="id",
        groups=10,
        provenance={"made_by": "tests.guard.make", "saw_labels": False},
    )
    with tempfile.TemporaryDirectory() as folder:
        # configs that are kept name no place of whoever made them
        shutil.copytree(data, Path(folder) / "digits")
        runs = {name: train(name, Path(folder) / "runs", Path(folder) / "digits") for name in RUNS}
        hashes = {name: tensors_of(run) for name, run in runs.items()}
        (FIXTURES / "hashes.json").write_text(
            json.dumps({"where": where(), "runs": hashes}, indent=1)
        )
        for name in HALF:
            kept(runs[name], FIXTURES / name, half=True)
        kept(runs["scored"], FIXTURES / "scored", half=False)
        shutil.copy(
            sampled(FIXTURES / "zero1_online", Path(folder) / "samples"), FIXTURES / "samples.png"
        )


if __name__ == "__main__":
    main()
