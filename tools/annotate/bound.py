"""The most groups worth separating: TEMI with K doubled until too few are used, then a finer grid (C-EDM 3.3).

  python -m tools.annotate bound data/digits --features notes/features --start 8 --out notes/bound
  python -m tools.annotate bound data/digits --features notes/features --beta 1 --over 50 100 200 --out notes/lower

Each fit stays in <out>/groups-<K>, an annotation as any other, so the one that serves a generative model best needs no
other fit; a killed search goes on where it was. <out>/bound.png shows the share of groups used over K, and
<out>/bound.json says the same. With --over it is the lower bound that is drawn, the groups that fits with --beta 1 use
whatever K is, with their mean and deviation (appendix C.2).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from selfguide.discovery import bound
from selfguide.discovery.corrected import plain
from selfguide.discovery.temi import TemiConfig
from shards import sidecar, storage
from shards.errors import UserError
from shards.format import manifest as manifests
from tools import drawing, flags
from tools.annotate.features import add_source, features_of
from tools.annotate.temi import add_settings, annotate, as_fit_was_begun, config_of


def add(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    flags.add(
        parser.add_argument_group("of the search"),
        ("--alpha", float, 0.96, "share of groups in use that is enough (0.96)"),
        ("--start K", int, 16, "the first K (16)"),
        ("--finer N", int, 3, "K between the last two doublings (3)"),
        (
            "--over K+",
            int,
            None,
            "the lower bound in place of a search: with --beta 1, a fit of each K",
        ),
    )
    add_settings(parser)
    flags.add(parser, ("--out DIR", flags.here, flags.REQUIRED, "folder of fits and picture"))


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    out, count = Path(options.out), manifests.load(options.root).count
    settings = {n: getattr(options, n) for n in ("alpha", "start", "finer")} | {"limit": count}
    wanted = options.over or [options.start]
    if options.over:
        _check_over(options, count)
    else:
        bound.check(**settings)
    for groups in wanted:
        config_of(options, groups).check(count)
    features = features_of(options)
    partial = out / ".partial"

    def folder_of(groups: int) -> Path:
        return out / f"groups-{groups:05d}"

    # one search is made of one kind of fits: the first tells under which settings it was begun
    first = as_fit_was_begun(
        config_of(options, min(wanted)),
        features,
        partial,
        options,
        lambda config: _holds(folder_of(min(wanted)), config, features),
    )

    def used(groups: int) -> int:
        config, folder = replace(first, groups=groups), folder_of(groups)
        found = _finished(folder, config, features)
        found = found or annotate(features, config, folder, partial, options)
        return int(found.provenance["used"])

    if options.over:
        facts, lines = _lower(bound.lower(used, options.over, limit=count), out, count)
    else:
        facts, lines = _upper(bound.search(used, **settings), out, count)
    facts |= {"out": str(out)}
    storage.publish(out / "bound.json", json.dumps(facts, indent=1).encode(), replace=True)
    shutil.rmtree(partial, ignore_errors=True)
    return facts, "\n".join([*lines, str(out / "bound.png")])


def _check_over(options: argparse.Namespace, count: int) -> None:
    """
    Raises:
        UserError: K that make no mean, or another exponent than the lower bound's.
    """
    bound.check_over(options.over, limit=count)
    if options.beta != 1:
        raise UserError(
            f"--over with --beta {options.beta:g}: the lower bound is what fits use without the exponent; give --beta 1"
        )


def _upper(search: bound.Search, out: Path, count: int) -> tuple[dict[str, Any], list[str]]:
    """What a search came to, drawn, as facts and as lines."""
    plot(search, out / "bound.png", f"Groups that TEMI separates in {count:,} images")
    facts = {
        "bound": search.bound,
        "open": search.open,
        "alpha": search.alpha,
        "points": [{**asdict(p), "ratio": p.ratio} for p in search.points],
    }
    lines = _table(search.points)
    if search.bound is None:
        lines.append(f"fewer than {search.start} groups are separated: give a smaller --start")
    elif search.open:
        lines.append(f"bound: at least {search.bound}, which is as far as the images go")
    else:
        lines.append(f"bound: {search.bound} groups at alpha {search.alpha:g}")
    return facts, lines


def _lower(found: bound.Lower, out: Path, count: int) -> tuple[dict[str, Any], list[str]]:
    """The same of a lower bound."""
    plot_lower(found, out / "bound.png", f"Groups in use without the exponent, {count:,} images")
    facts = {
        "lower": found.mean,
        "deviation": found.deviation,
        "points": [{**asdict(p), "ratio": p.ratio} for p in found.points],
    }
    said = f"lower bound: {found.mean:.1f} groups, deviation {found.deviation:.1f} over {len(found.points)} K"
    return facts, [*_table(found.points), said]


def _table(points: Sequence[bound.Point]) -> list[str]:
    lines = [f"{'groups':>7} {'used':>7} {'share':>7}"]
    return [*lines, *(f"{p.groups:7} {p.used:7} {p.ratio:7.1%}" for p in points)]


def _finished(
    folder: Path, config: TemiConfig, features: sidecar.Sidecar
) -> sidecar.Sidecar | None:
    """The fit that is in `folder` already.

    Raises:
        UserError: it has other settings, or other features.
    """
    if not (folder / storage.MANIFEST).exists():
        return None
    if not _holds(folder, config, features):
        raise UserError(
            f"{folder} holds a fit with other settings or features; name another --out, or remove it"
        )
    return sidecar.read(folder, manifest=features.manifest)


def _holds(folder: Path, config: TemiConfig, features: sidecar.Sidecar) -> bool:
    """Whether a fit of these settings to these features is published there."""
    if not (folder / storage.MANIFEST).exists():
        return False
    said = sidecar.read(folder, manifest=features.manifest).provenance
    settings, read = said.get("temi"), said["features"]["rows_sha256"]
    return bool(settings == plain(config) and read == features.sha256)


def plot(found: bound.Search, file: Path, title: str) -> None:
    """The ratio over K with the threshold and the bound."""
    from matplotlib.ticker import NullLocator, PercentFormatter

    groups = [p.groups for p in found.points]
    with drawing.figure(file, 1, 1, size=(7, 3.6)) as (_, [[axes]]):
        axes.plot(groups, [p.ratio for p in found.points], "o-", color="#4c78a8", markersize=5)
        axes.axhline(found.alpha, color="#888888", linestyle="--", linewidth=1)
        axes.annotate(
            f"alpha = {found.alpha:g}", (groups[0], found.alpha), (0, -12), textcoords="offset points",
            color="#666666", fontsize=9,
        )  # fmt: skip
        if found.bound is not None:
            axes.axvline(found.bound, color="#e45756", linewidth=1)
            axes.annotate(
                f"bound {'at least ' if found.open else ''}{found.bound}", (found.bound, 0), (-4, 6),
                xycoords=("data", "axes fraction"), textcoords="offset points", color="#e45756", ha="right",
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(groups, [str(g) for g in groups], rotation=45, fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(xlabel="groups K", ylabel="share of groups used, r", title=title)
        drawing.open_frame(axes)


def plot_lower(found: bound.Lower, file: Path, title: str) -> None:
    """Groups in use over K, with their mean and the band of one deviation around it."""
    with drawing.figure(file, 1, 1, size=(7, 3.6)) as (_, [[axes]]):
        groups = [p.groups for p in found.points]
        axes.plot(groups, [p.used for p in found.points], "o-", color="#4c78a8", markersize=5)
        axes.axhline(found.mean, color="#e45756", linewidth=1)
        low, high = found.mean - found.deviation, found.mean + found.deviation
        axes.axhspan(low, high, color="#e45756", alpha=0.12, linewidth=0)
        axes.annotate(
            f"{found.mean:.1f} ± {found.deviation:.1f}", (groups[0], found.mean), (0, 5),
            textcoords="offset points", color="#e45756", fontsize=9,
        )  # fmt: skip
        axes.set(xlabel="groups K", ylabel="groups used", title=title, ylim=(0, None))
        drawing.open_frame(axes)
