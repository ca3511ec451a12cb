"""An atlas -> one HTML file that needs nothing else: pictures are inline, nothing runs, nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from selfguide.sampling.group_names import Naming
from tools.atlas.grouping import Grouping

EDGE = 64  # screen pixels of a picture; larger images are shrunk before they are carried


@dataclass(frozen=True)
class Picture:
    """One image as a data URI."""

    source: str
    text: str
    width: int
    height: int
    small: bool  # shown larger than it is


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """All that the page says; images are uint8 (C, H, W)."""

    title: str
    source: str
    facts: Sequence[tuple[str, str]]
    grouping: Grouping
    naming: Naming
    shown: Sequence[int]
    images: Mapping[int, Tensor]  # by ordinal
    samples: (
        Mapping[int, Tensor] | None
    )  # (count, C, H, W) of a group; None where nothing can be drawn


def render(atlas: Atlas) -> str:
    """The page as text; everything a user can name is escaped."""
    here, house = files("tools.atlas"), files("launcher.board")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (here / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.2f} %"
    style = "".join((at / "style.css").read_text(encoding="utf-8") for at in (house, here))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    bars = _bars(atlas)
    return environment.get_template("page.html").render(
        policy=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=Markup(style),
        title=atlas.title,
        source=atlas.source,
        facts=atlas.facts,
        measure=atlas.grouping.measure,
        samples=atlas.samples is not None,
        bars=bars,
        width=10 * len(bars),
        groups=[_group(atlas, group) for group in atlas.shown],
        hidden=len(bars) - len(atlas.shown),
    )


def _bars(atlas: Atlas) -> list[dict[str, object]]:
    p, naming = atlas.grouping.p, atlas.naming
    return [
        {
            "id": group,
            "called": naming.called(group),
            "shown": group in atlas.shown,
            "share": float(p[group]),
            "height": 118 * float(p[group] / p.max()),
            "banned": group in naming.banned,
        }
        for group in atlas.grouping.order
    ]


def _group(atlas: Atlas, group: int) -> dict[str, object]:
    grouping, naming = atlas.grouping, atlas.naming
    nearest = zip(grouping.nearest[group], grouping.closeness[group], strict=True)
    drawn = (atlas.samples or {}).get(group, ())
    return {
        "id": group,
        "called": naming.called(group),
        "name": naming.names.get(group),
        "banned": group in naming.banned,
        "share": float(grouping.p[group]),
        "images": int((grouping.ids == group).sum()),
        "nearest": [
            picture(atlas.images[int(ordinal)], f"image {ordinal}, {close:.3f}")
            for ordinal, close in nearest
        ],
        "samples": [
            picture(image, f"sample {i} of group {group}") for i, image in enumerate(drawn)
        ],
        "neighbours": [
            {
                "id": other,
                "called": naming.called(other),
                "cosine": cosine,
                "shown": other in atlas.shown,
            }
            for other, cosine in grouping.neighbours[group]
        ],
    }


def picture(image: Tensor, text: str) -> Picture:
    """uint8 (1 or 3, H, W) as a PNG of at most `EDGE` pixels, shown at `EDGE`."""
    plain = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    found = Image.fromarray(plain.numpy())
    small = max(found.size) < EDGE
    if not small:
        found.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    found.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    scale = EDGE / max(found.size)
    width, height = (round(edge * scale) for edge in found.size)
    return Picture(f"data:image/png;base64,{data}", text, width, height, small)
