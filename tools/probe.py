"""How well each layer of a snapshot predicts labels at each noise-time, by a linear map and by nearest neighbours.

    python -m tools.probe RUN --preset probe_digits --figure probe.png
    python -m tools.probe RUN --root data/labelled --noise-times 0.1 0.2 --layers block_4 block_6
    python -m tools.probe RUN --over-images --ema 0 1 --pooling mean token --figure probes.png
    python -m launcher.submit experiment=NAME contrastive.weight=0.01 $(python -m tools.probe RUN --choose contrastive)

This is `evaluation=probe` by hand, with its settings and its numbers; what an evaluation of the run has measured with
the same settings is taken from its record. Labels are those of the run's shards, or of --root; a fifth of them is kept
to choose a layer and a noise-time on, and another one, or --test, to say how well these tell labels. Beside layers the
model's input itself is probed. --over-images probes every snapshot of the run, several averages and poolings each.
What is measured is kept in --out: a command that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import yaml

import configs
from selfguide.evaluation.metrics.probe import best_of
from selfguide.evaluation.probe import Probed, probe
from selfguide.snapshot import Snapshot
from selfguide.spec.averages import averages_of
from selfguide.spec.config import Config, EvaluationConfig, build
from selfguide.spec.config.laws import check
from selfguide.spec.find import find
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import Protocol, record_key, records_of
from selfguide.spec.run import RunFolder
from selfguide.spec.sizes import architecture
from selfguide.spec.uvit import UViTArchitecture
from selfguide.spec.validate import check_probe
from shards import cli
from shards.errors import UserError
from shards.format import manifest as manifests
from tools import flags
from tools.probe_report import Measured, plot, plot_all, show, show_all
from tools.sample_run import load_snapshot

PRESETS = ("probe", "probe_digits")
POOLINGS = ("mean", "cls", "token")
# what takes a layer, or a layer and a noise-time, in the words of `launcher.submit`
USES = ("contrastive", "guidance", "self_condition")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    poolings = options.pooling or [None]
    single = not options.over_images and len(options.ema) == len(poolings) == 1
    if options.choose and not single:
        raise UserError(
            f"--choose {options.choose} reads one probe; give one --ema and one --pooling, and no --over-images"
        )
    if options.over_images and options.images is not None:
        raise UserError(f"--images {options.images} with --over-images, which takes all; drop one")
    counts = [options.images]
    if options.over_images:
        counts = list(find(options.run, Path(options.runs)).published())
        if not counts:
            raise UserError(f"run {options.run} has published no snapshot yet")
    probes = [
        _measure(options, images, average, pooling)
        for images in counts
        for average in options.ema
        for pooling in poolings
    ]
    if single:
        _tell_one(probes[0], options)
        return 0
    if options.figure:
        plot_all(Path(options.figure), probes)
    if options.json:
        print(json.dumps({"run": options.run, "probes": [each.plain() for each in probes]}))
    else:
        show_all(probes)
    return 0


def _tell_one(probed: Measured, options: argparse.Namespace) -> None:
    found = probed.found
    if options.figure:
        plot(Path(options.figure), found.table)
    if options.choose:
        print(settings(probed, options.choose))
    elif options.json:
        about = {"snapshot": str(probed.snapshot), "scores": found.scores}
        print(json.dumps({**about, **found.table}))
    else:
        show(found)


def settings(probed: Measured, use: str) -> str:
    """What is typed to `launcher.submit` for a run that reads the layer and noise-time that the linear map chose.

    Raises:
        UserError: no layer that was probed can condition the network itself.
    """
    best = probed.found.table["linear_best"]
    if use == "self_condition":
        net = architecture(probed.config)
        if isinstance(net, UViTArchitecture):
            # its tokens read [CLS], whatever layer is best
            return "model.cls_token=true"
        # after the last layer there is none that could read it
        last = net.layers[-1].name
        cells = [cell for cell in probed.found.table["cells"] if cell["layer"] != last]
        if not cells:
            raise UserError(
                f"--choose self_condition: only {last} was probed, the network's last layer, which no later one could "
                "read; probe others as well: leave --layers out"
            )
        best = best_of(cells, "linear")
    layer, noise_time = best["layer"], best["noise_time"]
    if use == "guidance":
        # online guidance takes a layer by its number
        layer = architecture(probed.config).layer(layer)
    if use == "self_condition":
        return f"model.self_condition={layer}"
    # what was probed is read: experiments pool otherwise, unless every patch is in a group
    patches = getattr(probed.config.guidance, "level", "image") == "patch"
    pooled = "" if patches else f"guidance.pooling={probed.pooling}"
    if use == "contrastive":
        pooled = f"contrastive.feature={'cls' if probed.pooling == 'cls' else 'pooled'}"
    return f"{use}.layer={layer} {use}.noise_time={noise_time} {pooled}".rstrip()


def _measure(
    options: argparse.Namespace, images: int | None, average: int, pooling: str | None
) -> Measured:
    """The probe of one average of one snapshot, of features of one kind."""
    snapshot, folder = load_snapshot(options.run, options.runs, images, average)
    config = _config(snapshot, options, average, pooling)
    manifest = manifests.load(options.root or snapshot.data["root"]).hash
    protocol = Protocol.of(config, {"data": {"manifest": manifest}, "guidance": snapshot.guidance})
    found = _recorded(folder, snapshot, protocol)
    if found is None:
        flags.moved(snapshot.student, options.device)
        work = Path(options.out) / f"{protocol.key}-{snapshot.sha256[:12]}"
        found = probe(snapshot, config.evaluation, RankStatus(), work, root=options.root)
    assert found is not None
    name = str(averages_of(config)[average])
    return Measured(folder, snapshot.images, name, config.evaluation.pooling, found, config)


def _recorded(folder: Path, snapshot: Snapshot, protocol: Protocol) -> Probed | None:
    """What an evaluation of the snapshot's run has measured under the same protocol."""
    run = RunFolder(folder.resolve().parents[1])
    for record in records_of(run, record_key(snapshot.images, protocol)):
        if record.done and record.probe and record.snapshot_sha256 == snapshot.sha256:
            return Probed(dict(record.scores), dict(record.probe))
    return None


