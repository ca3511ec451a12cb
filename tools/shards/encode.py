"""Encode a data set of images with an autoencoder, and write the latents as a data set of their own.

SOURCE is a folder or s3:// prefix of image shards that `make` or `index` wrote. Latents keep the order of their
images: ordinal i stays ordinal i, and `tools.annotate adopt` takes over annotations of the images. What is stored for
each image, with SD-VAE (f8, 4 channels) at 256 pixels and float16:

  --content moments  mean and log-variance, 16 KiB: every step samples anew, nothing is frozen (the default)
  --content sample   one sample drawn by --seed and ordinal, 8 KiB: every epoch sees the same one
  --content mean     the mean, 8 KiB: narrower than what a decoder was trained on
  --flips            also the latents of the mirror image, twice the bytes: training with mirrored images needs
                     them, because the mirror image of a latent is not the latent of the mirror image

The order of tars that `index` found is kept as well: if they are sorted by class, so are their latents. `make tars`
shuffles first.

Each worker process loads the network once, on a GPU of its own if there are several; more --workers than GPUs overlap
reading, encoding and writing. On CPUs each process uses one core. A killed encode continues when the same command
is run again, and loses at most one shard per process.

With --tasks N the work becomes an array of N jobs, on Slurm or on this machine, that need not run at the same time:
--cluster NAME [KEY=VALUE ...] are the launcher's cluster=NAME and cluster.KEY=VALUE. A task that dies only costs time.

examples:
  python -m tools.shards encode data/digits --encoder tiny --out data/digits-latents
  python -m tools.shards encode s3://data/in1k-256 --encoder sd_vae --workers 16 --out s3://data/in1k-sd
  python -m tools.shards encode data/in1k-256 --encoder va_vae --flips --out /scratch/in1k-va --tasks 8 \\
      --cluster slurm partition=gpu gpus_per_node=1 cpus_per_task=8
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.sites import takes_config_dir
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.format.manifest import Manifest
from shards.write.committing import find_existing
from shards.write.plan import Plan
from tools import flags
from tools.shards import report, sweep

if TYPE_CHECKING:
    from selfguide.data.autoencoders.encode import Task
    from selfguide.data.autoencoders.encoding import EncodedSource

UNIT = (
    0.5,
    2.0,
)  # range of sound standard deviations of what a model sees


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("source SOURCE", str, None, "folder or s3:// prefix of image shards"),
        (
            "--encoder NAME",
            str,
            flags.REQUIRED,
            "sd_vae, va_vae, tiny (for digits), or small (tools.vae fits it)",
        ),
        (
            "--weights PATH",
            str,
            None,
            "weights, a file or folder (default: SELFGUIDE_<NAME>, then the local hub cache)",
        ),
        (
            "--statistics PATH",
            str,
            None,
            "mean and std of va_vae's latents (default: beside its weights)",
        ),
        ("--content", str, "moments", "moments, sample or mean (default moments)"),
        ("--flips", bool, False, "also encode the mirror image"),
        ("--dtype", str, "float16", "float16 or float32 (default float16)"),
        (
            "--batch",
            int,
            32,
            "images in a batch of the encoder; the last bits may depend on it (default 32)",
        ),
        ("--seed", int, 0, "seed of --content sample (default 0)"),
        ("--workers", int, None, "worker processes (default: one per GPU, at least 1)"),
        ("--device", str, "auto", "cpu, cuda or cuda:N (default: a GPU if there is one)"),
    )
    array = parser.add_argument_group("as an array of jobs")
    flags.add(array, ("--tasks", int, None, "number of jobs that share the work; see above"))
    array.add_argument(
        "--cluster",
        nargs="+",
        metavar=("NAME", "KEY=VALUE"),
        help="slurm, devcluster, local or auto, and its settings (default auto)",
    )
    flags.add(
        array,
        ("--follow", bool, False, "wait until the jobs have ended"),
        ("--runs DIR", str, "runs", "folder of their logs (default runs)"),
    )
    takes_config_dir(array)
    report.add_out(parser)


def run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    # needs torch, for which the help of other verbs should not wait
    from selfguide.data.autoencoders.encode import encode, plan
    from selfguide.data.autoencoders.encoding import EncodedSource

    task, array = _task(options), options.tasks is not None or options.cluster
    # GPUs of jobs need not be here
    source = EncodedSource.of(task.source, task.encoding, "cpu" if array else task.device)
    planned = plan(task, source)
    if array:
        return _submit(options, task, planned)
    built = report.Counted("encoding shards")
    manifest, new = encode(task, source, watch=built)
    sweep.afterwards(options.out)
    _print_report(options, source, manifest, new, built.count, time.monotonic() - started)
    return 0


def _task(options: argparse.Namespace) -> Task:
    from selfguide.data.autoencoders.encode import Task
    from selfguide.data.autoencoders.encoding import Encoding

    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: give at least 1")
    names = ("encoder", "content", "flips", "dtype", "batch", "seed")
    encoding = Encoding(
        **{name: getattr(options, name) for name in names},
        weights=_file(options.weights),
        statistics=_file(options.statistics),
    )
    return Task(
        source=_absolute(options.source),
        out=_absolute(options.out),
        encoding=encoding,
        shard_bytes=report.shard_bytes(options),
        device=options.device,
        workers=options.workers,
        rank=options.rank,
        world=options.world,
    )


def _submit(options: argparse.Namespace, task: Task, planned: Plan) -> int:
    """The same by an array of jobs."""
    from launcher import array, attempt

    if options.rank or options.world > 1:
        raise UserError("--rank and --world with --tasks: tasks are the ranks; leave them out")
    if options.json and options.follow:
        raise UserError("--json with --follow: a stream is no JSON object; drop one of them")
    tasks = 1 if options.tasks is None else options.tasks
    if tasks < 1:
        raise UserError(f"--tasks {tasks}: give at least 1")
    name, *settings = options.cluster or ["auto"]
    cluster = array.cluster_of([f"cluster={name}", *(f"cluster.{text}" for text in settings)])
    found = find_existing(task.out)
    if found is not None:
        print(f"already there, nothing submitted: {report.line(found)} in {task.out}")
        return 0
    work = array.Work(
        kind="encode",
        id=manifests.digest({"plan": planned.hash, "out": task.out})[:12],
        function=attempt.encode,
        requests=[replace(task, rank=rank, world=tasks).plain() for rank in range(tasks)],
        counted=storage.join(task.out, "shards"),
        of=planned.shards,
    )
    folder, new = array.submit(work, cluster, Path(options.runs))
    if report.as_json(options, {"folder": str(folder), "submitted": new, **array.read(folder)}):
        return 0
    print(array.sentences(folder, new), flush=True)
    return array.follow(folder) if options.follow else 0


def _absolute(root: str) -> str:
    """Jobs start elsewhere."""
    return root if storage.is_remote(root) else str(Path(root).expanduser().absolute())


def _file(path: str | None) -> str | None:
    # not resolved: a hub cache links names to blobs, and the name says what kind of file it is
    return path and str(Path(path).expanduser().absolute())


def _print_report(
    options: argparse.Namespace,
    source: EncodedSource,
    manifest: Manifest,
    new: bool,
    built: int,
    seconds: float,
) -> None:
    stds = deviations(manifest)
    if options.json:
        facts: dict[str, Any] = {"root": options.out, "written": new, "shards_built": built}
        facts |= {"seconds": round(seconds, 3), "deviations_seen": stds}
        print(json.dumps({**facts, **report.summary(manifest)}))
        return
    print(report.written(manifest, options.out, new))
    coded = source.encoding
    forms = ", both mirror images" if coded.flips else ""
    rows = {
        "images": f"{source.root}, manifest {source.manifest.hash[:12]}",
        "encoder": f"{coded.encoder}, sha256 {str(source.sha256)[:12]}",
        "stored": f"{coded.content}{forms}, {coded.dtype}",
        "std a model sees": f"{min(stds):.3g} to {max(stds):.3g}",
        "shards built by this call": f"{built:,} of {len(manifest.shards):,}",
        "seconds": f"{seconds:,.1f}",
    }
    if built == len(manifest.shards):
        rows["images a second"] = f"{manifest.count / seconds:,.1f}"
    report.print_table(rows)
    if not UNIT[0] <= min(stds) <= max(stds) <= UNIT[1]:
        print(
            f"note: a model sees channels with standard deviations {min(stds):.3g} to {max(stds):.3g}, not about 1: "
            "these weights or statistics may be of other images"
        )


def deviations(manifest: Manifest) -> list[float]:
    """Standard deviation of each channel as a model sees it; of moments that of their means."""
    scale, channels = Header.of(manifest.header).scale, manifest.model_shape[0]
    scales = scale if isinstance(scale, tuple) else (scale,) * channels
    return [s * std for s, std in zip(scales, manifest.channel_std[:channels], strict=True)]
