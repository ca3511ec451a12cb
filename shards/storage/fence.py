"""Which attempt may publish below a place, when several attempts work there one after the other.

Attempts have rising numbers. `end_attempts(place, n)` ends the right of every attempt below `n`; once it has returned,
nothing that they publish appears. Checking the number and publishing are one operation of the store: an attempt
prepares what it publishes where nobody sees it, a newer attempt removes what older ones have prepared, and only
what is still prepared can appear. `folder` and `s3` describe how each does it.
"""

from __future__ import annotations

from dataclasses import dataclass

MANIFEST = "MANIFEST.json"  # of a folder that is published as a whole
LEASES = (
    ".leases"  # a hidden folder of a place: what attempts have prepared, and which were overtaken
)


@dataclass(frozen=True)
class Fence:
    """The right of attempt `number` to publish below `place`, a folder or s3:// prefix."""

    place: str
    number: int
