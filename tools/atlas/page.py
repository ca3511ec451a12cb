"""An atlas -> one HTML file that needs nothing else: pictures are inline, nothing runs, nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files

import jinja2
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from selfguide.sampling.group_names import Naming
from tools.atlas.grouping import Grouping

EDGE = 64  # screen pixels of a picture; larger images are shrunk before they are carried


def render(
    *,
    title: str,
    source: str,
    facts: Sequence[tuple[str, str]],
    grouping: Grouping,
    naming: Naming,
    shown: Sequence[int],
    images: Mapping[int, Tensor],
    samples: Mapping[int, Tensor] | None,
) -> str:
    """The page as text; everything a user can name is escaped.

    Args:
        shown: the groups that are shown in full.
        images: uint8 (C, H, W) by ordinal, of all that are nearest to a group shown.
        samples: uint8 (count, C, H, W) by group; None where nothing can be drawn.
    """
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
    p = grouping.p
    bars = [
        {
            "id": group,
            "called": naming.called(group),
            "shown": group in shown,
            "share": float(p[group]),
            "height": 118 * float(p[group] / p.max()),
            "banned": group in naming.banned,
        }
        for group in grouping.order
    ]

    def group_of(group: int) -> dict[str, object]:
        nearest = zip(grouping.nearest[group], grouping.closeness[group], strict=True)
        drawn = (samples or {}).get(group, ())
        return {
            "id": group,
            "called": naming.called(group),
            "name": naming.names.get(group),
            "banned": group in naming.banned,
            "share": float(p[group]),
            "images": int((grouping.ids == group).sum()),
            "nearest": [picture(images[int(o)], f"image {o}, {close:.3f}") for o, close in nearest],
            "samples": [picture(x, f"sample {i} of group {group}") for i, x in enumerate(drawn)],
            "neighbours": [
                {
                    "id": other,
                    "called": naming.called(other),
                    "cosine": cosine,
                    "shown": other in shown,
                }
                for other, cosine in grouping.neighbours[group]
            ],
        }

    return environment.get_template("page.html").render(
        policy=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=Markup(style),
        title=title,
        source=source,
        facts=facts,
        measure=grouping.measure,
        samples=samples is not None,
        bars=bars,
        width=10 * len(bars),
        groups=[group_of(group) for group in shown],
        hidden=len(bars) - len(shown),
    )


def picture(image: Tensor, text: str) -> dict[str, object]:
    """uint8 (1 or 3, H, W) as a PNG of at most `EDGE` pixels in a data URI, shown at `EDGE`."""
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
    source = f"data:image/png;base64,{data}"
    return {"source": source, "text": text, "width": width, "height": height, "small": small}
