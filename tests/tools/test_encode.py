"""`tools.shards encode`: the latents of each image, in its place, the same bytes whoever writes them."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

import shards
from selfguide.data.autoencoders import encoding, load_autoencoder, to_images
from selfguide.data.autoencoders.encode import Task, plan
from selfguide.data.autoencoders.encode import encode as share
from selfguide.data.autoencoders.encoding import EncodedSource, Encoding, _device
from selfguide.data.normaliser import Normaliser
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.read.reader import Reader
from shards.sources.source import ArraySource
from shards.verify import verify
from shards.write import writer
from tests.shards.data import LATENT, flip, payload
from tests.shards.data import source as latent_source
from tests.tools.latents import IMAGES, OWN, encode, images_of, levels, moments, other_weights, tree
from tools import digit_vae
from tools.shards import __main__ as command


@pytest.fixture(scope="module")
def latents(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moments of the digits, written by one process."""
    out = tmp_path_factory.mktemp("latents")
    encode(digits, out)
    return out


def test_every_image_is_its_latent_at_its_ordinal(digits: Path, latents: Path) -> None:
    images, found = shards.read_all(digits), shards.read_all(latents)
    assert found["key"].tolist() == images["key"].tolist()
    assert np.array_equal(found["y"], images["y"])
    assert found["x"].dtype == np.float16
    expected = moments(levels(digits))
    np.testing.assert_allclose(found["x"], expected, rtol=2e-3, atol=1e-4)  # float16's rounding
    assert verify(latents).problems == ()


def test_what_a_model_sees_decodes_to_the_images(digits: Path, latents: Path) -> None:
    manifest, stored = manifests.load(latents), torch.from_numpy(shards.read_all(latents)["x"])
    codec, pictures = load_autoencoder("tiny"), levels(digits)
    seen = Normaliser.of(manifest.header).encode(stored)
    assert seen.shape == (1797, 2, 4, 4) and 0.9 < seen.std() < 1.1
    through_shards = digit_vae.psnr(to_images(manifest.header, seen, codec), pictures)
    directly = digit_vae.psnr(codec.decode(codec.encode(pictures)[:, :2]), pictures)
    assert through_shards >= digit_vae.LEAST and abs(through_shards - directly) < 0.02


def test_the_mirror_image_is_encoded_by_itself(digits: Path, tmp_path: Path) -> None:
    manifest = encode(digits, tmp_path, "--flips", "--dtype", "float32")
    assert manifest.shape == (2, 4, 4, 4) and manifest.model_shape == (2, 4, 4)
    assert Header.of(manifest.header).flips
    x, images = shards.read_all(tmp_path)["x"], levels(digits)
    np.testing.assert_allclose(x[:, 0], moments(images), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x[:, 1], moments(images.flip(-1)), rtol=1e-4, atol=1e-5)
    assert np.abs(x[:, 1] - x[:, 0, ..., ::-1]).mean() > 0.01  # and so it is stored


def test_samples_are_draws_of_their_seed_and_ordinal(digits: Path, tmp_path: Path) -> None:
    more = ("--content", "sample", "--dtype", "float32", "--flips")
    manifest = encode(digits, tmp_path / "a", *more)
    assert manifest.shape == (2, 2, 4, 4) and Header.of(manifest.header).content == "sample"
    encode(digits, tmp_path / "b", *more, "--seed", "1")
    images = levels(digits)
    noise = []
    for name in ("a", "b"):
        x = shards.read_all(tmp_path / name)["x"]
        for k, form in enumerate((images, images.flip(-1))):
            mean, log_variance = np.split(moments(form), 2, axis=1)
            noise.append((x[:, k] - mean) / np.exp(log_variance / 2))
    for one in noise:
        assert stats.kstest(one.ravel(), "norm").pvalue > 1e-3
    apart = np.corrcoef([one.ravel() for one in noise])  # seeds, and mirror images
    assert np.abs(apart - np.eye(4)).max() < 4 / np.sqrt(noise[0].size)


def test_the_mean_is_the_first_half_of_the_moments(
    digits: Path, latents: Path, tmp_path: Path
) -> None:
    manifest = encode(digits, tmp_path, "--content", "mean")
    assert manifest.shape == (2, 4, 4) and Header.of(manifest.header).content == "sample"
    assert np.array_equal(shards.read_all(tmp_path)["x"], shards.read_all(latents)["x"][:, :2])


