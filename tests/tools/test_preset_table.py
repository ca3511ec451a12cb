"""docs/differences.md has a row for every preset that names a source, with a test that exists."""

from __future__ import annotations

import re
from fnmatch import fnmatch

import pytest

from selfguide.data.autoencoders.load import KNOWN
from selfguide.discovery.nets import VIEWS
from selfguide.discovery.stego import PRESETS
from selfguide.spec.corrections import CORRECTIONS, Correction
from selfguide.spec.sizes import TABLE
from tests.differences import PAGE, ROOT, Row, rows, sourceless
from tools.annotate.__main__ import VERBS

TEXT = PAGE.read_text()


def presets() -> list[str]:
    """Every preset that can be chosen by name."""
    found = [f"model={name}" for name in TABLE]
    for group in ("model", "path", "sampler", "guidance", "init", "augment"):
        found += [f"{group}={file.stem}" for file in (ROOT / "configs" / group).glob("*.yaml")]
    found += [f"annotate={verb}" for verb in VERBS] + [f"stego={name}" for name in PRESETS]
    return found + [f"view={name}" for name in VIEWS] + [f"autoencoder={n}" for n in KNOWN]


@pytest.mark.parametrize("preset", presets())
def test_a_preset_has_a_row_or_names_no_source(preset: str) -> None:
    of_source = any(fnmatch(preset, name) for row in rows(TEXT) for name in row.presets)
    assert of_source != (preset in sourceless(TEXT)), "in one of the two, and not in both"


@pytest.mark.parametrize("row", rows(TEXT), ids=lambda row: row.presets[0])
def test_a_row_stands_for_presets_and_names_tests_that_exist(row: Row) -> None:
    known = [*presets(), "vit=dino"]
    assert all(any(fnmatch(one, name) for one in known) for name in row.presets)
    assert re.match(r"\d\.\de-\d\d$|0\.0e\+00$|< 1e-\d+$|exact$|by tolerance$", row.error)
    assert row.tests
    for test in row.tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


@pytest.mark.parametrize("each", CORRECTIONS, ids=lambda each: f"{each.group}={each.name}")
def test_the_page_says_what_a_corrected_choice_was(each: Correction) -> None:
    assert all(f"{each.group}.{name}=" in TEXT for name in each.now)


def test_what_names_no_source_exists() -> None:
    assert set(sourceless(TEXT)) <= set(presets())
