"""What a check of a site found: one line, with the cure where something is not well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "warning", "bad"]
# exit code of a command that found it
CODES: dict[Verdict, int] = {"ok": 0, "warning": 1, "bad": 2}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer of one check."""

    check: str
    verdict: Verdict
    text: str
    # what to do, as typed or asked for
    cure: str = ""
    # the numbers behind the text
    figures: Mapping[str, Any] = field(default_factory=dict)


def code(findings: Iterable[Finding]) -> int:
    """Returns the exit code of the worst."""
    return max((CODES[each.verdict] for each in findings), default=0)
