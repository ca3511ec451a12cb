"""The table of presets in docs/differences.md: what it says, and errors that its tests measure.

python -m tests.differences     runs the tests that it names and writes what they measured into it
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "differences.md"
BEGINS, NONE = "| preset | source |", "These name no source: "
_QUOTED = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    presets: tuple[str, ...]  # such as path=vp; with * for several
    error: str
    tests: tuple[str, ...]  # file::name below tests/


def rows(text: str) -> list[Row]:
    """The table's lines in order."""
    table = text[text.index(BEGINS) :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [
        Row(tuple(_QUOTED.findall(first)), error, tuple(_QUOTED.findall(tests)))
        for first, _, _, error, tests in cells
    ]


def sourceless(text: str) -> list[str]:
    """The presets that are said to name no source."""
    return _QUOTED.findall(text[text.index(NONE) :].partition("\n\n")[0])


def measured(tests: list[str]) -> dict[str, float]:
    """The largest error of each test that measures one, over its parameters."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        asked = [f"tests/{test}" for test in tests]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-o",
            "junit_family=legacy",
            f"--junitxml={report}",
            *asked,
        ]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ)
        cases = ET.parse(report).iter("testcase")
        errors: dict[str, float] = {}
        for case in cases:
            name = case.attrib["name"].partition("[")[0]
            for each in case.iter("property"):
                if each.attrib["name"] == "error":
                    errors[name] = max(errors.get(name, 0.0), float(each.attrib["value"]))
    return errors


def main() -> int:
    text = PAGE.read_text()
    table = rows(text)
    measure = sorted({test for row in table for test in row.tests if _measures(test)})
    errors = measured(measure)
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(BEGINS)) + 2
    for number, row in enumerate(table, start=first):
        found = [errors[test.partition("::")[2]] for test in row.tests if test in measure]
        if found:
            cells = lines[number].split("|")
            cells[4] = f" {max(found):.1e} "
            lines[number] = "|".join(cells)
    PAGE.write_text("\n".join(lines) + "\n")
    return 0


def _measures(test: str) -> bool:
    """Whether the test takes the fixture that keeps an error."""
    file, _, name = test.partition("::")
    found = re.search(rf"def {name}\((.*?)\)", (ROOT / "tests" / file).read_text(), re.S)
    return found is not None and "agree" in found[1]


if __name__ == "__main__":
    sys.exit(main())
