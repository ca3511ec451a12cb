"""The images of `python -m tools.sample`, once its command line is read."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from selfguide.data.autoencoders import Autoencoder, load_autoencoder, to_images
from selfguide.diffusion.conditions import Condition
from selfguide.sampling import queries
from selfguide.sampling.generate import check_finite, generate_each
from selfguide.sampling.grid import write_grid
from selfguide.sampling.group_names import Naming, naming_of
from selfguide.snapshot import Snapshot, load
from selfguide.spec import recipe
from selfguide.spec.averages import averages_of
from selfguide.spec.config import SamplerConfig, build
from selfguide.spec.config.sampler import plain_sampler
from selfguide.spec.conventions import noise_shift, noise_time, total_weight
from selfguide.spec.find import find_snapshot
from selfguide.spec.run import RunFolder
from selfguide.trained import changed_sampler
from selfguide.training.engine.protocol import DTYPES
from shards import cli
from shards.errors import UserError
from shards.format.header import Header
from tools import flags, sample_beside, sample_grid, sample_options, sample_set
from tools.sample_chain import Chain
from tools.sample_condition import condition_of
from tools.sample_queries import of_queries


def run(options: argparse.Namespace) -> int:
    """Makes the images; `options` are those of `tools.sample_options`."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.grid:
        return grid(options)
    snapshot, folder = load_snapshot(options.run, options.runs, options.images, options.ema)
    if options.recipe:
        snapshot = with_recipe(snapshot, folder, options.recipe, options.ema)
    naming = naming_of(folder, snapshot)
    rank, world = sample_options.rank_of(options)
    options.device = sample_set.device_of(options.device, rank, world)
    flags.moved(snapshot.student, options.device, DTYPES[options.dtype])
    sampler = sampler_of(snapshot, options)
    if options.chain and sampler.name == "dopri5":
        raise UserError(
            "--chain with dopri5: it takes steps of its own; give --sampler euler or heun"
        )
    codec = autoencoder_of(snapshot.data["header"], options)
    condition = condition_of(snapshot, naming, codec, options)
    seeds = options.seed + torch.arange(len(condition))
    if options.between:
        seeds = seeds[:1].expand(len(condition))  # one noise, so that only the condition changes
    decided = {
        "snapshot": snapshot.sha256,
        "sampler": plain_sampler(sampler),
        "autoencoder": codec.sha256 if codec else None,
        **{name: getattr(options, name) for name in ("dtype", "batch", "npz")},
        "device": options.device.partition(":")[0],
    }
    out, wanted = Path(options.out), sample_set.request(condition, seeds, **decided)
    if options.npz:
        return export(snapshot, sampler, condition, seeds, codec, options, out, wanted, naming)
    chain = Chain(sampler.steps, options.columns) if options.chain else None
    x, evaluations = draw(
        snapshot, sampler, condition, seeds, options.batch, chain.see if chain else None
    )
    images = to_images(snapshot.data["header"], x, codec)
    sample_set.make_room(out, wanted)
    columns = None
    if chain is not None:
        columns = chain.states()
        if options.what == "x0":
            columns = chain.estimates(snapshot, sampler, condition, seeds, options.batch)
    _write_grid(out / "grid.png", snapshot, condition, images, columns, codec, options)
    write_images(out / "images", images)
    said = {"grid": str(out / "grid.png"), "images": str(out / "images")}
    _say(
        snapshot,
        sampler,
        naming,
        options,
        said | {"count": len(images), "nfe": evaluations, "request": wanted},
    )
    return 0


