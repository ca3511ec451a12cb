"""`make emoji`: a small font of our own here; Debian's where this machine can fetch it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import PIL
import pytest

import shards
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.sources.emoji import OnWhite, emoji
from tests.shards.colour_font import picture, write_font, write_list
from tools.shards import debian
from tools.shards.__main__ import main
from tools.shards.make import EMOJI

RED, GLASS, BLUE, GREEN = (255, 0, 0, 255), (0, 0, 0, 128), (0, 0, 255, 255), (0, 128, 0, 255)
HEART, FACE, WAVE, FLAG, TONE = (
    (0x2764, 0xFE0F),
    (0x1F600,),
    (0x1F44B,),
    (0x1F1E9, 0x1F1EA),
    0x1F3FB,
)
LISTED = [
    ("Smileys & Emotion", "face-smiling", FACE, "fully-qualified", "grinning face"),
    ("Smileys & Emotion", "heart", HEART, "fully-qualified", "red heart"),
    ("Smileys & Emotion", "heart", HEART[:1], "unqualified", "red heart"),
    ("People & Body", "hand-fingers-open", WAVE, "fully-qualified", "waving hand"),
    ("People & Body", "hand-fingers-open", (*WAVE, TONE), "fully-qualified", "waving hand: light"),
    ("Component", "skin-tone", (TONE,), "component", "light skin tone"),
    ("Flags", "country-flag", FLAG, "fully-qualified", "flag: Germany"),
]  # fmt: skip
# of Debian's font at 32 pixels: all pixels in the order of keys, and the data set with Pillow 13.0.0
PIXELS = "14a44fd5a10c756f9272bd8b80c7f9eb6d919433fca06eb5c64883fd9cc564e4"
MANIFEST = "7953dc6b6e3238bdb80db3c4017fb7ccae6a892ed4664f66714a0925bb7240ac"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The options that name a font and a list."""
    pictures = {FACE[0]: picture(RED), HEART[0]: picture(GLASS), WAVE[0]: picture(BLUE)}
    font = write_font(tmp_path / "colour.ttf", pictures, {FLAG: picture(GREEN)})
    listed = write_list(tmp_path / "emoji-test.txt", LISTED)
    return ["--font", str(font), "--emoji-test", str(listed)]


def make(out: Path, *words: str) -> manifests.Manifest:
    assert main(["make", "emoji", "--out", str(out), *words]) == 0
    return manifests.load(out)


def test_make_emoji_gives_pictures_on_white_with_group_and_name(
    files: list[str], tmp_path: Path
) -> None:
    manifest = make(tmp_path / "out", *files, "--size", "16")
    assert manifest.count == 4 and manifest.model_shape == (3, 16, 16)
    assert manifest.plain["class_names"] == ["Smileys & Emotion", "People & Body", "Flags"]
    assert {"font_sha256", "emoji_test_sha256"} <= manifest.source.keys()
    found = shards.read_all(tmp_path / "out")
    expected = {
        "face-smiling/1f600": ((255, 0, 0), 0),
        "heart/2764-fe0f": ((127, 127, 127), 0),
        "hand-fingers-open/1f44b": ((0, 0, 255), 1),
        "country-flag/1f1e9-1f1ea": ((0, 128, 0), 2),
    }
    assert set(found["key"]) == expected.keys()
    for key, x, y in zip(found["key"], found["x"], found["y"], strict=True):
        colour, label = expected[key]
        assert np.array_equal(x, np.broadcast_to(np.array(colour)[:, None, None], (3, 16, 16)))
        assert y == label
    (tar,) = (tmp_path / "out" / "shards").glob("*.tar")
    with tarfile.open(tar) as opened:
        about = [json.load(opened.extractfile(m)) for m in opened if m.name.endswith(".json")]
    assert {a["codepoints"] for a in about} == {"1F600", "2764 FE0F", "1F44B", "1F1E9 1F1EA"}
    flag = next(a for a in about if a["group"] == "Flags")
    assert flag["name"] == "flag: Germany" and flag["subgroup"] == "country-flag"
    assert (flag["group_label"], flag["subgroup_label"]) == (2, 3)


