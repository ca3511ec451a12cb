"""What a submission would do, in numbers that need no network, no Slurm and no torch: the dry run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import backends, jobs
from launcher.folder import Attempt
from selfguide.spec.accumulation import cut_batch, node_counts
from selfguide.spec.config import Config
from selfguide.spec.files import plain, to_yaml
from selfguide.spec.lacks import Lack
from selfguide.spec.official import FORMS
from selfguide.spec.sizes import architecture, footprint

RUN_ID = "RUN-ID"  # a run is named by a hash that includes its data's, and a dry run reads no data


def facts(config: Config, lacks: Sequence[Lack] = ()) -> dict[str, Any]:
    """Everything a dry run tells, as JSON holds it; bytes, images and GFLOPs.

    Args:
        lacks: files that the run's evaluations will wait for.
    """
    net, size = architecture(config), footprint(config)
    batch, ranks = config.train.batch, config.ranks
    run_id = config.name or RUN_ID
    root = Path(config.runs).absolute() / config.experiment / run_id / "attempts" / "0001"
    jobs.check_limit(config, None)
    job = jobs.training(config, Attempt(root), run_id)
    forward, trained = 2 * net.forward_macs() / 1e9, 2 * net.training_macs() / 1e9
    memory = ("weights", "gradients", "optimiser", "ema", "teacher")
    return {
        "config": plain(config),
        "cluster": config.cluster.kind,
        "ranks": {"nodes": config.nodes, "per_node": config.cluster.gpus_per_node, "world": ranks},
        "batch": {
            "global": batch,
            "micro": config.micro_batch,
            "accumulation": batch // (ranks * config.micro_batch),
            "steps": config.train.images // batch,
        },
        "fewer_nodes": {
            nodes: cut_batch(config, nodes * config.cluster.gpus_per_node)._asdict()
            for nodes in node_counts(config)[:-1]
        },
        "parameters": size.parameters,
        "gflop": {
            "forward_image": forward,
            "image": 3 * trained,
            "step": 3 * trained * batch,
            "dense_image": 3 * forward,
        },
        "bytes_per_rank": {name: getattr(size, name) for name in memory} | {"total": size.rank},
        "checkpoint_bytes": size.checkpoint,
        "snapshot_bytes": size.snapshot,
        "init": {"source": config.init.source, "path": config.init.path, "checked": False},
        "data": {"root": config.data.root, "checked": False},
        "annotations": config.guidance.folders,
        "evaluation": {
            "protocol": config.evaluation.protocol,
            "samples": config.evaluation.samples,
            "waits_for": [lack.sentence for lack in lacks],
        },
        "sbatch": backends.of(config.cluster).script(job),
    }


def text(config: Config, lacks: Sequence[Lack] = ()) -> str:
    """The same for people."""
    found = facts(config, lacks)
    ranks, batch, gflop = found["ranks"], found["batch"], found["gflop"]
    memory = found["bytes_per_rank"]
    rows = [
        ("cluster", found["cluster"]),
        ("ranks", f"{ranks['world']} = {ranks['nodes']} nodes x {ranks['per_node']}"),
        (
            "global batch",
            f"{batch['global']} = {ranks['world']} ranks x {batch['micro']} (micro) "
            f"x {batch['accumulation']} (accumulation)",
        ),
        *(
            (f"  on {nodes} nodes", f"x {cut['micro_batch']} (micro) x {cut['accumulation']}")
            for nodes, cut in found["fewer_nodes"].items()
        ),
        ("steps", f"{batch['steps']:,} for {config.train.images:,} images"),
        ("parameters", f"{found['parameters']:,}"),
        (
            "compute",
            f"{gflop['image']:,.4g} GFLOP per image, {gflop['step']:,.4g} per step (backbone)",
        ),
        *(
            [("  without routing", f"{gflop['dense_image']:,.4g} GFLOP per image")]
            if gflop["dense_image"] != gflop["image"]
            else []
        ),
        ("memory per rank", f"{human(memory['total'])} without activations, of it"),
        *((f"  {name}", human(size)) for name, size in memory.items() if name != "total"),
        ("checkpoint", human(found["checkpoint_bytes"])),
        ("snapshot", human(found["snapshot_bytes"])),
        ("weights", _beginning(config)),
        ("data", f"{found['data']['root']} (not checked)"),
        *((field, f"{folder} (not checked)") for field, folder in found["annotations"].items()),
        ("evaluation", _scores(config)),
        *(("  waits for", lack.sentence) for lack in lacks),
    ]
    parts = [f"# config\n{to_yaml(config, unset=False)}"]
    if found["sbatch"]:
        parts.append(f"# sbatch script\n{found['sbatch']}")
    parts.append("# what it takes\n" + "\n".join(f"{name:<17}{value}" for name, value in rows))
    return "\n".join([*parts, "\ndry run: nothing was written, asked or queued"])


def _scores(config: Config) -> str:
    if len(config.scored_by) > 1:
        return "; ".join(map(_scores, config.scored_by))
    protocol = config.evaluation.protocol
    if protocol == "none":
        return protocol
    if protocol == "probe":
        times = ", ".join(f"{time:g}" for time in config.evaluation.noise_times)
        layers = ", ".join(config.evaluation.layers) or "all layers"
        return f"{protocol} of {layers} at noise-times {times} (not checked)"
    against = config.evaluation.shards or config.evaluation.reference
    where = f" against {against}" if against else ""
    return f"{protocol}, {config.evaluation.samples:,} samples{where} (not checked)"


def _beginning(config: Config) -> str:
    init = config.init
    if init.source == "scratch":
        return "fresh"
    of = f"published {FORMS[init.form].title}" if init.form else "snapshot"
    labels = "kept" if init.labels == "keep" else "dropped"
    return f"{of} {init.path} (not checked), its label table {labels}"


def human(size: float) -> str:
    """Bytes in the largest binary unit that leaves at least one."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while size >= 1024 and power < len(units) - 1:
        size, power = size / 1024, power + 1
    return f"{size:,.0f} {units[power]}" if power == 0 else f"{size:,.2f} {units[power]}"
