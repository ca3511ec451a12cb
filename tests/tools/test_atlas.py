"""The atlas of a trained run and of annotations, and sampling that honours names and bans."""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.metrics import normalized_mutual_info_score

import shards
from selfguide.diffusion.preconditioning import build_preconditioning
from selfguide.guidance.prototypes import extract
from selfguide.randomness import normal
from selfguide.sampling.condition_sampler import TrainingImages
from selfguide.snapshot import load
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest
from tests.tools.test_sample import annotated, labelled, run, sampled  # noqa: F401
from tools import sample
from tools.atlas import __main__ as atlas
from tools.atlas.grouping import of_sidecar, of_snapshot
from tools.atlas.histogram import Sizes, draw


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tags, self.ids = "", [], []
        self.references: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [str(found["id"])] if "id" in found else []
        self.references += [str(found[name]) for name in ("href", "src") if name in found]
        self.pictures += [found] if tag == "img" else []

    def handle_data(self, data: str) -> None:
        self.text += data


def pixels(picture: dict[str, str | None]) -> np.ndarray:
    data = base64.b64decode(str(picture["src"]).removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture
def named(run: Path) -> Path:  # noqa: F811
    """The run with group 3 named and group 7 banned, for one test."""
    file = run / "groups.yaml"
    file.write_text('names: {3: "zeros & <b>ohs</b>"}\nbanned: [7]\n')
    yield run
    file.unlink()


def made(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> tuple[Page, dict]:
    assert atlas.main([*arguments, "--out", str(out), "--json"]) == 0
    return Page(out), json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def cosines(run: Path) -> torch.Tensor:  # noqa: F811
    """(N, K) of every scan with every prototype, in one piece."""
    snapshot = load(run / "snapshots" / "img-000000512")
    x0 = TrainingImages(snapshot).x0(torch.arange(1797))
    eps = normal(0, "extraction-noise", torch.arange(1797), (1, 8, 8))
    features = extract(
        snapshot.student,
        build_preconditioning(snapshot.config.path),
        snapshot.config.guidance.noise_time,
        x0,
        eps,
    )
    with torch.no_grad():
        return snapshot.student.head(features)


def test_an_atlas_of_a_run_on_labels_shows_its_classes(
    labelled: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    page, said = made(capsys, tmp_path / "a.html", str(labelled), "--count", "2")
    assert (said["groups"], said["used"], said["nmi"], said["samples"]) == (10, 10, 1.0, True)
    assert len(page.pictures) == 10 * (2 + 2) and "the first of the class" in page.text


def test_nearest_images_are_those_with_the_highest_cosine(
    run: Path,  # noqa: F811
    cosines: torch.Tensor,
) -> None:
    snapshot = load(run / "snapshots" / "img-000000512")
    found = of_snapshot(snapshot, 5, batch=100)
    for group in range(12):
        wanted = cosines[:, group].sort(descending=True).values[:5]
        torch.testing.assert_close(torch.tensor(found.closeness[group]).float(), wanted)
        torch.testing.assert_close(cosines[found.nearest[group], group], wanted)
    assert (found.ids == cosines.argmax(1).numpy()).mean() > 0.999
    np.testing.assert_allclose(found.p, snapshot.guidance["p"])
    rows = torch.nn.functional.normalize(snapshot.student.head.prototypes, dim=1)
    for group, near in enumerate(found.neighbours):
        others = sorted((float(rows[group] @ rows[j]), j) for j in range(12) if j != group)[::-1]
        assert [j for j, _ in near] == [j for _, j in others[:3]]
        assert [c for _, c in near] == pytest.approx([c for c, _ in others[:3]], abs=1e-6)


def test_the_page_needs_nothing_else_and_says_what_is_there(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cosines: torch.Tensor
) -> None:
    page, said = made(capsys, tmp_path / "atlas.html", str(named), "--count", "3")
    assert "script" not in page.tags and "http" not in page.source.replace("http-equiv", "")
    for reference in page.references:
        assert reference.startswith(("data:", "#group-"))
        assert not reference.startswith("#") or reference[1:] in page.ids
    groups = [int(i.removeprefix("group-")) for i in page.ids if i.startswith("group-")]
    p = load(named / "snapshots" / "img-000000512").guidance["p"]
    assert [p[g] for g in groups] == sorted(p, reverse=True) and len(groups) == 12
    labels = shards.read_all(load(named / "snapshots" / "img-000000512").data["root"])["y"]
    nmi = normalized_mutual_info_score(labels, cosines.argmax(1).numpy())
    assert said["nmi"] == pytest.approx(nmi, abs=2e-3) and f"{said['nmi']:.3f}" in page.text
    assert said["groups"] == 12 and said["shown"] == 12 and said["banned"] == [7]
    assert "zeros & <b>ohs</b>" in page.text and "b" not in page.tags
    assert "banned: not drawn" in page.text
    texts = [str(p["alt"]) for p in page.pictures]
    assert len(texts) == 12 * 3 + 11 * 3
    assert not any(text.endswith("of group 7") for text in texts)


def test_its_pictures_are_the_images_and_samples_of_the_group(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, _ = made(capsys, tmp_path / "atlas.html", str(named), "--count", "2", "--g", "1.5")
    root = load(named / "snapshots" / "img-000000512").data["root"]
    scans = shards.read_all(root)["x"]
    for picture in page.pictures:
        if ordinal := re.match(r"image (\d+),", str(picture["alt"])):
            scan = np.round(scans[int(ordinal[1]), 0] * (255 / 16)).astype(np.uint8)
            np.testing.assert_array_equal(pixels(picture), scan)
    steps = str(load(named / "snapshots" / "img-000000512").config.sampler.steps)
    drawn, _ = sampled(
        named, tmp_path / "s", "--group", "3", "--count", "2", "--g", "1.5", "--steps", steps
    )
    shown = [pixels(p) for p in page.pictures if str(p["alt"]).endswith("of group 3")]
    # the same noise and group in a batch of another size: equal up to one level of grey
    assert np.abs(np.stack(shown).astype(int) - drawn).max() <= 16


def test_fewer_groups_on_request_are_the_largest(
    run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page, said = made(capsys, tmp_path / "a.html", str(run), "--groups", "4", "--count", "1")
    assert said["shown"] == 4 and "8 smaller groups are not shown" in page.text
    assert sum(i.startswith("group-") for i in page.ids) == 4
    assert all(r[1:] in page.ids for r in page.references if r.startswith("#"))


def test_before_the_second_stage_there_are_images_and_no_samples(
    run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page, said = made(capsys, tmp_path / "a.html", str(run), "--images", "256", "--count", "1")
    assert not said["samples"] and len(page.pictures) == 12
    assert "the second stage had not begun" in page.text


@pytest.fixture
def notes(digits: Path, tmp_path: Path) -> Path:
    """The scans' labels as if they were found, in five groups, with features and with confidence."""
    data, hash_ = shards.read_all(digits), manifest.load(digits).hash
    ids = (data["y"] // 2).astype(np.int32)
    facts = {"manifest": hash_, "provenance": {"saw_labels": True}}
    flat = data["x"].reshape(1797, -1).astype(np.float32)
    sidecar.write(tmp_path / "plain", ids, kind="id", groups=6, **facts)
    sidecar.write(tmp_path / "features", flat, kind="dense", **facts)
    sure = np.random.default_rng(0).random(1797)
    sidecar.write(tmp_path / "sure", ids, kind="id", groups=6, confidence=sure, **facts)
    sidecar.write(tmp_path / "far", ids, kind="id", groups=6, distance=sure, **facts)
    other = facts | {"manifest": "0" * 64}
    sidecar.write(tmp_path / "other", ids, kind="id", groups=6, confidence=sure, **other)
    return tmp_path


def test_images_of_an_annotation_stand_by_confidence_distance_or_features(notes: Path) -> None:
    ids = np.asarray(sidecar.read(notes / "plain").rows())
    sure = np.asarray(sidecar.read(notes / "sure").column("confidence"))
    flat = np.asarray(sidecar.read(notes / "features").rows(), dtype=np.float64)
    by_confidence = of_sidecar(sidecar.read(notes / "sure"), 4)
    by_distance = of_sidecar(sidecar.read(notes / "far"), 4)
    by_features = of_sidecar(sidecar.read(notes / "plain"), 4, sidecar.read(notes / "features"))
    means = np.stack([flat[ids == k].mean(0) for k in range(5)])
    for group in range(5):
        members = np.flatnonzero(ids == group)
        ranked = members[np.argsort(sure[members])]
        assert by_confidence.nearest[group].tolist() == ranked[::-1][:4].tolist()
        assert by_distance.nearest[group].tolist() == ranked[:4].tolist()
        away = ((flat[members] - means[group]) ** 2).sum(1)
        np.testing.assert_allclose(by_features.closeness[group], np.sort(away)[:4])
        assert by_features.p[group] == pytest.approx(len(members) / 1797)
        unit = means / np.linalg.norm(means, axis=1, keepdims=True)
        first = max((j for j in range(5) if j != group), key=lambda j: unit[group] @ unit[j])
        assert by_features.neighbours[group][0] == (first, pytest.approx(unit[group] @ unit[first]))
    assert not any(by_confidence.neighbours)  # nothing says where the groups lie
    assert len(by_features.nearest[5]) == 0 and by_features.order[-1] == 5


def test_an_annotation_alone_makes_a_page(
    notes: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--sidecar", str(notes / "sure"), "--shards", str(digits), "--count", "2")
    page, said = made(capsys, notes / "a.html", *asked)
    assert said["groups"] == 6 and said["used"] == 5 and not said["samples"]
    assert len(page.pictures) == 10 and "nearest images (confidence)" in page.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a RUN, an annotation"),
        (["--sidecar", "sure"], "give the annotated shards by --shards"),
        (["--sidecar", "other", "--shards", "DIGITS"], "the groups are of 000000000000"),
        (
            ["--sidecar", "plain", "--shards", "DIGITS"],
            "no column of confidence or distance",
        ),
        (["--sidecar", "features", "--shards", "DIGITS"], "holds dense; an atlas shows groups"),
        (
            ["--sidecar", "plain", "--shards", "DIGITS", "--features", "sure"],
            "give 1797 of kind dense",
        ),
        (["--sidecar", "sure", "RUN"], "was trained on no annotation"),
        (["RUN", "--features", "features"], "this run has prototypes"),
        (["RUN", "--count", "0"], "--count 0"),
    ],
)
def test_mistakes_are_named(
    notes: Path, digits: Path, arguments: list[str], words: str, request: pytest.FixtureRequest
) -> None:
    places = {"DIGITS": str(digits)}
    for word, fixture in (("RUN", "run"), ("LABELLED", "labelled")):
        if word in arguments:
            places[word] = str(request.getfixturevalue(fixture))
    local = {name: str(notes / name) for name in ("sure", "plain", "other", "features")}
    asked = [(places | local).get(a, a) for a in arguments]
    with pytest.raises(UserError, match=words):
        atlas.main([*asked, "--out", str(notes / "none.html")])
    assert not (notes / "none.html").exists()


def test_the_annotation_must_be_the_one_that_the_run_was_trained_on(
    run: Path,  # noqa: F811
    notes: Path,
) -> None:
    trained_on = sidecar.read(notes / "sure")
    snapshot = load(run / "snapshots" / "img-000000512")
    ids = {"folder": str(trained_on.folder), "kind": "id", "sha256": trained_on.sha256}
    snapshot = replace(snapshot, guidance={**snapshot.guidance, "sidecars": {"ids": ids}})
    for asked in (None, str(trained_on.folder)):
        options = argparse.Namespace(sidecar=asked)
        assert atlas.annotation(snapshot, options) == trained_on
    rows = np.zeros(1797, dtype=np.int32)
    facts = {"manifest": trained_on.manifest, "provenance": {"saw_labels": False}}
    sidecar.write(notes / "zeros", rows, kind="id", groups=6, confidence=rows / 2, **facts)
    with pytest.raises(UserError, match="was trained on other groups"):
        atlas.annotation(snapshot, argparse.Namespace(sidecar=str(notes / "zeros")))


def test_groups_of_patches_have_no_atlas(run: Path) -> None:  # noqa: F811
    snapshot = load(run / "snapshots" / "img-000000512")
    config = snapshot.config
    patches = replace(config, guidance=replace(config.guidance, level="patch"))
    with pytest.raises(UserError, match=r"guidance\.level=patch"):
        of_snapshot(replace(snapshot, config=patches), 4)


def test_sampling_honours_names_and_bans(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_name, said = sampled(named, tmp_path / "a", "--group", "zeros & <b>ohs</b>", "--count", "2")
    by_number, _ = sampled(named, tmp_path / "b", "--group", "3", "--count", "2")
    np.testing.assert_array_equal(by_name, by_number)
    assert said["banned"] == [7]
    way, _ = sampled(named, tmp_path / "c", "--between", "zeros & <b>ohs</b>", "5", "--count", "2")
    assert np.abs(way[0].astype(int) - by_number[0]).max() <= 16
    capsys.readouterr()
    for asked in (["--group", "7"], ["--group", "1", "7"], ["--between", "1", "7"]):
        with pytest.raises(UserError, match=r"group 7 is banned in .*groups.yaml"):
            sample.main([str(named), "--out", str(tmp_path / "none"), *asked])
    with pytest.raises(UserError, match="no group is called 'zero"):
        sample.main([str(named), "--out", str(tmp_path / "none"), "--group", "zeros"])


def test_banned_groups_are_not_drawn_at_their_frequency(
    run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With all but one banned, what is drawn is that one; images whose own group stays are not touched."""
    free, _ = sampled(run, tmp_path / "free", "--count", "3")
    kept = int(np.argmax(load(run / "snapshots" / "img-000000512").guidance["p"]))
    file = run / "groups.yaml"
    file.write_text(f"names: {{{kept}: kept}}\nbanned: {[k for k in range(12) if k != kept]}\n")
    try:
        for prior in ("empirical", "uniform"):
            drawn, _ = sampled(run, tmp_path / prior, "--count", "3", "--prior", prior)
            wanted, _ = sampled(run, tmp_path / "wanted", "--group", "kept", "--count", "3")
            np.testing.assert_array_equal(drawn, wanted)
        ordinals = [str(o) for o in range(40)]
        with pytest.raises(UserError, match="is banned"):
            sample.main([str(run), "--like", *ordinals, "--out", str(tmp_path / "none")])
        assert f"is nearest to group {kept} (kept)" in capsys.readouterr().err
    finally:
        file.unlink()
    again, _ = sampled(run, tmp_path / "again", "--count", "3")
    np.testing.assert_array_equal(free, again)


def counted(capsys: pytest.CaptureFixture[str], file: Path, *arguments: str) -> dict:
    assert atlas.main([*arguments, "--figure", str(file), "--json"]) == 0
    assert Image.open(file).width > 500
    return json.loads(capsys.readouterr().out)


def test_the_sizes_of_an_annotation_s_groups_are_their_bincount(
    notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # neither the images nor what says how near they are is asked for
    said = counted(capsys, notes / "drawn" / "sizes.png", "--sidecar", str(notes / "plain"))
    wanted = np.bincount(np.asarray(sidecar.read(notes / "plain").rows()), minlength=6)
    assert said["counts"] == wanted.tolist() and said["images"] == 1797
    assert (said["groups"], said["used"], said["utilisation"]) == (6, 5, pytest.approx(5 / 6))
    assert said["entropy"] == pytest.approx(stats.entropy(wanted))


def test_the_sizes_of_a_run_s_groups_are_the_bincount_of_its_nearest_prototypes_or_labels(
    run: Path,  # noqa: F811
    labelled: Path,  # noqa: F811
    tmp_path: Path,
    cosines: torch.Tensor,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = counted(capsys, tmp_path / "a.png", str(run))
    wanted = np.bincount(cosines.argmax(1).numpy(), minlength=12)
    # an image may lie as near to two, by batches of another size
    assert np.abs(np.array(said["counts"]) - wanted).sum() <= 2 and said["images"] == 1797
    root = load(labelled / "snapshots" / "img-000000512").data["root"]
    said = counted(capsys, tmp_path / "b.png", str(labelled))
    assert said["counts"] == np.bincount(shards.read_all(root)["y"]).tolist()


def test_the_sizes_of_groups_of_patches_count_every_patch(
    annotated: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = counted(capsys, tmp_path / "a.png", str(annotated / "patches"))
    assert "images" not in said and said["patches"] == sum(said["counts"]) == 1797 * 16


def test_a_histogram_says_how_even_its_groups_are_and_shows_it(tmp_path: Path) -> None:
    collapsed, even = Sizes(np.array([0, 100, 0, 0])), Sizes(np.array([25, 25, 25, 25]))
    assert (collapsed.used, collapsed.utilisation, collapsed.entropy) == (1, 0.25, 0)
    assert "1 of 4 groups used (25.0 %); entropy 0.000 of 1.386 nats" in collapsed.text()
    assert (
        even.entropy == pytest.approx(np.log(4)) and "4 of 4 groups used (100.0 %)" in even.text()
    )
    inked = []
    for name, sizes in (("collapsed", collapsed), ("even", even)):
        draw(tmp_path / f"{name}.png", sizes, name)
        drawn = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        inked.append(int((np.abs(drawn - (0x4C, 0x78, 0xA8)).max(-1) < 8).sum()))
    # all groups high, against one
    assert inked[1] == pytest.approx(4 * inked[0], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sidecar", "features"], "holds dense"),
        (["--sidecar", "none"], "none"),
        ([], "name a RUN, an annotation"),
    ],
)
def test_a_histogram_of_what_has_no_groups_is_refused(
    notes: Path, arguments: list[str], words: str
) -> None:
    asked = [str(notes / each) if each in ("features", "none") else each for each in arguments]
    with pytest.raises(UserError, match=words):
        atlas.main([*asked, "--figure", str(notes / "none.png")])
    assert not (notes / "none.png").exists()
