"""Shards that are not what a run can learn from are refused at submission, and nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launcher import submission, submit
from launcher.compose import compose
from selfguide.spec.files import to_yaml
from shards import storage
from shards.errors import UserError
from shards.format.header import Header
from shards.read import cache
from shards.sources.source import ArraySource
from shards.write import writer

LATENT = Header(kind="latent", scale=0.18215, encoder="sd_vae", encoder_sha256="a" * 64)
IMAGE = Header(kind="image", shift=8.0, scale=0.125)


@pytest.fixture(scope="module")
def shards_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small data sets by name, unlabelled."""
    headers = {
        "latent": LATENT,
        "moments": replace(LATENT, content="moments"),
        "channels": replace(LATENT, scale=(0.18215, 0.182150001, 0.18215, 0.18215)),
        "scaled": replace(LATENT, scale=0.13025),
        "shifted": replace(LATENT, shift=(0.0, 0.0, 0.1, 0.0)),
        "other": replace(LATENT, encoder_sha256="b" * 64),
        "va": replace(LATENT, encoder="va_vae"),
        "image": IMAGE,
        "photo": Header(kind="image", shift=127.5, scale=1 / 127.5),
    }
    root, found = tmp_path_factory.mktemp("fit"), {}
    for name, header in headers.items():
        channels = 8 if header.content == "moments" else 4
        x = np.random.default_rng(0).normal(size=(600, channels, 8, 8)).astype(np.float16)
        x = x if header.kind == "latent" else (x * 0).astype(np.uint8)
        writer.write(root / name, ArraySource.of(name, x), header=header, seed=0)
        found[name] = root / name
    return found


def settings(root: Path | str, *more: str) -> list[str]:
    return [
        "experiment=digits_uncond", "cluster=local", f"data.root={root}", "data.shape=[4,8,8]", "data.classes=0",
        "evaluation=none", *more,
    ]  # fmt: skip


def accepted(words: list[str]) -> bool:
    return len(submission.check_data(submission.absolute(compose(words)))) == 64


def refused(runs: Path, words: list[str], *parts: str) -> None:
    """As the command does it; none of the runs folder exists afterwards."""
    with pytest.raises(UserError) as raised:
        submit.submit(submit.resolve([*words, f"runs={runs}"]))
    message = str(raised.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and not runs.exists()


def snapshot(folder: Path, header: Header, *words: str) -> Path:
    """As a run publishes it, less the weights, which nobody looks into here."""
    config = compose(settings("elsewhere", *words))
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / f"ema-{config.train.ema_halflife[0]}.safetensors").write_bytes(b"weights")
    storage.publish_folder(folder, extra={"data": {"header": header.plain()}, "images": 7})
    return folder


def test_a_snapshot_goes_on_in_the_latents_it_learned(
    shards_of: dict[str, Path], tmp_path: Path
) -> None:
    begin = f"init.path={snapshot(tmp_path / 'of', LATENT)}"
    for name in ("latent", "moments", "channels"):
        assert accepted(settings(shards_of[name], "init=snapshot", begin)), name
    for name, parts in {
        "scaled": ("header scale=0.18215", "have scale=0.13025"),
        "shifted": ("header shift=0.0", "shift=(0.0, 0.0, 0.1, 0.0)"),
        "other": ("encoder_sha256=aaa", "encoder_sha256=bbb"),
        "va": ("encoder=sd_vae", "encoder=va_vae"),
        "image": ("kind=latent", "kind=image"),
    }.items():
        words = settings(shards_of[name], "init=snapshot", begin)
        refused(tmp_path / "runs", words, "init.path=", "data.root=", "init=scratch", *parts)


def test_images_are_put_on_one_scale_so_theirs_may_differ(
    shards_of: dict[str, Path], tmp_path: Path
) -> None:
    begin = f"init.path={snapshot(tmp_path / 'of', IMAGE)}"
    assert accepted(settings(shards_of["photo"], "init=snapshot", begin))
    words = settings(shards_of["latent"], "init=snapshot", begin)
    refused(tmp_path / "runs", words, "kind=image", "kind=latent")


def test_published_weights_learned_the_latents_of_one_encoder(
    shards_of: dict[str, Path], tmp_path: Path
) -> None:
    begin = ["init=dit", f"init.path={tmp_path / 'dit.pt'}", "path=ddpm", "model.time=index"]
    for name in ("latent", "moments"):
        assert accepted(settings(shards_of[name], *begin))
    for name, part in {
        "scaled": "header scale=0.13025", "shifted": "header shift=", "va": "those of va_vae"
    }.items():  # fmt: skip
        words = settings(shards_of[name], *begin)
        refused(tmp_path / "runs", words, "init.path=", part, "init=scratch")


def test_a_mixture_is_of_one_kind_and_named_by_what_it_holds(
    shards_of: dict[str, Path], tmp_path: Path
) -> None:
    more = tmp_path / "more"
    x = np.ones((300, 4, 8, 8), dtype=np.float16)
    writer.write(more, ArraySource.of("more", x), header=LATENT, seed=0)

    def words(root: Path, other: Path, weights: str) -> list[str]:
        return settings(root, f"data.mix=[{other}]", f"data.weights={weights}")

    def name(*given: str) -> str:
        return submission.check_data(submission.absolute(compose(given)))

    latent = shards_of["latent"]
    one = name(*words(latent, more, "[3,1]"))
    assert one == name(*words(latent, more, "[6,2]"))
    assert len({one, name(*words(latent, more, "[1,1]")), name(*settings(latent))}) == 3
    refused(tmp_path / "runs", words(latent, shards_of["scaled"], "[1,1]"), "cannot be mixed", "scale")  # fmt: skip
    refused(tmp_path / "runs", words(latent, tmp_path / "none", "[1,1]"), "no shards at")
    mixed = submission.absolute(compose(words(latent, Path("beside"), "[1,1]")))
    assert mixed.data.mix == (str(Path.cwd() / "beside"),)