def test_make_emoji_by_subgroup_is_another_data_set_of_the_same_pictures(
    files: list[str], tmp_path: Path
) -> None:
    group = make(tmp_path / "group", *files)
    subgroup = make(tmp_path / "subgroup", *files, "--label", "subgroup", "--layout", "blocks")
    assert (group.classes, subgroup.classes) == (3, 4) and group.hash != subgroup.hash
    one, other = (shards.read_all(tmp_path / name) for name in ("group", "subgroup"))
    assert np.array_equal(one["x"], other["x"]) and list(one["key"]) == list(other["key"])


def test_make_emoji_twice_gives_the_same_manifest(files: list[str], tmp_path: Path) -> None:
    assert make(tmp_path / "a", *files).hash == make(tmp_path / "b", *files).hash


def test_an_emoji_that_the_font_lacks_is_counted_and_named(
    files: list[str], tmp_path: Path
) -> None:
    lacking = [*LISTED, ("Flags", "flag", (0x1F3C1,), "fully-qualified", "chequered flag")]
    write_list(Path(files[3]), lacking)
    with pytest.raises(UserError, match="no picture"):
        main(["make", "emoji", "--out", str(tmp_path / "out"), *files])
    assert make(tmp_path / "out", *files, "--max-skipped", "1").count == 4
    assert "flag/1f3c1" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_what_is_no_list_or_no_colour_font_is_refused(files: list[str], tmp_path: Path) -> None:
    font, listed = files[1], files[3]
    plain = write_font(tmp_path / "plain.ttf", {FACE[0]: b""}, colour=False)
    empty = write_list(tmp_path / "empty.txt", [])
    for bad, of in (((listed, listed), "no font"), ((str(plain), listed), "CBDT"),
                    ((font, font), "line 1"), ((font, str(empty)), "lists no emoji"),
                    ((str(tmp_path / "none"), listed), "does not exist")):  # fmt: skip
        with pytest.raises(UserError, match=of):
            emoji(*bad, OnWhite())
    with pytest.raises(UserError, match="belong together"):
        main(["make", "emoji", "--out", str(tmp_path / "out"), "--font", font])


def test_without_apt_the_files_may_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"no apt-get.*--font"):
        main(["make", "emoji", "--out", str(tmp_path / "out")])


def test_a_package_of_another_sha256_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "apt-get").write_text(
        "#!/bin/sh\nfor a; do [ $a = download ] && echo x >p.deb; done; true\n"
    )
    (bin / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(bin))
    with pytest.raises(UserError, match="sha256"), debian.files(EMOJI, "give another"):
        pass
    assert not list((tmp_path / "cache").rglob("*.deb"))


@pytest.fixture(scope="session")
def noto() -> list[Path]:
    """Debian's font and list, of this machine's cache or its apt; skips where neither has them."""
    if shutil.which("apt-get") is None:
        pytest.skip("no apt-get on this machine to fetch Debian's font with")
    if not debian.cached(EMOJI):
        # asks for the index alone, and not for long: a machine without a network should not wait
        asked = [
            "apt-get",
            "-qq",
            "-oAcquire::Retries=0",
            "-oAcquire::http::Timeout=5",
            "--print-uris",
            "download",
        ]
        if subprocess.run([*asked, EMOJI[0].name], capture_output=True, check=False).returncode:
            pytest.skip("apt knows no package fonts-noto-color-emoji: no lists, or no network")
    try:
        with debian.files(EMOJI, "") as found:
            yield found
    except UserError as error:
        pytest.skip(f"Debian's font cannot be fetched here: {error}")


def test_debians_font_has_1870_emoji_in_9_groups_and_99_subgroups(
    noto: list[Path], tmp_path: Path
) -> None:
    words = ["--font", str(noto[0]), "--emoji-test", str(noto[1])]
    manifest = make(tmp_path / "out", *words)
    assert (manifest.count, manifest.classes, manifest.source["skipped"]) == (1870, 9, 0)
    histogram = manifest.plain["label_histogram"]
    assert histogram == [166, 363, 152, 133, 218, 85, 261, 223, 269]
    # halving by a box filter is whole arithmetic, the same in all versions of Pillow
    found = shards.read_all(tmp_path / "out")
    pixels = found["x"][np.argsort(found["key"])].tobytes()
    assert hashlib.sha256(pixels).hexdigest() == PIXELS
    # its version is a part of the rule, and what its zlib makes of pixels a part of the shards
    if PIL.__version__ == "13.0.0":
        assert manifest.hash == MANIFEST