def _write_grid(
    file: Path,
    snapshot: Snapshot,
    condition: Condition,
    images: Tensor,
    chain: Tensor | None,
    codec: Autoencoder | None,
    options: argparse.Namespace,
) -> None:
    """The picture of a set: a row for each group, label or query that was named, or for each way from noise.

    `chain` (N, columns, C, H, W) is the way of each image, in model space.
    """
    header = snapshot.data["header"]
    rows = options.group or options.label or options.matched or options.row or options.like or []
    columns = options.columns if len(rows) < 2 else len(condition) // len(rows)
    sheet, columns = images, len(condition) if options.between else columns
    if chain is not None:
        sheet, columns = to_images(header, chain.flatten(0, 1), codec), chain.shape[1]
    if options.beside:
        queries = to_images(header, of_queries(snapshot, codec, options), codec)
        sheet, columns = sample_beside.sheet(condition, queries, images)
    shown = _first(len(sheet), len(rows) if chain is None else 0)
    # small images are shown larger: at least 64 screen pixels each
    zoom = max(1, 64 // sheet.shape[-1])
    columns = min(columns, len(shown) // len(rows)) if len(rows) > 1 and chain is None else columns
    write_grid(file, sheet[shown], columns=columns, zoom=zoom)


def grid(options: argparse.Namespace) -> int:
    """One noise a row, and what --grid varies from column to column; a condition is drawn anew for each run."""
    drawn = {}
    for name, each in sample_grid.columns(options):
        snapshot, folder = load_snapshot(each.run, each.runs, each.images, each.ema)
        flags.moved(snapshot.student, each.device, DTYPES[each.dtype])
        codec = autoencoder_of(snapshot.data["header"], each)
        condition = condition_of(snapshot, naming_of(folder, snapshot), codec, each)
        seeds = each.seed + torch.arange(len(condition))
        x, _ = draw(snapshot, sampler_of(snapshot, each), condition, seeds, each.batch)
        drawn[name] = to_images(snapshot.data["header"], x, codec)
    said = sample_grid.write(Path(options.out), [*drawn], [*drawn.values()])
    print(json.dumps(said) if options.json else f"{said['grid']}: {', '.join(drawn)}")
    return 0


def _first(count: int, rows: int) -> Tensor:
    """(n,) the images that a grid shows: all, or the first `sample_set.GRID`; of several rows the first of each."""
    numbers = torch.arange(count)
    if count <= sample_set.GRID:
        return numbers
    if rows < 2:
        return numbers[: sample_set.GRID]
    return numbers.view(rows, -1)[:, : max(1, sample_set.GRID // rows)].flatten()


def export(
    snapshot: Snapshot,
    sampler: SamplerConfig,
    condition: Condition,
    seeds: Tensor,
    codec: Autoencoder | None,
    options: argparse.Namespace,
    out: Path,
    wanted: str,
    naming: Naming,
) -> int:
    """This rank's share of `samples.npz`, and the file itself where it is the last."""
    rank, world = sample_options.rank_of(options)
    parts = sample_set.rows(out, wanted, len(seeds), options.batch)
    evaluations = 0

    def drawn(numbers: Tensor) -> Tensor:
        nonlocal evaluations
        part = condition.map(lambda tensor: tensor[numbers])
        x, took = draw(snapshot, sampler, part, seeds[numbers], options.batch)
        evaluations = max(evaluations, took)
        check_finite(x, int(numbers[0]))
        return to_images(snapshot.data["header"], x, codec)

    def finish(first: Tensor) -> None:
        zoom = max(1, 64 // first.shape[-1])
        write_grid(out / "grid.png", first, columns=options.columns, zoom=zoom)
        said = {"grid": str(out / "grid.png"), "npz": str(out / sample_set.NPZ)}
        count = {"count": len(seeds), "nfe": evaluations, "request": wanted}
        _say(snapshot, sampler, naming, options, said | count)

    if sample_set.holds(out, wanted):
        if options.json:
            print(json.dumps(json.loads((out / sample_set.SAID).read_text())))
        else:
            print(f"{out / sample_set.NPZ} holds these {len(seeds)} images already")
        return 0
    sample_set.fill(parts, drawn, options.batch, rank=rank, world=world)
    if not sample_set.publish(out, wanted, parts, condition.id, finish):
        # the last one's is the answer
        to = sys.stderr if options.json else sys.stdout
        print(f"rank {rank} is done; the last of {world} writes {out / sample_set.NPZ}", file=to)
    return 0


def _say(
    snapshot: Snapshot,
    sampler: SamplerConfig,
    naming: Naming,
    options: argparse.Namespace,
    made: dict[str, Any],
) -> None:
    """Writes sample.json, and says what was made."""
    said: dict[str, Any] = made | {
        "snapshot_images": snapshot.images,
        "snapshot_sha256": snapshot.sha256,
        "sampler": asdict(sampler),
        "seed": options.seed,
        "banned": sorted(naming.banned),
    }
    if options.label is not None:
        asked = queries.labels(snapshot, options.label).tolist()
        said["labels"] = [naming.called(label) for label in asked]
    (Path(options.out) / sample_set.SAID).write_text(json.dumps(said, indent=1))
    if options.json:
        print(json.dumps(said))
        return
    bans = f", without banned groups {', '.join(map(str, said['banned']))}"
    print(
        f"{said['count']} images from {snapshot.images:,} images seen, {sampler.name}, {said['nfe']} evaluations, "
        f"g={sampler.g:g}{bans if naming.banned else ''}\n{said.get('npz', said['grid'])}"
    )


def draw(
    snapshot: Snapshot,
    sampler: SamplerConfig,
    condition: Condition,
    seeds: Tensor,
    batch: int,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> tuple[Tensor, int]:
    """Model-space samples (N, C, H, W) of conditions and seeds, and the most evaluations that a batch took."""
    drawn = generate_each(snapshot, sampler, condition, seeds, batch=batch, callback=callback)
    total = -(-len(seeds) // batch)
    made = list(cli.track(drawn, total, f"sampling {len(seeds)} images"))
    return torch.cat([x for x, _ in made]), max(evaluations for _, evaluations in made)


def load_snapshot(
    name: str, runs: str, images: int | None = None, ema: int = 0
) -> tuple[Snapshot, Path]:
    """The snapshot named on the command line, with one of its averages, and its folder.

    `name` is a snapshot's folder, or a run, of which the newest is taken, or the one at so many images seen.

    Raises:
        UserError: there is no such run, snapshot or average, or the snapshot is damaged.
    """
    folder = find_snapshot(name, Path(runs), images, ema)
    try:
        snapshot = load(folder, ema)
    except FileNotFoundError as error:
        raise UserError(
            f"{error}: it was not published to its end, or was damaged since"
        ) from error
    return snapshot, folder


def load_scored(name: str, runs: str) -> tuple[Snapshot, Path]:
    """The same with the average that its run's evaluation scores."""
    snapshot, folder = load_snapshot(name, runs)
    average = snapshot.config.evaluation.average
    return load_snapshot(str(folder), runs, ema=average) if average else (snapshot, folder)


def with_recipe(snapshot: Snapshot, folder: Path, metric: str, ema: int | None = None) -> Snapshot:
    """The snapshot with the average and, as its run's own, the sampler that sweeps chose for it by this metric.

    Raises:
        UserError: no sweep of this snapshot chose any, or one with another average than `ema`.
    """
    fronts = recipe.read(RunFolder(folder.resolve().parents[1]))
    known = [front for front in fronts if front.images == snapshot.images]
    # the most samples come first
    front = next((front for front in known if front.metric == metric), None)
    if front is None:
        metrics = ", ".join(sorted({front.metric for front in known})) or "none"
        run = shlex.quote(str(folder.resolve().parents[1]))
        raise UserError(
            f"--recipe {metric}: recipes of this snapshot are by {metrics}; `python -m launcher.evaluate {run} "
            "sampler.g=1,1.5,2 sampler.steps=10,20` makes one"
        )
    averages = [average.plain for average in averages_of(snapshot.config)]
    index = averages.index(front.recipe.average)
    if ema and ema != index:
        raise UserError(f"--ema {ema}: the recipe has average {index}; drop one of them")
    sampler = build(SamplerConfig, dict(front.recipe.sampler), "sampler")
    found = load(folder, index)
    return replace(found, config=replace(found.config, sampler=sampler))


def sampler_of(snapshot: Snapshot, options: argparse.Namespace) -> SamplerConfig:
    """The run's own sampler with what the command line changes of it."""
    flag_of = {f.name: f.name for f in fields(SamplerConfig)} | {"name": "sampler"}
    asked = {name: getattr(options, flag) for name, flag in flag_of.items()}
    changes = {name: value for name, value in asked.items() if value is not None}
    if options.convention:
        changes |= converted(options.convention, changes)
    try:
        return changed_sampler(snapshot, changes)
    except UserError as error:
        # fields and cures under the names that this command line has for them
        said = re.sub(
            rf"\bsampler\.({'|'.join(flag_of)})\b(=?)",
            lambda key: f"--{flag_of[key[1]].replace('_', '-')}{' ' if key[2] else ''}",
            str(error),
        )
        raise UserError(said) from error


def converted(source: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The weight, interval and shift among `changes` from a paper's numbers to ours."""
    converters: dict[str, Callable[[str, Any], Any]] = {
        "g": total_weight,
        "interval": lambda source, ends: tuple(sorted(noise_time(source, end) for end in ends)),
        "shift": noise_shift,
    }
    ours = {n: convert(source, changes[n]) for n, convert in converters.items() if n in changes}
    if not ours:
        raise UserError(
            f"--convention {source} has nothing to convert: give --g, --interval or --shift"
        )
    return ours


def autoencoder_of(
    header: Header | Mapping[str, Any], options: argparse.Namespace
) -> Autoencoder | None:
    """What decodes data of this header, or the autoencoder that was asked for; None for images."""
    header = Header.of(header)
    if header.kind == "image":
        return None
    name = options.autoencoder or str(header.encoder)
    return load_autoencoder(name, options.weights, device=options.device)


def write_images(folder: Path, images: Tensor) -> None:
    """uint8 (N, C, H, W) as one lossless PNG each, named by its number; those of an earlier set go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]" * 6 + ".png"):
        old.unlink()
    for number, image in enumerate(images):
        plain = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(plain.numpy()).save(folder / f"{number:06d}.png")
