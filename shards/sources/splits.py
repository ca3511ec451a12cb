"""Names of folders and files that say which split of a data set they hold, such as train-00000-of-00002 and val2017."""

from __future__ import annotations

import re
from collections.abc import Iterable

# words for a split, and the one that stands for those that mean the same
_WORDS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
    "dev": "dev",
    "eval": "eval",
    "extra": "extra",
    "unlabeled": "unlabeled",
}
# by itself between other words, as in seg_train, val2017, trainA and test-images; never in trained, nor in evaluate
_SPLIT = re.compile(rf"(?<![A-Za-z])(?i:{'|'.join(sorted(_WORDS, reverse=True))})(?![a-z])")


def meant(word: str) -> str:
    """The split that a word asks for: `val` and `validation` are one."""
    return _WORDS.get(word.lower(), word)


def split_of(name: str) -> str:
    """The split that a name says; empty where it says none."""
    found = _SPLIT.search(name)
    return meant(found[0]) if found else ""


def is_split(name: str) -> bool:
    """Whether the name is a word for a split, and nothing else."""
    return name.lower() in _WORDS


def apart(names: Iterable[str]) -> list[str]:
    """The names that differ in their splits alone, sorted: seg_train and seg_test, not crash_test and bullet_train."""
    alike: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        if found := _SPLIT.search(name):
            frame = f"{name[: found.start()]}*{name[found.end() :]}".lower()
            alike.setdefault(frame, {})[name] = meant(found[0])
    several = [splits for splits in alike.values() if len(set(splits.values())) > 1]
    return sorted(name for splits in several for name in splits)
