"""Names of classes: their order, and what a user's text asks for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.format.classes import label_of, ordered, renumbered


@given(st.integers(1, 300))
def test_ordered_numbers_from_0_have_themselves_as_labels(count: int) -> None:
    names = ordered(str(i) for i in range(count))
    assert names == [str(i) for i in range(count)] and renumbered(names) == ""
    assert all(label_of(name, names, count) == int(name) for name in names)


@given(st.sets(st.integers(0, 999), min_size=1, max_size=20))
def test_label_of_a_number_never_means_another_one(numbers: set[int]) -> None:
    names = ordered(map(str, numbers))
    assert [int(name) for name in names] == sorted(numbers)
    assert (renumbered(names) == "") == (sorted(numbers) == [*range(len(numbers))])
    for label, name in enumerate(names):
        assert label_of(f"name:{name}", names, len(names)) == label
        assert label_of(f"number:{label}", names, len(names)) == label
        if int(name) != label:
            with pytest.raises(UserError):
                label_of(name, names, len(names))


@given(st.sets(st.text(st.characters(categories=["L"]), min_size=1), min_size=1, max_size=9))
def test_ordered_words_are_sorted_as_text(words: set[str]) -> None:
    names = ordered(words)
    assert names == sorted(words)
    assert [label_of(name, names, len(names)) for name in names] == [*range(len(names))]


@pytest.mark.parametrize("text", ["flag", "-1", "3", "name:2", "number:3", "number:x", "", "1.0"])
def test_label_of_what_is_no_class_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        label_of(text, ["cat", "dog", "flags"], 3)


def test_label_of_a_name_two_classes_have_is_refused() -> None:
    with pytest.raises(UserError, match="number:0, number:1"):
        label_of("crane", ["crane", "crane"], 2)


@pytest.mark.parametrize(("text", "label"), [("flags", 2), ("2", 2), ("name:flags", 2)])
def test_label_of_a_name_or_number_is_the_class(text: str, label: int) -> None:
    assert label_of(text, ["cat", "dog", "flags"], 3) == label


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("Flags", "flags"),
        ("flag", "flags"),
        ("SEA BASS", "sea bass"),
        ("ete", "\u00e9t\u00e9"),
        ("dg", "dog"),
    ],
)
def test_label_of_a_near_miss_names_the_class(typed: str, meant: str) -> None:
    with pytest.raises(UserError) as refused:
        label_of(typed, ["dog", "flags", "sea bass", "\u00e9t\u00e9"], 4)
    assert str(refused.value).endswith(f"did you mean {meant!r}?")


@pytest.mark.parametrize("typed", ["\u00e9t\u00e9", "e\u0301te\u0301", "name:\u00e9t\u00e9"])
@pytest.mark.parametrize("stored", ["\u00e9t\u00e9", "e\u0301te\u0301"])
def test_label_of_accents_is_the_class_however_they_are_encoded(typed: str, stored: str) -> None:
    assert label_of(typed, ["dog", stored], 2) == 1
    # where both are classes, each is its own
    assert label_of("\u00e9t\u00e9", ["\u00e9t\u00e9", "e\u0301te\u0301"], 2) == 0
    assert label_of("e\u0301te\u0301", ["\u00e9t\u00e9", "e\u0301te\u0301"], 2) == 1
