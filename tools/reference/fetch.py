"""Downloads published weights, or a published reference, on a machine with a network. The only command that does.

The sha256 is checked before the file takes its name, so a download that was cut or changed is never there. Of a net of
timm none is known beforehand: what came is printed, and --sha256 checks it against what somebody else's download has.
"""

from __future__ import annotations

import argparse
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from selfguide.spec.suggest import nearest
from selfguide.spec.timm_nets import check_net, models
from selfguide.spec.weight_files import FOLDER, HUB_FILES, REFERENCES, WEIGHT_FILES, torch_cache
from shards import storage
from shards.errors import UserError
from tools import flags

HUB = "https://huggingface.co"
SAFE = ".safetensors"
OF_TIMM = "weights of timm, such as resnet50.a1_in1k"
KNOWN = (*(n for n, each in WEIGHT_FILES.items() if each.url), *REFERENCES)


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("name", str, None, f"one of {', '.join(KNOWN)}, or {OF_TIMM}"),
        (
            "--out DIR",
            flags.here,
            None,
            f"a folder (the one that {FOLDER} names, or torch's cache)",
        ),
        ("--url URL", str, None, "a mirror to read it from"),
        ("--sha256 HEX", str, None, "of a net of timm: what it must have"),
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    name, of_timm = options.name, options.name.partition(".")[0] in models()
    if options.sha256 and not of_timm:
        raise UserError(
            f"--sha256 {options.sha256} is of a net of timm, which {name} is not: leave it out"
        )
    url, file, sha256 = _of_timm(name, options.url, options.sha256) if of_timm else _known(name)
    folder = Path(options.out or os.environ.get(FOLDER) or torch_cache()).expanduser()
    target = folder / file
    if not target.is_file():
        _download(options.url or url, target, sha256)
    found = storage.sha256(str(target))
    if sha256 is not None and found != sha256:
        raise UserError(f"{target} is there with sha256 {found}, not {sha256}: remove it")
    text = f"{target}, sha256 {found}"
    if of_timm:
        pin = f"evaluation=fd_timm evaluation.net={name} evaluation.sha256={found}"
        text += f"\n{pin} measures in these weights and no others"
    return {"file": str(target), "sha256": found}, text


def _known(name: str) -> tuple[str, str, str | None]:
    """The address, the file's name, and its sha256 where that is known."""
    weights = WEIGHT_FILES.get(name)
    if weights is not None and weights.url:
        return weights.url, weights.files[0], weights.sha256
    if weights is not None:
        raise UserError(f"{name} is no download: `{weights.fetch}` installs it")
    if name not in REFERENCES:
        close = nearest(name, [*KNOWN, *models()])
        raise UserError(f"{name!r} is unknown{close}; known: {', '.join(KNOWN)}, and {OF_TIMM}")
    return REFERENCES[name], name, None


def _of_timm(name: str, url: str | None, sha256: str | None) -> tuple[str, str, str | None]:
    """The same of weights that timm publishes: on Hugging Face's hub, or where it alone says."""
    if "." not in name and models()[name]:
        raise UserError(
            f"{name} has weights of several trainings: {', '.join(models()[name])}; fetch one of them"
        )
    check_net(name, None, where="")
    # imports torch, which other downloads do without
    from timm.models import get_pretrained_cfg

    if url is None and (published := get_pretrained_cfg(name)) is not None:
        place = f"{HUB}/{published.hf_hub_id}/resolve/main/{HUB_FILES[0]}"
        url = place if published.hf_hub_id else str(published.url)
    if url is None:
        raise UserError(f"{name}: timm says of no place where its weights are; give --url")
    suffix = SAFE if urllib.parse.urlsplit(url).path.endswith(SAFE) else ".pth"
    return url, f"{name}{suffix}", sha256 and sha256.lower()


def _download(url: str, target: Path, sha256: str | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url) as answer, draft.open("wb") as out:
            shutil.copyfileobj(answer, out, 1 << 20)
        found = storage.sha256(str(draft))
        if sha256 is not None and found != sha256:
            raise UserError(
                f"{url} answered with a file of sha256 {found}, not {sha256}: it was cut or changed"
            )
        draft.replace(target)
    # a ValueError where it is no address
    except (urllib.error.URLError, ValueError) as error:
        raise UserError(
            f"{url} does not answer from here ({error}): call this on a machine with a network, or give --url"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
