"""The table of docs/faults.md: no cell is empty, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
FAULTS = (
    *("bit flip in header", "bit flip in payload", "truncation", "short 206", "early close"),
    *("503 storm", "ETag change", "expired token", "SIGKILL", "full disk"),
)
LAYERS = ("format", "storage", "cache", "writer")


def _rows() -> dict[str, list[list[str]]]:
    """The table of the page: of each fault, the tests of each layer."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [c.lower() for c in cells[0]] == ["fault", *LAYERS]
    return {row[0]: [re.findall(r"`([^`]+)`", cell) for cell in row[1:]] for row in cells[2:]}


def _tests(file: Path) -> tuple[set[str], set[str]]:
    """Names of the tests in a file, and all its strings, among which a parameter's name must be."""
    nodes = [*ast.walk(ast.parse(file.read_text()))]
    functions = {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {f for f in functions if f.startswith("test_")}, strings


def test_each_fault_has_tests_at_each_layer() -> None:
    rows = _rows()
    assert [*rows] == [*FAULTS]
    for fault, cells in rows.items():
        assert len(cells) == len(LAYERS)
        for layer, cell in zip(LAYERS, cells, strict=True):
            assert cell, f"no test of {fault} at {layer}"
            for name in cell:
                file, _, test = name.partition("::")
                test, _, parameter = test.rstrip("]").partition("[")
                known, strings = _tests(ROOT / "tests" / file)
                assert test in known, name
                assert not parameter or parameter in strings, name