def test_the_manifest_says_where_latents_come_from(digits: Path, latents: Path) -> None:
    manifest, images = manifests.load(latents), manifests.load(digits)
    report = manifest.source
    assert report["name"] == "digits-tiny" and manifest.plain["order"] == "source"
    assert report["images"] == {"name": "digits", "manifest": images.hash, "rule": None}
    assert report["encoding"]["content"] == "moments" and "posterior_seed" not in report["encoding"]
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    header = Header.of(manifest.header)
    assert (header.encoder, header.content) == ("tiny", "moments")
    assert header.encoder_sha256 == load_autoencoder("tiny").sha256
    assert manifest.seed == images.seed and manifest.label_histogram == images.label_histogram


def test_pictures_one_a_key_give_the_latents_of_blocks(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    for i, image in enumerate(x):
        (tmp_path / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "in" / "ab"[i % 2] / f"{i:03d}.png")
    found = []
    for layout in ("samples", "blocks"):
        words = ["make", "folder", str(tmp_path / "in"), "--channels", "1", "--layout", layout]
        assert command.main([*words, "--out", str(tmp_path / layout)]) == 0
        manifest = encode(tmp_path / layout, tmp_path / f"{layout}-latents")
        assert manifest.plain["class_names"] == ["a", "b"]
        found.append([shard.sha256 for shard in manifest.shards])
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_images_are_read_once_and_not_before_the_first_block(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their keys, some of them no ASCII, and labels come with them; a data set of 100 GB is not read for those."""
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (600, 8, 8), np.uint8)):
        (tmp_path / "in" / "aü"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "in" / "aü"[i % 2] / f"{i}.png")
    words = ["make", "folder", str(tmp_path / "in"), "--channels", "1", "--layout", layout]
    assert command.main([*words, "--out", str(tmp_path / "images")]) == 0
    opened: list[Reader] = []

    def ranges(*of: Any) -> Reader:
        opened.append(Reader(*of, mapped=False))  # counts what it fetches
        return opened[-1]

    monkeypatch.setattr(encoding, "Reader", ranges)
    made = EncodedSource.of(str(tmp_path / "images"), Encoding(encoder="tiny"))
    task = Task(source=made.root, out=str(tmp_path / "out"), encoding=made.encoding)
    plan(task, made)
    assert not opened
    share(task, made)
    (reader,) = opened
    stored = manifests.load(made.root)
    assert reader.counts["fetched"] == stored.block_count == 3
    assert stored.blocks["bytes"].sum() <= reader.counts["bytes"] <= stored.shards[0].bytes
    images, latents = (shards.read_all(tmp_path / name) for name in ("images", "out"))
    assert latents["key"].tolist() == images["key"].tolist() and "ü/1.png" in latents["key"]
    assert np.array_equal(latents["y"], images["y"])


def test_class_names_and_the_rule_of_decoding_go_over(tmp_path: Path) -> None:
    x = np.arange(300 * 64, dtype=np.uint8).reshape(300, 1, 8, 8)
    images = ArraySource.of("some", x, labels=np.arange(300) % 2, classes=2)
    report = {"class_names": ("cat", "dog"), "notes": {"rule": "grey centre"}, "seed": 5}
    writer.write(tmp_path / "in", images, header=IMAGES, **report)
    manifest = encode(tmp_path / "in", tmp_path / "out")
    assert manifest.plain["class_names"] == ["cat", "dog"] and manifest.seed == 5
    assert manifest.source["images"]["rule"] == "grey centre"
    assert (
        shards.read_all(tmp_path / "in")["key"].tolist()
        == shards.read_all(tmp_path / "out")["key"].tolist()
        != images.keys.astype(str).tolist()
    )


def test_all_that_decides_bytes_is_in_the_fingerprint(digits: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other_weights(other)
    plain = Encoding(encoder="tiny")
    changes = [
        {"content": "sample"},
        {"content": "sample", "seed": 1},
        {"content": "mean"},
        {"flips": True},
        {"dtype": "float32"},
        {"batch": 16},
        {"weights": str(other)},
    ]
    found = {
        EncodedSource.of(str(digits), replace(plain, **change)).fingerprint
        for change in [{}, *changes]
    }
    assert len(found) == 1 + len(changes)
    same = [{"seed": 1}, {"weights": str(OWN)}]  # nothing is drawn; the same weights elsewhere
    for change in same:
        assert EncodedSource.of(str(digits), replace(plain, **change)).fingerprint in found


def test_a_pickled_source_carries_no_weights_and_notices_others(
    digits: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(OWN.read_bytes())
    made = EncodedSource.of(str(digits), Encoding(encoder="tiny", weights=str(own)))
    rows = np.array([3, 500])
    first = made.images(rows)
    data = pickle.dumps(made)
    assert len(data) < 100_000
    again = pickle.loads(data)
    assert np.array_equal(again.images(rows), first)
    other_weights(own)
    with pytest.raises(UserError, match="weights of tiny changed"):
        pickle.loads(data).images(rows)
    made.close()
    again.close()


# --- many hands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images, so that an encoding can be met at work."""
    x = np.concatenate([shards.read_all(digits)["x"]] * 2)
    root = tmp_path_factory.mktemp("many")
    writer.write(root, ArraySource.of("many", x), header=Header.of(manifests.load(digits).header))
    return root


def begin(root: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tools.shards", "encode", str(root), "--out", str(out)]
    words += ["--encoder", "tiny", "--shard-mb", "0.01", "--batch", "4", "--json", *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_workers_ranks_and_a_kill_leave_the_bytes_of_one_process(
    many: Path, tmp_path: Path
) -> None:
    whole = encode(many, tmp_path / "whole", "--batch", "4")
    expected = tree(tmp_path / "whole")
    assert len(whole.shards) == 15

    killed = tmp_path / "killed"
    process = begin(many, killed)
    deadline = time.monotonic() + 90
    while not list(killed.glob("shards/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    tars, records = (len(list(killed.glob(f"shards/*.{kind}"))) for kind in ("tar", "json"))
    assert 0 < records < 15 and tars - records in (0, 1) and not (killed / "LATEST").exists()
    process = begin(many, killed, "--workers", "2")
    report = json.loads(process.communicate(timeout=120)[0])
    assert report["written"] and report["shards_built"] == 15 - records
    assert tree(killed) == expected

    encode(many, tmp_path / "rank", "--batch", "4", "--rank", "1", "--world", "3")
    assert tree(tmp_path / "rank") == expected


def test_a_second_encode_writes_nothing(
    digits: Path, latents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(latents)
    encode(digits, latents)
    assert "already there, nothing written" in capsys.readouterr().out
    assert tree(latents) == before


def test_processes_of_a_pool_share_out_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(_device("auto")) == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    names = ["MainProcess", *(f"SpawnProcess-{i}" for i in range(1, 7)), "SpawnProcess-2:5"]
    found = []
    for name in names:
        monkeypatch.setattr(multiprocessing.current_process(), "_name", name)
        found.append(_device("auto").index)
    assert found == [0, 1, 2, 0, 1, 2, 0, 2]
    assert str(_device("cpu")) == "cpu"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "header", "more", "message"),
    [
        ((3, 8, 8), IMAGES, (), "images have 3 channels; tiny encodes 1"),
        ((1, 9, 8), IMAGES, (), "images are 9 x 8; tiny makes a latent pixel of 2 x 2"),
        ((1, 8, 8), Header(kind="image"), (), "no levels 0..top become"),
        ((2, 1, 8, 8), replace(IMAGES, flips=True), (), "holds both mirror images of each"),
        ((1, 8, 8), IMAGES, ("--encoder", "tinny"), "encoder='tinny' is unknown; did you mean 'tiny'"),
        ((1, 8, 8), IMAGES, ("--encoder", "identity"), "known: sd_vae, va_vae, tiny"),
        ((1, 8, 8), IMAGES, ("--content", "moment"), "did you mean 'moments'"),
        ((1, 8, 8), IMAGES, ("--dtype", "float64"), "dtype='float64' is unknown"),
        ((1, 8, 8), IMAGES, ("--batch", "0"), "batch=0"),
        ((1, 8, 8), IMAGES, ("--workers", "0"), "--workers 0: give at least 1"),
        ((1, 8, 8), IMAGES, ("--shard-mb", "0"), "--shard-mb 0.0"),
        ((1, 8, 8), IMAGES, ("--rank", "2", "--world", "2"), "rank=2 of world=2"),
        ((1, 8, 8), IMAGES, ("--weights", "none.bin"), "none.bin: no such file"),
        ((1, 8, 8), IMAGES, ("--device", "gpu"), "device='gpu'"),
        ((1, 8, 8), IMAGES, ("--tasks", "0"), "--tasks 0: give at least 1"),
        ((1, 8, 8), IMAGES, ("--tasks", "2", "--world", "2"), "tasks are the ranks"),
        ((1, 8, 8), IMAGES, ("--cluster", "slrum"), "cluster=slrum does not exist; did you mean 'slurm'"),
        ((1, 8, 8), IMAGES, ("--cluster", "local", "partitoin=x"), "unknown key 'cluster.partitoin'"),
    ],
)  # fmt: skip
def test_what_cannot_be_encoded_is_named_before_anything_is_written(
    tmp_path: Path, shape: tuple[int, ...], header: Header, more: tuple[str, ...], message: str
) -> None:
    root = images_of(tmp_path / "in", shape, header)
    with pytest.raises(UserError) as raised:
        encode(root, tmp_path / "out", *more)
    assert message in str(raised.value) and not (tmp_path / "out").exists()


def test_latents_and_another_data_set_are_refused(
    digits: Path, latents: Path, tmp_path: Path
) -> None:
    writer.write(tmp_path / "in", latent_source(), header=LATENT)
    with pytest.raises(UserError, match="holds latents of test already"):
        encode(tmp_path / "in", tmp_path / "out")
    before = tree(latents)
    with pytest.raises(UserError, match="holds another data set"):
        encode(digits, latents, "--flips")
    with pytest.raises(UserError, match="holds another data set"):
        encode(digits, digits)
    assert tree(latents) == before and not (tmp_path / "out").exists()


def test_weights_are_looked_for_and_never_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SELFGUIDE_SD_VAE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = images_of(tmp_path / "in", (3, 8, 8))
    with pytest.raises(UserError, match="no weights of sd_vae: give their file or folder"):
        encode(root, tmp_path / "out", "--encoder", "sd_vae")


@pytest.mark.parametrize(
    ("filled", "message"),
    [
        (
            {"moments.bias": 1e5},
            r"reach 1e\+05, and float16 holds 65504 at most: take --dtype float32",
        ),
        ({"moments.weight": 3e38}, "are not finite: the weights"),
        (
            {"look.bias": 3e38, "down.weight": -10},
            "are not finite: the weights",
        ),  # NaN, by silu(-inf)
    ],
)
def test_latents_that_do_not_fit_name_their_image(
    digits: Path, tmp_path: Path, filled: dict[str, float], message: str
) -> None:
    tensors = load_file(OWN)
    tensors |= {name: torch.full_like(tensors[name], value) for name, value in filled.items()}
    save_file(tensors, tmp_path / "far.safetensors")
    with pytest.raises(UserError, match=rf"latents of 'digits-\d+' {message}"):
        encode(digits, tmp_path / "out", "--weights", str(tmp_path / "far.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_no_latent(digits: Path, tmp_path: Path) -> None:
    for path in digits.rglob("*"):
        if path.is_file():
            (tmp_path / "in" / path.relative_to(digits)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / path.relative_to(digits)).write_bytes(path.read_bytes())
    flip(*payload(tmp_path / "in", 3, "x"))
    with pytest.raises(DamagedError, match="block 3"):
        encode(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "LATEST").exists()


# --- a published architecture ---------------------------------------------------------------------


def test_colour_images_by_diffusers_own_encoder(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    config = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
    }
    net = AutoencoderKL(**config).eval()
    net.save_pretrained(tmp_path / "net")
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    writer.write(tmp_path / "in", ArraySource.of("x", x), header=IMAGES, seed=1)
    words = ("--encoder", "sd_vae", "--weights", str(tmp_path / "net"), "--dtype", "float32")
    manifest = encode(tmp_path / "in", tmp_path / "out", *words)
    assert manifest.shape == (8, 4, 4) and manifest.header["scale"] == 0.5
    stored = torch.from_numpy(shards.read_all(tmp_path / "in")["x"])
    with torch.no_grad():
        expected = net.encode(stored / 127.5 - 1).latent_dist.parameters
    found = shards.read_all(tmp_path / "out")["x"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert "diffusers" in manifest.source["versions"]