def _config(
    snapshot: Snapshot, options: argparse.Namespace, average: int, pooling: str | None
) -> Config:
    """The snapshot's config with the settings of its probe.

    Raises:
        UserError: a setting that is none, or that the snapshot does not have.
    """
    each = (by.evaluation for by in snapshot.config.scored_by)
    own = next((by for by in each if by.protocol == "probe"), None)
    if own is not None and options.preset is None:
        values = asdict(own)
    else:
        file = Path(configs.__file__).parent / "evaluation" / f"{options.preset or 'probe'}.yaml"
        values = yaml.safe_load(file.read_text())
    asked = {
        "layers": options.layers,
        "noise_times": options.noise_times,
        "pooling": pooling,
        "average": average,
        "passes": options.passes,
        "learning_rate": options.learning_rate,
        "batch": options.batch,
        "samples": options.samples,
        "seed": options.seed,
        "shards": options.test,
    }
    values |= {name: value for name, value in asked.items() if value is not None}
    if options.test:
        values["manifest"] = manifests.load(options.test).hash
    evaluation = build(EvaluationConfig, values, "evaluation")
    check(evaluation, "evaluation")
    if options.choose and evaluation.pooling == "token":
        raise UserError(
            f"--choose {options.choose} with features of one patch: what is chosen reads all patches of a layer, or "
            "[CLS]; give --pooling mean"
        )
    config = replace(snapshot.config, evaluation=evaluation)
    check_probe(config)
    return config


def _parser() -> argparse.ArgumentParser:
    return flags.command(
        "tools.probe",
        __doc__,
        ("run RUN", str, None, flags.RUN),
        flags.RUNS,
        ("--images N", int, None, "the run's snapshot at so many images (the newest)"),
        ("--ema I+", int, [0], "which averages (0)"),
        ("--over-images", bool, False, "all snapshots of the run"),
        (
            "--preset",
            PRESETS,
            None,
            "where settings come from that no flag gives (the run's own evaluation=probe, or probe)",
        ),
        ("--root SHARDS", str, None, "labelled shards, made as the run's own (its own)"),
        ("--test SHARDS", str, None, "labelled shards to test on (a fifth of the others)"),
        ("--layers NAME+", str, None, "by name, or by number from 1 (all)"),
        ("--noise-times TAU+", float, None, "0 is data, 1 is noise (the preset's)"),
        (
            "--pooling HOW+",
            POOLINGS,
            None,
            "a layer's tokens to one vector; token is one patch, drawn anew each time (the preset's)",
        ),
        ("--passes N", int, None, "over the training part (the preset's)"),
        (
            "--learning-rate LR",
            float,
            None,
            "the first one, which falls to 0 by a cosine (the preset's)",
        ),
        ("--batch N", int, None, "images of a step (the preset's)"),
        ("--samples N", int, None, "the most images to choose on, and to test on (the preset's)"),
        ("--seed N", int, None, "of parts, order and noise (the preset's)"),
        ("--device", str, "cpu", "cpu, or cuda (cpu)"),
        ("--out DIR", flags.here, ".probes", "where what is measured is kept (.probes)"),
        ("--figure FILE", str, None, "where to draw heat maps, or of several probes curves (none)"),
        (
            "--choose",
            USES,
            None,
            "print only the settings of this group for a run that reads the best layer and noise-time",
        ),
        flags.JSON,
    )


if __name__ == "__main__":
    cli.run(main)
