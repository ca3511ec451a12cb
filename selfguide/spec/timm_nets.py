"""The nets of timm that `evaluation.net` names: which there are, where their weights lie, and which file it is.

The names are read from timm's files as text, since importing it imports torch, and a submission answers in seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from selfguide.spec.checksums import remembered_sha256
from selfguide.spec.config.evaluation import EvaluationConfig
from selfguide.spec.metrics import FEATURES
from selfguide.spec.suggest import nearest
from selfguide.spec.weight_files import WeightFile, locate, timm_weights
from shards.errors import UserError

_MODEL = re.compile(r"^@register_model\s+def (\w+)\(", re.MULTILINE)
_WEIGHTS = re.compile(r"""(['"])(\w+\.\w+)\*?\1\s*:""")
# of a name that stands for no file
_UNTRAINED = ".untrained"
# the hub's cache calls a large file by its sha256
_BLOB = re.compile(r"[0-9a-f]{64}")


@functools.cache
def models() -> Mapping[str, tuple[str, ...]]:
    """Each model of timm, and the names of its published weights; of a few models none stand there.

    Empty where no timm is installed.
    """
    spec = importlib.util.find_spec("timm")
    roots = (spec.submodule_search_locations or ()) if spec else ()
    files = [file for root in roots for file in sorted(Path(root, "models").glob("*.py"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    found: dict[str, dict[str, None]] = {name: {} for name in _MODEL.findall(text)}
    for _, name in _WEIGHTS.findall(text):
        model = name.partition(".")[0]
        if model in found and not name.endswith(_UNTRAINED):
            found[model][name] = None
    return {model: tuple(names) for model, names in found.items()}


def check_net(net: str, weights: str | None, where: str = "evaluation.") -> None:
    """Returns when timm has this net, and, without a file of `weights`, publishes weights by this name.

    Args:
        where: what stands before the names of the settings, as they are typed.

    Raises:
        UserError: it does not; names the nearest.
    """
    model, _, tag = net.partition(".")
    there = models()
    if not there:
        return
    if model not in there:
        close = nearest(net, (n for names in there.values() for n in names)) if tag else ""
        raise UserError(f"{where}net={net} is no model of timm{close or nearest(model, there)}")
    names = there[model]
    if tag and names and net not in names:
        raise UserError(
            f"{where}net={net}: timm publishes no such weights of {model}{nearest(net, names)}; known: "
            f"{', '.join(names)}"
        )
    if tag or weights:
        return
    published = ", ".join(f"{where}net={name}" for name in names)
    raise UserError(
        f"{where}net={net} names a model alone, and none of its weights; give {where}weights=FILE"
        f"{f', or one of these: {published}' if names else ''}"
    )


def weights_of(evaluation: EvaluationConfig) -> WeightFile | None:
    """The weights that a protocol measures in; None where it needs none, or names none."""
    if evaluation.protocol == "fd_timm":
        return timm_weights(evaluation.net, evaluation.sha256) if evaluation.net else None
    features = FEATURES.get(evaluation.protocol)
    return features.weights if features else None


def pinned(evaluation: EvaluationConfig) -> EvaluationConfig:
    """`evaluation` with the sha256 of the net's weights that are here, where it names a net and no sha256.

    Raises:
        UserError: the file cannot be read, or is not what the hub's cache calls it.
    """
    if evaluation.protocol != "fd_timm" or evaluation.net is None or evaluation.sha256:
        return evaluation
    found = found_sha256(evaluation.net, evaluation.weights)
    return dataclasses.replace(evaluation, sha256=found) if found else evaluation


def found_sha256(net: str, weights: str | None) -> str | None:
    """The sha256 of the weights of a net that are here; None where there are none. Raises as `pinned`."""
    file = locate(timm_weights(net), weights)
    if file is None:
        return None
    try:
        found = remembered_sha256(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    called = file.resolve().name
    if file.is_symlink() and _BLOB.fullmatch(called) and called != found:
        raise UserError(
            f"{file} has sha256 {found}, and the hub's cache calls it {called}: it was cut or changed; remove it and "
            "fetch it again"
        )
    return found
