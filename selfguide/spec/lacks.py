"""Which files an evaluation waits for: weights of the feature net, a reference, weights that decode samples. No torch.

Training does not need them, so a run is queued without them; its evaluations start once the files are there.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfguide.spec.config import Config, EvaluationConfig
from selfguide.spec.metrics import FEATURES
from selfguide.spec.timm_nets import pinned, weights_of
from selfguide.spec.weight_files import (
    AUTOENCODERS,
    REFERENCES,
    WeightFile,
    autoencoder_variable,
    from_hub_cache,
    lacking,
    locate,
    locate_reference,
    reference_places,
)
from shards.errors import UserError


@dataclass(frozen=True)
class Lack:
    """A file that evaluations wait for."""

    # in a few words, such as "inception weights"
    what: str
    # names the file, where it may lie, and the command that fetches it
    sentence: str
    # which waits for it; None stands for all of a run's
    evaluation: EvaluationConfig | None = None


def encoder_of(header: Mapping[str, Any]) -> str | None:
    """Returns the name of the autoencoder whose latents data with this header are; None of images."""
    return header.get("encoder") if header.get("kind") == "latent" else None


def lacks(config: Config, encoder: str | None) -> tuple[Lack, ...]:
    """Returns the files that the evaluations of a run need and that are not here.

    Args:
        encoder: of the run's data (`encoder_of`).
    """
    return tuple(
        replace(lack, evaluation=each.evaluation)
        for each in config.scored_by
        for lack in _lacks(each.evaluation, encoder)
    )


def lacks_of(found: tuple[Lack, ...], evaluation: EvaluationConfig) -> tuple[Lack, ...]:
    """Those that this evaluation waits for: only the protocol that needs a file waits for it."""
    return tuple(lack for lack in found if lack.evaluation in (None, evaluation))


def _lacks(evaluation: EvaluationConfig, encoder: str | None) -> list[Lack]:
    features = FEATURES.get(evaluation.protocol)
    if features is None or not features.of_images:
        return []
    found = []
    if (weights := weights_of(evaluation)) is not None:
        found += _lacks_weights(evaluation, weights)
    if evaluation.reference and locate_reference(evaluation.reference) is None:
        found.append(_lacks_reference(evaluation, evaluation.reference))
    if evaluation.unconditional and locate_reference(evaluation.unconditional) is None:
        found.append(_lacks_unconditional(evaluation, evaluation.unconditional))
    for protocol in evaluation.fdr_protocols:
        weights = FEATURES[protocol].weights
        if weights is not None and locate(weights) is None:
            found.append(Lack(f"{weights.name} weights", lacking(weights)))
    if encoder is not None and (lack := lacks_autoencoder(encoder, evaluation.decoder)):
        found.append(lack)
    return found


def _lacks_weights(evaluation: EvaluationConfig, weights: WeightFile) -> list[Lack]:
    what, given = f"{weights.name} weights", evaluation.weights
    if locate(weights, given) is None:
        if given and evaluation.protocol == "fd_timm":
            return [Lack(what, f"evaluation.weights={given}: no such file; put the weights there")]
        return [Lack(what, lacking(weights, given))]
    try:
        pinned(evaluation)
    except UserError as error:
        return [Lack(what, str(error))]
    return []


def _lacks_reference(evaluation: EvaluationConfig, given: str) -> Lack:
    name, where = Path(given).name, " or ".join(map(str, reference_places(given)))
    fetch = f"`python -m tools.reference fetch {name}` fetches it on a machine with a network"
    make = f"`{_makes('make SHARDS', evaluation, given)}` makes one of any shards"
    sentence = f"the reference is not here: {name} may lie at {where}; {fetch if name in REFERENCES else make}"
    return Lack(f"reference {name}", sentence)


def _lacks_unconditional(evaluation: EvaluationConfig, given: str) -> Lack:
    name, where = Path(given).name, " or ".join(map(str, reference_places(given)))
    sentence = (
        f"the unconditional samples' statistics are not here: {name} may lie at {where}; "
        f"`{_makes('samples RUN', evaluation, given)}` makes them of an unconditional run"
    )
    return Lack(f"unconditional {name}", sentence)


def _makes(what: str, evaluation: EvaluationConfig, given: str) -> str:
    """The command that writes such statistics, in this protocol's net, to where they are looked for."""
    words = ["python -m tools.reference", what, f"--protocol {evaluation.protocol}"]
    for name in ("net", "weights", "sha256"):
        if value := getattr(evaluation, name):
            words.append(f"--{name} {shlex.quote(value)}")
    return " ".join([*words, f"--out {shlex.quote(str(reference_places(given)[0]))}"])


def lacks_autoencoder(name: str, given: str | None) -> Lack | None:
    """What is missing to decode latents of the encoder `name`; `given` is `evaluation.decoder`."""
    variable = autoencoder_variable(name)
    named = given or os.environ.get(variable)
    if named:
        here = Path(named).expanduser().exists()
    else:
        published = AUTOENCODERS.get(name)
        here = from_hub_cache(*published) is not None if published else name == "tiny"
    if here:
        return None
    repository = AUTOENCODERS[name][0] if name in AUTOENCODERS else ""
    cure = f"give evaluation.decoder=FILE, set {variable}"
    if repository:
        cure += f", or fetch {repository} on a machine with a network by `hf download {repository}`"
    where = f"{named} is no file or folder" if named else "they are in no usual place"
    return Lack(
        f"{name} weights",
        f"the {name} weights that decode samples are not here: {where}; {cure}",
    )
