"""docs/reproduce.md, made of the table of rows: `python -m tools.reproduce page --out docs/reproduce.md`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from launcher.compose import Frames, compose
from selfguide.spec.metrics import METRICS
from selfguide.spec.published import DIFFERS, PAPERS, ROWS, Row, table, tables
from shards.sources.published_lists import LISTS, PublishedList
from tools.reproduce import steps
from tools.reproduce.cost import gpu_hours

_HEAD = """\
# Every table and figure of four papers

Somebody who read one of these papers finds its rows here: the experiment, its protocol, the published number, and the
commands from raw data to the row. `python -m tools.reproduce page --out docs/reproduce.md` makes this page of the table
of rows in `selfguide/spec/published`, and a test holds it to that.

    python -m tools.reproduce ls                              papers, and their tables
    python -m tools.reproduce ls sgdm table2                  the rows of one
    python -m tools.reproduce show sgdm table2 in32-self      every command of one row
    python -m tools.reproduce sgdm table2 --shrink digits     the whole table at toy size, to the board, in minutes

A row is an experiment with what is typed behind it. Typed exactly so, on any cluster, data root and seed, the run
expects the published number, and the board shows it beside ours; with any other setting of training, sampling or score
it expects none. The published numbers are the papers'; none of them has been reached here yet.

GPU-hours are those of an H100 at 40 % of its bf16 peak, from the FLOPs of the network alone, without evaluation.
`--only FILE` takes lists that are not shipped, a key or class a line. A file of one of these names must be that list:

{lists}

The others have no sha256 here: it would be that of a whole file, and we have held none of them whole, so a file of
their name must have as many lines. `voc12031.txt` is two published lists joined, and no published file.
"""
_TOY = """\
## Whole tables at toy size

With `--shrink digits` a row is trained on 1,797 handwritten digits of 8 x 8 pixels, by a network of its own form that a
CPU trains: its path, prediction, source of conditions, sampler and guidance stay, and of K groups the square root of K
are found. The score is `fd_digits`, the Frechet distance of 500 samples in a small digit net, and never FID: it says
that a row works from data to the board, and how rows stand to each other on digits, and nothing of the paper's numbers,
which stand beside it. The same command again goes on where it was ended; with `--figure FILE` it draws what is
finished, each row's samples and both numbers.
"""
# tables that were drawn so, and what is to be known of each
_PICTURES = {
    "sgdm table2": "`in64-...` repeat `in32-...`: the toy replaces all that they differ in. A row's condition has "
    "hardly been learned, and all draw nearly the same digits from the same noise.",
    "cedm table2": "CLIP's rows were not drawn; `labels-k100` repeats `labels-k20`, since digits have "
    "ten classes. The largest difference, of `kmeans-k100` and `temi-k200`, is 32 ± 13 by the standard errors of both.",
    "ddaepp table4": "`in100-...` repeat `tiny-...`. U-ViT still draws noise after 100 steps, and self-conditioning "
    "makes no difference yet.",
}
_DRAWN = """\
Three tables were drawn so at the default of 12,800 images, which are 100 steps of 128: with the code of commit e764a8d,
on 29 November 2026, on a two-core machine (AMD EPYC) that other work shared, where a row took 9 to 16 s of processor
time. To save their starts, the rows were trained one after the other in one process by the functions that the command's
jobs call. SGDM's table was then made again by the command itself, whole, with the code of commit 28a219b9 on another
machine of that kind: its picture is the same, with every number that is printed in it. A hundred steps show that each
row's path, groups, sampler and guidance work from data to a score, and no more: with one seed a row, the order of the
blue bars says nothing of the published one. `--images 128_000` trains ten times as long.
"""
_TABLE = "| row | command | published | GPU-hours | what differs, or lacks |\n|---|---|---|---|---|"


def _list(name: str, each: PublishedList) -> str:
    own = f", sha256 `{each.sha256}`" if each.sha256 else ""
    return f"- `{name}`: {each.what}, {each.lines:,} lines{own}: {each.place}"


def text(frames: Frames | None = None) -> str:
    """The page; `frames` as `launcher.compose.compose` takes them."""
    lists = "\n".join(_list(name, each) for name, each in LISTS.items())
    parts = [_HEAD.format(lists=lists), _TOY, _DRAWN, *map(_picture, _PICTURES)]
    frames = {} if frames is None else frames
    for paper, title in PAPERS.items():
        parts.append(f"## {title}\n")
        parts.append("\n".join(f"- {sentence}" for sentence in DIFFERS[paper]) + "\n")
        for name in tables(paper):
            parts.append(f"### {paper} {name}\n")
            parts.append(_commands(table(paper, name), frames))
    parts.append(_not_built())
    return "\n".join(parts)


def _picture(table_of: str) -> str:
    """A drawn table, under the command that draws it."""
    paper, name = table_of.split()
    file = f"reproduce-{paper}-{name}.png"
    command = f"    python -m tools.reproduce {table_of} --shrink digits --figure docs/{file}"
    alt = f"Rows of {table_of} at toy size: samples, published number and ours"
    return f"{command}\n\n![{alt}]({file})\n\n{_PICTURES[table_of]}\n"


def _commands(rows: Sequence[Row], frames: Frames) -> str:
    """What comes before the rows of a table, once, and the rows."""
    configs = {
        row.name: compose([*row.settings, "cluster=slurm"], frames) for row in rows if row.settings
    }
    wanted = {
        each.text: None
        for row in rows
        if row.name in configs and not row.lacks
        for each in steps.before(configs[row.name])
    }
    lines = [f"    {command}" for command in wanted]
    lines = [*lines, ""] if lines else []
    for row in rows:
        command = f"`{steps.training(row)}`" if row.settings else f"`{row.command}`"
        hours = f"{gpu_hours(configs[row.name]):,.0f}" if row.name in configs else ""
        if row.lacks:
            command, hours = (command if row.settings else "", hours)
        cells = (row.name, command.replace("|", "\\|"), published(row), hours, remarks(row))
        lines.append("| " + " | ".join(cells) + " |")
    at = next(number for number, line in enumerate(lines) if line.startswith("| "))
    return "\n".join([*lines[:at], _TABLE, *lines[at:]]) + "\n"


def published(row: Row) -> str:
    """Its numbers with their headings; accuracies in percent."""
    found = []
    for metric, value in row.numbers.items():
        percent = METRICS[metric].form == "percent"
        found.append(f"{METRICS[metric].heading} {100 * value if percent else value:g}")
    return ", ".join(found)


def remarks(row: Row) -> str:
    """What the row lacks, and what differs in it."""
    images = f"the snapshot at {row.images:,} images" if row.images else None
    lacks = f"**not yet**: {row.lacks}" if row.lacks else None
    return "; ".join(filter(None, (lacks, images, row.differs)))


def _not_built() -> str:
    """What no row can be had without, with the rows that wait for it."""
    lines = ["## What is not built\n"]
    waiting = sorted((row for row in ROWS if row.lacks), key=lambda row: str(row.lacks))
    for lacks, rows in itertools.groupby(waiting, key=lambda row: row.lacks):
        where = dict.fromkeys(f"{row.paper} {row.table}" for row in rows)
        lines.append(f"- {lacks}: {', '.join(where)}")
    return "\n".join(lines) + "\n"
