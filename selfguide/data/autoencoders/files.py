"""Files of weights: found without a download, checked before a network takes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from shards.errors import UserError

# of a folder as diffusers saves it, the first that is there
NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def variable(name: str) -> str:
    """The environment variable that may name the weights of autoencoder `name`."""
    return f"SELFGUIDE_{name.upper()}"


def locate(name: str, given: str | Path | None, hub: tuple[str, Sequence[str]]) -> Path:
    """The file of weights: an explicit path, the environment variable, or the local hub cache.

    `hub` is a repository and the files of it that would do. A folder is one that diffusers saved.

    Raises:
        UserError: no weights at any of them; says where they are looked for.
    """
    if given is not None:
        return _file(Path(given).expanduser(), f"weights={given}")
    if os.environ.get(variable(name)):
        path = os.environ[variable(name)]
        return _file(Path(path).expanduser(), f"{variable(name)}={path}")
    repository, files = hub
    for file in files:
        cached = from_hub_cache(repository, file)
        if cached is not None:
            return cached
    raise UserError(
        f"no weights of {name}: give their file or folder, set {variable(name)}, or have {repository} in the local "
        "hub cache; nothing is downloaded"
    )


def from_hub_cache(repository: str, file: str) -> Path | None:
    """A file of that repository in the local cache of Hugging Face's hub; asks no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


def _file(path: Path, said: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{said}: no such file or folder")
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{said}: the folder holds none of {', '.join(NAMES)}; name the file itself")


def fill(net: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Puts `tensors` into `net`, all of it; fp32, eval mode, frozen.

    Raises:
        UserError: a name is missing or left over, a shape differs, or a value is not finite; says which.
    """
    own = net.state_dict()
    missing, left = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or left:
        lacks = f"lacks {_some(missing)}" if missing else ""
        extra = f"has {_some(left)} too many" if left else ""
        raise UserError(
            f"{path} is not of this autoencoder: it {' and '.join(filter(None, (lacks, extra)))}"
        )
    for name, expected in own.items():
        if tensors[name].shape != expected.shape:
            raise UserError(
                f"{path}: {name} is {tuple(tensors[name].shape)}, and this autoencoder's is {tuple(expected.shape)}"
            )
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; get the file again")
    net.load_state_dict(tensors)
    net.float().eval().requires_grad_(False)


def _some(names: Sequence[str]) -> str:
    """The first three, and how many more."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
