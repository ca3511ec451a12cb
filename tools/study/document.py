"""A report as blocks, which Markdown and HTML show alike; the HTML is one file that fetches nothing."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #d0d7de; padding: .3rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
code { font-size: .9em; overflow-wrap: anywhere; }
img { max-width: 100%; }
img.pixels { image-rendering: pixelated; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading of a report; level 1 is its title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of a report; what stands between backticks is code."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of the same columns, by their headings."""

    rows: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Picture:
    """A picture of a report, with the text that stands for it where it is not shown."""

    file: Path
    text: str
    # whether it is of few pixels, which are shown as squares when it is enlarged
    pixels: bool = False


Block = Heading | Paragraph | Table | Picture


def markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The report as Markdown that lies in `folder`, whose pictures are files beside it."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Picture(file, text, _):
            return f"![{text}]({file.relative_to(folder)})"
        case Table(rows):
            names = list(rows[0])
            cells = [[row[name].replace("|", "\\|") for name in names] for row in rows]
            return "\n".join(
                f"| {' | '.join(each)} |" for each in [names, ["---"] * len(names), *cells]
            )


def page(blocks: Sequence[Block], title: str) -> str:
    """The report as one HTML file: pictures are inline, and everything that is said is escaped."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            said = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
            return f"<p>{said}</p>"
        case Picture(file, text, pixels):
            data = base64.b64encode(file.read_bytes()).decode()
            kind = ' class="pixels"' if pixels else ""
            return f'<img{kind} alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
        case Table(rows):
            names = list(rows[0])
            head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
            lines = (
                "".join(f"<td>{html.escape(row[name])}</td>" for name in names) for row in rows
            )
            return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
