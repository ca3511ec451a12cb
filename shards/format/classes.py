"""Names of classes: their order, and the label that a name or a number stands for.

Numbers in names are sorted as numbers, so that folder 2 of 0 to 12 is label 2, and class_2 comes before class_10; all
else is sorted as text. A number never means another number in silence: where class '2' is not label 2, asking for 2 is
refused.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from shards.errors import UserError

NUMBER, NAME = "number:", "name:"


def ordered(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: as text, but as numbers where they hold such.

    Raises:
        UserError: two look alike, and differ only in how accents are composed.
    """
    found = sorted(set(names), key=_natural)
    seen: dict[str, str] = {}
    for name in found:
        other = seen.setdefault(_composed(name), name)
        if other != name:
            raise UserError(
                f"classes {other!a} and {name!a} look alike, for only their accents are composed "
                "otherwise: give both one name"
            )
    return found


def _natural(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """What a name is sorted by: every second part is a number, which may have more digits than Python reads."""
    parts = re.split(r"([0-9]+)", name)
    return [_digits(part) if at % 2 else part for at, part in enumerate(parts)], name


def _digits(number: str) -> tuple[int, str]:
    plain = number.lstrip("0")
    return len(plain), plain


def renumbered(names: Sequence[str]) -> str:
    """A line that says so where names are numbers and one of them has another label, else nothing."""
    for label, name in enumerate(names):
        if name.isdecimal() and name.isascii() and (name.lstrip("0") or "0") != str(label):
            return f"class {name!r} is label {label}: labels go from 0 to {len(names) - 1} without gaps"
    return ""


def label_of(text: str, names: Sequence[str], classes: int) -> int:
    """The label in [0, classes) that `text` asks for: a number, a class's name, `number:2` or `name:2`.

    Args:
        names: of the classes, by label; may be empty.

    Raises:
        UserError: no such class, or a number that is the name of a class of another number.
    """
    if text.startswith(NUMBER):
        return _number(text, text.removeprefix(NUMBER), classes)
    asked = text.removeprefix(NAME)
    labels = [label for label, name in enumerate(names) if name == asked]
    # macOS names files with accents that are characters of their own
    labels = labels or [i for i, name in enumerate(names) if _composed(name) == _composed(asked)]
    if len(labels) > 1:
        shown = ", ".join(f"{NUMBER}{label}" for label in labels)
        raise UserError(f"label {text!r} names {len(labels)} classes: give one of {shown}")
    if not labels and text.removeprefix("-").isdecimal():
        return _number(text, text, classes)
    if not labels:
        plain = {_letters(name): name for name in names}
        close = difflib.get_close_matches(_letters(asked), plain, n=1, cutoff=0.5)
        hint = f"; did you mean {plain[close[0]]!r}?" if close else ""
        known = f"a number from 0 to {classes - 1}" + (" or a class's name" if names else "")
        raise UserError(f"label {text!r} is no class of this data: give {known}{hint}")
    if text == asked and text.isdecimal() and int(text) != labels[0]:
        meant = f"{names[int(text)]!r}" if int(text) < len(names) else "no class"
        raise UserError(
            f"label {text}: the class called {text!r} is label {labels[0]}, and label {text} is {meant}: "
            f"give {NAME}{text} or {NUMBER}{text}"
        )
    return labels[0]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _letters(name: str) -> str:
    """In lower case and without accents."""
    apart = unicodedata.normalize("NFKD", name).casefold()
    return "".join(each for each in apart if not unicodedata.combining(each))


def _number(text: str, digits: str, classes: int) -> int:
    try:
        label = int(digits)
    except ValueError:
        raise UserError(f"label {text!r}: give a whole number, such as {NUMBER}2") from None
    if not 0 <= label < classes:
        raise UserError(f"label {text} is out of range: labels go from 0 to {classes - 1}")
    return label
