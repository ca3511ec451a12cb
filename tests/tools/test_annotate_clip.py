"""`tools.annotate clip`: labels by text are the plain argmax of both towers, and say that they are of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from shards import sidecar
from shards.errors import UserError
from tools.annotate.__main__ import main
from tools.shards.__main__ import main as make

open_clip = pytest.importorskip("open_clip")

NAMES = ("flour", "grass", "night sky", "red square", "sea_horse")
TINY = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model of open_clip that is small, and of which nobody is told but open_clip."""
    folder = tmp_path_factory.mktemp("towers")
    (folder / "tiny-towers.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-towers.json")
    torch.manual_seed(0)
    net = open_clip.create_model("tiny-towers", load_weights=False)
    # as they are drawn, all images are nearly the same to it
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    nn.init.zeros_(net.visual.class_embedding)
    nn.init.zeros_(net.visual.positional_embedding)
    torch.save(net.state_dict(), folder / "w.bin")
    return folder / "w.bin"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of each name, half of them of one colour."""
    folder, root = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("pictures") / "shards"
    x = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3)).astype(np.uint8)
    x[:20] = x[:20, :1, :1]
    for number, image in enumerate(x):
        (folder / NAMES[number % 5]).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / NAMES[number % 5] / f"{number}.png")
    blocks = ["--size", "32", "--layout", "blocks", "--out", str(root)]
    assert make(["make", "folder", str(folder), *blocks]) == 0
    return root


def words(pictures: Path, weights: Path, *more: Any) -> list[str]:
    fixed = ["--net", "tiny-towers", "--weights", weights, "--device", "cpu", "--batch", 7]
    return [str(word) for word in ("clip", pictures, *fixed, *more)]


def plain(pictures: Path, weights: Path, prompts: list[str]) -> np.ndarray:
    """open_clip's own transform and zero-shot recipe, an image at a time."""
    import shards

    net, _, transform = open_clip.create_model_and_transforms("tiny-towers", load_weights=False)
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.eval()
    tokens = open_clip.get_tokenizer("tiny-towers")
    found = []
    with torch.no_grad():
        rows = []
        for name in NAMES:
            texts = [prompt.replace("{}", name.replace("_", " ")) for prompt in prompts]
            each = net.encode_text(tokens(texts))
            mean = (each / each.norm(dim=1, keepdim=True)).mean(0)
            rows.append(mean / mean.norm())
        for image in shards.read_all(pictures)["x"]:
            x = transform(Image.fromarray(image.transpose(1, 2, 0)))[None]
            found.append(int((net.encode_image(x) @ torch.stack(rows).T).argmax()))
    return np.array(found)


def test_labels_are_the_nearest_names_and_say_that_they_are_of_text(
    pictures: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a photo of a {}.", "{}, seen from above"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    more = ["--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "c", "--json"]
    assert main(words(pictures, weights, *more)) == 0
    facts = json.loads(capsys.readouterr().out)
    found = sidecar.read(tmp_path / "c")
    expected = plain(pictures, weights, prompts)
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(found.rows(), expected)
    assert (found.kind, found.groups, found.saw_labels) == ("id", 5, True)
    record = found.provenance
    assert record["text"] is True and record["prompts"] == prompts
    assert record["names"][4] == "sea horse" and facts["nmi"] == record["report"]["nmi"]


def test_other_names_are_other_groups(pictures: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    more = ["--names", tmp_path / "names.txt", "--out", tmp_path / "c"]
    assert main(words(pictures, weights, *more)) == 0
    found = sidecar.read(tmp_path / "c")
    assert found.groups == 2 and found.provenance["names"] == ["cat", "dog"]
    assert main(words(pictures, weights, "--names", pictures, "--out", tmp_path / "o")) == 0
    assert sidecar.read(tmp_path / "o").provenance["names"][3] == "red square"


def test_what_cannot_be_is_refused(pictures: Path, weights: Path, tmp_path: Path) -> None:
    for name, text in {"twice": "cat\ncat\n", "none": "\n", "bare": "a photo\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "other.bin").write_bytes(b"no weights")
    out = ["--out", tmp_path / "c"]
    for more, said in (
        (["--names", tmp_path / "twice"], "2 names: give two or more, each once"),
        (["--names", tmp_path / "none"], "is empty; give one a line"),
        (["--names", tmp_path / "gone"], "no text can be read there"),
        (["--prompts", tmp_path / "bare"], r"prompt 'a photo' has no \{\}"),
        (["--sha256", "00"], "has sha256 [0-9a-f]{64}, and 00 was asked for"),
        (["--weights", tmp_path / "gone"], "no such file"),
        (["--weights", tmp_path / "other.bin"], "cannot be read as tensors only"),
        (["--net", "ViT-B-33"], "did you mean"),
        (["--net", "xlm-roberta-base-ViT-B-32"], "words are those of a model of the hub"),
    ):
        with pytest.raises(UserError, match=said):
            main(words(pictures, weights, *more, *out))
    assert not (tmp_path / "c").exists()
