"""groups.yaml: what it may hold, and what a name or a ban means."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfguide.sampling.group_names import FILE, Naming, read_naming
from selfguide.sampling.groups import sample_group_ids
from shards.errors import UserError


def written(folder: Path, text: str) -> Naming:
    (folder / FILE).write_text(text)
    return read_naming(folder, 12)


def test_names_and_bans_are_read(tmp_path: Path) -> None:
    naming = written(tmp_path, "names: {3: zeros, 11: sevens with a bar}\nbanned: [7, 3]\n")
    assert naming.number("zeros") == 3 and naming.number("sevens with a bar") == 11
    assert naming.number("5") == 5 and naming.number("-1") == -1  # the range is checked elsewhere
    assert naming.called(3) == "3 (zeros)" and naming.called(4) == "4"
    naming.refuse_banned([0, 1, 11])
    with pytest.raises(
        UserError, match=r"group 3 \(zeros\) is banned in .*groups.yaml; .*`banned`"
    ):
        naming.refuse_banned([0, 3])
    with pytest.raises(UserError, match=r"no group is called 'zeroes'.*did you mean 'zeros'"):
        naming.number("zeroes")


@pytest.mark.parametrize("text", [None, "", "names:\nbanned:\n", "names: {}\n"])
def test_nothing_said_is_nothing_named(tmp_path: Path, text: str | None) -> None:
    naming = read_naming(tmp_path, 12) if text is None else written(tmp_path, text)
    assert not naming.names and not naming.banned
    assert naming.allowed([0.25, 0.75]) == [0.25, 0.75]


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=12), st.data())
def test_banned_groups_are_never_drawn_and_the_others_keep_their_proportions(
    weights: list[float], data: st.DataObject
) -> None:
    p = [w / sum(weights) for w in weights]
    several = st.sets(st.integers(0, len(p) - 1), max_size=len(p) - 1)
    banned = frozenset(data.draw(several))
    allowed = Naming(groups=len(p), banned=banned).allowed(p)
    assert sum(allowed) == pytest.approx(1)
    kept = [k for k in range(len(p)) if k not in banned]
    for k in kept:
        assert allowed[k] / allowed[kept[0]] == pytest.approx(p[k] / p[kept[0]])
    drawn = sample_group_ids(allowed, 0, torch.arange(500))
    assert not banned & set(drawn.tolist())


def test_something_must_be_left_to_draw() -> None:
    with pytest.raises(UserError, match="every group that occurs is banned"):
        Naming(groups=3, banned=frozenset({0, 1})).allowed([0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: {3: zeros}", "unknown key 'name'; did you mean 'names'"),
        ("names: {12: zeros}", "group 12 is not one of 0 to 11"),
        ("names: {three: zeros}", "group 'three' is not one of 0 to 11"),
        ("banned: [-1]", "group -1 is not one of"),
        ("banned: [true]", "group True is not one of"),
        ("banned: 7", "banned=7 must be a list"),
        ("names: [zeros]", "must be a mapping"),
        ("names: {3: zeros, 4: zeros}", "groups 3 and 4 are both called 'zeros'"),
        ("names: {3: 7}", "the name 7 of group 3 must be a word"),
        ("names: {3: '7'}", "the name '7' of group 3 must be a word"),
        ("names: {3: no}", "put quotes"),
        ("names: {3: zeros", "is not YAML"),
        ("- 3", "give `names:` and `banned:`"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        written(tmp_path, text)