def test_digits_are_not_scored_by_latents(shards_of: dict[str, Path], tmp_path: Path) -> None:
    x = np.zeros((20, 1, 8, 8), dtype=np.float16)
    writer.write(tmp_path / "one", ArraySource.of("one", x), header=LATENT, seed=0)
    words = settings(tmp_path / "one", "data.shape=[1,8,8]", "evaluation=fd_digits")
    refused(tmp_path / "runs", words, "evaluation.protocol=fd_digits", "sd_vae", "evaluation=none")


def test_latents_are_not_augmented(shards_of: dict[str, Path], tmp_path: Path) -> None:
    augmented = "augment.probability=0.12"
    for kind in ("latent", "moments"):
        words = settings(shards_of[kind], augmented)
        refused(tmp_path / "runs", words, augmented, "hold latents", "augment.probability=null")
        assert accepted([*words, "augment.probability=null"])
    assert accepted(settings(shards_of["image"], augmented))


def test_a_manifest_of_another_version_is_named(shards_of: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "later"
    root.mkdir()
    for path in shards_of["latent"].iterdir():
        if path.is_file():
            (root / path.name).write_bytes(path.read_bytes())
    (manifest,) = root.glob("manifest-*.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))
    refused(tmp_path / "runs", settings(root), "version 99", "this program reads")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/cache", "is a file"),
        ("file", "is a file"),
        ("full", "holds other things (notes)"),
    ],
)
def test_a_place_where_no_cache_can_be_is_named_and_left_alone(
    tmp_path: Path, place: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(UserError, match="name a") as raised:
        cache.check(tmp_path / place)
    assert message in str(raised.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "notes"]


def test_a_place_where_a_cache_can_be_is_left_alone_too(tmp_path: Path) -> None:
    cache.check(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    kept = cache.Cache(tmp_path / "a")
    assert kept.put(cache.Piece("a" * 64, 0, 2), memoryview(b"xy"), lambda p: np.zeros(len(p)))
    cache.check(tmp_path / "a")  # one that holds something is one all the same


def test_a_folder_of_a_job_does_not_depend_on_where_it_starts() -> None:
    config = compose(["experiment=digits_dit", "cluster=local", "data.cache=kept"])
    assert submission.absolute(config).data.cache == str(Path.cwd() / "kept")
    assert (
        submission.absolute(compose(["experiment=digits_dit", "cluster=local"])).data.cache is None
    )


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Latents and images, 39 and 40 of each."""
    root, found = tmp_path_factory.mktemp("few"), {}
    for name, header, dtype in (("latent", LATENT, np.float16), ("image", IMAGE, np.uint8)):
        for count in (39, 40):
            x = np.random.default_rng(0).integers(0, 17, (count, 3, 8, 8)).astype(dtype)
            writer.write(root / f"{name}{count}", ArraySource.of(name, x), header=header)
            found[f"{name}{count}"] = root / f"{name}{count}"
    return found


def of_three(root: Path, *more: str) -> list[str]:
    return settings(root, "data.shape=[3,8,8]", "evaluation=fid_adm", *more)


def test_too_few_samples_of_a_model_of_latents_are_refused(
    few: dict[str, Path], tmp_path: Path
) -> None:
    shards = f"evaluation.shards={few['image40']}"
    words = of_three(few["latent40"], shards)
    refused(
        tmp_path / "runs",
        [*words, "evaluation.samples=39"],
        "evaluation.samples=39, and the shards in",
        "take evaluation.samples=40 or more",
    )
    assert accepted([*words, "evaluation.samples=40"])
    # images need no second reference
    assert accepted(of_three(few["image40"], "evaluation.samples=20"))


@pytest.mark.parametrize(
    ("data", "more", "parts"),
    [
        ("latent39", ["evaluation.shards=IMAGE40"], ("hold 39; give more of them, or evaluation=none",)),
        ("latent39", ["evaluation.reference=x.npz"], ("hold 39; give more of them, or evaluation=none",)),
        ("image39", [], ("hold 39; give more", "evaluation.shards=ROOT of 40 images or more")),
        ("image40", ["evaluation.shards=IMAGE39"], ("image39 holds 39 images", "give evaluation.shards=ROOT")),
        ("image40", ["evaluation.reference_count=39"], ("evaluation.reference_count=39", "take 40 or more")),
        (
            "image39",
            ["evaluation.shards=IMAGE40", "evaluation.metrics=[near_copies]"],
            ("hold 39; give more of them, or evaluation=none",),
        ),
    ],
)  # fmt: skip
def test_too_few_real_images_for_a_score_are_refused(
    few: dict[str, Path], tmp_path: Path, data: str, more: list[str], parts: tuple[str, ...]
) -> None:
    named = [
        word.replace("IMAGE", "image").replace(
            "shards=image", f"shards={few['image40'].parent}/image"
        )
        for word in more
    ]
    words = of_three(few[data], *named, "evaluation.samples=40")
    with pytest.raises(UserError) as raised:
        config = submit.resolve([*words, f"runs={tmp_path / 'runs'}"])
        submit.validate(config)
        submission.submit(config)
    assert all(part in str(raised.value) for part in parts), raised.value
    assert not (tmp_path / "runs").exists()


def test_as_many_images_as_a_reference_needs_are_taken(few: dict[str, Path]) -> None:
    assert accepted(of_three(few["image40"], "evaluation.samples=40"))
    assert accepted(of_three(few["image39"], f"evaluation.shards={few['image40']}"))
