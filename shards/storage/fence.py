"""Which attempt may publish below a place, when several of them work there one after the other.

Attempts have rising numbers. `end_attempts(place, n)` ends the right of every attempt below `n`; when it returns,
nothing of theirs appears any more. The look at who is newest and the publishing are one operation of the
store: what is published is first prepared where nobody sees it, the newer attempt removes what older ones
have prepared, and only what is still there can appear. `folder` and `s3` each say how.
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
