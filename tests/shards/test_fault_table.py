"""The tables of docs/faults.md: no cell is empty, and every test that they name is there."""

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


def _tables() -> list[list[list[str]]]:
    """The cells of each table of the page, row by row, its heading first."""
    parts = [part for part in PAGE.read_text().split("\n\n") if part.startswith("|")]
    rows = [[line.strip("|").split("|") for line in part.splitlines()] for part in parts]
    return [[[cell.strip() for cell in row] for row in (head, *body)] for head, _, *body in rows]


def _names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _tests(file: Path) -> tuple[set[str], set[str]]:
    """Names of the tests in a file, and all its strings, among which a parameter's name must be."""
    nodes = [*ast.walk(ast.parse(file.read_text()))]
    functions = {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {f for f in functions if f.startswith("test_")}, strings


def test_each_fault_has_tests_at_each_layer() -> None:
    (head, *rows), _ = _tables()
    assert [cell.lower() for cell in head] == ["fault", *LAYERS]
    assert [row[0] for row in rows] == [*FAULTS]
    for fault, *cells in rows:
        for layer, cell in zip(LAYERS, cells, strict=True):
            assert _names(cell), f"no test of {fault} at {layer}"
            _check(_names(cell))


def test_each_fault_of_a_run_has_tests() -> None:
    _, (head, *rows) = _tables()
    assert head[-1] == "Tests"
    for fault, _, cell in rows:
        assert _names(cell), f"no test of {fault}"
        _check(_names(cell))


def _check(names: list[str]) -> None:
    for name in names:
        file, _, test = name.partition("::")
        test, _, parameter = test.rstrip("]").partition("[")
        known, strings = _tests(ROOT / "tests" / file)
        assert test in known, name
        assert not parameter or parameter in strings, name
